"""Objects and shadows that no stub refers to: found after a mount, put aside, later deleted.

Candidates are only what was there before serving began.  First they go to lost/ of their
device; from there they are deleted at a later mount.  When they are more than a small share of
all objects, nothing is touched: then something else is wrong.
"""

import logging
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from pafkafs import layout
from pafkafs.device import Device, Home

log = logging.getLogger(__name__)

SHARE_MAX = 0.10
COUNT_ALWAYS_ALLOWED = 64
KEEP_S = 7 * 86400.0


@dataclass(frozen=True)
class GarbageReport:
    """What was found on one device."""

    objects: int
    unreferenced: int
    put_aside: int

    @property
    def suspicious(self) -> bool:
        """Whether it was too much to touch."""
        return self.unreferenced > 0 and self.put_aside == 0


def allowed(count: int, *, has_names: bool = True) -> int:
    """How many of so many may be garbage.  None when the home tree has no files at all: that does
    not make garbage of all data, but is a sign that it is not the one that was there."""
    return max(COUNT_ALWAYS_ALLOWED, int(count * SHARE_MAX)) if has_names else 0


def collect(
    device: Device, is_referenced: Callable[[str], bool], *, has_names: bool
) -> GarbageReport:
    """Puts the unreferenced objects of a device aside.  May block.

    is_referenced tells whether a stub had this id before serving, or an object was made with it
    since: it is asked after the objects were listed, so none that is listed is too new for it.
    has_names is of `allowed`.
    """
    _delete_old(device)
    found, empty = _objects(device)
    unreferenced = [path for path in found if not is_referenced(_object_id(path))]
    if len(unreferenced) > allowed(len(found), has_names=has_names):
        log.error(
            "%s: %d of %d objects have no stub; nothing is removed",
            os.fsdecode(device.path),
            len(unreferenced),
            len(found),
        )
        return GarbageReport(len(found), len(unreferenced), 0)
    for path in unreferenced:
        _put_aside(device, path)
    for directory in empty:
        layout.remove_empty(device.objects_fd, directory)
    device.lost = len(os.listdir(device.lost_fd))
    return GarbageReport(len(found), len(unreferenced), len(unreferenced))


def collect_shadows(
    device: Device, home: Home, is_referenced: Callable[[str], bool], *, has_names: bool
) -> None:
    """The same for shadows."""
    found = os.listdir(home.shadows_fd)
    unreferenced = [name for name in found if not is_referenced(name)]
    if len(unreferenced) > allowed(len(found), has_names=has_names):
        log.error("%d of %d shadows have no stub; none is removed", len(unreferenced), len(found))
        return
    for name in unreferenced:
        layout.put_aside(home.shadows_fd, name.encode(), device.lost_fd, durably=False)


def _objects(device: Device) -> tuple[list[bytes], list[bytes]]:
    """Paths below objects/, and directories in which a crash left nothing."""
    paths: list[bytes] = []
    empty: list[bytes] = []
    for directory, directories, names, fd in os.fwalk(b".", dir_fd=device.objects_fd):
        names += [name for name in directories if _is_link(name, fd)]  # planted
        paths.extend(os.path.normpath(os.path.join(directory, name)) for name in names)
        if not directories and not names and directory != b".":
            empty.append(os.path.normpath(directory))
    return paths, empty


def _is_link(name: bytes, dir_fd: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False  # a directory that was empty


def _object_id(path: bytes) -> str:
    return os.fsdecode(path.rpartition(b".")[2])


def _put_aside(device: Device, path: bytes) -> None:
    log.warning("%s: %s has no stub, moved to lost", os.fsdecode(device.path), os.fsdecode(path))
    layout.put_aside(device.objects_fd, path, device.lost_fd, durably=False)
    layout.remove_empty(device.objects_fd, path.rpartition(b"/")[0])


def _delete_old(device: Device) -> None:
    """What was put aside long ago; its ctime tells when."""
    oldest = time.time() - KEEP_S
    for name in os.listdir(device.lost_fd):
        status = os.stat(name, dir_fd=device.lost_fd, follow_symlinks=False)
        if status.st_ctime < oldest:
            layout.remove(os.fsencode(name), device.lost_fd)
