"""Names that are made, all of them system calls on the fast tier.

Errors are the OSErrors of the home filesystem.  Methods that are not async are atomic: one trio
thread runs them all, inline.
"""

import errno
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from pafkafs import _native, kafka, layout
from pafkafs.attributes import Changes, apply_changes
from pafkafs.catalogue import Catalogue, Directory
from pafkafs.device import Device, Home
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.growing import Pool
from pafkafs.nodes import Node, NodeTable
from pafkafs.objects import ObjectUpkeep
from pafkafs.survey import Survey
from pafkafs.tree import Tree, is_bulk_name

_INODE_RESERVE_MIN = 16
_INODE_RESERVE_MAX = 4096

_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Caller:
    """Who asked, with umask and set-group-id already applied to modes by the kernel."""

    uid: int
    gid: int


class Making(Tree):
    """Names that are made.

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

    def _if_there(self, parent: Node, name: bytes) -> Node | None:
        try:
            return self.lookup(parent, name)
        except FileNotFoundError:
            return None
