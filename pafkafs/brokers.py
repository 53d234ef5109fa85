"""Brokers that have a log directory open: each locks the file .lock in it with fcntl(2)."""

import fcntl
import os
import struct

from pafkafs import kafka, layout
from pafkafs.errors import PafkafsError

_LOCK = ".lock"
_FLOCK = struct.Struct("@hhqqi")  # struct flock of 64-bit Linux
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def refuse_running(log_dir: str) -> None:
    """PafkafsError when a broker uses this log directory."""
    fd = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse(fd, log_dir)
    finally:
        os.close(fd)


def refuse_running_on_tree(device_fd: int, path: str) -> None:
    """PafkafsError when a broker runs on the home tree of a device itself: what it changes there
    must not be changed by us, too.  Its log directory is the tree, or right below it."""
    try:
        tree_fd = os.open(layout.TREE, _DIRECTORY, dir_fd=device_fd)
    except OSError:
        return  # a new device; or what is wrong is told by who needs it
    tree = os.path.join(path, layout.TREE)
    try:
        _refuse(tree_fd, tree)
        for name in os.listdir(tree_fd):
            if kafka.parse_directory(name) is None:
                _refuse_below(tree_fd, name, os.path.join(tree, name))
    finally:
        os.close(tree_fd)


def _refuse_below(tree_fd: int, name: str, path: str) -> None:
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=tree_fd)
    except OSError:
        return  # no directory
    try:
        _refuse(fd, path)
    finally:
        os.close(fd)


def _refuse(log_dir_fd: int, path: str) -> None:
    pid = _lock_holder(log_dir_fd)
    if pid is not None:
        raise PafkafsError(f"a Kafka broker (pid {pid}) is using {path}: stop it first")


def _lock_holder(log_dir_fd: int) -> int | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(_LOCK, flags, dir_fd=log_dir_fd)
    except OSError:
        return None
    try:
        probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, probe))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid
