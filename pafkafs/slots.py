"""The slots of files that grow in persistent memory, as they lie in `sizes`: see native/sizes.h.

This reads them; who maps, takes and frees them is the native core.
"""

import errno
import os
import struct
from dataclasses import dataclass

from pafkafs import _native, layout

_PAGE = 4096
_SLOT = struct.Struct("<6Q16x")
_MAGIC = 0x315A495346415031


@dataclass(frozen=True)
class Slot:
    """A slot that was in use when the last mount ended; sizes in bytes."""

    number: int
    nonce: int
    ino: int
    size: int
    mtime_ns: int
    grown: int
    settled: int

    def is_ours(self, length: int) -> bool:
        """Whether a file of this length is one that was growing, and nobody has changed since: it
        grows by whole pages, and a growth may have been cut anywhere."""
        growing = self.settled < length <= self.grown and length % _PAGE == 0
        return length == self.size or (length > self.size and (growing or length == self.settled))


def read_slots(device_fd: int) -> list[Slot] | None:
    """The slots in use of a fast device that is not mounted; None when nothing ever grew there.
    OSError when they cannot be read, EINVAL when the file is another one."""
    try:
        fd = os.open("sizes", layout.LOOKING, dir_fd=device_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        text = file.read()
    whole = len(text) - len(text) % _SLOT.size
    raw = list(_SLOT.iter_unpack(text[:whole]))
    if not raw or raw[0][0] != _MAGIC:
        raise OSError(errno.EINVAL, "it is no file of slots")
    found = []
    for number, (nonce, size, mtime_ns, ino, grown, settled) in enumerate(raw[1:], 1):
        if nonce:
            found.append(Slot(number, nonce, ino, size, mtime_ns, grown, settled))
    return found


def nonce_of(dir_fd: int, name: bytes) -> int | None:
    """The nonce that ties a file to a slot; None when it has none."""
    path = b"/proc/self/fd/%d/" % dir_fd + name
    try:
        value = os.getxattr(path, _native.NONCE_ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOENT):
            return None
        raise
    return int.from_bytes(value, "little")
