"""A hard disk for tests and measurements: ext4 on a loop device that the kernel throttles.

    scripts/hdd DIRECTORY [--rate 80MB] [--iops N] [--size 4GiB] [--image-in DIR] [--] CMD [ARG...]

What is written to the filesystem waits in the page cache for the disk, as on a real one.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_BLKIO = _CGROUPS / "blkio"
_SIZE = re.compile(r"(\d+)(|k|m|g|t)(|b|ib)", re.IGNORECASE)
# Nothing is left to the kernel to write later: it would take its share of the rate.
_MKFS = "mkfs.ext4 -q -F -m 0 -E nodiscard,lazy_itable_init=0,lazy_journal_init=0"


class HddError(Exception):
    """Why there is no disk, in a line that says what helps."""


def main() -> int:
    asked = parse()
    try:
        with hdd(asked.directory, asked.rate, asked.iops, asked.size, asked.image_in):
            return subprocess.run(asked.command, check=False).returncode
    except HddError as error:
        print(f"hdd: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"hdd: {error.filename or asked.command[0]}: {error.strerror}", file=sys.stderr)
        return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/hdd", description="Runs a command with an emulated hard disk at DIRECTORY."
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIRECTORY", help="an empty directory")
    add("--rate", type=size, default=80_000_000, help="bytes per second, each way (80MB)")
    add("--iops", type=int, default=0, help="requests per second, each way (default: no bound)")
    add("--size", type=size, default=4 << 30, help="of the disk (4GiB); takes what is written")
    add("--image-in", type=Path, default=Path("/var/tmp"), metavar="DIR",
        help="where its blocks lie (%(default)s)")  # fmt: skip
    add("command", nargs="+", metavar="CMD", help="with its arguments, after --")
    return parser.parse_args()


def size(text: str) -> int:
    """Bytes of a size such as 80MB or 4GiB."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 80MB or 4GiB")
    base = 1000 if match[3].lower() == "b" and match[2] else 1024
    return int(match[1]) * int(base ** " kmgt".index(match[2].lower() or " "))


@contextmanager
def hdd(
    directory: Path,
    rate_bytes_per_s: int = 80_000_000,
    iops: int = 0,
    size_bytes: int = 4 << 30,
    image_in: Path = Path("/var/tmp"),
) -> Iterator[Path]:
    """The disk, mounted at the directory."""
    _check(directory)
    with ExitStack() as stack:
        throttle = _throttle_v1 if _files("write_bps_device") else stack.enter_context(_group())
        image = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=image_in))) / "hdd"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        _run(*_MKFS.split(), str(image))
        loop = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        stack.callback(_run, "losetup", "--detach", loop)
        _run("mount", loop, str(directory))
        stack.callback(_unmount, directory)
        throttle(loop, rate_bytes_per_s, iops)
        stack.callback(throttle, loop, 0, 0)  # first of all: what is dirty goes fast
        yield directory


def _check(directory: Path) -> None:
    if os.geteuid() != 0:
        raise HddError("run as root: it mounts a filesystem and sets limits")
    if not directory.is_dir() or any(directory.iterdir()):
        raise HddError(f"{directory} is no empty directory; make one: mkdir {directory}")


# -- cgroup v1 ------------------------------------------------------------------------------------


def _files(limit: str) -> list[Path]:
    """Where a limit is set: for write-back, which belongs to the root group, and for processes
    of our own group, since groups do not inherit it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = [line.split(":", 2)[2] for line in lines if "blkio" in line.split(":", 2)[1].split(",")]
    names = {_BLKIO / group.lstrip("/") / f"blkio.throttle.{limit}" for group in ["/", *own]}
    return sorted(path for path in names if path.exists())


def _throttle_v1(loop: str, rate_bytes_per_s: int, iops: int) -> None:
    """0 is no bound."""
    for way in ("read", "write"):
        for limit, value in ((f"{way}_bps_device", rate_bytes_per_s), (f"{way}_iops_device", iops)):
            for path in _files(limit):
                path.write_text(f"{_number(loop)} {value}\n")


def _number(loop: str) -> str:
    number = os.stat(loop).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


# -- cgroup v2 ------------------------------------------------------------------------------------


@contextmanager
def _group() -> Iterator[Callable[[str, int, int], None]]:
    """A group of its own for this process, and what it starts: the root group has no limits.  Gives
    what sets the limits of a device there."""
    line = next((x for x in _lines("/proc/self/cgroup") if x.startswith("0::")), "")
    own = _CGROUPS / line.removeprefix("0::").lstrip("/")
    group = _CGROUPS / f"pafkafs-hdd-{os.getpid()}"
    try:
        # With memory, what is written back counts for the group that wrote it.
        (_CGROUPS / "cgroup.subtree_control").write_text("+io +memory")
        group.mkdir()
    except OSError as error:
        raise HddError(
            "no blkio controller of cgroup v1 and no io controller of v2, which throttle here; "
            f"where the kernel has one: mkdir -p {_BLKIO} && mount -t cgroup -o blkio cgroup "
            f"{_BLKIO}, or mount -t cgroup2 cgroup2 {_CGROUPS} ({error.strerror})"
        ) from error
    try:
        _move(os.getpid(), group)

        def throttle(loop: str, rate_bytes_per_s: int, iops: int) -> None:
            rate, requests = rate_bytes_per_s or "max", iops or "max"
            limits = f"rbps={rate} wbps={rate} riops={requests} wiops={requests}"
            (group / "io.max").write_text(f"{_number(loop)} {limits}")

        yield throttle
    finally:
        while pids := _lines(group / "cgroup.procs"):
            for pid in pids:
                _move(int(pid), own)
        group.rmdir()


def _move(pid: int, group: Path) -> None:
    with suppress(ProcessLookupError):  # it has ended
        (group / "cgroup.procs").write_text(str(pid))


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()


# -------------------------------------------------------------------------------------------------


def _unmount(directory: Path) -> None:
    """Also while something of a failed command is open there."""
    if subprocess.run(["umount", str(directory)], capture_output=True, check=False).returncode:
        _run("umount", "--lazy", str(directory))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HddError(f"{command[0]} not found: apt-get install e2fsprogs mount") from error
    if done.returncode != 0:
        raise HddError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
