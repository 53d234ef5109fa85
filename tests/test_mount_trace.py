"""The order of system calls that a power cut would tell: seen by strace, with slow fsyncs."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conftest import MakeMount
from filetools import MIB
from harness import wait_until

FSYNC_S = 0.15


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
def traced(pid: int, path: Path) -> Iterator[Trace]:
    """The calls of a daemon that concern durability, each fsync taking its time."""
    names = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    delay = f"inject=fsync,fdatasync:delay_enter={FSYNC_S * 1e6:.0f}"
    command = [
        "strace",
        "-f",
        "-yy",
        "-o",
        path,
        "-p",
        str(pid),
        "-e",
        f"trace={names}",
        "-e",
        delay,
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            wait_until(lambda: is_traced(pid), "strace to be attached")
            trace = Trace(path)
            yield trace
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(20)
    trace.read()


def is_traced(pid: int) -> bool:
    """Whether all threads are."""
    tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
    return all("TracerPid:\t0\n" not in task for task in tasks)


def test_old_object_is_removed_after_the_fsync_of_the_name_that_leads_to_the_new_one(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, other = make_mount("--mode", "slow"), make_mount(name="other")
    mount.slow_list = f"{mount.slow},{other.slow}"
    mount.start("--slow-capacity", "8MiB,16MiB")
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    filler = directory / "filler"
    filler.write_bytes(bytes(12 * MIB))  # on the larger device: the next one goes to the other
    with open(directory / "file", "xb", buffering=0) as stream:
        stream.write(bytes(MIB))
        (old,) = [path for path in mount.objects if path.name.startswith("file~")]
        filler.unlink()
        wait_until(lambda: not list((other.slow / "objects").rglob("filler*")), "room there")
        with traced(mount.pid, tmp_path / "trace") as trace:
            for _ in range(9):
                stream.write(bytes(MIB))
            wait_until(lambda: not old.exists(), "the removal of the old object")
    assert list((other.slow / "objects").rglob("file~*"))
    (renamed,) = trace.find("rename", f"{mount.tree}/orders-0>", '"file"')
    (removed,) = trace.find("unlink", old.name)
    (synced,) = [
        call
        for call in trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")
        if call.began > renamed.returned
    ]
    assert synced.returned < removed.began


def test_power_mode_fsyncs_the_directory_of_a_new_name_before_it_returns(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--durability", "power").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    pid = mount.pid
    with traced(pid, tmp_path / "trace") as trace, open(directory / "file", "xb"):
        pass
    assert trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")
    with traced(pid, tmp_path / "trace") as trace:
        os.rename(directory / "file", directory / "renamed")
    assert trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")
