"""The namespace: names that come and go, all of them system calls on the fast tier.

Errors are the OSErrors of the home filesystem.  Methods that are not async are atomic: one trio
thread runs them all, inline.
"""

import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import trio

from pafkafs import _native, kafka, layout
from pafkafs.attributes import Changes, apply_changes
from pafkafs.catalogue import Catalogue, Directory, Entry
from pafkafs.device import Device, Home
from pafkafs.files import LONG_FREE, OpenFile, OpenFiles
from pafkafs.growing import Pool
from pafkafs.nodes import Attributes, Node, NodeTable
from pafkafs.objects import ObjectUpkeep
from pafkafs.survey import Survey
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

    place decides on which device a new file of a directory starts; with durable_names (power mode)
    what makes a name returns when the name survives a power cut.
    """

    def __init__(
        self,
        home: Home,
        devices: dict[str, Device],
        nodes: NodeTable,
        files: OpenFiles,
        upkeep: ObjectUpkeep,
        catalogue: Catalogue,
        survey: Survey,
        place: Callable[[Directory, bool], Device],
        *,
        pool: Pool | None,
        learns_segment_size: bool,
        durable_names: bool,
    ) -> None:
        super().__init__(home, devices, nodes, files, upkeep, catalogue, survey)
        self._place = place
        self._durable_names = durable_names
        self._pool = pool  # of new segments in persistent memory
        self._learns_segment_size = learns_segment_size
        self._privileged = os.geteuid() == 0

    # -- making -------------------------------------------------------------------------------

    async def create(
        self, parent: Node, name: bytes, mode: int, caller: Caller
    ) -> tuple[Node, int]:
        """A new regular file on the device that placement chooses, and a handle of it."""
        self._check_inodes()
        bulk = is_bulk_name(parent, name)
        directory = self._known(parent)
        device = self._place(directory, bulk)
        if device is self.home_device:
            file = self._create_growing(parent, name, mode, caller) if bulk else None
            if file is None:
                file = self._create_plain(parent, name, mode, caller)
        else:
            file = self._create_object(parent, name, mode, caller, device)
        device.files += 1
        self.nodes.add_name(file.node, parent, name)
        self._put(directory, parent, name, file.node)
        if self._pool is not None and bulk:
            self._seal_older(parent, name)
            self.files.note_growing(file)
        handle = self.files.add_handle(file)
        try:
            await self.name_made(parent)
        except OSError:
            self.files.release(handle)
            raise
        return file.node, handle

    def _known(self, directory: Node) -> Directory:
        """The directory in the catalogue; what was in it before is known, and is counted."""
        return self.survey.know(directory, self.nodes.directory_fd(directory))

    def _put(
        self,
        directory: Directory,
        parent: Node,
        name: bytes,
        node: Node,
        moved_s: float = -math.inf,
    ) -> None:
        """A node got this name.  What it seals is looked at for the last time."""
        if kafka.segment_base_offset(name) is None or node.refused:
            return
        attributes = self.attributes(node)
        if attributes.nlink > 1 or not stat.S_ISREG(attributes.status.st_mode):
            return
        place = self.place_of(node, attributes)
        sealed = self.catalogue.put(directory, name, place, moved_s)
        if sealed is None:
            return
        before = self._if_there(parent, kafka.segment_name(sealed.base_offset))
        if before is not None:
            self.refresh(before)
            self.nodes.drop_if_unused(before)

    def arrived(self, node: Node, why: str) -> None:
        """The data of a node is on another device now."""
        entry = self.entry(node)
        if entry is not None:
            place = self.place_of(node, self.attributes(node))
            self.catalogue.moved(entry, place, time.monotonic(), why)

    def _check_inodes(self) -> None:
        """Leaves inodes for the stubs and shadows of files that have to move."""
        status = os.fstatvfs(self.home.tree_fd)
        reserve = max(_INODE_RESERVE_MIN, min(_INODE_RESERVE_MAX, status.f_files // 100))
        if status.f_files and status.f_favail <= reserve:
            raise OSError(errno.ENOSPC, "no inodes left but the reserve")

    def _create_plain(self, parent: Node, name: bytes, mode: int, caller: Caller) -> OpenFile:
        """It gets its name last: a crash leaves no name that its owner cannot open."""
        parent_fd = self.nodes.directory_fd(parent)
        try:
            fd = layout.open_unnamed(parent_fd)
        except OSError as error:
            if error.errno not in layout.NO_UNNAMED:
                raise
            with self._made_for(parent, name, mode, caller) as (where, new):
                os.mknod(new, stat.S_IFREG | 0o600, dir_fd=where)
            return self.opened(self.lookup(parent, name))
        try:
            self._give_to(fd, parent_fd, mode, caller)
            status = os.fstat(fd)
            layout.give_name(fd, parent_fd, name)
        except OSError:
            os.close(fd)
            raise
        node = self.nodes.obtain(status.st_ino, status, None)
        return self.files.attach_plain(node, self.home_device, fd, read_only=False)

    def _seal_older(self, parent: Node, name: bytes) -> None:
        """Older segments grow no more, and tell at what size Kafka rolls."""
        if kafka.parse_file(os.fsdecode(name)).state is not kafka.FileState.CURRENT:
            return  # the cleaner's
        for file in self.files.growing_in(parent):
            rolled_at, _ = file.native.growing or (0, 0)
            native = self.home_device.native
            if self._learns_segment_size:
                native.segment_bytes = max(native.segment_bytes, rolled_at)
            self.files.start_soon(self.files.seal, file)

    def _create_growing(
        self, parent: Node, name: bytes, mode: int, caller: Caller
    ) -> OpenFile | None:
        """From the pool; None when there is none that can be used."""
        pooled = self._pool.take() if self._pool is not None else None
        if self._pool is None or pooled is None:
            return None
        parent_fd = self.nodes.directory_fd(parent)
        try:
            made_ns = time.time_ns()
            os.utime(pooled.data_fd, ns=(made_ns, made_ns))
            pooled.set_mtime(made_ns)
        except OSError:
            self._pool.give_up(pooled)
            return None
        try:
            self._give_to(pooled.data_fd, parent_fd, mode, caller)
            status = os.fstat(pooled.data_fd)  # nothing may fail once it has its name
            layout.give_name(pooled.data_fd, parent_fd, name)
        except OSError:
            self._pool.put_back(pooled)
            raise
        node = self.nodes.obtain(status.st_ino, status, None, ino=pooled.ino)
        return self.files.attach_growing(node, self.home_device, pooled)

    def _create_object(
        self, parent: Node, name: bytes, mode: int, caller: Caller, device: Device
    ) -> OpenFile:
        """Stub and shadow now; the object by the device's worker, which may take its time."""
        parent_fd = self.nodes.directory_fd(parent)
        path = os.path.join(parent.path(), name)
        stub = layout.make_stub(device.id, device.path, path)
        self.files.object_made(stub.object_id)  # before anybody takes its shadow for garbage
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
        if (owner := self._owner_for(parent_fd, caller)) is not None:
            os.fchown(fd, *owner)
        os.fchmod(fd, stat.S_IMODE(mode))

    @staticmethod
    def _group_for(parent_fd: int, caller: Caller) -> int:
        parent = os.stat(parent_fd)
        return parent.st_gid if parent.st_mode & stat.S_ISGID else caller.gid

    async def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> Node:
        """A new directory; it inherits set-group-id."""
        self._check_inodes()
        self._known(parent)
        inherited = os.stat(self.nodes.directory_fd(parent)).st_mode & stat.S_ISGID
        with self._made_for(parent, name, stat.S_IMODE(mode) | inherited, caller) as (where, new):
            # Without privilege a chmod could lose the set-group-id that it inherits.
            os.mkdir(new, 0o700 if self._privileged else stat.S_IMODE(mode), dir_fd=where)
        await self.name_made(parent)
        return self.lookup(parent, name)

    async def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        """A fifo, a socket, a device node, or an empty regular file."""
        self._check_inodes()
        directory = self._known(parent)
        with self._made_for(parent, name, stat.S_IMODE(mode), caller) as (where, new):
            os.mknod(new, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=where)
        node = self.lookup(parent, name)
        if stat.S_ISREG(mode):
            self.home_device.files += 1
            self._put(directory, parent, name, node)
        await self.name_made(parent)
        return node

    async def symlink(self, parent: Node, name: bytes, text: bytes, caller: Caller) -> Node:
        """An ordinary symlink; a text that could be taken for a stub's is refused."""
        if layout.looks_like_stub(text):
            raise PermissionError(errno.EPERM, "the text of this symlink is reserved")
        self._check_inodes()
        self._known(parent)
        with self._made_for(parent, name, 0o777, caller) as (where, new):
            os.symlink(text, new, dir_fd=where)
        await self.name_made(parent)
        return self.lookup(parent, name)

    @contextmanager
    def _made_for(
        self, parent: Node, name: bytes, mode: int, caller: Caller
    ) -> Iterator[tuple[int, bytes]]:
        """The block makes something, where and by the name that it is given: in tmp/, where it gets
        its owner and mode, and only then its own name, or a crash would leave one that its owner
        cannot use.  Without privilege it is always ours, and made where it belongs: a directory
        that may not be written to could not be moved.

        Atomic for the trio thread, which alone makes names: one that is free stays so.
        """
        parent_fd, tmp_fd = self.nodes.directory_fd(parent), self.home.tmp_fd
        if layout.exists(name, parent_fd):
            raise FileExistsError(errno.EEXIST, "it is there already")
        if not self._privileged:
            yield parent_fd, name
            self._give_name_to(parent_fd, name, mode, None)
            return
        new = layout.new_object_id().encode()
        yield tmp_fd, new
        try:
            self._give_name_to(tmp_fd, new, mode, self._owner_for(parent_fd, caller))
            _native.rename(tmp_fd, new, parent_fd, name, 0)
        except OSError:
            layout.remove(new, tmp_fd)
            raise

    def _owner_for(self, parent_fd: int, caller: Caller) -> tuple[int, int] | None:
        """None: without privilege it is ours."""
        return (caller.uid, self._group_for(parent_fd, caller)) if self._privileged else None

    @staticmethod
    def _give_name_to(dir_fd: int, name: bytes, mode: int, owner: tuple[int, int] | None) -> None:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            status = os.fstat(fd)
            if stat.S_ISLNK(status.st_mode):
                if owner is not None:
                    os.chown(name, *owner, dir_fd=dir_fd, follow_symlinks=False)
                return
            if owner is None and stat.S_IMODE(status.st_mode) == mode:
                return
            uid, gid = owner or (None, None)
            apply_changes(f"/proc/self/fd/{fd}", Changes(mode=mode, uid=uid, gid=gid))
        finally:
            os.close(fd)

    async def link(self, node: Node, parent: Node, name: bytes) -> Node:
        """A further name; of a demoted file, of its stub."""
        old_parent, old_name = node.names[0]
        self._known(old_parent)
        self._known(parent)
        os.link(
            old_name,
            name,
            src_dir_fd=self.nodes.directory_fd(old_parent),
            dst_dir_fd=self.nodes.directory_fd(parent),
            follow_symlinks=False,
        )
        self.nodes.add_name(node, parent, name)
        for where, known in node.names:
            self.catalogue.remove(where.key, known)  # one rename replaces one name: it stays
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
        self._known(parent)
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
        self._known(parent)
        self.nodes.pin_directory(node)
        os.rmdir(name, dir_fd=self.nodes.directory_fd(parent))
        self._directory_gone(node)

    def _directory_gone(self, node: Node) -> None:
        self.survey.directory_gone(node.key)
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
        self.catalogue.remove(parent.key, name)
        if before.nlink > 1 or not stat.S_ISREG(before.status.st_mode):
            if node.stub is not None and node.file is not None:
                node.file.native.nlink = before.nlink - 1
            self.names_changed(node)
            if before.nlink == 2:
                for where, left in node.names:  # it may move again
                    self._put(self._known(where), where, left, node)
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
            self.survey.damaged.pop(before.status.st_ino, None)
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
            self.refresh(node)
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
        self._known(old_parent)
        self._known(new_parent)
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
        before_old = self.catalogue.remove(old_parent.key, old)
        before_new = self.catalogue.remove(new_parent.key, new)
        self._took_name(moved, new_parent, new, before_old)
        if target is not None and flags & RENAME_EXCHANGE:
            self._took_name(target, old_parent, old, before_new)
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

    def _took_name(self, node: Node, parent: Node, name: bytes, before: Entry | None) -> None:
        """Tells the catalogue, which had it as before."""
        directory = self._known(parent)
        if node.is_directory:
            self.catalogue.directory(node.key, directory, name)
        else:
            moved_s = -math.inf if before is None else before.moved_s
            self._put(directory, parent, name, node, moved_s)
