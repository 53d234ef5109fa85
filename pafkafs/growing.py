"""Files that grow in persistent memory: their slots, the pool of new ones, and recovery.

See native/pmem.h for what a growing file is, native/sizes.h for slots.  The pool has files without
a name (O_TMPFILE): whatever crashes, the filesystem frees them, and creating a segment is one
linkat.
"""

import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import trio

from pafkafs import _native
from pafkafs.device import Device
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.policy import HIGH_MARK

log = logging.getLogger(__name__)

_PAGE = 4096
NONCE_ATTRIBUTE = "user.pafkafs.nonce"

# 64 bytes each.  More files than this do not grow at once: later ones are written with pwrite.
SLOTS = 1 << 15

# What a file of the pool has allocated: enough until the first growth ahead of its writer.
FIRST_BYTES = 2 << 20
_POOL_FILES_MAX = 64
# With less room a file that is written to does not begin to grow ahead of its writer.
ROOM_TO_START = 128 << 20
_FILL_RETRY_S = 5.0
# After it was drained because a writer had no room.
_REST_S = 30.0


def open_sizes(device: Device) -> None:
    """Opens the slots of a fast device, made at its first mount."""
    device.native.open_sizes(device.fd, SLOTS, device.kind == "dax")


@cache
def persist_method() -> str:
    """What makes a store durable on this machine, as libpmem finds it."""
    if _native.caches_survive():
        return "eADR"
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((name for name in ("clwb", "clflushopt", "clflush") if name in flags), "unknown")


def was_used(device: Device) -> bool:
    """Whether files may have been growing there, with other options, when a mount ended."""
    try:
        os.stat("sizes", dir_fd=device.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def take_slot(device: Device, fd: int, size: int, mtime_ns: int) -> int:
    """Ties a file that is as long as it says to a slot, durably; the slot's number."""
    nonce = secrets.randbits(63) + 1
    ino = os.fstat(fd).st_ino
    number = device.native.take_slot(nonce, ino, size, mtime_ns)
    try:
        os.setxattr(fd, NONCE_ATTRIBUTE, nonce.to_bytes(8, "little"))
        os.fsync(fd)
    except OSError:
        device.native.give_slot_back(number)
        raise
    return number


# -- recovery -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A slot that was in use when the last mount ended; sizes in bytes."""

    number: int
    nonce: int
    ino: int
    size: int
    mtime_ns: int
    grown: int

    def is_ours(self, length: int) -> bool:
        """Whether a file of this length is one that was growing, and nobody has changed since: it
        grows by whole pages, and a growth may have been cut anywhere."""
        return length == self.size or (self.size < length <= self.grown and length % _PAGE == 0)


class Recovery:
    """Brings files that were growing to their logical size, before anything is served."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: dict[int, list[Slot]] = {}
        for raw in device.native.slots():
            slot = Slot(*raw)
            self._slots.setdefault(slot.ino, []).append(slot)
        self.recovered = 0
        self.refused: list[str] = []

    def file_found(self, dir_fd: int, path: bytes, ino: int) -> bool:
        """A regular file of the home tree; cuts it when it was growing, which it tells."""
        slots = self._slots.get(ino)
        if slots is None:
            return False
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        except OSError as error:
            self._slots.pop(ino)  # they stay, for a mount that may open it
            self._refuse(path, error.strerror or "cannot be opened")
            return True
        try:
            self._apply(fd, path, slots)
        except OSError as error:
            self._slots.pop(ino)
            self._refuse(path, error.strerror or "cannot be cut to its size")
        finally:
            os.close(fd)
        return True

    def _apply(self, fd: int, path: bytes, slots: list[Slot]) -> None:
        nonce, status = _nonce_of(fd), os.fstat(fd)
        slot = next((slot for slot in slots if slot.nonce == nonce), None)
        if slot is None:
            self._refuse(path, "its slot belongs to another file")
        elif not slot.is_ours(status.st_size):
            self._refuse(path, f"changed since it was written to: {status.st_size} bytes")
        else:
            os.ftruncate(fd, slot.size)
            os.utime(fd, ns=(status.st_atime_ns, slot.mtime_ns))
            os.fsync(fd)
            self.recovered += 1
        # Now, and not at the end: a file that is served must not be cut by the next mount.
        for done in self._slots.pop(status.st_ino):
            self._device.native.give_slot_back(done.number)

    def _refuse(self, path: bytes, why: str) -> None:
        self.refused.append(f"{os.fsdecode(path)}: {why}")
        log.error("a file that was growing is left as it is: %s", self.refused[-1])

    def finish(self) -> None:
        """After all files were found: slots of files that are gone are free again."""
        for slots in self._slots.values():
            for slot in slots:
                self._device.native.give_slot_back(slot.number)


def _nonce_of(fd: int) -> int | None:
    try:
        return int.from_bytes(os.getxattr(fd, NONCE_ATTRIBUTE), "little")
    except OSError:
        return None


# -- the pool -----------------------------------------------------------------------------------


class Pool:
    """New segment files, allocated, zeroed and mapped before they are needed."""

    def __init__(
        self,
        front: _native.Front,
        device: Device,
        tree_fd: int,
        ratio: float,
        new_ino: Callable[[], int],
    ) -> None:
        self._new_ino = new_ino
        self._front = front
        self.device = device
        self._tree_fd = tree_fd
        self._ratio = ratio
        self._ready: list[_native.File] = []
        self._wanted = trio.Event()
        self._rest_until = -math.inf

    @property
    def files(self) -> int:
        """Files that are ready."""
        return len(self._ready)

    @property
    def bytes(self) -> int:
        """What they have allocated."""
        return sum(file.counted_bytes for file in self._ready)

    def take(self) -> _native.File | None:
        """A new, empty file without a name; None when there is none."""
        self._wanted.set()
        return self._ready.pop() if self._ready else None

    def put_back(self, file: _native.File) -> None:
        """It got no name."""
        self._ready.append(file)

    def drain(self) -> None:
        """Gives all of its room back, and leaves it for a while."""
        self._rest_until = trio.current_time() + _REST_S
        while self._ready:
            self._drop(self._ready.pop())

    def _drop(self, file: _native.File) -> None:
        self.device.native.add_used(-file.counted_bytes)
        file.close()

    def _target(self) -> int:
        """How many files there should be: of the room that new segments may use, ratio at most."""
        room = self.device.room
        free = max(0, int(HIGH_MARK * room.limit_bytes) - room.used_bytes) + self.bytes
        return min(_POOL_FILES_MAX, math.floor(free * self._ratio / FIRST_BYTES))

    async def run(self) -> None:
        """Fills the pool, one file at a time; never returns."""
        while True:
            while len(self._ready) < self._target() and trio.current_time() >= self._rest_until:
                try:
                    file = await self.device.run(partial(self._make, self._new_ino()))
                except OSError as error:
                    log.warning("cannot fill the pool: %s", error.strerror)
                    break
                self._ready.append(file)
            while len(self._ready) > self._target():
                self._drop(self._ready.pop())
            self._wanted = trio.Event()
            with trio.move_on_after(_FILL_RETRY_S):
                await self._wanted.wait()

    def _make(self, ino: int) -> _native.File:
        """**Invariant:** its slot is durable before it is longer than its logical size."""
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        fd = os.open(".", flags, 0o600, dir_fd=self._tree_fd)
        try:
            slot = take_slot(self.device, fd, 0, time.time_ns())
        except OSError:
            os.close(fd)
            raise
        try:
            file = self._front.open_growing(ino, self.device.native, fd, slot)
        except OSError:
            self.device.native.give_slot_back(slot)
            os.close(fd)
            raise
        try:
            file.grow(FIRST_BYTES)
        except OSError:
            self._drop(file)
            raise
        return file


def link_into(file: _native.File, dir_fd: int, name: bytes) -> None:
    """Gives a file of the pool its name; FileExistsError when it is taken."""
    path = f"/proc/self/fd/{file.data_fd}".encode()
    os.link(path, name, dst_dir_fd=dir_fd, follow_symlinks=True)


async def start(files: OpenFiles, file: OpenFile) -> None:
    """Makes a plain file one that grows in persistent memory.  An error leaves it as it is."""

    def convert() -> None:
        if file.native.growing is not None or file.node.stub is not None:
            return  # while this waited at the gate
        status = os.fstat(file.native.data_fd)
        if os.lseek(file.native.data_fd, 0, os.SEEK_HOLE) < status.st_size:
            return  # preallocated, say: a store into a hole would need room
        slot = take_slot(file.device, file.native.data_fd, status.st_size, status.st_mtime_ns)
        try:
            file.native.start_growing(slot)
        except OSError:
            file.device.native.give_slot_back(slot)
            raise

    try:
        async with files.used(file):
            if file.native.growing is None and file.node.stub is None:
                async with file.closed_gate():
                    await file.replace_at_gate(convert)
                files.note_growing(file)
    except OSError as error:
        log.warning("%s does not grow in PMem: %s", os.fsdecode(file.node.path()), error.strerror)
