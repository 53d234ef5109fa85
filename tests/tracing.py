"""The system calls of a process, in their order, seen by strace."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness import wait_until

FSYNC_S = 0.15
CALLS = "trace=fsync,fdatasync,syncfs,ftruncate,rename,renameat,renameat2,unlink,unlinkat"


@dataclass
class Call:
    """A system call: its arguments, and where in the trace it began and returned."""

    text: str
    began: int
    returned: int = -1


@dataclass
class Trace:
    path: Path
    calls: list[Call] = field(default_factory=list)

    def read(self) -> None:
        """Each line is a call, the beginning of one, or its end."""
        begun: dict[str, Call] = {}
        for number, line in enumerate(self.path.read_text().splitlines()):
            thread, _, text = line.partition(" ")
            if resumed := re.match(r" *<\.\.\. \w+ resumed>(.*)", text):
                if thread in begun:
                    call = begun.pop(thread)
                    call.text += resumed[1]
                    call.returned = number
                continue
            call = Call(text.strip(), number, number)
            self.calls.append(call)
            if text.endswith("<unfinished ...>"):
                call.returned = -1
                begun[thread] = call

    def find(self, kind: str, *words: str) -> list[Call]:
        """The calls of this kind that have returned and have all these words."""
        found = [c for c in self.calls if c.returned >= 0 and c.text.startswith(kind)]
        return [call for call in found if all(word in call.text for word in words)]


@contextmanager
def attached(pid: int, path: Path, *options: str) -> Iterator[None]:
    """strace of all threads of a daemon."""
    command = ["strace", "-f", "-yy", "-o", str(path), "-p", str(pid), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            wait_until(lambda: is_traced(pid), "strace to be attached")
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(20)


@contextmanager
def traced(pid: int, path: Path) -> Iterator[Trace]:
    """The calls of a daemon that concern durability, each fsync taking its time."""
    delay = f"inject=fsync,fdatasync:delay_enter={FSYNC_S * 1e6:.0f}"
    trace = Trace(path)
    with attached(pid, path, "-e", CALLS, "-e", delay):
        yield trace
    trace.read()


def is_traced(pid: int) -> bool:
    """Whether all threads are."""
    tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
    return all("TracerPid:\t0\n" not in task for task in tasks)


def traced_command(path: Path, *command: str) -> Trace:
    """The same of a command, which succeeds, without delay."""
    strace = ["strace", "-f", "-yy", "-o", str(path), "-e", CALLS]
    subprocess.run([*strace, *command], check=True, capture_output=True, timeout=120)
    trace = Trace(path)
    trace.read()
    return trace


def syncs(trace: Trace, *words: str) -> list[Call]:
    return trace.find("fsync", *words) + trace.find("fdatasync", *words)
