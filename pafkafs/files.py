"""Open files: the Python side of native File, one for each open inode.

Contents never pass through here.  What does: opening and closing, truncation, the gate.
"""

import errno
import itertools
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from pafkafs import _native, kernel
from pafkafs.device import Device
from pafkafs.nodes import Node

# Freeing more bytes than this is not for the trio thread.
LONG_FREE = 16 << 20


_OPEN_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class OpenFile:
    """An open inode with its handles.

    users counts handles and operations of our own; the last one closes it.
    """

    __slots__ = (
        "device",
        "devices_tried",
        "gate_open",
        "moving",
        "mtime_set_ns",
        "native",
        "node",
        "quiet",
        "read_only",
        "starving_since",
        "users",
    )

    def __init__(self, node: Node, native: _native.File, device: Device, read_only: bool) -> None:
        self.node = node
        self.native = native
        self.device = device
        self.read_only = read_only  # without privilege, of a file with mode 0400
        self.users = 0
        self.moving = False  # a copy of it is under way
        self.mtime_set_ns: int | None = None  # by utimens, since a seal began
        self.starving_since = -math.inf
        self.devices_tried: set[str] = set()  # for room, since then
        self.gate_open: trio.Event | None = None  # set while the gate is closed
        self.quiet: trio.Event | None = None

    async def close_gate(self) -> None:
        """No change of the file is under way when this returns, and none begins.  Waits for who
        has closed it before."""
        while self.gate_open is not None:
            await self.gate_open.wait()
        self.gate_open = trio.Event()
        self.quiet = trio.Event()
        if not self.native.close_gate():
            try:
                await self.quiet.wait()
            except BaseException:  # cancelled: nobody else would open it
                self.open_gate()
                raise
        self.quiet = None

    def open_gate(self) -> None:
        """What waited at the gate goes on."""
        assert self.gate_open is not None
        self.native.open_gate()
        self.gate_open.set()
        self.gate_open = None

    @asynccontextmanager
    async def closed_gate(self) -> AsyncIterator[None]:
        """Closes the gate for the block."""
        await self.close_gate()
        try:
            yield
        finally:
            self.open_gate()

    async def replace_at_gate(self, act: Callable[[], None]) -> None:
        """Runs what prepares another backing in a thread of the device.  For who has closed the
        gate."""
        await self.device.run(act)
        # Here, and not in the thread: others use descriptors of the old one between awaits.
        self.native.switch_backing()

    async def seal(self) -> None:
        """A file that grows in persistent memory is as any other when this returns."""
        if self.native.growing is not None:
            async with self.closed_gate():
                await self.seal_at_gate()

    async def seal_at_gate(self) -> None:
        """The same for who has closed the gate."""
        if self.native.growing is None:
            return
        self.mtime_set_ns = None
        await self.replace_at_gate(self.native.seal)
        if self.mtime_set_ns is not None:  # while the seal set that of the last write
            status = os.fstat(self.native.data_fd)
            os.utime(self.native.data_fd, ns=(status.st_atime_ns, self.mtime_set_ns))

    async def truncate(self, size: int) -> None:
        """Sets the size; waits at the gate, and in a worker for a slow device."""
        while True:
            await self.seal()
            try:
                return await self._with_gate_open(
                    lambda: self.native.truncate(size),
                    may_block=lambda: (
                        self.device.slow or self.native.counted_bytes - size > LONG_FREE
                    ),
                )
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise  # else a write has made it grow again

    async def sync(self) -> None:
        """fsync, and the shadow's times for the object."""
        await self._with_gate_open(self.native.sync, may_block=lambda: True)

    async def _with_gate_open(self, act: Callable[[], None], may_block: Callable[[], bool]) -> None:
        while True:
            while self.gate_open is not None:
                await self.gate_open.wait()
            try:
                if not may_block():
                    return act()
                return await self.device.run(act)
            except BlockingIOError:
                # Someone closed the gate between our look and the call.
                await trio.lowlevel.checkpoint()


class OpenFiles:
    """All open files of a mount."""

    def __init__(
        self,
        front: _native.Front,
        nursery: trio.Nursery,
        on_closed: Callable[[OpenFile], None],
    ) -> None:
        self._front = front
        self._nursery = nursery
        self._on_closed = on_closed
        self._handles: dict[int, OpenFile] = {}
        self._numbers = itertools.count(1)
        self._open: set[OpenFile] = set()
        self._growing: dict[Node, set[OpenFile]] = {}  # by the directory they were in
        self._kernel_keeps_up = kernel.drops_pages_after_direct_write(os.uname().release)
        self.opened_objects: set[str] | None = set()  # since the mount; None: nobody asks
        self.unsynced_objects: set[str] = set()  # not open, with attributes to be fsynced
        self._unsound: set[int] = set()  # keys of files, not open, whose fsync failed
        self._ending = False

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def may_bypass_cache(self) -> bool:
        """Whether writes may bypass the page cache, and the file still be mapped and sent."""
        return self._kernel_keeps_up and self._front.mapped_direct_io

    def all(self) -> list[OpenFile]:
        """Every open file, those that stay open to be synced included."""
        return list(self._open)

    def attach_plain(self, node: Node, device: Device, fd: int, *, read_only: bool) -> OpenFile:
        """Makes node's open file of a descriptor of the file itself."""
        native = self._front.open_plain(node.ino, device.native, fd)
        return self._attach(OpenFile(node, native, device, read_only))

    def _attach(self, file: OpenFile) -> OpenFile:
        file.node.file = file
        self._open.add(file)
        return file

    def attach_growing(self, node: Node, device: Device, native: _native.File) -> OpenFile:
        """Makes node's open file of one that grows in persistent memory."""
        return self._attach(OpenFile(node, native, device, read_only=False))

    def note_growing(self, file: OpenFile) -> None:
        """The file has a name and grows."""
        if file.native.growing is not None and file.node.names:
            self._growing.setdefault(file.node.names[0][0], set()).add(file)

    def growing_in(self, directory: Node) -> list[OpenFile]:
        """The files of a directory that grow."""
        return [f for f in self._growing.get(directory, ()) if f.native.growing is not None]

    def all_growing(self, device: Device) -> list[OpenFile]:
        """The files on a device that grow."""
        found = (file for files in self._growing.values() for file in files)
        return [f for f in found if f.device is device and f.native.growing is not None]

    def ahead_bytes(self, device: Device) -> int:
        """What they have allocated there beyond their logical sizes."""
        return sum(file.native.ahead_bytes for file in self.all_growing(device))

    def _forget_growing(self, file: OpenFile) -> None:
        for directory in [d for d, files in self._growing.items() if file in files]:
            self._growing[directory].discard(file)
            if not self._growing[directory]:
                del self._growing[directory]

    def attach_object(
        self, node: Node, device: Device, shadow_fd: int, *, create: bool, nlink: int
    ) -> OpenFile:
        """Makes node's open file of a shadow; its object is opened by the first I/O."""
        assert node.stub is not None
        stub = node.stub
        # What was written before the mount may be in the device's page cache still.
        synced = not create and device.synced and stub.object_id not in self.unsynced_objects
        native = self._front.open_object(
            node.ino, device.native, shadow_fd, stub.object, create, synced
        )
        native.nlink = nlink
        self.unsynced_objects.discard(stub.object_id)
        self.object_made(stub.object_id)
        return self._attach(OpenFile(node, native, device, read_only=False))

    def object_made(self, object_id: str) -> None:
        """An object of this id is about to be, and is no garbage of an earlier mount."""
        if self.opened_objects is not None:
            self.opened_objects.add(object_id)

    def start_soon(self, act: Callable[[OpenFile], Awaitable[None]], file: OpenFile) -> None:
        """Runs an operation on a file in the background, and keeps it open until then."""
        file.users += 1
        self._nursery.start_soon(self._run_and_end_use, act, file)

    async def _run_and_end_use(
        self, act: Callable[[OpenFile], Awaitable[None]], file: OpenFile
    ) -> None:
        try:
            await act(file)
        finally:
            self._end_use(file)

    def open_data_soon(self, file: OpenFile) -> None:
        """Has the object of a new file made before anybody writes to it."""
        self.start_soon(self._open_data, file)

    async def _open_data(self, file: OpenFile) -> None:
        try:
            await file.device.run(file.native.open_data)
        except OSError as error:
            file.device.failed(f"cannot create an object: {error.strerror}")

    def add_handle(self, file: OpenFile) -> int:
        """A new handle of the file, as the kernel gets to know it."""
        handle = next(self._numbers)
        file.native.add_handle(handle)
        self._handles[handle] = file
        file.users += 1
        return handle

    def release(self, handle: int) -> None:
        """The kernel has closed a handle."""
        file = self._handles.pop(handle)
        file.native.remove_handle(handle)
        self._end_use(file)

    @asynccontextmanager
    async def used(self, file: OpenFile) -> AsyncIterator[OpenFile]:
        """Keeps a file open for an operation of our own."""
        file.users += 1
        try:
            yield file
        finally:
            self._end_use(file)

    def _end_use(self, file: OpenFile) -> None:
        file.users -= 1
        self.close_if_unused(file)

    def is_unsound(self, file: OpenFile) -> bool:
        """Whether an fsync of it failed during this mount.  The next one would succeed, though what
        is on the device is not what was written, and is still in the page cache."""
        return file.native.sync_failed or file.node.key in self._unsound

    def forget(self, key: int) -> None:
        """The file is removed: another one may get its key."""
        self._unsound.discard(key)

    def end(self) -> None:
        """All that can be synced was: no file is kept open for it any more.  An operation that is
        cancelled now would begin another one in its place, without end."""
        self._ending = True

    def close_if_unused(self, file: OpenFile) -> None:
        """Closes a file that nobody uses, unless an fsync through a later handle has to know
        that there is something to do, or has an error of this one to see."""
        if file.users > 0:
            return
        if file.node.names and not self._ending:
            if file.node.stub is not None and file.native.unsynced:
                self.start_soon(self._sync, file)
                return
            if file.native.growing is not None:
                file.users += 1
                self._nursery.start_soon(self._seal_and_close, file)
                return
            if file.native.error_unseen:
                return
        if file.native.sync_failed:
            self._unsound.add(file.node.key)
        if file.node.gone is not None:
            self.forget(file.node.key)
        self._open.discard(file)
        if self._growing:
            self._forget_growing(file)
        self._on_closed(file)
        file.native.close()
        file.node.file = None

    async def _seal_and_close(self, file: OpenFile) -> None:
        await self.seal(file)
        if file.native.growing is None:
            self._end_use(file)  # else recovery has to do it

    async def seal(self, file: OpenFile) -> None:
        """Seals; a failure is told, and the file goes on growing."""
        try:
            async with self.used(file):
                await file.seal()
                self._forget_growing(file)
        except OSError as error:
            file.device.failed(f"cannot seal {os.fsdecode(file.node.path())}: {error.strerror}")

    async def _sync(self, file: OpenFile) -> None:
        try:
            await file.sync()
        except OSError as error:
            file.device.failed(f"fsync of {os.fsdecode(file.node.path())}: {error.strerror}")


def open_data(name: bytes, dir_fd: int) -> tuple[int, bool]:
    """Opens a plain file for all its handles: (descriptor, whether it is read-only).

    Never as the caller opened it: O_APPEND would put page-cache writes in the wrong place, and
    a write-only open still has to serve page reads.
    """
    try:
        return os.open(name, os.O_RDWR | _OPEN_FLAGS, dir_fd=dir_fd), False
    except PermissionError:
        return os.open(name, os.O_RDONLY | _OPEN_FLAGS, dir_fd=dir_fd), True
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ETXTBSY):
            raise
        return os.open(name, os.O_RDONLY | _OPEN_FLAGS, dir_fd=dir_fd), True


def open_shadow(name: bytes, shadows_fd: int) -> int:
    """Opens a shadow; without privilege one of a file with mode 0400 is read-only."""
    return open_data(name, shadows_fd)[0]
