"""Reads every byte of every file of a set, for errors of the media, and leaves nothing of it in
the page cache."""

import mmap
import os
import stat
from collections.abc import Callable, Iterator

from pafkafs import layout
from pafkafs.checking import Finding, Kind, Place
from pafkafs.inspecting import Inspection
from pafkafs.units import format_size
from pafkafs.walking import Entry

_STEP_BYTES = 1 << 20
_BLOCK_BYTES = 4096


def read_all(
    inspection: Inspection, devices: int, progress: Callable[[int], None]
) -> Iterator[Finding]:
    """What cannot be read.  progress is told the bytes of each step."""
    buffer = mmap.mmap(-1, _STEP_BYTES)  # on a page, as O_DIRECT wants it
    try:
        for number in range(devices):
            for area in (layout.TREE, layout.OBJECTS):
                for entry in inspection.walk(number, area):
                    if isinstance(entry, Entry) and stat.S_ISREG(entry.status.st_mode):
                        where = Place(number, area, entry.path)
                        yield from _read(entry, where, buffer, progress)
    finally:
        buffer.close()


def _read(
    entry: Entry, where: Place, buffer: mmap.mmap, progress: Callable[[int], None]
) -> Iterator[Finding]:
    try:
        fd, direct = _open(entry)
    except FileNotFoundError:
        return  # moved or removed meanwhile
    except OSError as error:
        what = f"cannot be opened: {error.strerror}"
        yield Finding(Kind.UNREADABLE, where, what)
        return
    try:
        first, bad, why = _read_to_end(fd, direct, buffer, progress)
    finally:
        os.close(fd)
    if why is not None:
        what = f"{format_size(bad)} from byte {first} on cannot be read: {why.strerror}"
        yield Finding(Kind.UNREADABLE, where, what)


def _open(entry: Entry) -> tuple[int, bool]:
    """Past the page cache where the filesystem can: what lies there says nothing of the media."""
    flags = layout.LOOKING | os.O_NONBLOCK
    try:
        return os.open(entry.name, flags | os.O_DIRECT, dir_fd=entry.dir_fd), True
    except FileNotFoundError:
        raise
    except OSError:
        return os.open(entry.name, flags, dir_fd=entry.dir_fd), False


def _read_to_end(
    fd: int, direct: bool, buffer: mmap.mmap, progress: Callable[[int], None]
) -> tuple[int, int, OSError | None]:
    """(offset of the first byte that cannot be read, how many, why)."""
    size = os.fstat(fd).st_size
    at, first, bad = 0, 0, 0
    why: OSError | None = None
    step = _STEP_BYTES
    while at < size:
        with memoryview(buffer)[:step] as view:
            try:
                count = os.preadv(fd, [view], at)
            except OSError as error:
                if step > _BLOCK_BYTES:
                    step = _BLOCK_BYTES  # which of the blocks is it
                    continue
                first, why = (at, error) if why is None else (first, why)
                count = min(_BLOCK_BYTES, size - at)
                bad += count
        if count == 0:
            break  # it became shorter
        if not direct:
            os.posix_fadvise(fd, at, count, os.POSIX_FADV_DONTNEED)
        at += count
        progress(count)
        if at % _STEP_BYTES == 0:
            step = _STEP_BYTES
    return first, bad, why
