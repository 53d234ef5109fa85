"""How a mount ends: everything in the kernel and in the daemon is made durable."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from pafkafs import _native, mountpoint
from pafkafs.device import Device
from pafkafs.errors import EXIT_NOT_SYNCED, PafkafsError
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.growing import Pool
from pafkafs.moving import Mover
from pafkafs.objects import ObjectUpkeep

log = logging.getLogger(__name__)

# For each of: the kernel's stores; half of it the moves, the upkeep, and a device that writes
# nothing meanwhile.  One that writes gets as long as it needs, but for the maximum.
SYNC_PATIENCE_S = 60.0
SYNC_MAX_S = 300.0
LONGEST_S = 2 * SYNC_PATIENCE_S + 2 * SYNC_MAX_S  # the home device waits for the others


class NotSynced(PafkafsError):
    """The mount has ended, and what was written may not be durable."""

    exit_status = EXIT_NOT_SYNCED


class Ending:
    """The end of one mount."""

    def __init__(
        self,
        front: _native.Front,
        devices: Sequence[Device],
        files: OpenFiles,
        upkeep: ObjectUpkeep,
        mover: Mover,
        pool: Pool | None,
    ) -> None:
        self._front = front
        self._devices = devices
        self._statistics = {device.id: _statistics(device) for device in devices}
        self._files = files
        self._upkeep = upkeep
        self._mover = mover
        self._pool = pool

    async def unmount(self, where: str) -> None:
        """Detaches, also when busy: then open files are cut off, after everything is synced."""
        with trio.move_on_after(SYNC_PATIENCE_S):
            # Stores into mappings are still in the kernel.  A process of its own, because a
            # call into our own mount may wait for us.
            await trio.run_process(
                ["sync", "-f", where], check=False, capture_stdout=True, capture_stderr=True
            )
        try:
            await trio.to_thread.run_sync(lambda: mountpoint.detach(where, lazy=False))
        except OSError as error:
            log.warning("%s is busy (%s): open files are cut off", where, error.strerror)
            with suppress(OSError):  # detached already, by umount -l
                await trio.to_thread.run_sync(lambda: mountpoint.detach(where, lazy=True))
            await trio.to_thread.run_sync(self._front.stop)

    async def finish(self) -> list[str]:
        """After the last request: all that was written is made durable.  The paths of the devices
        of which that may not be so."""
        unsynced: list[str] = []
        with trio.CancelScope(shield=True):
            if self._pool is not None:
                self._pool.drain()
            with trio.move_on_after(SYNC_PATIENCE_S / 2):
                await self._mover.end()
            await self._upkeep.flush(SYNC_PATIENCE_S / 2)
            log.info("all requests are answered: the devices are synced")
            # The home device last: its names lead to what the others have.
            async with trio.open_nursery() as nursery:
                for device in self._devices[1:]:
                    nursery.start_soon(self._sync_device, device, unsynced)
            await self._sync_device(self._devices[0], unsynced)
            self._files.end()
            self._front.stop()
            for device in self._devices:
                if device.native.stop() > 0:
                    log.error("%s hangs and is left behind", os.fsdecode(device.path))
        return unsynced

    async def _sync_device(self, device: Device, unsynced: list[str]) -> None:
        """Everything on it, open or not.  A device that hangs uses up its own patience only."""
        done = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, device, nursery.cancel_scope)
            synced = [await self._sync_file(f) for f in self._files.all() if f.device is device]
            try:
                await device.run(lambda: _native.syncfs(device.fd))
                done = all(synced)
            except OSError as error:
                device.failed(f"sync at unmount: {error.strerror}")
            nursery.cancel_scope.cancel()
        if not done:
            path = os.fsdecode(device.path)
            log.error("%s was not synced at unmount", path)
            unsynced.append(path)

    async def _watch(self, device: Device, syncing: trio.CancelScope) -> None:
        """Ends the sync of a device that stands still: there may be gigabytes to write."""
        until_s = trio.current_time() + SYNC_MAX_S
        before = self._written(device)
        while trio.current_time() < until_s:
            await trio.sleep(SYNC_PATIENCE_S / 2)
            now = self._written(device)
            if now == before:
                break
            before = now
        syncing.cancel()

    def _written(self, device: Device) -> str | None:
        """What differs when the device has written something; None when that is not known."""
        try:
            fields = self._statistics[device.id].read_text().split()
        except OSError:
            return None  # a network filesystem, say
        return fields[_SECTORS_WRITTEN]

    async def _sync_file(self, file: OpenFile) -> bool:
        """Whether it is durable; not so when an fsync failed before, and nobody was told."""
        if file.node.file is not file or file.node.gone is not None:
            return True  # closed while others were synced, or removed
        try:
            async with self._files.used(file):
                await file.seal()
                await file.sync()
                return not file.native.error_unseen
        except OSError as error:
            stub = file.node.stub
            if stub is not None and stub.object_id in file.device.missing_objects:
                return True  # there is nothing to sync, and status has told
            file.device.failed(f"fsync at unmount: {error.strerror}")
            return False


_SECTORS_WRITTEN = 6  # the field of /sys/dev/block/MAJ:MIN/stat


def _statistics(device: Device) -> Path:
    number = os.fstat(device.fd).st_dev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
