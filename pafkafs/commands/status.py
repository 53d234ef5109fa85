"""`pafkafs status`: what is mounted, how full it is, and what is wrong."""

import json
import os
import re
import sys
import time
from typing import Any

import click

from pafkafs import control, mountpoint
from pafkafs.commands import completing
from pafkafs.errors import EXIT_UNHEALTHY, PafkafsError, UsageError
from pafkafs.status import DEAD, HEALTHY, UNKNOWN, MountStatus, Problem, as_dict, to_json

_WATCH_S = "2"
_NUMBER = re.compile(r"\d+(\.\d*)?")


class _WithWatch(click.Command):
    """--watch takes a number or nothing: what follows it may be the mountpoint."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--watch" in args:
            at = args.index("--watch")
            if not _NUMBER.fullmatch("".join(args[at + 1 : at + 2])):
                args = [*args[: at + 1], _WATCH_S, *args[at + 1 :]]
        return super().parse_args(ctx, args)


@click.command(cls=_WithWatch)
@click.argument(
    "where", metavar="[MOUNTPOINT]", required=False, shell_complete=completing.mountpoints
)
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
@click.option(
    "--watch",
    metavar="[SECONDS]",
    help=f"Show it again every SECONDS (default {_WATCH_S}), until Ctrl-C or the end of the mount.",
)
def status(where: str | None, as_json: bool, watch: str | None) -> int:
    """Show the state of the mount at MOUNTPOINT, or of all.

    Exit status: 0 all healthy, 1 not, 2 wrong usage. With --watch: 0 after Ctrl-C, 1 when nothing
    is mounted any more.
    """
    where = None if where is None else os.path.realpath(where)
    chosen = _chosen(where)
    if where is not None and not chosen:
        raise PafkafsError(f"no pafkafs is mounted at {where}")
    if watch is not None:
        return _watch(where, _seconds(watch, as_json))
    found = [ask(mounted) for mounted in chosen]
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    elif not found:
        click.echo("no pafkafs is mounted")
    else:
        _show(found)
    return 0 if all(mount["state"] == HEALTHY for mount in found) else EXIT_UNHEALTHY


def _chosen(where: str | None) -> list[mountpoint.Mounted]:
    if where is None:
        return mountpoint.all_mounted()
    mounted = mountpoint.find_mounted(where)
    return [] if mounted is None else [mounted]


def _show(found: list[dict[str, Any]]) -> None:
    from pafkafs.commands.status_table import console, table

    for mount in found:
        console().print(table(mount))


def _seconds(text: str, as_json: bool) -> float:
    if as_json:
        raise UsageError("--watch is for people, and --json for programs: give one of them")
    if not sys.stdout.isatty():
        raise UsageError("--watch needs a terminal")
    if not _NUMBER.fullmatch(text) or not 0.1 <= float(text) <= 3600:
        raise UsageError(f"'{text}' is no time for --watch; give 0.1 to 3600 seconds")
    return float(text)


def _watch(where: str | None, seconds: float) -> int:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from pafkafs.commands.status_table import console, table

    try:
        with Live(console=console(), auto_refresh=False) as live:
            while chosen := _chosen(where):
                tables = [table(ask(mounted)) for mounted in chosen]
                now = Text(time.strftime("%H:%M:%S, Ctrl-C ends"), style="dim")
                live.update(Group(*tables, now), refresh=True)
                time.sleep(seconds)
    except KeyboardInterrupt:
        return 0
    raise PafkafsError(f"no pafkafs is mounted {f'at {where} ' if where else ''}any more")


def ask(mounted: mountpoint.Mounted) -> dict[str, Any]:
    """The status of one mount, also of one whose daemon is gone."""
    try:
        answer: dict[str, Any] = control.ask(mounted.mountpoint, "status")
        return answer
    except control.NoDaemon:
        if not mountpoint.is_dead(mounted.mountpoint):
            problem = "its daemon is alive, and has no control socket for this user"
            return _without_daemon(mounted, UNKNOWN, problem, "run pafkafs status as its owner")
        fast, *middle, slow = mounted.source.split(":")
        between = "".join(f"--tier {tier} " for tier in middle)
        action = f"pafkafs mount {between}{fast} {slow} {mounted.mountpoint}"
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
