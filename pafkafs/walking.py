"""Reads directories name by name below an open one, following no symlink and changing nothing."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pafkafs import _native, layout

DIRECTORY = layout.LOOKING | os.O_DIRECTORY


@dataclass(frozen=True, slots=True)
class Entry:
    """A name below the directory where a walk began; dir_fd is open until the next one is asked
    for."""

    dir_fd: int
    name: bytes
    path: bytes
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A directory that could not be read, or not to its end."""

    path: bytes
    error: OSError


def walk(top_fd: int) -> Iterator[Entry | Unreadable]:
    """All that is below a directory, each directory before what is in it."""
    queue = deque([b""])
    while queue:
        directory = queue.popleft()
        try:
            fd = _native.open_beneath(top_fd, directory or b".", DIRECTORY)
        except OSError as error:
            yield Unreadable(directory, error)
            continue
        try:
            for entry in entries(fd, directory):
                if stat.S_ISDIR(entry.status.st_mode):
                    queue.append(entry.path)
                yield entry
        except OSError as error:
            yield Unreadable(directory, error)
        finally:
            os.close(fd)


def entries(fd: int, directory: bytes = b"") -> Iterator[Entry]:
    """What is in one directory; directory is its path for the entries'."""
    own = os.open(".", DIRECTORY, dir_fd=fd)  # scandir moves its position
    try:
        with os.scandir(own) as names:
            for found in names:
                name = os.fsencode(found.name)
                status = status_of(own, name)
                if status is not None:
                    path = directory + b"/" + name if directory else name
                    yield Entry(own, name, path, status)
    finally:
        os.close(own)


def status_of(dir_fd: int, name: bytes) -> os.stat_result | None:
    """Of the entry itself; None when it is not there."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def status_beneath(top_fd: int, path: bytes) -> os.stat_result | None:
    """Of what is at a path; None when it is not there, or a symlink is on the way to it."""
    try:
        fd = _native.open_beneath(top_fd, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def read_link(entry: Entry) -> bytes | None:
    """None when it is gone, or no symlink any more."""
    try:
        return os.readlink(entry.name, dir_fd=entry.dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            return None
        raise
