"""`pafkafs ls`: which segments are where, and why."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import click

from pafkafs import control, mountpoint
from pafkafs.commands.paths import below_mount
from pafkafs.status import JSON_VERSION
from pafkafs.units import format_duration, format_size, parse_duration, parse_size, printable

Segment = dict[str, Any]
_SORTS: dict[str, Callable[[Segment], Any]] = {
    "path": lambda s: (s["mountpoint"], s["path"]),
    "age": lambda s: s["age_s"],
    "size": lambda s: s["size_bytes"],
    "device": lambda s: (s["device"], s["path"]),
}
_STATES = ("active", "sealed", "moving", "waiting", "stays", "removed")


@click.command()
@click.argument("paths", metavar="[PATH…]", nargs=-1, type=click.Path())
@click.option("--tier", metavar="NAME", help="Only those on this tier: fast, slow.")
@click.option("--state", type=click.Choice(_STATES), help="Only those in this state.")
@click.option("--older", metavar="TIME", help="Only those not written to for so long: 12h, 7d.")
@click.option("--larger", metavar="SIZE", help="Only those that take at least so much.")
@click.option(
    "--sort",
    type=click.Choice(list(_SORTS)),
    default="path",
    help="By path (default), device, or the largest of age or size first.",
)
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
def ls(
    paths: tuple[str, ...],
    tier: str | None,
    state: str | None,
    older: str | None,
    larger: str | None,
    sort: str,
    reverse: bool,
    as_json: bool,
) -> None:
    """List the segments at PATH…, as seen in a mount, or of all mounts: tier, device, size, age.

    \b
    active    Kafka appends to it        waiting  a move of it failed, and is tried again
    sealed    may move                   stays    is not for the slow tier
    moving    on its way                 removed  its partition is being deleted
    """
    age_s = 0.0 if older is None else parse_duration(older)
    size = 0 if larger is None else parse_size(larger)
    found = [
        segment
        for segment in _segments(paths)
        if (tier is None or segment["tier"] == tier)
        and (state is None or segment["state"] == state)
        and segment["age_s"] >= age_s
        and segment["size_bytes"] >= size
    ]
    found.sort(key=_SORTS[sort], reverse=reverse != (sort in ("age", "size")))
    if as_json:
        click.echo(json.dumps({"version": JSON_VERSION, "segments": found}, indent=2))
    else:
        _show(found)


def _segments(paths: tuple[str, ...]) -> Iterator[Segment]:
    """Each once, whatever was given twice."""
    wanted = [below_mount(path) for path in paths]
    if not paths:
        wanted = [(mounted.mountpoint, "") for mounted in mountpoint.all_mounted()]
    seen: set[tuple[str, str]] = set()
    for where, path in wanted:
        for segment in _pages(where, path):
            if (where, segment["path"]) not in seen:
                seen.add((where, segment["path"]))
                yield {"mountpoint": where, **segment}


def _pages(where: str, path: str) -> Iterator[Segment]:
    after: str | None = ""
    while after is not None:
        page = control.ask(where, "ls", path=path, after=after)
        yield from page["segments"]
        after = page["next"]


def _show(found: list[Segment]) -> None:
    width = max((len(s["device"]) for s in found), default=0)
    for s in found:
        path = os.path.join(s["mountpoint"], s["path"])
        click.echo(
            f"{s['tier']:6} {s['device']:{width}} {format_size(s['size_bytes']):>9} "
            f"{format_duration(s['age_s']):>12}  {s['state']:8} {s['why']:14} " + printable(path)
        )
