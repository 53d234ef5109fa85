"""What a setattr changes, and how it is applied to an inode or to a remembered status."""

import os
import stat
from dataclasses import dataclass


@dataclass(frozen=True)
class Changes:
    """What a setattr sets; None leaves it.  Times are ns since the epoch."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def apply_changes(path: str, changes: Changes) -> None:
    """On a /proc/self/fd path: the one way that serves O_PATH descriptors too."""
    if changes.uid is not None or changes.gid is not None:
        uid = -1 if changes.uid is None else changes.uid
        os.chown(path, uid, -1 if changes.gid is None else changes.gid)
    if changes.mode is not None:
        os.chmod(path, stat.S_IMODE(changes.mode))  # after chown, which clears suid
    times = changed_times(os.stat(path), changes)
    if times is not None:
        os.utime(path, ns=times)


def changed_times(now: os.stat_result, changes: Changes) -> tuple[int, int] | None:
    """atime and mtime in ns as they will be; None when neither is set."""
    if changes.atime_ns is None and changes.mtime_ns is None:
        return None
    return (
        now.st_atime_ns if changes.atime_ns is None else changes.atime_ns,
        now.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns,
    )


def with_changes(status: os.stat_result, changes: Changes) -> os.stat_result:
    """A status as it would be after the changes, for an inode that is gone."""
    values = list(status)
    extra = {name: getattr(status, name) for name in _EXTRA_FIELDS}
    if changes.mode is not None:
        values[stat.ST_MODE] = stat.S_IFMT(status.st_mode) | stat.S_IMODE(changes.mode)
    for index, value in ((stat.ST_UID, changes.uid), (stat.ST_GID, changes.gid)):
        values[index] = values[index] if value is None else value
    for name, time_ns in (("atime", changes.atime_ns), ("mtime", changes.mtime_ns)):
        if time_ns is not None:
            extra[f"st_{name}_ns"] = time_ns
    return os.stat_result(values, extra)


def with_size(status: os.stat_result, size: int, mtime_ns: int) -> os.stat_result:
    """A status of a file that is longer on the device than it is."""
    values = list(status)
    values[stat.ST_SIZE] = size
    extra = {name: getattr(status, name) for name in _EXTRA_FIELDS}
    extra |= {"st_blocks": -(-size // 512), "st_mtime_ns": mtime_ns}
    return os.stat_result(values, extra)


def as_empty_file(status: os.stat_result) -> os.stat_result:
    """A status of an empty regular file with the owner and the times of this one."""
    values = list(status)
    values[stat.ST_MODE] = stat.S_IFREG | 0o400
    values[stat.ST_SIZE] = 0
    return os.stat_result(values, {name: getattr(status, name) for name in _EXTRA_FIELDS})


_EXTRA_FIELDS = (
    "st_atime",
    "st_mtime",
    "st_ctime",
    "st_atime_ns",
    "st_mtime_ns",
    "st_ctime_ns",
    "st_blksize",
    "st_blocks",
    "st_rdev",
)
