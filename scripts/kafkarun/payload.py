"""Records that prove themselves: each carries its origin and a checksum over all of it.

Layout, big-endian: crc32 of the rest, seed, partition, sequence number within the partition,
then filler. The filler is a window into random bytes derived from the seed, so that no
record compresses well and two neighbours never look alike.
"""

import random
import struct
import zlib
from dataclasses import dataclass

_CRC = struct.Struct(">I")
_ORIGIN = struct.Struct(">IIQ")
_HEADER_BYTES = _CRC.size + _ORIGIN.size
_POOL_BYTES = 1 << 20
_STRIDE = 7919  # odd, so that the windows of successive records visit all of the pool


@dataclass(frozen=True)
class Origin:
    partition: int
    seq: int


class Payloads:
    """Makes and recognises the records of one seed, each `size` bytes long."""

    def __init__(self, seed: int, size: int) -> None:
        if size < _HEADER_BYTES:
            raise ValueError(f"a record needs at least {_HEADER_BYTES} bytes, not {size}")
        self.size = size
        self._seed = seed
        self._filler_bytes = size - _HEADER_BYTES
        self._pool = random.Random(seed).randbytes(_POOL_BYTES + self._filler_bytes)

    def make(self, partition: int, seq: int) -> bytes:
        """The record with this number, the same bytes every time."""
        start = (partition + seq * _STRIDE) % _POOL_BYTES
        filler = self._pool[start : start + self._filler_bytes]
        body = _ORIGIN.pack(self._seed, partition, seq) + filler
        return _CRC.pack(zlib.crc32(body)) + body

    def origin(self, record: bytes | None) -> Origin | None:
        """Where the record comes from, or None if it is not a whole record of this seed."""
        if record is None or len(record) != self.size:
            return None
        (crc,) = _CRC.unpack_from(record)
        seed, partition, seq = _ORIGIN.unpack_from(record, _CRC.size)
        if seed != self._seed or crc != zlib.crc32(memoryview(record)[_CRC.size :]):
            return None
        return Origin(partition, seq)
