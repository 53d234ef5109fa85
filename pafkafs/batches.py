"""Record batches in a segment, by their headers: to which offset a segment goes, and how many of
its bytes are whole batches.  Checksums are left to Kafka.

A header of version 2 (Kafka's DefaultRecordBatch): base offset int64, length int32 of what comes
after these two, leader epoch int32, magic int8 at byte 16, CRC uint32, attributes int16, last
offset delta int32 at byte 23.  Those of versions 0 and 1 have the last offset instead of the first.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

_HEADER = struct.Struct(">qiibIhi")
_PREFIX_BYTES = 12  # offset and length
_V2_LENGTH_MIN = 61 - _PREFIX_BYTES
_OLD_LENGTH_MIN = 14
_MAGIC = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """What a segment has: next_offset is one more than its last, None without any batch."""

    whole_bytes: int
    next_offset: int | None


def extent(fd: int, size: int, base_offset: int) -> Extent:
    """Walks the batches of an open segment of size bytes.  OSError when it cannot be read."""
    return walk(lambda at: os.pread(fd, _HEADER.size, at), size, base_offset)


def walk(read: Callable[[int], bytes], size: int, base_offset: int) -> Extent:
    """read returns the header at a position.  Offsets never go back, or it is no batch."""
    at, next_offset = 0, None
    expected = base_offset
    while at + _HEADER.size <= size:
        header = read(at)
        if len(header) < _HEADER.size:
            break
        after = _next_offset(header, expected)
        length = int.from_bytes(header[8:12], "big", signed=True)
        if after is None or at + _PREFIX_BYTES + length > size:
            break
        expected = next_offset = after
        at += _PREFIX_BYTES + length
    return Extent(at, next_offset)


def _next_offset(header: bytes, expected: int) -> int | None:
    """None for what is no header of a batch from the expected offset on."""
    offset, length, _, magic, _, _, delta = _HEADER.unpack(header)
    if not 0 <= magic <= _MAGIC or offset < expected:
        return None
    if magic < _MAGIC:
        return int(offset) + 1 if length >= _OLD_LENGTH_MIN else None
    return int(offset) + delta + 1 if length >= _V2_LENGTH_MIN and delta >= 0 else None
