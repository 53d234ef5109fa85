"""Answers the lack of room: waits for some, or moves the file that needs it."""

import errno
import logging
import os
from collections.abc import Mapping

import trio

from pafkafs.copying import SourceError
from pafkafs.device import Device
from pafkafs.files import OpenFile
from pafkafs.growing import Pool
from pafkafs.moving import Mover
from pafkafs.namespace import Namespace
from pafkafs.placement import Mode, place_spill

log = logging.getLogger(__name__)

# A writer waits so long for room that is being freed (a removed segment whose blocks a worker
# still returns) before its file is moved; and so long while segments are on their way down.
ROOM_WAIT_S = 0.2
DRAIN_WAIT_S = 30.0
_ROOM_POLL_S = 0.01
# So long, counted from its first request without room, a file does not try a device again.
_EPISODE_S = 2.0
# Room that must be there before a parked write is tried again: the largest WRITE.
_WRITE_BYTES_MAX = 1 << 20


class Spiller:
    """Makes room for one request after the other."""

    def __init__(
        self,
        namespace: Namespace,
        mover: Mover,
        devices: Mapping[str, Device],
        mode: Mode,
        pool: Pool | None,
    ) -> None:
        """pool is that of the home device."""
        self._namespace = namespace
        self._mover = mover
        self._devices = devices
        self._mode = mode
        self._pool = pool

    async def make_room(self, file: OpenFile) -> None:
        """A request of this file waits for room; it goes on, or fails with ENOSPC."""
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
            if self._pool is not None and self._pool.device is file.device:
                self._pool.drain()
            await self._take_tails_back(file)
            if await self._room_came(file.device):
                file.native.end_starving(0)
                return
        if file.device.id != here:
            file.native.end_starving(0)  # it was moved while this waited
        elif self._mover.may_move(file):
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

    async def _room_came(self, device: Device) -> bool:
        """Whether room came in time.  A drain that goes on frees some sooner or later."""
        began = trio.current_time()
        # Room is given back by C threads, which signal nobody: it is looked for.
        while device.room.free_bytes < _WRITE_BYTES_MAX:
            waited = trio.current_time() - began
            source = os.fsdecode(device.path)
            draining = any(move.source == source for move in self._mover.running)
            if waited > (DRAIN_WAIT_S if draining else ROOM_WAIT_S):
                return False
            await trio.sleep(_ROOM_POLL_S)
        return True

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
            if not await self._move_anywhere(file):
                file.native.end_starving(errno.ENOSPC)
        finally:
            file.open_gate()

    async def _move_anywhere(self, file: OpenFile) -> bool:
        while self._mover.may_move(file) and (target := self._choose(file)) is not None:
            file.devices_tried.add(target.id)
            try:
                await self._mover.move(file, target, "spilled", gate_closed=True)
                return True
            except SourceError:
                raise
            except OSError as error:
                path = os.fsdecode(file.node.path())
                log.error("cannot move %s: %s", path, error.strerror)
        return False

    def _choose(self, file: OpenFile) -> Device | None:
        tried = file.devices_tried - {file.device.id}
        devices = [d for d in self._devices.values() if d.id not in tried]
        source = devices.index(file.device)
        need = self._namespace.attributes(file.node).blocks * 512 + _WRITE_BYTES_MAX
        chosen = place_spill(self._mode, [d.room for d in devices], source, need)
        return None if chosen is None else devices[chosen]
