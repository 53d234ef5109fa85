"""Faults at a chosen system call of a daemon: the other end of tests/preload/faults.c."""

import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, IntFlag
from pathlib import Path

_SOURCE = Path(__file__).parent / "preload" / "faults.c"
_HEAD = struct.Struct("iiiiqqq256s")
_CALLS_KEPT, _CALL_BYTES = 2048, 128
_ARMED = struct.Struct("i")


class Action(IntEnum):
    """What happens to the call."""

    COUNT = 0
    FAIL = 1
    SHORT = 2
    HANG = 3
    DIE = 4
    TEAR = 5  # it falls short, and is the last


class Kind(IntFlag):
    """What a call is."""

    CHANGE = 1  # what lies on the device is another afterwards
    SYNC = 2
    READ = 4
    PARTIAL = 8  # may transfer less than it was asked to
    ROOM = 16  # may find no room
    SLOW = 32  # may be interrupted
    TORN = 64  # may change a part


ANY = Kind.CHANGE | Kind.SYNC | Kind.READ


class Faults:
    """Which call of the daemons started with `environment` is hit; none until `arm`."""

    def __init__(self, directory: Path) -> None:
        self._library = directory / "faults.so"
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", self._library, _SOURCE, "-ldl"], check=True)
        self._file = directory / "faults"
        size = _HEAD.size + _CALLS_KEPT * _CALL_BYTES
        self._file.write_bytes(bytes(size))
        with self._file.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    @property
    def environment(self) -> dict[str, str]:
        """What is started with it can be hit."""
        return {"LD_PRELOAD": str(self._library), "PAFKAFS_FAULTS": str(self._file)}

    @contextmanager
    def daemon(self) -> Iterator[None]:
        """What is started here can be hit."""
        os.environ |= self.environment
        try:
            yield
        finally:
            for name in self.environment:
                del os.environ[name]

    def arm(
        self, root: Path, action: Action, which: int = 0, error: int = 0, kinds: Kind = ANY
    ) -> None:
        """From now on calls of these kinds below root count, and the one with that number, from
        1, is hit."""
        self.disarm()
        fields = (0, action, error, 0, which, 0, kinds, os.fsencode(root))
        _HEAD.pack_into(self._map, 0, *fields)
        _ARMED.pack_into(self._map, 0, 1)

    def disarm(self) -> int:
        """Nothing more is hit, and what hangs goes on; the calls that were counted."""
        _ARMED.pack_into(self._map, 0, 0)
        return int(_HEAD.unpack_from(self._map)[5])

    @property
    def hit(self) -> str | None:
        """The call that was hit: its name, and where."""
        head = _HEAD.unpack_from(self._map)
        return self._call(head[4]) if head[3] else None

    @property
    def calls(self) -> list[str]:
        """The calls that were counted, the first 2,048 of them: names, and where."""
        counted = _HEAD.unpack_from(self._map)[5]
        return [self._call(number) for number in range(1, min(counted, _CALLS_KEPT) + 1)]

    def _call(self, number: int) -> str:
        start = _HEAD.size + (number - 1) * _CALL_BYTES
        return os.fsdecode(self._map[start : start + _CALL_BYTES].partition(b"\0")[0])


ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
