"""What the stubs of a set lead to, in 16 bytes for each: a million fit into 16 MiB, and into some
40 MiB more while they are sorted."""

from __future__ import annotations  # array is generic for type checkers only

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import blake2b


class References:
    """Ids and places of objects, each a number of 64 bits.  All are added, then sorted, then asked
    for."""

    def __init__(self) -> None:
        self._ids = array("Q")
        self._places = array("Q")
        self._linked: dict[int, int] = {}  # by id: the inode of a stub with several names

    def add(self, id: int, status: os.stat_result, place: tuple[int, bytes] | None = None) -> None:
        """A stub with this status; place is the device of its object and the path there, None for
        one that is refused.  A symlink with several names is one stub."""
        if status.st_nlink > 1:
            if self._linked.get(id) == status.st_ino:
                return
            self._linked[id] = status.st_ino
        self._ids.append(id)
        if place is not None:
            self._places.append(_digest(*place))

    def sort(self) -> None:
        """Before anything is asked."""
        self._ids = array("Q", sorted(self._ids))
        self._places = array("Q", sorted(self._places))

    def shared(self) -> Iterator[int]:
        """Ids that more than one stub has."""
        for i in range(1, len(self._ids)):
            if self._ids[i] == self._ids[i - 1]:
                yield self._ids[i]

    def has_id(self, id: int) -> bool:
        """Whether a stub has it."""
        return _is_in(self._ids, id)

    def has_place(self, device: int, path: bytes) -> bool:
        """Whether a stub leads there."""
        return _is_in(self._places, _digest(device, path))


def _is_in(numbers: array[int], number: int) -> bool:
    at = bisect_left(numbers, number)
    return at < len(numbers) and numbers[at] == number


def _digest(device: int, path: bytes) -> int:
    digest = blake2b(path, digest_size=8, salt=device.to_bytes(4, "little")).digest()
    return int.from_bytes(digest, "little")
