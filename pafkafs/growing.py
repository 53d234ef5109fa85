"""Files that grow in persistent memory: their slots, the pool of new ones, and recovery.

See native/pmem.h for what a growing file is, native/sizes.h for slots.  The pool has files without
a name (O_TMPFILE): whatever crashes, the filesystem frees them, and creating a segment is one
linkat.
"""

import errno
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from functools import cache, partial

import trio

from pafkafs import _native, layout
from pafkafs.device import Device
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.placement import HIGH_MARK
from pafkafs.slots import Slot

log = logging.getLogger(__name__)

WINDOW_BYTES = 1 << 32  # what a growing file may have; see native/pmem.c
_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# 64 bytes each.  More files than this do not grow at once: later ones are written with pwrite.
# As many windows of 4 GiB (native/pmem.c) leave room in the address space.
SLOTS = 1 << 13

# What a file of the pool has allocated: enough until the first growth ahead of its writer.
FIRST_BYTES = 2 << 20
_POOL_FILES_MAX = 64
_POOL_NICE = 10
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
    return layout.exists("sizes", device.fd)


def take_slot(device: Device, fd: int, size: int, mtime_ns: int) -> int:
    """Ties a file that is as long as it says to a slot, durably; the slot's number."""
    nonce = secrets.randbits(63) + 1
    ino = os.fstat(fd).st_ino
    number = device.native.take_slot(nonce, ino, size, mtime_ns)
    try:
        os.setxattr(fd, _native.NONCE_ATTRIBUTE, nonce.to_bytes(8, "little"))
        os.fsync(fd)
    except OSError:
        device.native.give_slot_back(number)  # a nonce that no slot has ties to nothing
        raise
    return number


# -- recovery -----------------------------------------------------------------------------------


class Recovery:
    """Brings files that were growing to their logical size, each before it is served.

    Whoever meets a file first recovers it: the scan, in its thread, or a lookup.  Nothing is made
    durable there: native/sizes.h says why a power cut does no harm, as long as slots are given
    back only when all of it is durable, which is what finish does.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: dict[int, list[Slot]] = {}  # by inode number; stays as it is
        for raw in device.native.slots():
            slot = Slot(*raw)
            self._slots.setdefault(slot.ino, []).append(slot)
        # What was not looked at yet is in here; the lock is held while one is.
        self._unseen = set(self._slots)
        self._lock = threading.Lock()
        self._finished = False
        self._unrecovered: dict[int, list[Slot]] = {}
        self.recovered = 0
        self.refused: list[str] = []  # changed by others; served as they are
        self.unrecovered: list[str] = []  # longer than they should be; not to be opened

    def pending(self, ino: int) -> bool:
        """Whether file_found has to be asked about a file with this inode number.

        True also when another thread has recovered it: a status from before is stale then.
        """
        return ino in self._slots

    def file_found(self, dir_fd: int, path: bytes, ino: int) -> bool:
        """A regular file of the home tree; cuts it when it was growing.  True: it is as long now
        as it should be, or cannot be recovered, and what was known of it before is stale."""
        if ino not in self._slots:
            return False
        with self._lock:
            unseen = ino in self._unseen and not self._finished
            if unseen and self._recover(dir_fd, path, ino):
                self._unseen.remove(ino)
        return True

    def _recover(self, dir_fd: int, path: bytes, ino: int) -> bool:
        """False when there is no file of this name; by another one it may still be there."""
        where = os.fsdecode(path)
        try:
            where = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), where)
            fd = os.open(path, os.O_RDWR | _OPEN_FLAGS, dir_fd=dir_fd)
            try:
                self._apply(fd, where, self._slots[ino])
            finally:
                os.close(fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._unrecovered[ino] = self._slots[ino]
            self.unrecovered.append(f"{where}: {error.strerror}")
            log.error("a file that was growing cannot be recovered: %s", self.unrecovered[-1])
        return True

    def _apply(self, fd: int, where: str, slots: list[Slot]) -> None:
        """**Invariant:** a file that is served has no nonce, or one of a slot of this mount; so no
        later mount cuts what was written to it from now on."""
        nonce, status = _nonce_of(fd), os.fstat(fd)
        slot = next((slot for slot in slots if slot.nonce == nonce), None)
        if slot is None:
            return  # sealed, or another file with the number of one that is gone
        ours = slot.is_ours(status.st_size)
        if ours:
            os.ftruncate(fd, slot.size)
            os.utime(fd, ns=(status.st_atime_ns, slot.mtime_ns))
        os.removexattr(fd, _native.NONCE_ATTRIBUTE)
        if ours:
            self.recovered += 1
        else:
            self.refused.append(f"{where}: {status.st_size} bytes, {slot.size} of ours")
            log.error("a file that was growing was changed since: %s", self.refused[-1])

    def must_not_be_opened(self, fd: int) -> bool:
        """Whether this is a file that could not be recovered: its length would be a lie."""
        slots = self._unrecovered.get(os.fstat(fd).st_ino) if self._unrecovered else None
        if slots is None:
            return False
        nonce = _nonce_of(fd)
        return any(slot.nonce == nonce for slot in slots)  # else a new file has its number

    def finish(self) -> None:
        """After all files were found: makes what was done durable, and gives the slots back, those
        of files that are gone too.  May block.  An error leaves them all to the next mount."""
        with self._lock:
            self._finished = True
            done = [ino for ino in self._slots if ino not in self._unrecovered]
        if not self._slots:
            return
        _native.syncfs(self._device.fd)
        for ino in done:
            for slot in self._slots[ino]:
                self._device.native.give_slot_back(slot.number)


def _nonce_of(fd: int) -> int | None:
    try:
        return int.from_bytes(os.getxattr(fd, _native.NONCE_ATTRIBUTE), "little")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise  # it may have one
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

    def give_up(self, file: _native.File) -> None:
        """It cannot be used: its slot is bad, say."""
        self._drop(file)

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
                    make = partial(_at_low_priority, partial(self._make, self._new_ino()))
                    file = await self.device.run(make)
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
        file = self._front.open_growing(ino, self.device.native, fd, slot)
        try:
            file.grow(FIRST_BYTES)
        except OSError:
            self._drop(file)
            raise
        return file


def _at_low_priority(make: Callable[[], _native.File]) -> _native.File:
    """Writers go first.  Without privilege a thread could not be given its priority back."""
    if os.geteuid() != 0:
        return make()
    thread = threading.get_native_id()
    before = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, before + _POOL_NICE)
    try:
        return make()
    finally:
        os.setpriority(os.PRIO_PROCESS, thread, before)


async def start(files: OpenFiles, file: OpenFile) -> None:
    """Makes a plain file one that grows in persistent memory.  An error leaves it as it is."""

    def convert() -> None:
        if file.native.growing is not None or file.node.stub is not None:
            return  # while this waited at the gate
        status = os.fstat(file.native.data_fd)
        if status.st_size > WINDOW_BYTES:
            return
        if os.lseek(file.native.data_fd, 0, os.SEEK_HOLE) < status.st_size:
            return  # preallocated, say: a store into a hole would need room
        slot = take_slot(file.device, file.native.data_fd, status.st_size, status.st_mtime_ns)
        file.native.start_growing(slot)

    try:
        async with files.used(file):
            if file.native.growing is None and file.node.stub is None:
                async with file.closed_gate():
                    await file.replace_at_gate(convert)
                files.note_growing(file)
    except OSError as error:
        log.warning("%s does not grow in PMem: %s", os.fsdecode(file.node.path()), error.strerror)
