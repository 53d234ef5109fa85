"""Copies the data of a file to another device, piece by piece, and makes the copy durable.

Each piece runs in a thread of the device, and each has to be done within some patience: a device
that hangs is left alone, and the file stays where it is.
"""

import errno
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import trio

from pafkafs import _native, layout
from pafkafs.device import Device
from pafkafs.layout import Stub

T = TypeVar("T")

_PIECE_BYTES = 8 << 20
# For one piece, or the fsync at the end.  At 1 MB/s a disk is still good enough.
PATIENCE_S = 30.0
# The removal of the last object of a directory takes the directory, too.
_CREATE_TRIES = 8


class SourceError(OSError):
    """The data could not be read where it is."""


class Pace:
    """Bounds how many bytes per second all copies together read; 0 is no bound."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._changed = trio.Event()

    def change(self, bytes_per_s: int) -> None:
        """From now on.  A piece that waits goes on at once: at the old rate it may have hours to
        wait."""
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, count: int) -> None:
        """Until count more bytes may be read."""
        with trio.move_on_after(self.charge(count)):
            await self._changed.wait()

    def charge(self, count: int) -> float:
        """Counts bytes that are read without waiting; for how long others have to."""
        if self.bytes_per_s == 0:
            return 0.0
        now = trio.current_time()
        self._free_at = max(now, self._free_at) + count / self.bytes_per_s
        return self._free_at - now


class Copy:
    """A new file on a device that becomes the copy of another one.  fd is given away with
    take_fd, else closed with the copy."""

    def __init__(self, target: Device, fd: int, name: bytes, stub: Stub | None) -> None:
        self.target = target
        self.fd = fd
        self.name = name
        self.committed = False  # it is the file now
        self._stub = stub
        self._taken = False
        # **Invariant:** with these attributes, if any, the copy is durable.
        self._finished: tuple[int, ...] | None = None
        self._allocated = 0

    def take_fd(self) -> int:
        """The descriptor, which is the caller's from now on."""
        self._taken = True
        return self.fd

    def close(self) -> None:
        """Closes the descriptor unless it was taken."""
        if not self._taken:
            self.target.close_soon(self.fd)

    async def add(
        self,
        source: Device,
        data_fd: Callable[[], int],
        start: int,
        end: int,
        pace: Pace,
        *,
        again: bool,
        at_once: bool,
        on_copied: Callable[[int], None],
    ) -> None:
        """Copies a range; again, over what was copied before; at once, because others wait for it.
        on_copied is told of each piece, in bytes.  Raises SourceError, or the OSError of the
        target."""
        self._finished = None
        pieces = _pieces(start, end)
        failed: list[OSError] = []

        async def work() -> None:
            for at, upto in pieces:
                if failed:
                    return
                if at_once:
                    pace.charge(upto - at)
                else:
                    await pace.wait(upto - at)
                piece = _copier(at, upto, keep_holes=not again, urgent=at_once)
                act = _with_own(piece, data_fd(), self.fd)
                try:
                    # In a thread of the slower one: it may hang, and hold the thread.
                    if source.slow:
                        await from_source(source, act)
                    else:
                        await _run(self.target, act)
                except OSError as error:
                    failed.append(error)
                else:
                    on_copied(upto - at)

        # Two, so that one piece is read while another is written.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(work)
        if failed:
            raise failed[0]

    async def cut(self, size: int) -> None:
        """Forgets what was copied from size on."""
        self._finished = None
        act = _with_own(lambda fd: os.ftruncate(fd, min(size, os.fstat(fd).st_size)), self.fd)
        await _run(self.target, act)

    async def finish(self, status: os.stat_result) -> int:
        """Gives the copy its size and attributes and makes it durable, with its directory
        entries; the bytes that it has allocated.  The second time it asks the device nothing,
        unless something has changed: others wait for it at the gate."""
        attributes = _comparable(status)
        if self._finished != attributes:
            act = _with_own(lambda fd: self._finish(fd, status), self.fd)
            self._allocated = await _run(self.target, act)
            self._finished = attributes
        return self._allocated

    def _finish(self, fd: int, status: os.stat_result) -> int:
        os.ftruncate(fd, status.st_size)
        layout.copy_attributes(status, fd)
        os.fsync(fd)
        if self._stub is not None:
            layout.sync_object_directories(self.target.objects_fd, self._stub.object)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(fd).st_blocks * 512


def _comparable(status: os.stat_result) -> tuple[int, ...]:
    """What a copy has of its file; the time of the last access is no reason to write."""
    s = status
    return (s.st_size, s.st_mode, s.st_uid, s.st_gid, s.st_mtime_ns)


async def new_object(target: Device, stub: Stub) -> Copy:
    """An empty object."""
    fd = await _run(target, lambda: _create(target, stub))
    return Copy(target, fd, stub.object, stub)


def new_plain(target: Device, tmp_fd: int, name: bytes) -> Copy:
    """An empty file in tmp/, on its way into the home tree."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return Copy(target, os.open(name, flags, 0o600, dir_fd=tmp_fd), name, None)


async def _run(target: Device, act: Callable[[], T]) -> T:
    """In a thread of the device, for whose faults status is told."""
    try:
        return await target.run(act, PATIENCE_S)
    except SourceError:
        raise
    except OSError as error:
        target.failed(f"cannot take a file over: {error.strerror}")
        raise


async def from_source(source: Device, act: Callable[[], T]) -> T:
    """Runs what reads, or syncs, the source in one of its threads.  Raises SourceError when it does
    not answer."""
    try:
        return await source.run(act, PATIENCE_S)
    except OSError as error:
        if error.errno == errno.ETIMEDOUT:
            raise SourceError(errno.ETIMEDOUT, error.strerror or "") from error
        raise


class _Own:
    """A duplicate, closed with its last reference.  No io.FileIO: that would ask a device that
    may hang what kind of file it is."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __del__(self) -> None:
        self.close()


def _with_own(act: Callable[..., T], *fds: int) -> Callable[[], T]:
    """act on duplicates of the descriptors: a thread that was left behind in the device must not
    write to whatever gets their numbers next."""
    own = [_Own(fd) for fd in fds]

    def run() -> T:
        try:
            return act(*(duplicate.fd for duplicate in own))
        finally:
            for duplicate in own:  # here: a network filesystem may wait in close
                duplicate.close()

    return run


def _create(device: Device, stub: Stub) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for left in reversed(range(_CREATE_TRIES)):
        try:
            _native.make_dirs(device.objects_fd, stub.object)
            return _native.open_beneath(device.objects_fd, stub.object, flags, 0o600)
        except FileNotFoundError as error:
            if not left:  # not to be taken for the absence of the file
                raise OSError(errno.EIO, "objects/ is missing on the device") from error
    raise AssertionError


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The range in parts that end at whole pieces, so that no block is in two of them."""
    while start < end:
        upto = min((start // _PIECE_BYTES + 1) * _PIECE_BYTES, end)
        yield start, upto
        start = upto


def _copier(start: int, end: int, *, keep_holes: bool, urgent: bool) -> Callable[[int, int], None]:
    def copy(from_fd: int, to_fd: int) -> None:
        if error := _native.copy_data(from_fd, to_fd, start, end, keep_holes, urgent):
            raise SourceError(error, os.strerror(error))

    return copy
