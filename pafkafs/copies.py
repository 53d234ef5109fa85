"""Copies the contents of a file into a new, empty one: shared blocks where the filesystem can,
else past the page cache.  Holes stay holes.  No device here, and nobody who waits: the moves of a
mount are `copying`."""

import errno
import fcntl
import os

from pafkafs import _native

_FICLONE = 0x40049409
_CANNOT_SHARE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.EPERM)
_STEP_BYTES = 8 << 20


def copy_into(source_fd: int, target_fd: int, size: int) -> int:
    """Copies the first size bytes; the target is as long then.

    How many bytes were copied before one could not be read, which is size if all could.  OSError
    is the target's.
    """
    if size == os.fstat(source_fd).st_size and _share(source_fd, target_fd):
        return size
    for start in range(0, size, _STEP_BYTES):
        end = min(start + _STEP_BYTES, size)
        if _native.copy_data(source_fd, target_fd, start, end, True, False):
            good = _copy_slowly(source_fd, target_fd, start, end)
            os.ftruncate(target_fd, good)
            return good
    os.ftruncate(target_fd, size)
    return size


def _share(source_fd: int, target_fd: int) -> bool:
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        return False
    return True


def _copy_slowly(source_fd: int, target_fd: int, start: int, end: int) -> int:
    """Block by block, up to the first one that cannot be read: where that is."""
    for at in range(start, end, 4096):
        try:
            block = os.pread(source_fd, min(4096, end - at), at)
        except OSError:
            return at
        os.pwrite(target_fd, block, at)
    return end
