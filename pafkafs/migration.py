"""Moves the data of one file from a device to another, under its open handles.

For now files move when they have no room to grow where they are: they spill.
"""

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import trio

from pafkafs import _native, layout
from pafkafs.device import Device, Home
from pafkafs.files import OpenFile
from pafkafs.layout import Stub
from pafkafs.namespace import Namespace
from pafkafs.policy import Mode, place_spill

log = logging.getLogger(__name__)

T = TypeVar("T")

# A writer waits so long for room that is being freed (a removed segment whose blocks a worker
# still returns) before its file is moved.
ROOM_WAIT_S = 0.2
_ROOM_POLL_S = 0.01
# So long, counted from its first request without room, a file does not try a device again.
_EPISODE_S = 2.0
# Room that must be there before a parked write is tried again: the largest WRITE.
_WRITE_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class SpillTotals:
    """What has been moved since the mount."""

    files: int = 0
    bytes: int = 0
    failed: int = 0


class Spiller:
    """Answers the lack of room: waits for some, or moves the file that needs it."""

    def __init__(
        self, namespace: Namespace, home: Home, devices: Mapping[str, Device], mode: Mode
    ) -> None:
        self._namespace = namespace
        self._home = home
        self._devices = devices
        self._mode = mode
        self.totals = SpillTotals()
        self.degraded: str | None = None

    async def make_room(self, file: OpenFile) -> None:
        """A request of this file waits for room; it goes on, or fails with ENOSPC."""
        async with self._namespace.files.used(file):
            if trio.current_time() - file.starving_since > _EPISODE_S:
                file.starving_since = trio.current_time()
                file.devices_tried.clear()
            try:
                await self._find_room(file)
            except OSError as error:
                log.error("%s: %s", os.fsdecode(file.node.path()), error.strerror)
                file.native.end_starving(error.errno or errno.EIO)

    async def _find_room(self, file: OpenFile) -> None:
        """Lets those who wait try again, here or elsewhere, or fails them.

        Each device is tried once in an episode: one that has room by its accounts, and none for
        this request, must not be tried for ever.
        """
        here = file.device.id
        if here not in file.devices_tried:
            file.devices_tried.add(here)
            if await _room_came(file.device):
                file.native.end_starving(0)
                return
        if self._may_move(file):
            await self._spill(file)
        else:
            file.native.end_starving(errno.ENOSPC)

    async def _spill(self, file: OpenFile) -> None:
        """Moves the file to the first device that takes it.

        The gate stays closed over all attempts: who waits is told once, of the last.
        """
        await file.close_gate()
        try:
            if not await self._move_anywhere(file):
                file.native.end_starving(errno.ENOSPC)
        finally:
            file.open_gate()

    async def _move_anywhere(self, file: OpenFile) -> bool:
        while self._may_move(file) and (target := self._choose(file)) is not None:
            file.devices_tried.add(target.id)
            try:
                await self._move(file, target)
                return True
            except OSError as error:
                path = os.fsdecode(file.node.path())
                log.error("cannot move %s: %s", path, error.strerror)
                self._count(failed=1)
        return False

    def _may_move(self, file: OpenFile) -> bool:
        """One rename replaces one name: a file with several links stays where it is, and so
        does one that is left with a name that we do not know."""
        known = bool(file.node.names) or file.node.gone is not None
        return known and self._namespace.attributes(file.node).nlink <= 1

    def _choose(self, file: OpenFile) -> Device | None:
        tried = file.devices_tried - {file.device.id}
        devices = [d for d in self._devices.values() if d.id not in tried]
        source = devices.index(file.device)
        need = self._namespace.attributes(file.node).blocks * 512 + _WRITE_BYTES_MAX
        chosen = place_spill(self._mode, [d.room for d in devices], source, need)
        return None if chosen is None else devices[chosen]

    async def _move(self, file: OpenFile, target: Device) -> None:
        """Copy, fsync, commit, re-point, with the gate closed: reads go on.

        **Invariant:** until the rename in _commit the file is what it was, and afterwards the
        copy is durable; whatever fails before it costs only garbage.
        """
        source, old_stub = file.device, file.node.stub
        await _open_data(file)
        status = os.fstat(file.native.attr_fd)
        stub = layout.make_stub(target.id, target.path, file.node.path())
        self._namespace.files.object_made(stub.object_id)
        object_fd = await _copy(file, target, stub, status)
        target.native.add_used(os.fstat(object_fd).st_blocks * 512)
        shadow_fd = await self._make_shadow(stub, status, object_fd)
        counted = file.native.counted_bytes
        self._commit(file, target, stub, shadow_fd, object_fd)
        if old_stub is None:
            source.native.add_used(-counted)
        else:
            self._namespace.upkeep.remove(old_stub)
        await self._sync_parent(file)
        if file.node.stub is not None:
            self._namespace.upkeep.attributes_changed(file.node.stub)
        self._count(files=1, bytes=status.st_size)

    async def _make_shadow(self, stub: Stub, status: os.stat_result, object_fd: int) -> int:
        try:
            fd = layout.create_shadow(self._home.shadows_fd, stub, status)
            await trio.to_thread.run_sync(layout.sync_all, (fd, self._home.shadows_fd))
        except OSError:
            os.close(object_fd)
            self._namespace.upkeep.remove(stub)
            raise
        return fd

    def _commit(
        self, file: OpenFile, target: Device, stub: Stub, shadow_fd: int, object_fd: int
    ) -> None:
        """Atomic for the trio thread: the name is what it is found to be here."""
        node = file.node
        if not self._may_move(file):
            self._discard(stub, object_fd, shadow_fd)
            raise OSError(errno.EMLINK, "it got a second link meanwhile")
        # chmod, chown and utimens do not wait at the gate.
        layout.copy_attributes(os.fstat(file.native.attr_fd), shadow_fd)
        key = os.fstat(shadow_fd).st_ino
        if node.names:
            parent, name = node.names[0]
            parent_fd = self._namespace.nodes.directory_fd(parent)
            try:
                layout.replace_with_stub(self._home.tmp_fd, parent_fd, name, target.path, stub)
            except OSError:
                self._discard(stub, object_fd, shadow_fd)
                raise
            file.device.files -= 1
            target.files += 1
            self._namespace.nodes.rekey(node, key, stub)
        else:
            # Removed, and still open: the object goes when it is closed.
            node.stub = stub
        file.native.repoint_object(target.native, shadow_fd, object_fd, stub.object)
        file.native.nlink = 1 if node.names else 0
        file.device = target
        file.read_only = False

    def _discard(self, stub: Stub, object_fd: int, shadow_fd: int) -> None:
        """Throws the copy away; the file stays what it was."""
        os.close(object_fd)
        os.close(shadow_fd)
        self._namespace.upkeep.remove(stub)

    async def _sync_parent(self, file: OpenFile) -> None:
        if not file.node.names:
            return
        try:
            await self._namespace.sync_directory(file.node.names[0][0])
        except OSError as error:
            # The device may come back with the old file under this name.
            self.degraded = f"fsync of a directory failed ({error.strerror}) after a file moved"
            log.critical("%s: %s", os.fsdecode(file.node.path()), self.degraded)

    def _count(self, *, files: int = 0, bytes: int = 0, failed: int = 0) -> None:
        t = self.totals
        self.totals = SpillTotals(t.files + files, t.bytes + bytes, t.failed + failed)


async def _room_came(device: Device) -> bool:
    with trio.move_on_after(ROOM_WAIT_S):
        # Room is given back by C threads, which signal nobody: it is looked for.
        while device.room.free_bytes < _WRITE_BYTES_MAX:  # noqa: ASYNC110
            await trio.sleep(_ROOM_POLL_S)
        return True
    return False


async def _open_data(file: OpenFile) -> None:
    if file.native.data_fd < 0:
        await _in_threads_of(file.device, file.native.open_data)


async def _in_threads_of(device: Device, act: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(act, limiter=device.limiter)


async def _copy(file: OpenFile, target: Device, stub: Stub, status: os.stat_result) -> int:
    """A copy of the file's data on target; when it fails, target is to blame."""
    from_fd = file.native.data_fd
    try:
        return await _in_threads_of(target, lambda: _copy_to_object(target, stub, from_fd, status))
    except OSError as error:
        target.failed(f"cannot take a file over: {error.strerror}")
        raise


def _copy_to_object(device: Device, stub: Stub, from_fd: int, status: os.stat_result) -> int:
    """A durable copy of a file that does not change; its descriptor.  May block."""
    _native.make_dirs(device.objects_fd, stub.object)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = _native.open_beneath(device.objects_fd, stub.object, flags, 0o600)
    try:
        _native.copy_data(from_fd, fd, 0, status.st_size)
        os.ftruncate(fd, status.st_size)
        layout.copy_attributes(status, fd)
        os.fsync(fd)
        layout.sync_object_directories(device.objects_fd, stub.object)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        os.close(fd)
        os.unlink(stub.object, dir_fd=device.objects_fd)
        raise
    return fd
