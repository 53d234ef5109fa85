"""A mount and a plain directory, its twin: the same is done to both, and must come to the same.

What is told of both is compared here; where pafkafs is known to differ is said by the rules that
do it.
"""

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
# Given by hand: what the clock says is none of them.
PAST_NS = (1, 10**18 + 7, 1_234_567_890_123_456_789)
USER = 1000


@dataclass
class Handle:
    """An open file of one side."""

    fd: int
    flags: int

    @property
    def reads(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writes(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass
class Side:
    """One of the two: a root, and what is open and mapped below it, each by the number of its
    slot."""

    root: Path
    handles: dict[int, Handle] = field(default_factory=dict)
    maps: dict[int, mmap.mmap] = field(default_factory=dict)
    map_inos: dict[int, int] = field(default_factory=dict)

    def open(self, slot: int, path: str, flags: int, mode: int) -> None:
        fd = os.open(self.root / path, flags | os.O_NONBLOCK, mode)
        self.close(slot)
        self.handles[slot] = Handle(fd, flags)

    def close(self, slot: int) -> None:
        if slot in self.handles:
            os.close(self.handles.pop(slot).fd)

    def map(self, map_slot: int, slot: int, **how: int) -> None:
        """The whole file, as long as it is now."""
        mapping = mmap.mmap(self.handles[slot].fd, 0, **how)
        self.unmap(map_slot)
        self.maps[map_slot] = mapping
        self.map_inos[map_slot] = os.fstat(self.handles[slot].fd).st_ino

    def unmap(self, map_slot: int) -> None:
        if map_slot in self.maps:
            self.maps.pop(map_slot).close()

    def mapped(self, map_slot: int) -> tuple[mmap.mmap, int]:
        """A mapping, and how much of it the file is long enough for: behind that is a SIGBUS."""
        mapping = self.maps[map_slot]
        return mapping, min(len(mapping), mapping.size())

    def close_all(self) -> None:
        """Of a dead mount, too."""
        for mapping in self.maps.values():
            mapping.close()
        self.maps.clear()
        for handle in self.handles.values():
            with suppress(OSError):
                os.close(handle.fd)
        self.handles.clear()

    def fd(self, slot: int) -> int:
        return self.handles[slot].fd


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """What the kernel checks is checked for this user."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def outcome_of(act: Callable[[Side], Any], side: Side, uid: int) -> tuple[str, Any]:
    """What an act returned, or which error it got."""
    try:
        with acting_as(uid):
            return ("returned", act(side))
    except OSError as error:
        return ("failed", errno.errorcode[error.errno or 0])
    except (
        ValueError,
        TypeError,
    ) as error:  # an empty file is not mapped, one to read not stored to
        return ("failed", str(error))


def is_regular(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


@dataclass(frozen=True)
class Told:
    """What lstat and fstat tell, as far as two filesystems must agree."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size: int | None  # of a directory each filesystem has its own
    text: str | None = None  # of a symlink

    @classmethod
    def of(cls, status: os.stat_result, text: str | None = None) -> "Told":
        size = None if stat.S_ISDIR(status.st_mode) else status.st_size
        return cls(status.st_mode, status.st_uid, status.st_gid, status.st_nlink, size, text)


Statuses = dict[str, os.stat_result]


def walk(root: Path) -> Statuses:
    """The status of every name below root."""
    found: Statuses = {}
    for directory, subdirectories, files in os.walk(root):
        for name in (*subdirectories, *files):
            path = os.path.join(directory, name)
            found[os.path.relpath(path, root)] = os.lstat(path)
    return found


@dataclass
class Twins:
    """The two sides of one example."""

    mount: Side
    plain: Side
    began_ns: int
    # Inode numbers of the plain side: stored to in a mapping since a time was given by hand. When
    # such a store changes the times is the kernel's affair, and differs between filesystems.
    stored: set[int] = field(default_factory=set)
    statuses: Statuses = field(default_factory=dict)  # of the mount, at the last comparison

    def both(self, act: Callable[[Side], Any], uid: int = 0) -> Any:
        """Does the same on both sides; what it returned, or None when it failed the same way."""
        plain = outcome_of(act, self.plain, uid)
        mount = outcome_of(act, self.mount, uid)
        assert mount == plain, f"the mount {mount}, a plain directory {plain}"
        return plain[1] if plain[0] == "returned" else None

    def close_all(self) -> None:
        self.plain.close_all()
        self.mount.close_all()

    # -- comparing --------------------------------------------------------------------------------

    def compare(self, *, times_stay: bool) -> None:
        """All names with their attributes, and what is read through every handle.

        times_stay: nothing has happened since the last time that may change the time of a file.
        """
        plain, mount = walk(self.plain.root), walk(self.mount.root)
        assert sorted(mount) == sorted(plain)
        for name, status in plain.items():
            text = self._text(name, status)
            self._compare_told(name, Told.of(mount[name], text), Told.of(status, text))
            self._compare_times(name, mount[name], status)
            if times_stay and name in self.statuses and status.st_ino not in self.stored:
                before = self.statuses[name]
                same = before.st_ino == mount[name].st_ino and stat.S_ISREG(status.st_mode)
                assert not same or before.st_mtime_ns == mount[name].st_mtime_ns, name
        self._compare_identities(mount, plain)
        self.statuses = mount
        for slot, handle in self.plain.handles.items():
            self._compare_handles(slot, handle)

    @staticmethod
    def _compare_told(name: str, mount: Told, plain: Told) -> None:
        assert mount == plain, f"{name}: the mount {mount}, a plain directory {plain}"

    def _text(self, name: str, status: os.stat_result) -> str | None:
        if not stat.S_ISLNK(status.st_mode):
            return None
        text = os.readlink(self.plain.root / name)
        assert os.readlink(self.mount.root / name) == text
        return text

    def _compare_times(self, name: str, mount: os.stat_result, plain: os.stat_result) -> None:
        """One that was given by hand is exact; all others are of the clock."""
        if not stat.S_ISREG(plain.st_mode) or plain.st_ino in self.stored:
            return
        if plain.st_mtime_ns in PAST_NS:
            assert mount.st_mtime_ns == plain.st_mtime_ns, name
        else:
            assert mount.st_mtime_ns >= self.began_ns, name

    @staticmethod
    def _compare_identities(mount: Statuses, plain: Statuses) -> None:
        """Two names lead to one file here when they do so there."""
        numbers = {(plain[name].st_ino, mount[name].st_ino) for name in plain}
        assert len(numbers) == len({n for n, _ in numbers}) == len({n for _, n in numbers})

    def _compare_handles(self, slot: int, handle: Handle) -> None:
        plain, mount = os.fstat(handle.fd), os.fstat(self.mount.fd(slot))
        self._compare_told(f"handle {slot}", Told.of(mount), Told.of(plain))
        self._compare_times(f"handle {slot}", mount, plain)
        if handle.reads and stat.S_ISREG(plain.st_mode):
            expected = os.pread(handle.fd, 8 * MIB, 0)
            compare_bytes(f"handle {slot}", os.pread(self.mount.fd(slot), 8 * MIB, 0), expected)

    def compare_contents(self) -> None:
        """Of all files, opened anew."""
        for name, status in walk(self.plain.root).items():
            if stat.S_ISREG(status.st_mode):
                expected = (self.plain.root / name).read_bytes()
                compare_bytes(name, (self.mount.root / name).read_bytes(), expected)

    def compare_cold(self, home: Path) -> None:
        """The home tree by itself: files with their data and attributes behind any stub."""
        for name, status in walk(self.plain.root).items():
            if not stat.S_ISREG(status.st_mode):
                continue
            expected = (self.plain.root / name).read_bytes()
            compare_bytes(f"cold {name}", (home / name).read_bytes(), expected)
            found = os.stat(home / name)
            attributes = (found.st_mode, found.st_uid, found.st_gid)
            assert attributes == (status.st_mode, status.st_uid, status.st_gid), f"cold {name}"

    # -- stores into mappings ---------------------------------------------------------------------

    def note_store(self, map_slot: int) -> None:
        self.stored.add(self.plain.map_inos[map_slot])

    def note_times(self, path: str) -> None:
        """They were given by hand, if the file is there."""
        with suppress(OSError):
            self.stored.discard(os.stat(self.plain.root / path).st_ino)

    def settle_stores(self) -> None:
        """What was stored into mappings has reached both sides: no later change of a time."""
        for mapping in (*self.plain.maps.values(), *self.mount.maps.values()):
            mapping.flush()
        for name, status in walk(self.plain.root).items():
            if status.st_ino in self.stored and stat.S_ISREG(status.st_mode):
                fd = os.open(self.mount.root / name, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        for slot, handle in self.plain.handles.items():
            if os.fstat(handle.fd).st_ino in self.stored:
                os.fsync(self.mount.fd(slot))

    def handles_are_dead(self) -> None:
        """Those of the mount, after its daemon."""
        for slot, handle in self.mount.handles.items():
            if handle.writes and is_regular(self.plain.fd(slot)):
                with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
                    os.pwrite(handle.fd, b"x", 0)


def compare_bytes(what: str, found: bytes, expected: bytes) -> None:
    """As assert does, but short."""
    if found == expected:
        return
    assert len(found) == len(expected), f"{what}: {len(found)} bytes and not {len(expected)}"
    wrong = [at for at, (f, e) in enumerate(zip(found, expected, strict=True)) if f != e]
    raise AssertionError(f"{what}: {len(wrong)} wrong bytes from {wrong[0]} to {wrong[-1]}")
