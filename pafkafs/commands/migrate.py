"""`pafkafs migrate`, `pause` and `resume`: steering what moves between the tiers."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import click

from pafkafs import control, mountpoint
from pafkafs.errors import PafkafsError

_POLL_S = 0.1
_ENDED = ("done", "there", "failed")


@click.command()
@click.option("--to", "tier", type=click.Choice(["fast", "slow"]), required=True)
@click.option("--wait", is_flag=True, help="Return when the files have moved; 1 if one did not.")
@click.argument("paths", metavar="PATH…", nargs=-1, required=True, type=click.Path(exists=True))
def migrate(tier: str, wait: bool, paths: tuple[str, ...]) -> int:
    """Move the segments at PATH…, as seen in the mount, to a tier; of directories, all in them.

    Active segments stay where they are. What policy moves is not asked: it may move them again.
    """
    jobs = []
    for where, relative in _files(paths):
        jobs.append((where, control.ask(where, "migrate", path=relative, to=tier)))
    if not wait:
        click.echo(f"{len(jobs)} files are on their way; see pafkafs status")
        return 0
    return _wait(jobs)


def _files(paths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(mountpoint, path below it) of each segment that was meant."""
    for text in paths:
        path = Path(os.path.abspath(text))
        where = _mount_of(path)
        found = sorted(path.rglob("*.log")) if path.is_dir() else [path]
        for file in found:
            yield where, str(file.relative_to(where))


def _mount_of(path: Path) -> str:
    mounts = [m.mountpoint for m in mountpoint.all_mounted() if path.is_relative_to(m.mountpoint)]
    if not mounts:
        raise PafkafsError(f"{path} is not in a pafkafs mount; give it as seen in the mount")
    return max(mounts, key=len)


def _wait(jobs: list[tuple[str, int]]) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    failed = 0
    columns = SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for where, number in jobs:
            job = control.ask(where, "job", job=number)
            while job["state"] not in _ENDED:
                progress.update(task, description=job["path"])
                time.sleep(_POLL_S)
                job = control.ask(where, "job", job=number)
            if job["state"] == "failed":
                failed += 1
                click.echo(f"pafkafs: {job['path']} was not moved: {job['error']}", err=True)
            progress.advance(task)
    return 1 if failed else 0


@click.command()
@click.argument("where", metavar="MOUNTPOINT")
def pause(where: str) -> None:
    """Let nothing begin to move in the background at MOUNTPOINT; what is on its way arrives."""
    control.ask(os.path.realpath(where), "pause")


@click.command()
@click.argument("where", metavar="MOUNTPOINT")
def resume(where: str) -> None:
    """Let segments move in the background again."""
    control.ask(os.path.realpath(where), "resume")
