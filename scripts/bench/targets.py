"""The log directories that are compared, each as a context that mounts and unmounts it.

All of them lie on the same two devices: a directory of its own for each target on the fast and
on the slow one. The fast one is large enough that nothing leaves it, so what is measured is the
price of the layer and not the placement policy.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench import processes
from bench.errors import BenchError

TMPFS_BYTES = 6 << 30
_TMPFS_OPTIONS = f"size={TMPFS_BYTES},mode=0755"
_MOUNT_TIMEOUT_S = 30

# What mergerfs(1) names under PERFORMANCE as worth setting, as far as it kept or raised
# throughput here. cache.files has to be on for Kafka's shared mappings, and "full" may be because
# nobody else touches the branches; xattr=nosys saves a getxattr before each write. Left off:
# cache.writeback, which loses acked writes when the daemon dies; pafkafs does not use it either.
MERGERFS_OPTIONS = (
    "allow_other,use_ino,category.create=ff,minfreespace=64M,moveonenospc=ff,"
    "cache.files=full,xattr=nosys,cache.attr=3600,cache.entry=3600,cache.readdir=true,"
    "cache.statfs=10"
)


@dataclass(frozen=True)
class Devices:
    """Where the fast and the slow data of all targets go."""

    fast: Path
    slow: Path
    fast_kind: str


@dataclass(frozen=True)
class Target:
    """A directory to load, and the process that serves it if there is one."""

    name: str
    directory: Path
    server_pid: int | None
    options: str
    version: str

    def server_cpu_seconds(self) -> float:
        return processes.cpu_seconds(self.server_pid)


@contextmanager
def memory_fast_device(directory: Path) -> Iterator[str]:
    """Mount a tmpfs on the directory; yields its options."""
    if psutil.virtual_memory().available < 2 * TMPFS_BYTES:
        needed_gib = 2 * TMPFS_BYTES >> 30
        raise BenchError(f"less than {needed_gib} GiB of memory available: use --fast DIRECTORY")
    directory.mkdir()
    options = _mount_tmpfs(directory)
    try:
        yield options
    finally:
        processes.run(["umount", str(directory)], timeout_s=_MOUNT_TIMEOUT_S)


def _mount_tmpfs(directory: Path) -> str:
    command = ["mount", "-t", "tmpfs", "pafkafs-bench", str(directory), "-o"]
    large_pages = f"{_TMPFS_OPTIONS},huge=within_size"
    if subprocess.run([*command, large_pages], capture_output=True).returncode == 0:
        return large_pages
    processes.run([*command, _TMPFS_OPTIONS], timeout_s=_MOUNT_TIMEOUT_S)
    return _TMPFS_OPTIONS


def _branches(devices: Devices, name: str) -> tuple[Path, Path]:
    branches = devices.fast / name, devices.slow / name
    for branch in branches:
        branch.mkdir()
    return branches


@contextmanager
def raw(devices: Devices, work: Path) -> Iterator[Target]:
    """The fast device itself."""
    fast, _ = _branches(devices, "raw")
    yield Target("raw", fast, None, devices.fast_kind, os.uname().release)


@contextmanager
def mergerfs(devices: Devices, work: Path) -> Iterator[Target]:
    """mergerfs, first-found create policy: the fast branch while it has room."""
    fast, slow = _branches(devices, "mergerfs")
    mountpoint = work / "mergerfs"
    mountpoint.mkdir()
    version = processes.run(["mergerfs", "-V"], timeout_s=_MOUNT_TIMEOUT_S).stdout
    command = ["mergerfs", "-f", "-o", MERGERFS_OPTIONS, f"{fast}:{slow}", str(mountpoint)]
    # Its own session: a Ctrl-C in the terminal must not unmount it under the load.
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _await_mount(server, mountpoint)
        name = version.splitlines()[0].partition(": ")[2]
        yield Target("mergerfs", mountpoint, server.pid, MERGERFS_OPTIONS, name)
    finally:
        if mountpoint.is_mount():
            processes.run(["umount", str(mountpoint)], timeout_s=_MOUNT_TIMEOUT_S)
        server.wait(_MOUNT_TIMEOUT_S)


def _await_mount(server: subprocess.Popen[bytes], mountpoint: Path) -> None:
    deadline = time.monotonic() + _MOUNT_TIMEOUT_S
    while not mountpoint.is_mount():
        if server.poll() is not None:
            raise BenchError(f"mergerfs ended with status {server.returncode} instead of mounting")
        if time.monotonic() > deadline:
            server.kill()
            raise BenchError(f"mergerfs did not mount within {_MOUNT_TIMEOUT_S} s")
        time.sleep(0.02)


@contextmanager
def pafkafs(devices: Devices, work: Path) -> Iterator[Target]:
    """pafkafs with its defaults."""
    with mounted(devices, work, "pafkafs") as target:
        yield target


@contextmanager
def mounted(
    devices: Devices, work: Path, name: str, options: Sequence[str] = ()
) -> Iterator[Target]:
    """pafkafs as installed beside the running interpreter, with these options."""
    program = str(Path(sys.executable).with_name("pafkafs"))
    fast, slow = _branches(devices, name)
    mountpoint = work / name
    mountpoint.mkdir()
    version = processes.run([program, "--version"], timeout_s=_MOUNT_TIMEOUT_S).stdout.strip()
    mount = [program, "mount", *options, str(fast), str(slow), str(mountpoint)]
    processes.run(mount, timeout_s=_MOUNT_TIMEOUT_S)
    try:
        found = status(mountpoint)
        shown = f"durability={found['durability']},mode={found['mode']}"
        shown = " ".join([shown, *options])
        yield Target(name, mountpoint, int(found["pid"]), shown, version)
    finally:
        processes.run([program, "umount", str(mountpoint)], timeout_s=_MOUNT_TIMEOUT_S)


def status(mountpoint: Path) -> dict[str, Any]:
    """What pafkafs says of its mount there."""
    program = str(Path(sys.executable).with_name("pafkafs"))
    command = [program, "status", str(mountpoint), "--json"]
    report = json.loads(processes.run(command, timeout_s=_MOUNT_TIMEOUT_S).stdout)
    found: dict[str, Any] = report["mounts"][0]
    return found


TargetContext = Callable[[Devices, Path], AbstractContextManager[Target]]
TARGETS: dict[str, TargetContext] = {"raw": raw, "mergerfs": mergerfs, "pafkafs": pafkafs}
