"""The status of a mount for people."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pafkafs.units import format_duration, format_size, printable

# A pipe has no width: nothing is cut there.
_PIPE_WIDTH = 250


def console() -> Console:
    """Standard output, as wide as it is."""
    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal:
        found.width = _PIPE_WIDTH
    return found


def table(mount: dict[str, Any]) -> RenderableType:
    """A mount of the document of `pafkafs status --json`."""
    return Group(*_parts(mount))


def _parts(mount: dict[str, Any]) -> Iterator[RenderableType]:
    head = Text.assemble((printable(mount["mountpoint"]), "bold"), f"  {mount['state']}")
    if mount["pid"] is not None:
        head.append(
            f"  mode {mount['mode']}, durability {mount['durability']}, pid {mount['pid']}, "
            f"up {format_duration(mount['uptime_s'])}"
        )
    yield head
    if mount["tiers"]:
        yield _devices(mount["tiers"])
    if mount["pool"] is not None:
        yield _pool(mount["pool"])
    if mount["migration"] is not None:
        yield from _migration(mount["migration"])
    if mount.get("metrics") is not None:  # the daemon may be older than this command
        yield Text(f"  metrics at http://{mount['metrics']}/metrics")
    for problem in mount["problems"]:
        yield Text.assemble("  ", ("status:", "red"), f" {printable(problem['problem'])}")
        yield Text.assemble("  ", ("action:", "red"), f" {printable(problem['action'])}")
    for note in mount["notes"]:
        yield Text(f"  note: {note}")


def _devices(tiers: list[dict[str, Any]]) -> Table:
    found = Table(box=None, pad_edge=True, padding=(0, 2))
    for title in ("tier", "kind", "device"):
        found.add_column(title, overflow="fold")
    for title in ("used", "capacity", "full", "files"):
        found.add_column(title, justify="right")
    for tier in tiers:
        for device in tier["devices"]:
            found.add_row(
                tier["name"],
                tier["kind"],
                Text(printable(device["path"])),
                format_size(device["used_bytes"]),
                format_size(device["capacity_bytes"]),
                f"{100 * device['used_bytes'] / max(1, device['capacity_bytes']):.0f} %",
                str(device["files"]),
            )
    return found


def _pool(pool: dict[str, Any]) -> Text:
    return Text(
        f"  growing in persistent memory ({pool['persist']}): {pool['growing']} segments, "
        f"{format_size(pool['ahead_bytes'])} ahead of their writers; prepared for new ones: "
        f"{pool['files']} files, {format_size(pool['bytes'])}; "
        f"slots: {pool['slots_used']} of {pool['slots']}"
    )


def _migration(migration: dict[str, Any]) -> Iterator[Text]:
    paused = ", paused: pafkafs resume" if migration["paused"] else ""
    yield Text(
        f"  moved since the mount: {migration['files']} files, {format_size(migration['bytes'])}"
        f"{paused}"
    )
    for move in migration["running"]:
        speed = move["copied_bytes"] / max(0.1, move["seconds"])
        done = 100 * move["copied_bytes"] / max(1, move["size_bytes"])
        yield Text(
            printable(
                f"  moving {move['path']} to {move['target']}: {min(100, done):.0f} %, "
                f"{format_size(int(speed))}/s"
            )
        )
    if migration["planned"]:
        yield Text(
            printable(
                f"  next: {migration['planned']} files, {format_size(migration['planned_bytes'])}, "
                f"because of {migration['why']}, first {migration['next']}"
            )
        )
    for note in migration["notes"]:
        yield Text(printable(f"  note: {note}"))
    if migration["last_error"] is not None:
        yield Text(printable(f"  last error: {migration['last_error']}"))
