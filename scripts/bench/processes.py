"""Running commands and what processes cost: CPU seconds of a command, of a process by its id."""

import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from bench.errors import BenchError


@dataclass(frozen=True)
class Finished:
    """A command that ended with status 0."""

    stdout: str
    cpu_seconds: float


def run(command: Sequence[str], *, timeout_s: float) -> Finished:
    """Run a command to its end; raises with the last line it wrote if it fails."""
    before = _waited_children_cpu_seconds()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError as missing:
        raise BenchError(f"{command[0]} not found") from missing
    except subprocess.TimeoutExpired as late:
        raise BenchError(f"{command[0]} took more than {timeout_s:g} s") from late
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise BenchError(f"{command[0]} failed with status {done.returncode}: {said}")
    return Finished(done.stdout, _waited_children_cpu_seconds() - before)


def _waited_children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(pid: int | None) -> float:
    """What a process and its children have used so far; 0 for no process."""
    if pid is None:
        return 0.0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(times.user + times.system for times in (p.cpu_times() for p in family))
    except psutil.NoSuchProcess as gone:
        raise BenchError(f"process {pid} ended in the middle of a measurement") from gone
