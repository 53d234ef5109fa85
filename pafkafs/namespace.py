"""The namespace: names that come and go, all of them system calls on the fast tier.

Errors are the OSErrors of the home filesystem.  Methods that are not async are atomic: one trio
thread runs them all, inline.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import trio

from pafkafs import _native, kafka, layout
from pafkafs.attributes import Changes, apply_changes
from pafkafs.device import Device, Home
from pafkafs.files import LONG_FREE, OpenFile, OpenFiles
from pafkafs.growing import Pool, link_into
from pafkafs.nodes import Attributes, Node
from pafkafs.objects import ObjectUpkeep
from pafkafs.tree import Tree, is_bulk_name

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_INODE_RESERVE_MIN = 16
_INODE_RESERVE_MAX = 4096

_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Caller:
    """Who asked, with umask and set-group-id already applied to modes by the kernel."""

    uid: int
    gid: int


class _Pin(AbstractContextManager["_Pin"]):
    """Keeps what a name leads to while the name is removed.

    Without it the blocks of a large file would be freed here, inline: 0.2 s for 1 GiB.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = fd

    def take(self) -> int | None:
        """The descriptor, if there is one; it is the caller's now."""
        fd, self._fd = self._fd, None
        return fd

    def __exit__(self, *exc_info: object) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Namespace(Tree):
    """Names that come and go.

    place decides on which device a new file starts; with durable_names (power mode) what makes
    a name returns when the name survives a power cut.
    """

    def __init__(
        self,
        home: Home,
        devices: dict[str, Device],
        files: OpenFiles,
        upkeep: ObjectUpkeep,
        place: Callable[[bool], Device],
        *,
        durable_names: bool,
    ) -> None:
        super().__init__(home, devices, files, upkeep)
        self._place = place
        self._durable_names = durable_names
        self.pool: Pool | None = None  # of new segments in persistent memory
        self.segment_size_given = False  # else it is learned
        self._privileged = os.geteuid() == 0

    # -- making -------------------------------------------------------------------------------

    async def create(
        self, parent: Node, name: bytes, mode: int, caller: Caller
    ) -> tuple[Node, int]:
        """A new regular file on the device that placement chooses, and a handle of it."""
        self._check_inodes()
        bulk = is_bulk_name(parent, name)
        device = self._place(bulk)
        if device is self.home_device:
            pooled = self.pool.take() if bulk and self.pool is not None else None
            if pooled is not None:
                file = self._create_growing(parent, name, mode, caller, pooled)
            else:
                file = self._create_plain(parent, name, mode, caller)
        else:
            file = self._create_object(parent, name, mode, caller, device)
        device.files += 1
        self.nodes.add_name(file.node, parent, name)
        if self.pool is not None and bulk:
            self._seal_older(parent, name)
            self.files.note_growing(file)
        handle = self.files.add_handle(file)
        try:
            await self.name_made(parent)
        except OSError:
            self.files.release(handle)
            raise
        return file.node, handle

    def _check_inodes(self) -> None:
        """Leaves inodes for the stubs and shadows of files that have to move."""
        status = os.fstatvfs(self.home.tree_fd)
        reserve = max(_INODE_RESERVE_MIN, min(_INODE_RESERVE_MAX, status.f_files // 100))
        if status.f_files and status.f_favail <= reserve:
            raise OSError(errno.ENOSPC, "no inodes left but the reserve")

    def _create_plain(self, parent: Node, name: bytes, mode: int, caller: Caller) -> OpenFile:
        parent_fd = self.nodes.directory_fd(parent)
        fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=parent_fd)
        try:
            self._give_to(fd, parent_fd, mode, caller)
            status = os.fstat(fd)
            node = self.nodes.obtain(status.st_ino, status, None)
        except OSError:
            os.close(fd)
            os.unlink(name, dir_fd=parent_fd)
            raise
        return self.files.attach_plain(node, self.home_device, fd, read_only=False)

    def _seal_older(self, parent: Node, name: bytes) -> None:
        """Older segments grow no more, and tell at what size Kafka rolls."""
        if kafka.parse_file(os.fsdecode(name)).state is not kafka.FileState.CURRENT:
            return  # the cleaner's
        for file in self.files.growing_in(parent):
            rolled_at, _ = file.native.growing or (0, 0)
            native = self.home_device.native
            if not self.segment_size_given:
                native.segment_bytes = max(native.segment_bytes, rolled_at)
            self.files.start_soon(self.files.seal, file)

    def _create_growing(
        self, parent: Node, name: bytes, mode: int, caller: Caller, pooled: _native.File
    ) -> OpenFile:
        """From the pool."""
        assert self.pool is not None
        parent_fd = self.nodes.directory_fd(parent)
        try:
            self._give_to(pooled.data_fd, parent_fd, mode, caller)
            made_ns = time.time_ns()
            os.utime(pooled.data_fd, ns=(made_ns, made_ns))
            pooled.set_mtime(made_ns)
            link_into(pooled, parent_fd, name)
        except OSError:
            self.pool.put_back(pooled)
            raise
        status = os.fstat(pooled.data_fd)
        node = self.nodes.obtain(status.st_ino, status, None, ino=pooled.ino)
        return self.files.attach_growing(node, self.home_device, pooled)

    def _create_object(
        self, parent: Node, name: bytes, mode: int, caller: Caller, device: Device
    ) -> OpenFile:
        """Stub and shadow now; the object by the device's worker, which may take its time."""
        parent_fd = self.nodes.directory_fd(parent)
        path = os.path.join(parent.path(), name)
        stub = layout.make_stub(device.id, device.path, path)
        fd = os.open(stub.shadow, _CREATE_FLAGS, 0o600, dir_fd=self.home.shadows_fd)
        try:
            self._give_to(fd, parent_fd, mode, caller)
            os.symlink(layout.stub_text(device.path, stub), name, dir_fd=parent_fd)
        except OSError:
            os.close(fd)
            os.unlink(stub.shadow, dir_fd=self.home.shadows_fd)
            raise
        status = os.fstat(fd)
        node = self.nodes.obtain(status.st_ino, status, stub)
        file = self.files.attach_object(node, device, fd, create=True, nlink=1)
        self.files.open_data_soon(file)
        return file

    def _give_to(self, fd: int, parent_fd: int, mode: int, caller: Caller) -> None:
        if self._privileged:
            os.fchown(fd, caller.uid, self._group_for(parent_fd, caller))
        os.fchmod(fd, stat.S_IMODE(mode))

    @staticmethod
    def _group_for(parent_fd: int, caller: Caller) -> int:
        parent = os.stat(parent_fd)
        return parent.st_gid if parent.st_mode & stat.S_ISGID else caller.gid

    async def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> Node:
        """A new directory; it inherits set-group-id."""
        self._check_inodes()
        parent_fd = self.nodes.directory_fd(parent)
        inherited = os.stat(parent_fd).st_mode & stat.S_ISGID
        os.mkdir(name, 0o700, dir_fd=parent_fd)
        self._give_name_to(parent_fd, name, stat.S_IMODE(mode) | inherited, caller)
        await self.name_made(parent)
        return self.lookup(parent, name)

    async def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        """A fifo, a socket, a device node, or an empty regular file."""
        self._check_inodes()
        parent_fd = self.nodes.directory_fd(parent)
        os.mknod(name, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=parent_fd)
        self._give_name_to(parent_fd, name, stat.S_IMODE(mode), caller)
        if stat.S_ISREG(mode):
            self.home_device.files += 1
        await self.name_made(parent)
        return self.lookup(parent, name)

    async def symlink(self, parent: Node, name: bytes, text: bytes, caller: Caller) -> Node:
        """An ordinary symlink; a text that could be taken for a stub's is refused."""
        if layout.looks_like_stub(text):
            raise PermissionError(errno.EPERM, "the text of this symlink is reserved")
        self._check_inodes()
        parent_fd = self.nodes.directory_fd(parent)
        os.symlink(text, name, dir_fd=parent_fd)
        if self._privileged:
            group = self._group_for(parent_fd, caller)
            os.chown(name, caller.uid, group, dir_fd=parent_fd, follow_symlinks=False)
        await self.name_made(parent)
        return self.lookup(parent, name)

    def _give_name_to(self, parent_fd: int, name: bytes, mode: int, caller: Caller) -> None:
        """Through a descriptor: whoever owns the directory could plant a symlink meanwhile."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        try:
            changes = Changes(mode=mode)
            if self._privileged:
                group = self._group_for(parent_fd, caller)
                changes = Changes(mode=mode, uid=caller.uid, gid=group)
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                apply_changes(f"/proc/self/fd/{fd}", changes)
        finally:
            os.close(fd)

    async def link(self, node: Node, parent: Node, name: bytes) -> Node:
        """A further name; of a demoted file, of its stub."""
        old_parent, old_name = node.names[0]
        os.link(
            old_name,
            name,
            src_dir_fd=self.nodes.directory_fd(old_parent),
            dst_dir_fd=self.nodes.directory_fd(parent),
            follow_symlinks=False,
        )
        self.nodes.add_name(node, parent, name)
        self._links_changed(node)
        self.names_changed(node)
        await self.name_made(parent)
        return node

    def _links_changed(self, node: Node) -> None:
        if node.stub is not None and node.file is not None:
            node.file.native.nlink = self.stub_links(node)

    async def name_made(self, *parents: Node) -> None:
        """In power mode: the entries of these directories are durable when it returns."""
        if self._durable_names:
            for parent in parents:
                await self.sync_directory(parent)

    async def sync_directory(self, node: Node) -> None:
        """fsync of a directory.  Shadows go first: a durable stub must find its own."""
        fd = layout.reopen_directory(self.nodes.directory_fd(node))
        try:
            await trio.to_thread.run_sync(layout.sync_all, (self.home.shadows_fd, fd))
        finally:
            os.close(fd)

    # -- removing and renaming ----------------------------------------------------------------

    def unlink(self, parent: Node, name: bytes) -> None:
        """Removes a name; with the last one the file, once it is closed."""
        parent_fd = self.nodes.directory_fd(parent)
        status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        node = self.node_of(parent, parent_fd, name, status)
        before = self.attributes(node)
        with self._pin(node, before, parent_fd, name) as pin:
            os.unlink(name, dir_fd=parent_fd)
            self._name_gone(node, parent, name, before, parent_fd, pin)

    @staticmethod
    def _pin(node: Node, before: Attributes, parent_fd: int, name: bytes) -> _Pin:
        if node.file is not None or node.stub is not None or node.is_directory:
            return _Pin()
        small = before.blocks * 512 <= LONG_FREE
        if small and before.nlink == 1 and stat.S_ISREG(before.status.st_mode):
            return _Pin()
        return _Pin(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd))

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Removes an empty directory, which may still be open."""
        node = self.lookup(parent, name)
        self.nodes.pin_directory(node)
        os.rmdir(name, dir_fd=self.nodes.directory_fd(parent))
        self._directory_gone(node)

    def _directory_gone(self, node: Node) -> None:
        self.nodes.clear_names(node)
        self.nodes.release_key(node)
        self.nodes.drop_if_unused(node)

    def _name_gone(
        self,
        node: Node,
        parent: Node,
        name: bytes,
        before: Attributes,
        parent_fd: int,
        pin: _Pin,
    ) -> None:
        self.nodes.remove_name(node, parent, name)
        if before.nlink > 1 or not stat.S_ISREG(before.status.st_mode):
            if node.stub is not None and node.file is not None:
                node.file.native.nlink = before.nlink - 1
            self.names_changed(node)
            if not node.names and node.fd is None:
                node.fd = pin.take()  # without a name that we know, it is all that reaches it
        else:
            self._file_gone(node, before, parent_fd, pin)
        if before.nlink <= 1:
            self.nodes.clear_names(node)
            self.nodes.release_key(node)
        self.nodes.drop_if_unused(node)

    def _file_gone(self, node: Node, before: Attributes, parent_fd: int, pin: _Pin) -> None:
        """The last name of a regular file was removed."""
        device = self.home_device if node.stub is None else self.devices[node.stub.device_id]
        if node.refused:
            self.damaged.pop(before.status.st_ino, None)
        else:
            device.files -= 1
        node.gone = before.status
        if node.stub is not None:
            self.upkeep.stub_removed(parent_fd)
        if node.file is not None:
            node.file.native.nlink = 0
            self.files.close_if_unused(node.file)
            return  # closing it does the rest
        if node.stub is not None:
            self.upkeep.remove(node.stub)
        elif (fd := pin.take()) is not None:
            self.upkeep.free(fd, device, before.blocks * 512)
        else:
            device.native.add_used(-before.blocks * 512)

    def file_closed(self, file: OpenFile) -> None:
        """The last handle of a file is gone: without a name its data goes too."""
        node = file.node
        if node.gone is None:
            return
        if node.stub is not None:
            self.upkeep.remove(node.stub)
        else:
            file.device.native.add_used(-file.native.counted_bytes)

    async def rename(
        self, old_parent: Node, old: bytes, new_parent: Node, new: bytes, flags: int
    ) -> None:
        """renameat2.  Data and objects stay where they are, whatever is renamed."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "unknown flags of rename")
        moved = self.lookup(old_parent, old)
        target = self._if_there(new_parent, new)
        if target is moved:
            return
        old_fd = self.nodes.directory_fd(old_parent)
        new_fd = self.nodes.directory_fd(new_parent)
        if target is None or flags & RENAME_EXCHANGE:
            _native.rename(old_fd, old, new_fd, new, flags)
            if target is not None:
                self.nodes.remove_name(target, new_parent, new)
                self.nodes.add_name(target, old_parent, old)
            self._renamed(moved, old_parent, old, new_parent, new)
        elif target.is_directory:
            self.nodes.pin_directory(target)
            _native.rename(old_fd, old, new_fd, new, flags)
            self._renamed(moved, old_parent, old, new_parent, new)
            self._directory_gone(target)
        else:
            before = self.attributes(target)
            with self._pin(target, before, new_fd, new) as pin:
                _native.rename(old_fd, old, new_fd, new, flags)
                self._renamed(moved, old_parent, old, new_parent, new)
                self._name_gone(target, new_parent, new, before, new_fd, pin)
        await self.name_made(new_parent, *([] if old_parent is new_parent else [old_parent]))

    def _if_there(self, parent: Node, name: bytes) -> Node | None:
        try:
            return self.lookup(parent, name)
        except FileNotFoundError:
            return None

    def _renamed(self, node: Node, old_parent: Node, old: bytes, parent: Node, new: bytes) -> None:
        self.nodes.remove_name(node, old_parent, old)
        self.nodes.add_name(node, parent, new)
        self.names_changed(node)
