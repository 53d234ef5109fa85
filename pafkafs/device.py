"""A device while it is mounted: its directories, its room, and what is wrong with it."""

import errno
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import trio

from pafkafs import _native, layout
from pafkafs.config import WHOLE_FILESYSTEM
from pafkafs.deviceset import SetDevice
from pafkafs.errors import PafkafsError
from pafkafs.placement import Room

# Stubs, shadows and directories must still fit when data fills the home device.
_RESERVE_SHARE = 0.02
_RESERVE_MIN_BYTES = 1 << 20
_RESERVE_MAX_BYTES = 1 << 30

# Threads that Python itself may have blocked in one slow device.
_SLOW_THREADS = 8

HUNG_AFTER_S = 5.0
_ERROR_IS_NEWS_S = 600.0

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Device:
    """Invariant: native.used_bytes is what is allocated plus what is reserved by requests."""

    id: str
    path: bytes
    tier: int
    kind: str
    capacity_option: int
    native: _native.Device
    fd: int
    objects_fd: int
    lost_fd: int
    capacity_bytes: int
    files: int = 0
    synced: bool = False  # nothing from before the mount waits for an fsync
    limiter: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(_SLOW_THREADS)
    )
    last_error: str | None = None
    last_error_at: float = 0.0
    errors: int = 0  # since the mount
    missing_objects: set[str] = field(default_factory=set)
    suspicious_objects: int = 0  # without a stub, and too many to be garbage
    lost: int = 0  # what had no name at the mount, and was put aside then or before
    _jobs: dict[int, float] = field(default_factory=dict)  # when each of our own threads began
    _job_numbers: Iterator[int] = field(default_factory=itertools.count)
    _job_ended: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether only workers may wait for it."""
        return self.tier > 0

    @property
    def hung_s(self) -> float:
        """For how many seconds it has been busy and completed nothing, when that is suspicious;
        else 0."""
        ages = [self.native.stuck_ns / 1e9]
        jobs = list(self._jobs.values())
        if jobs:
            ages.append(time.monotonic() - max(min(jobs), self._job_ended))
        age = max(ages)
        return age if age > HUNG_AFTER_S else 0.0

    async def run(self, act: Callable[[], T], patience_s: float = math.inf) -> T:
        """Runs what may block in the device in one of the threads that may.

        A cancelled caller does not wait for it, and neither does one whose patience is at its
        end: it gets ETIMEDOUT.
        """
        number = next(self._job_numbers)

        def run() -> T:
            self._jobs[number] = time.monotonic()
            try:
                return act()
            finally:
                self._job_ended = time.monotonic()
                del self._jobs[number]

        with trio.move_on_after(patience_s):
            return await trio.to_thread.run_sync(run, limiter=self.limiter, abandon_on_cancel=True)
        raise OSError(errno.ETIMEDOUT, "the device does not answer")

    def reserve(self, count: int) -> None:
        """Counts bytes as used before, or after, they are; where statvfs does not count them."""
        if self.capacity_option != WHOLE_FILESYSTEM:
            self.native.add_used(count)

    def close_soon(self, fd: int) -> None:
        """Closes a descriptor on the device, which may free blocks, in a thread of its own."""
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()

    def failed(self, what: str) -> None:
        """Remembers, for status, what went wrong on the device."""
        self.last_error = what
        self.last_error_at = time.monotonic()
        self.errors += 1
        log.error("%s: %s", os.fsdecode(self.path), what)

    @property
    def recent_error(self) -> str | None:
        """The last error, while it is news."""
        recent = time.monotonic() - self.last_error_at < _ERROR_IS_NEWS_S
        return self.last_error if recent else None

    @property
    def room(self) -> Room:
        """Its room, for policy."""
        return Room(
            self.tier, self.native.used_bytes, self.native.limit_bytes, in_service=not self.hung_s
        )

    def refresh_usage(self) -> None:
        """Counts what anything on the device takes.  A statvfs: may block on a slow device."""
        status = os.fstatvfs(self.fd)
        whole = status.f_blocks * status.f_frsize
        free = status.f_bavail * status.f_frsize
        if self.capacity_option == WHOLE_FILESYSTEM:
            # Blocks that only root may use are not ours: they are not capacity.
            self.capacity_bytes = whole - (status.f_bfree - status.f_bavail) * status.f_frsize
            self.native.used_bytes = self.capacity_bytes - free
        self.native.limit_bytes = self.capacity_bytes - self.reserve_bytes

    @property
    def reserve_bytes(self) -> int:
        """Room kept for metadata."""
        share = int(self.capacity_bytes * _RESERVE_SHARE)
        return min(max(share, _RESERVE_MIN_BYTES), _RESERVE_MAX_BYTES, self.capacity_bytes // 4)


@dataclass(frozen=True)
class Home:
    """The home tree's own directories, on the first fast device."""

    tree_fd: int
    shadows_fd: int
    tmp_fd: int
    device_number: int


def filesystem_type(path: str) -> str:
    """The type of the filesystem that path is on, as /proc/mounts names it."""
    real = Path(os.path.realpath(path))
    mounts = [p for p in psutil.disk_partitions(all=True) if real.is_relative_to(p.mountpoint)]
    # Of two mounts at one place the later one is seen.
    best = max(enumerate(mounts), key=lambda m: (len(m[1].mountpoint), m[0]), default=None)
    return "unknown" if best is None else best[1].fstype


def device_kind(fd: int, path: str) -> str:
    """`memory`, `dax` or `block`."""
    if filesystem_type(path) in ("tmpfs", "ramfs"):
        return "memory"
    try:
        return "dax" if _native.is_dax(fd) else "block"
    except OSError:
        return "block"  # no O_TMPFILE there: certainly not ext4 or xfs on DAX


def open_device(member: SetDevice, capacity: int, *, power: bool, kind: str) -> Device:
    """Opens a recognised device for serving; makes its directories."""
    path = member.member.path
    try:
        objects_fd = layout.open_state_directory(member.fd, layout.OBJECTS)
        lost_fd = layout.open_state_directory(member.fd, layout.LOST)
        native = _native.Device(
            os.dup(objects_fd), slow=member.member.tier > 0, memory=kind == "memory", power=power
        )
        device = Device(
            id=member.member.device,
            path=member.path,
            tier=member.member.tier,
            kind=kind,
            capacity_option=capacity,
            native=native,
            fd=member.fd,
            objects_fd=objects_fd,
            lost_fd=lost_fd,
            capacity_bytes=capacity,
        )
        device.refresh_usage()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PafkafsError(f"cannot use the device {path}: {reason}") from error
    return device


def open_home(device: Device) -> Home:
    """Opens the home tree of the first fast device; makes it if it is new."""
    try:
        _refuse_lost_tree(device)
        tree_fd = layout.open_state_directory(device.fd, layout.TREE)
        shadows_fd = layout.open_state_directory(device.fd, layout.SHADOWS)
        tmp_fd = layout.open_state_directory(device.fd, layout.TMP)
        for name in os.listdir(tmp_fd):  # what did not get its name before a crash
            layout.remove(os.fsencode(name), tmp_fd)
        return Home(tree_fd, shadows_fd, tmp_fd, os.fstat(tree_fd).st_dev)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PafkafsError(
            f"cannot use the home tree on {os.fsdecode(device.path)}: {reason}"
        ) from error


def _refuse_lost_tree(device: Device) -> None:
    """A new home tree in the place of one that is lost would make garbage of all that moved."""
    if layout.exists(layout.TREE, device.fd) or not layout.exists(layout.SHADOWS, device.fd):
        return
    shadows_fd = layout.open_state_directory(device.fd, layout.SHADOWS, create=False)
    try:
        count = len(os.listdir(shadows_fd))
    finally:
        os.close(shadows_fd)
    if count:
        raise PafkafsError(
            f"{os.fsdecode(device.path)} has lost its {layout.TREE}/, with the names of {count} "
            "files that moved: restore it, or see pafkafs rescue"
        )
