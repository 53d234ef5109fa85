"""Objects and shadows that no stub refers to: found after a mount, put aside, later deleted.

Candidates are only what was there before serving began.  First they go to lost/ of their
device; from there they are deleted at a later mount.  When they are more than a small share of
all objects, nothing is touched: then something else is wrong.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from pafkafs import _native
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


def collect(device: Device, referenced: Callable[[], set[str]]) -> GarbageReport:
    """Puts the unreferenced objects of a device aside.  May block.

    referenced returns the ids of all stubs before serving, and of all objects since: it is
    asked after the objects were listed, so none that is listed is too new for it.
    """
    _delete_old(device)
    found = _objects(device)
    known = referenced()
    unreferenced = [path for path in found if _object_id(path) not in known]
    allowed = max(COUNT_ALWAYS_ALLOWED, int(len(found) * SHARE_MAX))
    if len(unreferenced) > allowed:
        log.error(
            "%s: %d of %d objects have no stub; nothing is removed",
            os.fsdecode(device.path),
            len(unreferenced),
            len(found),
        )
        return GarbageReport(len(found), len(unreferenced), 0)
    for path in unreferenced:
        _put_aside(device, path)
    return GarbageReport(len(found), len(unreferenced), len(unreferenced))


def collect_shadows(device: Device, home: Home, referenced: set[str], found: list[str]) -> None:
    """Puts shadows, found before serving began, that have no stub aside."""
    unreferenced = [name for name in found if name not in referenced]
    if len(unreferenced) > max(COUNT_ALWAYS_ALLOWED, int(len(found) * SHARE_MAX)):
        log.error("%d of %d shadows have no stub; none is removed", len(unreferenced), len(found))
        return
    for name in unreferenced:
        _native.rename(home.shadows_fd, name.encode(), device.lost_fd, name.encode(), 0)


def _objects(device: Device) -> list[bytes]:
    """Paths below objects/."""
    paths: list[bytes] = []
    for directory, _, names, _ in os.fwalk(b".", dir_fd=device.objects_fd):
        paths.extend(os.path.normpath(os.path.join(directory, name)) for name in names)
    return paths


def _object_id(path: bytes) -> str:
    return os.fsdecode(path.rpartition(b".")[2])


def _put_aside(device: Device, path: bytes) -> None:
    name = path.rpartition(b"/")[2]
    log.warning("%s: %s has no stub, moved to lost", os.fsdecode(device.path), os.fsdecode(path))
    _native.rename(device.objects_fd, path, device.lost_fd, name, 0)
    try:
        os.rmdir(path.rpartition(b"/")[0], dir_fd=device.objects_fd)
    except OSError:
        return  # not empty, or objects/ itself


def _delete_old(device: Device) -> None:
    """What was put aside long ago; its ctime tells when."""
    oldest = time.time() - KEEP_S
    for name in os.listdir(device.lost_fd):
        status = os.stat(name, dir_fd=device.lost_fd, follow_symlinks=False)
        if status.st_ctime < oldest:
            os.unlink(name, dir_fd=device.lost_fd)
