"""How long a mount takes when segments were growing in persistent memory as the daemon died.

    scripts/bench/recovery [--fast DIR] [--segments N] [--files N] [--repeats N]

Each round writes to N new segments, each the active one of its partition, kills the daemon with
SIGKILL, and measures `pafkafs mount` until it returns: requests are served then.  The same again
after a clean unmount, with the same files.  The daemon's CPU time says what other loads on the
machine do not change.  --files: so many sealed segments, half of them demoted, are there besides.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.appends import tmpfs
from bench.files import device_of, populate
from bench.moves import pafkafs, status

BATCH = bytes(range(256)) * 40
_POLL_S = 0.01


@dataclass(frozen=True)
class Cost:
    """Of a mount, in seconds: until the command returned, and of the daemon's CPU time."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Mount:
    fast: Path
    slow: Path
    mountpoint: Path

    def start(self) -> Cost:
        """What it takes until it is served."""
        began = time.monotonic()
        pafkafs("mount", "--pmem", "on", str(self.fast), str(self.slow), str(self.mountpoint))
        wall_s = time.monotonic() - began
        cpu = psutil.Process(status(self.mountpoint)["pid"]).cpu_times()
        return Cost(wall_s, cpu.user + cpu.system)

    def stop(self) -> None:
        pafkafs("umount", str(self.mountpoint))

    def kill(self) -> None:
        os.kill(status(self.mountpoint)["pid"], signal.SIGKILL)
        while True:
            try:
                os.statvfs(self.mountpoint)
            except OSError:
                return  # it is dead
            time.sleep(_POLL_S)

    def is_longer(self, path: Path) -> bool:
        in_tree = self.fast / "tree" / path.relative_to(self.mountpoint)
        return in_tree.stat().st_size > len(BATCH)

    def create(self, path: Path) -> int:
        """The descriptor of a new segment that grows: another one is made until the pool gave
        one."""
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.write(fd, BATCH)
            if self.is_longer(path):
                return fd
            os.close(fd)
            path.unlink()
            time.sleep(_POLL_S)


def after_crash(mount: Mount, round_: int, segments: int) -> Cost:
    paths = [mount.mountpoint / f"bench{round_}-{n}" / f"{0:020}.log" for n in range(segments)]
    descriptors = []
    for path in paths:
        path.parent.mkdir()
        descriptors.append(mount.create(path))
    mount.kill()
    for fd in descriptors:
        os.close(fd)
    cost = mount.start()
    for path in paths:
        if path.stat().st_size != len(BATCH) or mount.is_longer(path):
            sys.exit(f"bench: {path} has {path.stat().st_size} bytes instead of {len(BATCH)}")
    return cost


def after_unmount(mount: Mount) -> Cost:
    mount.stop()
    return mount.start()


def remove(mount: Mount, round_: int) -> None:
    for directory in mount.mountpoint.glob(f"bench{round_}-*"):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/recovery", description=__doc__)
    parser.add_argument(
        "--fast", type=Path, help="a directory on the fast device (default: a tmpfs)"
    )
    parser.add_argument("--segments", type=int, default=1000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    crashed: list[Cost] = []
    clean: list[Cost] = []
    with ExitStack() as stack:
        fast = tempfile.TemporaryDirectory(dir=asked.fast) if asked.fast else None
        home = tmpfs(stack) if fast is None else Path(stack.enter_context(fast))
        slow = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        mountpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mount = Mount(home, slow, mountpoint)
        mount.start()
        mount.stop()
        populate(home, slow, device_of(slow), asked.files, share=0.5)
        mount.start()
        stack.callback(mount.stop)
        for round_ in range(asked.repeats):
            crashed.append(after_crash(mount, round_, asked.segments))
            clean.append(after_unmount(mount))
            remove(mount, round_)
    print(f"{asked.files} sealed segments besides")
    report(asked.segments, crashed, clean)


def report(segments: int, crashed: list[Cost], clean: list[Cost]) -> None:
    print(f"mount with {segments} segments: median (smallest..largest)")
    print(f"{'':28}{'seconds':>20}{'CPU seconds':>20}")
    for name, costs in (("after SIGKILL, all growing", crashed), ("after a clean unmount", clean)):
        wall, cpu = spread([c.wall_s for c in costs]), spread([c.cpu_s for c in costs])
        print(f"{name:28}{wall:>20}{cpu:>20}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


if __name__ == "__main__":
    main()
