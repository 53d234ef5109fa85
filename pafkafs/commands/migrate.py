"""`pafkafs migrate`, `pause` and `resume`: steering what moves between the tiers."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click

from pafkafs import control, kafka
from pafkafs.commands import completing
from pafkafs.commands.paths import below_mount
from pafkafs.errors import EXIT_UNHEALTHY
from pafkafs.units import printable

_POLL_S = 0.1
_ENDED = ("done", "there", "failed")
# The daemon runs fewer at once, in the order in which they were asked for.
_WINDOW = 8
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class _File:
    """A file that was meant: the mount, the path below it, its size."""

    where: str
    path: str
    bytes: int


@click.command()
@click.option(
    "--to", "tier", metavar="fast|middle|slow", required=True, help="A tier of the mount."
)
@click.option(
    "--wait",
    is_flag=True,
    help="Return when the files have moved; 1 if one did not. Ctrl-C ends the waiting alone.",
)
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path())
def migrate(tier: str, wait: bool, paths: tuple[str, ...]) -> int:
    """Move the segments at PATH…, as seen in the mount, to a tier; of directories, all in them.

    Active segments stay where they are. What policy moves is not asked: it may move them again.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    try:
        jobs = [(f, control.ask(f.where, "migrate", path=f.path, to=tier)) for f in files]
        if wait:
            return _wait(jobs)
    except KeyboardInterrupt:
        click.echo("the moves go on; see pafkafs status", err=True)
        return _EXIT_INTERRUPTED
    click.echo(f"{len(jobs)} files are on their way; see pafkafs status")
    return 0


def _files(text: str) -> Iterator[_File]:
    """The segments that a path means.  Raises OSError when there is no such path."""
    os.stat(text)
    path = os.path.realpath(text)
    where, _ = below_mount(path)
    for file in _segments_below(path) if os.path.isdir(path) else [path]:
        yield _File(where, os.path.relpath(file, where), os.stat(file).st_size)


def _segments_below(top: str) -> Iterator[str]:
    """All that may move; who means an active segment has to name it, to be told that it stays."""
    for directory, _, names in os.walk(top, onerror=_fail):
        active = kafka.active_base_offset(names)
        for name in sorted(names):
            sealed = kafka.parse_file(name).base_offset != active
            if sealed and kafka.may_migrate(os.path.basename(directory), name):
                yield os.path.join(directory, name)


def _fail(error: OSError) -> None:
    raise error


def _wait(jobs: list[tuple[_File, int]]) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.fields[files]} of {task.fields[all_files]} files"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    console = Console(stderr=True)
    pending, done_bytes, failed = list(jobs), 0, 0
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        total = sum(file.bytes for file, _ in jobs)
        task = bar.add_task("", total=total, files=0, all_files=len(jobs))
        while pending:
            for file, number in pending[:_WINDOW]:
                job = control.ask(file.where, "job", job=number)
                if job["state"] in _ENDED:
                    pending.remove((file, number))
                    done_bytes += file.bytes
                if job["state"] == "failed":
                    failed += 1
                    what = printable(f"{job['path']} was not moved: {job['error']}")
                    click.echo(f"pafkafs: {what}", err=True)
            copied = done_bytes + _copied_bytes([file for file, _ in pending[:_WINDOW]])
            bar.update(task, completed=copied, files=len(jobs) - len(pending))
            if pending:
                time.sleep(_POLL_S)
    return EXIT_UNHEALTHY if failed else 0


def _copied_bytes(files: list[_File]) -> int:
    """Of those that are on their way."""
    copied = 0
    for where in {file.where for file in files}:
        sizes = {file.path: file.bytes for file in files if file.where == where}
        for move in control.ask(where, "status")["migration"]["running"]:
            copied += min(move["copied_bytes"], sizes.get(move["path"], 0))
    return copied


@click.command()
@click.argument("where", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
def pause(where: str) -> None:
    """Let nothing begin to move in the background at MOUNTPOINT; what is on its way arrives."""
    control.ask(os.path.realpath(where), "pause")


@click.command()
@click.argument("where", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
def resume(where: str) -> None:
    """Let segments move in the background again."""
    control.ask(os.path.realpath(where), "resume")
