"""What changed while nothing was mounted: brings shadows up to date with their objects.

A Kafka that ran on tree/ itself may have appended to objects, truncated them, or removed stubs.
Objects win over their shadows; what lost its stub is garbage (see there).
"""

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from pafkafs import _native, layout
from pafkafs.catalogue import Directory, Place
from pafkafs.device import Device, Home
from pafkafs.files import open_shadow
from pafkafs.layout import Stub
from pafkafs.namespace import Namespace
from pafkafs.survey import Survey, stubs_in

log = logging.getLogger(__name__)

# Objects that are looked at in one hop to a thread: a disk that seeks for each one is not to be
# taken for one that hangs.
_CHUNK = 256
_TRIES = 5  # to read a directory that is moved meanwhile


@dataclass(frozen=True)
class Comparison:
    """The object of a stub as it was found; status is None when it is missing."""

    name: bytes
    stub: Stub
    status: os.stat_result | None


def compare(device: Device, stubs: list[tuple[bytes, Stub]]) -> list[Comparison]:
    """Looks at objects.  May block."""
    return [Comparison(name, stub, _object_status(device, stub)) for name, stub in stubs]


def _object_status(device: Device, stub: Stub) -> os.stat_result | None:
    try:
        fd = _native.open_beneath(
            device.objects_fd, stub.object, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except FileNotFoundError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _attributes_of(status: os.stat_result) -> tuple[int, ...]:
    """What a chmod or chown sets, as far as we may set it."""
    mode = stat.S_IMODE(status.st_mode)
    return (mode, status.st_uid, status.st_gid) if os.geteuid() == 0 else (mode,)


class Reconciler:
    """Compares the objects of the stubs that the survey finds, each device by itself."""

    def __init__(
        self, namespace: Namespace, home: Home, survey: Survey, invalidate: Callable[[int], None]
    ) -> None:
        """invalidate makes the kernel forget the attributes of an inode number."""
        self._namespace = namespace
        self._home = home
        self._survey = survey
        self._invalidate = invalidate
        self.done = {id: trio.Event() for id in survey.with_stubs}

    async def run(self, device: Device) -> None:
        """Compares all objects of a device that were there at the mount."""
        async for directory in self._survey.with_stubs[device.id]:
            try:
                for left in reversed(range(_TRIES)):
                    if await self._compare(device, directory, last=not left):
                        break
            except OSError as error:
                device.failed(f"cannot read objects/: {error.strerror}")
                return
        self.done[device.id].set()

    async def _compare(self, device: Device, directory: Directory, *, last: bool) -> bool:
        """False when the directory was moved meanwhile."""
        path = directory.path
        try:
            stubs = await trio.to_thread.run_sync(
                lambda: list(
                    stubs_in(self._home, path, directory.ino, device.id, self._survey.paths)
                )
            )
        except FileNotFoundError:
            return last  # removed, perhaps
        for start in range(0, len(stubs), _CHUNK):
            chunk = stubs[start : start + _CHUNK]
            for found in await device.run(partial(compare, device, chunk)):
                size = self._settle(device, directory, found)
                if self._survey.take_uncounted(found.stub.object_id):
                    device.reserve(size)
        return True

    def _settle(self, device: Device, directory: Directory, found: Comparison) -> int:
        """Applies one comparison, atomically for the trio thread; the object's bytes."""
        stub, status = found.stub, found.status
        opened = self._namespace.files.opened_objects
        if status is None:
            if self._survey.is_there(directory, found.name, found.stub):
                self._missing(device, stub)
            return 0
        if opened is not None and stub.object_id in opened:
            return status.st_blocks * 512  # its first I/O compares, or already did
        try:
            shadow = layout.shadow_status(self._home.shadows_fd, stub)
        except FileNotFoundError:
            self._restore_shadow(directory, found, status)
            return status.st_blocks * 512
        except OSError as error:
            device.failed(f"{os.fsdecode(stub.object)}: {error.strerror}")
            return status.st_blocks * 512
        if _attributes_of(shadow) != _attributes_of(status):
            self._namespace.upkeep.attributes_changed(stub)  # a change that did not get there
        if stub.object_id in self._namespace.files.unsynced_objects:
            return status.st_blocks * 512  # its times were set just now, and are on their way
        if layout.object_wins(shadow, status):
            self._update_shadow(stub, shadow, status)
        elif status.st_mtime_ns > shadow.st_mtime_ns:
            self._namespace.upkeep.attributes_changed(stub)  # a utimens that did not get there
        self._note(directory, found, status)
        return status.st_blocks * 512

    def _restore_shadow(
        self, directory: Directory, found: Comparison, status: os.stat_result
    ) -> None:
        """Unless it is gone because the file was removed."""
        if not self._survey.is_there(directory, found.name, found.stub):
            return
        os.close(layout.create_shadow(self._home.shadows_fd, found.stub, status))
        number = list(self._namespace.devices).index(found.stub.device_id)
        place = Place(number, status.st_blocks * 512, status.st_mtime_ns)
        self._namespace.catalogue.found(directory, [(found.name, place)])

    def _note(self, directory: Directory, found: Comparison, status: os.stat_result) -> None:
        """What an object takes is known only now."""
        if status.st_nlink > 1:
            return
        entry = self._namespace.catalogue.entry(directory.ino, found.name)
        if entry is not None:
            place = Place(
                entry.device, status.st_blocks * 512, max(entry.mtime_ns, status.st_mtime_ns)
            )
            self._namespace.catalogue.put(directory, found.name, place)

    def _update_shadow(self, stub: Stub, shadow: os.stat_result, status: os.stat_result) -> None:
        fd = open_shadow(stub.shadow, self._home.shadows_fd)
        try:
            os.ftruncate(fd, status.st_size)
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(fd)
        node = self._namespace.nodes.known(shadow.st_ino)
        if node is not None:
            self._invalidate(node.ino)
        log.info("%s was changed behind the mount", os.fsdecode(stub.object))

    def _missing(self, device: Device, stub: Stub) -> None:
        try:
            shadow = layout.shadow_status(self._home.shadows_fd, stub)
        except OSError:
            shadow = None
        if shadow is None or shadow.st_size > 0:
            device.missing_objects.add(stub.object_id)
            log.error("the object %s is missing", os.fsdecode(stub.object))
