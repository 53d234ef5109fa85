"""`pafkafs rescue`: a log directory from what is left of a set of devices."""

import json
import os
from collections.abc import Iterator
from typing import Any

import click

from pafkafs import rescuing
from pafkafs.commands import completing
from pafkafs.commands.bar import byte_bar
from pafkafs.errors import EXIT_UNHEALTHY, UsageError
from pafkafs.rescuing import Rescue
from pafkafs.salvage import Outcome
from pafkafs.units import format_size, printable

_JSON_VERSION = 1
# Beside the partitions: Kafka looks at directories only.
_REPORT, _REPORT_JSON = "pafkafs-rescue.txt", "pafkafs-rescue.json"


@click.command()
@click.option(
    "--fast",
    metavar="DEVICE[,DEVICE…]",
    help="The fast devices, if they are there; the first one has the names of all files.",
    shell_complete=completing.directories,
)
@click.option(
    "--slow",
    metavar="DEVICE[,DEVICE…]",
    help="All other devices that are there, of whatever tier.",
    shell_complete=completing.directories,
)
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
@click.argument("target", shell_complete=completing.directories)
def rescue(fast: str | None, slow: str | None, as_json: bool, target: str) -> int:
    """Make a Kafka log directory TARGET, new or empty, of the devices that are left of a set.

    Nothing on the devices is changed, and none may be mounted. With the fast ones, all that they
    have names for is copied; without, what lies on the slow ones, under the names that files had
    when they moved there. What is missing is told, and written to TARGET. Exit status: 0 all is
    there, 1 something is missing, 2 wrong usage.
    """
    fast_paths, slow_paths = _paths(fast), _paths(slow)
    if not fast_paths and not slow_paths:
        raise UsageError("no device was given; give --fast, --slow or both")
    paths = [*fast_paths, *slow_paths]
    fds = rescuing.open_sources(fast_paths, slow_paths)
    target_fd = rescuing.make_target(target, paths)
    devices = list(zip(paths, fds, strict=True))
    count = len(fast_paths)
    with byte_bar(None) as progress:
        outcome = Rescue(devices[:count], devices[count:], target_fd, progress).run()
    document = {"version": _JSON_VERSION, "target": os.path.abspath(target), **_document(outcome)}
    lines = list(_lines(outcome, target))
    _write(target_fd, _REPORT_JSON, json.dumps(document, indent=2))
    _write(target_fd, _REPORT, "\n".join(lines))
    os.fsync(target_fd)
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))
    return 0 if outcome.complete else EXIT_UNHEALTHY


def _paths(text: str | None) -> list[str]:
    return [] if text is None else [os.path.abspath(path) for path in text.split(",") if path]


def _document(outcome: Outcome) -> dict[str, Any]:
    partitions = {
        printable(path): {
            "segments": len(partition.segments),
            "missing": [
                {"from": gap.start, "to": gap.end, "why": gap.why}
                for gap in partition.gaps(names_known=outcome.names_known)
            ],
        }
        for path, partition in outcome.partitions.items()
    }
    return {
        "names_known": outcome.names_known,
        "complete": outcome.complete,
        "files": outcome.files,
        "bytes": outcome.bytes,
        "partitions": partitions,
        "lost": [printable(name) for name in outcome.lost],
        "damaged": _printable(outcome.damaged),
        "left_out": _printable(outcome.left_out),
        "notes": _printable(outcome.notes),
    }


def _printable(names: dict[str, str]) -> dict[str, str]:
    return {printable(name): printable(why) for name, why in sorted(names.items())}


def _lines(outcome: Outcome, target: str) -> Iterator[str]:
    for path, partition in outcome.partitions.items():
        for gap in partition.gaps(names_known=outcome.names_known):
            upto = "on" if gap.end is None else f"to {gap.end - 1}"
            yield printable(f"missing: {path}: offsets {gap.start} {upto} ({gap.why})")
    for name in outcome.lost:
        yield printable(f"lost: {name}")
    for title, names in (
        ("damaged", outcome.damaged),
        ("note", outcome.notes),
        ("left out", outcome.left_out),
    ):
        for name, why in sorted(names.items()):
            yield printable(f"{title}: {name}: {why}")
    segments = sum(len(partition.segments) for partition in outcome.partitions.values())
    yield (
        f"rescued {outcome.files} files, {segments} segments of {len(outcome.partitions)} "
        f"partitions, {format_size(outcome.bytes)}: "
        + ("all is there" if outcome.complete else "not all is there")
    )
    if not outcome.names_known:
        yield printable(
            f"{target} has segments only: docs/rescue.md says how a broker gets to read them"
        )


def _write(target_fd: int, name: str, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o644, dir_fd=target_fd), "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
