"""Brokers that have a log directory open: each locks the file .lock in it with fcntl(2)."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Sequence

from pafkafs import _native, layout
from pafkafs.errors import PafkafsError

_LOCK = b".lock"
_FLOCK = struct.Struct("@hhqqi")  # struct flock of 64-bit Linux
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def refuse_running(log_dir: str) -> None:
    """PafkafsError when a broker uses this log directory."""
    fd = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse(fd, _LOCK, (), log_dir)
    finally:
        os.close(fd)


def refuse_running_on_tree(home_fd: int, path: str, device_fds: Sequence[int]) -> None:
    """PafkafsError when a broker runs on the home tree of a device itself: what it changes there
    must not be changed by us, too.  Its log directory is the tree, or right below it.

    device_fds are the devices on which its lock may be, if that does not lie in the tree.
    """
    try:
        tree_fd = os.open(layout.TREE, layout.DIRECTORY, dir_fd=home_fd)
    except OSError:
        return  # a new device; or what is wrong is told by who needs it
    tree = os.path.join(path, layout.TREE)
    try:
        _refuse(tree_fd, _LOCK, device_fds, tree)
        for name in _names(tree_fd):
            lock = os.path.join(name, _LOCK)
            _refuse(tree_fd, lock, device_fds, os.path.join(tree, os.fsdecode(name)))
    finally:
        os.close(tree_fd)


def _names(tree_fd: int) -> Iterable[bytes]:
    try:
        return map(os.fsencode, os.listdir(tree_fd))
    except OSError:
        return ()  # told by who reads it all


def _refuse(dir_fd: int, lock: bytes, device_fds: Sequence[int], log_dir: str) -> None:
    fd = _open(dir_fd, lock, device_fds)
    if fd is None:
        return
    try:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, probe))
    finally:
        os.close(fd)
    if kind != fcntl.F_UNLCK:
        raise PafkafsError(f"a Kafka broker (pid {pid}) is using {log_dir}: stop it first")


def _open(dir_fd: int, lock: bytes, device_fds: Sequence[int]) -> int | None:
    """The file, or the object of a stub in its place; None when there is none."""
    try:
        return _native.open_beneath(dir_fd, lock, _OPEN)
    except OSError as error:
        if error.errno != errno.ELOOP:
            return None  # most are no log directories
    try:
        text = os.readlink(lock, dir_fd=dir_fd)
    except OSError:
        return None
    if not layout.looks_like_stub(text):
        return None
    object_ = os.path.join(os.fsencode(layout.OBJECTS), text.rpartition(b"/objects/")[2])
    for device_fd in device_fds:
        try:
            return _native.open_beneath(device_fd, object_, _OPEN)
        except OSError:
            continue
    return None
