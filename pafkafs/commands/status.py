"""`pafkafs status`: what is mounted, how full it is, and what is wrong."""

import json
import os
import sys
from typing import Any

import click

from pafkafs import control, mountpoint
from pafkafs.errors import EXIT_UNHEALTHY, PafkafsError
from pafkafs.status import DEAD, HEALTHY, UNKNOWN, MountStatus, Problem, as_dict, to_json
from pafkafs.units import format_duration, format_size


@click.command()
@click.argument("where", metavar="[MOUNTPOINT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
def status(where: str | None, as_json: bool) -> int:
    """Show the state of the mount at MOUNTPOINT, or of all.

    Exit status: 0 all healthy, 1 not, 2 wrong usage.
    """
    found = [ask(mounted) for mounted in _chosen(where)]
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    elif not found:
        click.echo("no pafkafs is mounted")
    else:
        for mount in found:
            _show(mount)
    return 0 if all(mount["state"] == HEALTHY for mount in found) else EXIT_UNHEALTHY


def _chosen(where: str | None) -> list[mountpoint.Mounted]:
    if where is None:
        return mountpoint.all_mounted()
    mounted = mountpoint.find_mounted(os.path.realpath(where))
    if mounted is None:
        raise PafkafsError(f"no pafkafs is mounted at {where}")
    return [mounted]


def ask(mounted: mountpoint.Mounted) -> dict[str, Any]:
    """The status of one mount, also of one whose daemon is gone."""
    try:
        answer: dict[str, Any] = control.ask(mounted.mountpoint, "status")
        return answer
    except control.NoDaemon:
        if not mountpoint.is_dead(mounted.mountpoint):
            problem = "its daemon is alive, and has no control socket for this user"
            return _without_daemon(mounted, UNKNOWN, problem, "run pafkafs status as its owner")
        fast, _, slow = mounted.source.partition(":")
        action = f"pafkafs mount {fast} {slow} {mounted.mountpoint}"
        return _without_daemon(mounted, DEAD, "the daemon has died", action)
    except PafkafsError as error:
        return _without_daemon(mounted, UNKNOWN, str(error), "run pafkafs status as its owner")


def _without_daemon(
    mounted: mountpoint.Mounted, state: str, problem: str, action: str
) -> dict[str, Any]:
    return as_dict(
        MountStatus(
            mountpoint=mounted.mountpoint,
            state=state,
            durability=None,
            mode=None,
            pid=None,
            uptime_s=None,
            problems=(Problem(problem, action),),
        )
    )


def _show(mount: dict[str, Any]) -> None:
    from rich.console import Console

    # A pipe has no width: nothing is cut there.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 250)
    console.print(f"[bold]{mount['mountpoint']}[/bold]  {mount['state']}", end="")
    if mount["pid"] is None:
        console.print()
    else:
        console.print(
            f"  mode {mount['mode']}, durability {mount['durability']}, pid {mount['pid']}, "
            f"up {format_duration(mount['uptime_s'])}"
        )
        _show_devices(console, mount)
    for problem in mount["problems"]:
        console.print(f"  [red]status:[/red] {problem['problem']}", markup=True)
        console.print(f"  [red]action:[/red] {problem['action']}", markup=True)
    for note in mount["notes"]:
        console.print(f"  note: {note}")


def _show_devices(console: Any, mount: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=True, padding=(0, 2))
    for title in ("tier", "kind", "device"):
        table.add_column(title, overflow="fold")
    for title in ("used", "capacity", "full", "files"):
        table.add_column(title, justify="right")
    for tier in mount["tiers"]:
        for device in tier["devices"]:
            table.add_row(
                tier["name"],
                tier["kind"],
                device["path"],
                format_size(device["used_bytes"]),
                format_size(device["capacity_bytes"]),
                f"{100 * device['used_bytes'] / max(1, device['capacity_bytes']):.0f} %",
                str(device["files"]),
            )
    console.print(table)
    if mount["pool"] is not None:
        pool = mount["pool"]
        console.print(
            f"  prepared for new segments in persistent memory ({pool['persist']}): "
            f"{pool['files']} files, {format_size(pool['bytes'])}"
        )
    if mount["migration"] is not None:
        _show_migration(console, mount["migration"])


def _show_migration(console: Any, migration: dict[str, Any]) -> None:
    paused = ", paused: pafkafs resume" if migration["paused"] else ""
    console.print(
        f"  moved since the mount: {migration['files']} files, {format_size(migration['bytes'])}"
        f"{paused}"
    )
    for move in migration["running"]:
        speed = move["copied_bytes"] / max(0.1, move["seconds"])
        done = 100 * move["copied_bytes"] / max(1, move["size_bytes"])
        console.print(
            f"  moving {move['path']} to {move['target']}: {min(100, done):.0f} %, "
            f"{format_size(int(speed))}/s",
            markup=False,
        )
    if migration["planned"]:
        console.print(f"  next: {migration['planned']} files, because of {migration['why']}")
    if migration["last_error"] is not None:
        console.print(f"  last error: {migration['last_error']}", markup=False)
