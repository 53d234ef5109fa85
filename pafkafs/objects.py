"""What happens to objects later, in the background: removal, and attributes that changed.

The namespace never waits for a slow device; it leaves word here.
"""

import logging
import os
from collections.abc import Callable, Mapping

import trio

from pafkafs import _native
from pafkafs.device import Device, Home
from pafkafs.layout import (
    Stub,
    copy_attributes,
    remove_empty,
    reopen_directory,
    shadow_status,
    sync_all,
)

log = logging.getLogger(__name__)

# Removals are collected for so long, so that one fsync of a directory serves many.
_BATCH_S = 0.05


class _Queue:
    """What is left to do on one device: each object once, what came last."""

    def __init__(self) -> None:
        self.attributes: dict[str, Stub] = {}
        self.removals: list[tuple[Stub, bool]] = []  # and whether its room was counted
        self.wake = trio.Event()

    def __bool__(self) -> bool:
        return bool(self.attributes or self.removals)


class ObjectUpkeep:
    """The work left to do on the objects of a mount.  A device that hangs holds up its own."""

    def __init__(
        self, home: Home, devices: Mapping[str, Device], is_counted: Callable[[Stub], bool]
    ) -> None:
        """is_counted tells, once, whether the room of an object counts as used."""
        self._is_counted = is_counted
        self._home = home
        self._devices = devices
        self._queues = {id: _Queue() for id in devices}
        self._unsynced: dict[int, int] = {}  # inode of a directory that lost stubs: descriptor
        self._sync_lock = trio.Lock()
        self._sync_failed = False  # no removal of a name is known to be durable any more
        self._pins: list[tuple[int, Device, int]] = []
        self._wake_free = trio.Event()
        # Ids of objects with several stubs: never removed.  None until all stubs are known:
        # nothing is removed before.
        self._kept: set[str] | None = None

    def stub_goes(self, parent_fd: int) -> None:
        """A stub is about to go from this directory, before the next await, and nothing can fail
        any more once it has.  OSError: it must stay."""
        inode = os.stat(parent_fd).st_ino
        if inode not in self._unsynced:
            self._unsynced[inode] = reopen_directory(parent_fd)

    def remove(self, stub: Stub, *, counted: bool = True) -> None:
        """Nothing refers to this object and its shadow any more."""
        queue = self._queues[stub.device_id]
        queue.attributes.pop(stub.object_id, None)
        queue.removals.append((stub, counted))
        queue.wake.set()

    def stubs_are_known(self, kept: set[str]) -> None:
        """Objects may be removed from now on, but not those that several stubs have."""
        self._kept = kept
        for queue in self._queues.values():
            queue.wake.set()

    def free(self, pin: int, device: Device, count: int) -> None:
        """Closes the last descriptor of a removed file of count allocated bytes, in a thread."""
        self._pins.append((pin, device, count))
        self._wake_free.set()

    def attributes_changed(self, stub: Stub) -> None:
        """The object is to get the mode, owner and times of its shadow."""
        queue = self._queues[stub.device_id]
        queue.attributes[stub.object_id] = stub
        queue.wake.set()

    async def run(self) -> None:
        """Does the work as it comes; never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_frees)
            for device in self._devices.values():
                nursery.start_soon(self._run_device, device, self._queues[device.id])

    async def _run_frees(self) -> None:
        while True:
            await self._wake_free.wait()
            self._wake_free = trio.Event()
            pins, self._pins = self._pins, []
            await trio.to_thread.run_sync(_free, pins)

    async def _run_device(self, device: Device, queue: _Queue) -> None:
        while True:
            await queue.wake.wait()
            await trio.sleep(_BATCH_S)
            await self._work_off(device, queue)

    async def flush(self, patience_s: float) -> None:
        """Does what is left to do, as far as the devices answer.  When run was cancelled."""
        async with trio.open_nursery() as nursery:
            for device in self._devices.values():
                nursery.start_soon(self._flush_device, device, patience_s)

    async def _flush_device(self, device: Device, patience_s: float) -> None:
        queue = self._queues[device.id]
        with trio.move_on_after(patience_s):
            await self._work_off(device, queue)
        if queue:
            left = len(queue.attributes) + len(queue.removals)
            device.failed(f"{left} changes of objects were left to the next mount")

    async def _work_off(self, device: Device, queue: _Queue) -> None:
        """What a cancelled caller leaves undone stays in the queue."""
        queue.wake = trio.Event()
        attributes, queue.attributes = queue.attributes, {}
        removals = list(queue.removals) if self._kept is not None else []
        if attributes:
            stubs = list(attributes.values())
            try:
                await device.run(lambda: self._copy_attributes(device, stubs))
            except trio.Cancelled:
                queue.attributes = {**attributes, **queue.attributes}
                raise
        if removals and await self._removals_are_durable():
            await device.run(lambda: self._remove(device, removals))
            del queue.removals[: len(removals)]

    async def _removals_are_durable(self) -> bool:
        """**Invariant:** an object is not removed before the removal of its stub is durable."""
        async with self._sync_lock:
            unsynced, self._unsynced = self._unsynced, {}
            try:
                with trio.CancelScope(shield=True):  # nobody else knows of them any more
                    await trio.to_thread.run_sync(_sync_and_close, list(unsynced.values()))
            except OSError as error:
                log.error("fsync after a removal failed, objects are kept: %s", error.strerror)
                self._sync_failed = True
        return not self._sync_failed

    def _copy_attributes(self, device: Device, stubs: list[Stub]) -> None:
        for stub in stubs:
            try:
                shadow = shadow_status(self._home.shadows_fd, stub)
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                fd = _native.open_beneath(device.objects_fd, stub.object, flags)
                try:
                    copy_attributes(shadow, fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                _report(device, stub, "cannot set attributes", error)

    def _remove(self, device: Device, removals: list[tuple[Stub, bool]]) -> None:
        for stub, counted in removals:
            if stub.object_id in (self._kept or ()):
                continue
            try:
                freed = remove_object(device, stub)
                device.native.add_used(-freed if counted and self._is_counted(stub) else 0)
            except OSError as error:
                # The shadow stays too: at the next mount both are garbage.
                _report(device, stub, "cannot remove", error)
                continue
            try:
                os.unlink(stub.shadow, dir_fd=self._home.shadows_fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                _report(device, stub, "cannot remove the shadow of", error)


def remove_object(device: Device, stub: Stub) -> int:
    """Unlinks an object; the bytes that it had allocated.  May block."""
    directory, _, name = stub.object.rpartition(b"/")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        fd = _native.open_beneath(device.objects_fd, directory or b".", flags)
        try:
            allocated = os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
            os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return 0  # a file that never got its object
    remove_empty(device.objects_fd, directory)
    return allocated


def _report(device: Device, stub: Stub, what: str, error: OSError) -> None:
    device.failed(f"{what} {os.fsdecode(stub.object)}: {error.strerror}")


def _sync_and_close(fds: list[int]) -> None:
    try:
        sync_all(fds)
    finally:
        for fd in fds:
            os.close(fd)


def _free(pins: list[tuple[int, Device, int]]) -> None:
    for pin, device, count in pins:
        os.close(pin)
        device.native.add_used(-count)
