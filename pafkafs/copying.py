"""Copies the data of a file into a new object, piece by piece, and makes the copy durable.

Each piece runs in a thread of the device, and each has to be done within some patience: a device
that hangs is left alone, and the file stays where it is.
"""

import errno
import io
import os
from collections.abc import Callable
from typing import TypeVar

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


async def copy_to_object(data_fd: int, status: os.stat_result, target: Device, stub: Stub) -> int:
    """A durable copy, with the attributes of status, of a file that does not change meanwhile;
    its descriptor.  Raises SourceError, or the OSError of the target."""
    fd = await target.run(lambda: _create(target, stub), _PATIENCE_S)
    try:
        for start in range(0, status.st_size, _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, status.st_size)
            await target.run(_with_own(_copier(start, end), data_fd, fd), _PATIENCE_S)
        await target.run(_with_own(lambda fd: _finish(target, stub, fd, status), fd), _PATIENCE_S)
    except BaseException:
        target.close_soon(fd)
        raise
    return fd


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
        _native.make_dirs(device.objects_fd, stub.object)
        try:
            return _native.open_beneath(device.objects_fd, stub.object, flags, 0o600)
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError


def _copier(start: int, end: int) -> Callable[[int, int], None]:
    def copy(from_fd: int, to_fd: int) -> None:
        try:
            _native.copy_data(from_fd, to_fd, start, end)
        except OSError as error:
            if not _readable(from_fd, start, end):
                raise SourceError(error.errno or errno.EIO, error.strerror or "") from error
            raise

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


def _finish(device: Device, stub: Stub, fd: int, status: os.stat_result) -> None:
    os.ftruncate(fd, status.st_size)
    layout.copy_attributes(status, fd)
    os.fsync(fd)
    layout.sync_object_directories(device.objects_fd, stub.object)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
