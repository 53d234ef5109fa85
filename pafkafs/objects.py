"""What happens to objects later, in the background: removal, and attributes that changed.

The namespace never waits for a slow device; it leaves word here.
"""

import errno
import logging
import os
from collections.abc import Callable, Mapping

import trio

from pafkafs import _native
from pafkafs.device import Device, Home
from pafkafs.layout import Stub, copy_attributes, reopen_directory, sync_all

log = logging.getLogger(__name__)

# Removals are collected for so long, so that one fsync of a directory serves many.
_BATCH_S = 0.05


class ObjectUpkeep:
    """The work left to do on the objects of a mount."""

    def __init__(self, home: Home, devices: Mapping[str, Device]) -> None:
        self._home = home
        self._devices = devices
        self._unsynced: dict[int, int] = {}  # inode of a directory that lost stubs: descriptor
        self._removals: list[Stub] = []
        self._attributes: dict[str, Stub] = {}
        self._pins: list[tuple[int, Device, int]] = []
        self._wake = trio.Event()
        self._wake_free = trio.Event()
        self.kept: set[str] = set()  # ids of objects with several stubs: never removed

    def stub_removed(self, parent_fd: int) -> None:
        """A stub is gone from this directory, which was not fsynced since."""
        inode = os.stat(parent_fd).st_ino
        if inode not in self._unsynced:
            self._unsynced[inode] = reopen_directory(parent_fd)

    def remove(self, stub: Stub) -> None:
        """Nothing refers to this object and its shadow any more."""
        self._removals.append(stub)
        self._wake.set()

    def free(self, pin: int, device: Device, count: int) -> None:
        """Closes the last descriptor of a removed file of count allocated bytes, in a thread."""
        self._pins.append((pin, device, count))
        self._wake_free.set()

    def attributes_changed(self, stub: Stub) -> None:
        """The object is to get the mode, owner and times of its shadow."""
        self._attributes[stub.object_id] = stub
        self._wake.set()

    async def run(self) -> None:
        """Does the work as it comes; never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_frees)
            while True:
                await self._wake.wait()
                await trio.sleep(_BATCH_S)
                await self.flush()

    async def _run_frees(self) -> None:
        """Apart from the rest: room on the fast tier does not wait for a slow device."""
        while True:
            await self._wake_free.wait()
            self._wake_free = trio.Event()
            pins, self._pins = self._pins, []
            await trio.to_thread.run_sync(_free, pins)

    async def flush(self) -> None:
        """Does what is to be done now, as far as the devices answer."""
        self._wake = trio.Event()
        removals, self._removals = self._removals, []
        attributes, self._attributes = self._attributes, {}
        unsynced, self._unsynced = self._unsynced, {}
        try:
            await self._each_device(list(attributes.values()), self._copy_attributes)
            # **Invariant:** an object is not removed before the removal of its stub is durable.
            await trio.to_thread.run_sync(_sync_and_close, list(unsynced.values()))
        except OSError as error:
            log.error("fsync after a removal failed, objects are kept: %s", error.strerror)
            return
        removals = [stub for stub in removals if stub.object_id not in self.kept]
        await self._each_device(removals, self._remove)

    async def _each_device(
        self, stubs: list[Stub], act: Callable[[Device, list[Stub]], None]
    ) -> None:
        """Runs act on each device's own share, in its own threads, and does not wait for a
        device that hangs longer than the others need."""
        async with trio.open_nursery() as nursery:
            for device in self._devices.values():
                mine = [stub for stub in stubs if stub.device_id == device.id]
                if mine:
                    nursery.start_soon(self._on_device, device, mine, act)

    async def _on_device(
        self, device: Device, stubs: list[Stub], act: Callable[[Device, list[Stub]], None]
    ) -> None:
        with trio.move_on_after(1.0):  # the thread goes on by itself
            await trio.to_thread.run_sync(
                act, device, stubs, limiter=device.limiter, abandon_on_cancel=True
            )

    def _copy_attributes(self, device: Device, stubs: list[Stub]) -> None:
        for stub in stubs:
            try:
                shadow = os.stat(stub.shadow, dir_fd=self._home.shadows_fd, follow_symlinks=False)
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

    def _remove(self, device: Device, stubs: list[Stub]) -> None:
        for stub in stubs:
            try:
                device.native.add_used(-remove_object(device, stub))
            except OSError as error:
                # The shadow stays too: at the next mount both are garbage.
                _report(device, stub, "cannot remove", error)
                continue
            try:
                os.unlink(stub.shadow, dir_fd=self._home.shadows_fd)
            except FileNotFoundError:
                continue


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
    if directory:
        _remove_empty(device, directory)
    return allocated


def _remove_empty(device: Device, directory: bytes) -> None:
    try:
        os.rmdir(directory, dir_fd=device.objects_fd)
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            raise


_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


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
