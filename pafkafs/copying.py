"""Copies the data of a file to another device, piece by piece, and makes the copy durable.

Each piece runs in a thread of the device, and each has to be done within some patience: a device
that hangs is left alone, and the file stays where it is.  What a copy has read and written does not
stay in the page cache.
"""

import errno
import io
import os
from collections.abc import Callable
from typing import TypeVar

import trio

from pafkafs import _native, layout
from pafkafs.device import Device
from pafkafs.layout import Stub

T = TypeVar("T")

_PIECE_BYTES = 16 << 20
# For one piece, or the fsync at the end.  At 1 MB/s a disk is still good enough.
_PATIENCE_S = 30.0
# The removal of the last object of a directory takes the directory, too.
_CREATE_TRIES = 8


class SourceError(OSError):
    """The data could not be read where it is."""


class Pace:
    """Bounds how many bytes per second all copies together read; 0 is no bound."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def wait(self, count: int) -> None:
        """Until count more bytes may be read."""
        await trio.sleep(self.charge(count))

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
        data_fd: Callable[[], int],
        start: int,
        end: int,
        pace: Pace,
        *,
        again: bool,
        at_once: bool,
    ) -> None:
        """Copies a range; again, over what was copied before; at once, because others wait for it.
        Raises SourceError, or the OSError of the target."""
        for at in range(start, end, _PIECE_BYTES):
            upto = min(at + _PIECE_BYTES, end)
            if at_once:
                pace.charge(upto - at)
            else:
                await pace.wait(upto - at)
            piece = _copier(at, upto, keep_holes=not again)
            await self.target.run(_with_own(piece, data_fd(), self.fd), _PATIENCE_S)

    async def cut(self, size: int) -> None:
        """Forgets what was copied from size on."""
        act = _with_own(lambda fd: os.ftruncate(fd, min(size, os.fstat(fd).st_size)), self.fd)
        await self.target.run(act, _PATIENCE_S)

    async def sync(self) -> None:
        """Makes what was copied so far durable."""
        await self.target.run(_with_own(os.fsync, self.fd), _PATIENCE_S)

    async def finish(self, status: os.stat_result) -> int:
        """Gives the copy its size and attributes and makes it durable, with its directory
        entries; the bytes that it has allocated."""
        return await self.target.run(
            _with_own(lambda fd: self._finish(fd, status), self.fd), _PATIENCE_S
        )

    def _finish(self, fd: int, status: os.stat_result) -> int:
        os.ftruncate(fd, status.st_size)
        layout.copy_attributes(status, fd)
        os.fsync(fd)
        if self._stub is not None:
            layout.sync_object_directories(self.target.objects_fd, self._stub.object)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(fd).st_blocks * 512


async def new_object(target: Device, stub: Stub) -> Copy:
    """An empty object."""
    fd = await target.run(lambda: _create(target, stub), _PATIENCE_S)
    return Copy(target, fd, stub.object, stub)


def new_plain(target: Device, tmp_fd: int, name: bytes) -> Copy:
    """An empty file in tmp/, on its way into the home tree."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return Copy(target, os.open(name, flags, 0o600, dir_fd=tmp_fd), name, None)


def _with_own(act: Callable[..., T], *fds: int) -> Callable[[], T]:
    """act on duplicates of the descriptors: a thread that was left behind in the device must not
    write to whatever gets their numbers next."""
    own = [io.FileIO(os.dup(fd)) for fd in fds]  # closed with their last reference

    def run() -> T:
        return act(*(file.fileno() for file in own))

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


def _copier(start: int, end: int, *, keep_holes: bool) -> Callable[[int, int], None]:
    def copy(from_fd: int, to_fd: int) -> None:
        try:
            _native.copy_data(from_fd, to_fd, start, end, keep_holes)
        except OSError as error:
            if not _readable(from_fd, start, end):
                raise SourceError(error.errno or errno.EIO, error.strerror or "") from error
            raise
        for fd in (from_fd, to_fd):
            os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)

    return copy


def _readable(fd: int, start: int, end: int) -> bool:
    """Whose fault an error was: that of the source, if it cannot be read again either."""
    try:
        while start < end:
            data = os.pread(fd, 1 << 20, start)
            if not data:
                break
            start += len(data)
    except OSError:
        return False
    return True
