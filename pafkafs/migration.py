"""Moves the data of one file from a device to another, under its open handles.

For now files move when they have no room to grow where they are: they spill.
"""

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from pafkafs import layout
from pafkafs.copying import SourceError, copy_to_object
from pafkafs.device import Device, Home
from pafkafs.files import OpenFile
from pafkafs.growing import Pool
from pafkafs.layout import Stub
from pafkafs.namespace import Namespace
from pafkafs.policy import Mode, place_spill

log = logging.getLogger(__name__)

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
        self.pool: Pool | None = None  # of the home device

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
            if self.pool is not None and self.pool.device is file.device:
                self.pool.drain()
            await self._take_tails_back(file)
            if await _room_came(file.device):
                file.native.end_starving(0)
                return
        if self._may_move(file):
            await self._spill(file)
        else:
            file.native.end_starving(errno.ENOSPC)

    async def _take_tails_back(self, file: OpenFile) -> None:
        """What other files have allocated ahead of their writers is room, too."""
        for other in self._namespace.files.all_growing(file.device):
            if file.device.room.free_bytes >= _WRITE_BYTES_MAX:
                break
            if other is not file:
                await self._namespace.files.seal(other)

    async def _spill(self, file: OpenFile) -> None:
        """Moves the file to the first device that takes it.

        The gate stays closed over all attempts: who waits is told once, of the last.
        """
        device = file.device
        await file.close_gate()
        try:
            if file.device is not device:
                file.native.end_starving(0)  # it was moved while this waited at the gate
                return
            if file.native.growing is not None:
                await file.device.run(file.native.seal)
                file.native.switch_backing()
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
                if isinstance(error, SourceError):
                    raise
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
        status = os.fstat(file.native.attr_fd)
        stub = layout.make_stub(target.id, target.path, file.node.path())
        self._namespace.files.object_made(stub.object_id)
        counted = file.native.counted_bytes
        try:
            object_fd = await self._copy(file, status, target, stub)
            await self._replace(file, target, stub, status, object_fd)
        except OSError:
            self._namespace.upkeep.remove(stub, counted=False)
            raise
        durable = await self._sync_parent(file)
        if old_stub is None:
            source.native.add_used(-counted)
        elif durable:
            self._namespace.upkeep.remove(old_stub)
        if file.node.stub is not None:
            self._namespace.upkeep.attributes_changed(file.node.stub)
        self._count(files=1, bytes=status.st_size)

    async def _copy(
        self, file: OpenFile, status: os.stat_result, target: Device, stub: Stub
    ) -> int:
        """A durable copy of the file's data; its descriptor."""
        source = file.device
        try:
            if status.st_size > 0 and file.native.data_fd < 0:
                await source.run(file.native.open_data)
            return await copy_to_object(file.native.data_fd, status, target, stub)
        except SourceError as error:
            source.failed(f"cannot read {os.fsdecode(file.node.path())}: {error.strerror}")
            raise
        except OSError as error:
            target.failed(f"cannot take a file over: {error.strerror}")
            raise

    async def _replace(
        self,
        file: OpenFile,
        target: Device,
        stub: Stub,
        status: os.stat_result,
        object_fd: int,
    ) -> None:
        """Puts the copy in the place of the file."""
        shadow_fd = -1
        try:
            blocks = await target.run(lambda: os.fstat(object_fd).st_blocks)
            shadow_fd = layout.create_shadow(self._home.shadows_fd, stub, status)
            await trio.to_thread.run_sync(layout.sync_all, (shadow_fd, self._home.shadows_fd))
            self._commit(file, target, stub, shadow_fd, object_fd)
        except BaseException:
            target.close_soon(object_fd)
            if shadow_fd >= 0:
                os.close(shadow_fd)
            raise
        target.native.add_used(blocks * 512)

    def _commit(
        self, file: OpenFile, target: Device, stub: Stub, shadow_fd: int, object_fd: int
    ) -> None:
        """Atomic for the trio thread: the name is what it is found to be here."""
        node = file.node
        if not self._may_move(file):
            raise OSError(errno.EMLINK, "it got a second link meanwhile")
        # chmod, chown and utimens do not wait at the gate.
        layout.copy_attributes(os.fstat(file.native.attr_fd), shadow_fd)
        key = os.fstat(shadow_fd).st_ino
        if node.names:
            parent, name = node.names[0]
            parent_fd = self._namespace.nodes.directory_fd(parent)
            layout.replace_with_stub(self._home.tmp_fd, parent_fd, name, target.path, stub)
            file.device.files -= 1
            target.files += 1
            self._namespace.nodes.rekey(node, key, stub)
        else:
            # Removed, and still open: the object goes when it is closed.
            node.stub = stub
        try:
            file.native.repoint_object(target.native, shadow_fd, object_fd, stub.object)
        except OSError as error:
            # Committed, and not in effect.  No error of a device: the mount must not go on.
            raise RuntimeError("cannot re-point an open file") from error
        file.native.nlink = 1 if node.names else 0
        file.device = target
        file.read_only = False

    async def _sync_parent(self, file: OpenFile) -> bool:
        """**Invariant:** what the file was is not removed before its new name is durable."""
        if not file.node.names:
            return True
        try:
            await self._namespace.sync_directory(file.node.names[0][0])
            return True
        except OSError as error:
            # The device may come back with the old file under this name.
            self.degraded = f"fsync of a directory failed ({error.strerror}) after a file moved"
            log.critical("%s: %s", os.fsdecode(file.node.path()), self.degraded)
            return False

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
