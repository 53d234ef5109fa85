"""The namespace: names, directories and attributes, all of them system calls on the fast tier.

It knows nodes, stubs and shadows, and nothing of FUSE.  Errors are the OSErrors of the home
filesystem.  Methods that are not async are atomic: one trio thread runs them all, inline.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from pafkafs import _native, kafka, layout
from pafkafs.attributes import Changes, apply_changes, changed_times, with_changes
from pafkafs.device import Device, Home
from pafkafs.files import LONG_FREE, OpenFile, OpenFiles, open_data, open_shadow
from pafkafs.layout import Stub
from pafkafs.nodes import Attributes, Node, NodeTable
from pafkafs.objects import ObjectUpkeep

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


class Namespace:
    """The tree that the mount shows.

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
        self.home = home
        self.devices = devices
        self.files = files
        self.upkeep = upkeep
        self.nodes = NodeTable(home.tree_fd)
        self._place = place
        self._durable_names = durable_names
        self._privileged = os.geteuid() == 0
        self._device_paths = {id: (device.path,) for id, device in devices.items()}
        self._home_device = next(iter(devices.values()))
        self.damaged: set[bytes] = set()  # paths of stubs that were refused

    # -- finding ------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> Node:
        """The node of a name; its attributes are one stat away."""
        parent_fd = self.nodes.directory_fd(parent)
        status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        node = self._node_of(parent, parent_fd, name, status)
        self.nodes.add_name(node, parent, name)
        return node

    def _node_of(self, parent: Node, parent_fd: int, name: bytes, status: os.stat_result) -> Node:
        stub = None
        if stat.S_ISLNK(status.st_mode):
            stub = self._read_stub(parent, parent_fd, name)
        if stub is not None:
            status = self._shadow_status(stub)
        return self.nodes.obtain(status.st_ino, status, stub)

    def _read_stub(self, parent: Node, parent_fd: int, name: bytes) -> Stub | None:
        text = os.readlink(name, dir_fd=parent_fd)
        try:
            return layout.parse_stub(text, self._device_paths)
        except layout.DamagedStub as error:
            self.damaged.add(parent.path() + b"/" + name)
            raise OSError(errno.EIO, f"refused stub: {error}") from error

    def _shadow_status(self, stub: Stub) -> os.stat_result:
        try:
            return os.stat(stub.shadow, dir_fd=self.home.shadows_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise OSError(errno.EIO, "the shadow is missing") from error

    def attributes(self, node: Node) -> Attributes:
        """What stat shows of a node, open or not, named or not."""
        file = node.file
        if file is not None:
            status = os.fstat(file.native.attr_fd)
        elif node.is_directory:
            status = os.stat(self.nodes.directory_fd(node))
        elif node.gone is not None:
            return Attributes(node.ino, node.gone, 0, node.gone.st_blocks)
        elif node.stub is not None:
            status = self._shadow_status(node.stub)
        elif node.fd is not None:
            status = os.stat(node.fd)
        else:
            parent, name = node.names[0]
            status = os.stat(name, dir_fd=self.nodes.directory_fd(parent), follow_symlinks=False)
        if node.stub is None:
            return Attributes(node.ino, status, status.st_nlink, status.st_blocks)
        blocks = -(-status.st_size // 512)
        if file is not None and file.native.data_fd >= 0:
            blocks = file.native.counted_bytes // 512
        links = self._stub_links(node) if file is None else file.native.nlink
        return Attributes(node.ino, status, links, blocks)

    def _stub_links(self, node: Node) -> int:
        if not node.names:
            return 0
        parent, name = node.names[0]
        parent_fd = self.nodes.directory_fd(parent)
        return os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_nlink

    def readlink(self, node: Node) -> bytes:
        """The text of a symlink."""
        parent, name = node.names[0]
        return os.readlink(name, dir_fd=self.nodes.directory_fd(parent))

    def list_names(self, node: Node) -> list[bytes]:
        """All names in a directory, without . and .."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(".", flags, dir_fd=self.nodes.directory_fd(node))
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def entries(
        self, node: Node, names: Iterable[tuple[int, bytes]]
    ) -> Iterator[tuple[int, bytes, Node, Attributes]]:
        """The numbered names that are still there, each with its node and attributes."""
        for number, name in names:
            try:
                entry = self.lookup(node, name)
                yield number, name, entry, self.attributes(entry)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                continue  # a refused stub must not hide its neighbours; status names it

    # -- making -------------------------------------------------------------------------------

    async def create(
        self, parent: Node, name: bytes, mode: int, caller: Caller
    ) -> tuple[Node, int]:
        """A new regular file on the device that placement chooses, and a handle of it."""
        self._check_inodes()
        device = self._place(_is_bulk_name(parent, name))
        if device is self._home_device:
            file = self._create_plain(parent, name, mode, caller)
        else:
            file = self._create_object(parent, name, mode, caller, device)
        device.files += 1
        self.nodes.add_name(file.node, parent, name)
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
        return self.files.attach_plain(node, self._home_device, fd, read_only=False)

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
            self._home_device.files += 1
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
        await self.name_made(parent)
        return node

    def _links_changed(self, node: Node) -> None:
        if node.stub is not None and node.file is not None:
            node.file.native.nlink = self._stub_links(node)

    async def name_made(self, *parents: Node) -> None:
        """In power mode: the entries of these directories are durable when it returns."""
        if self._durable_names:
            for parent in parents:
                await self.sync_directory(parent)

    async def sync_directory(self, node: Node) -> None:
        """fsync of a directory.  Shadows go first: a durable stub must find its own."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(".", flags, dir_fd=self.nodes.directory_fd(node))
        try:
            await trio.to_thread.run_sync(layout.sync_all, (self.home.shadows_fd, fd))
        finally:
            os.close(fd)

    # -- removing and renaming ----------------------------------------------------------------

    def unlink(self, parent: Node, name: bytes) -> None:
        """Removes a name; with the last one the file, once it is closed."""
        parent_fd = self.nodes.directory_fd(parent)
        try:
            status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            node = self._node_of(parent, parent_fd, name, status)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.unlink(name, dir_fd=parent_fd)  # a refused stub: the name is all there is
            self.damaged.discard(parent.path() + b"/" + name)
            return
        before = self.attributes(node)
        pin = self._pin(node, before, parent_fd, name)
        os.unlink(name, dir_fd=parent_fd)
        self._name_gone(node, parent, name, before, parent_fd, pin)

    @staticmethod
    def _pin(node: Node, before: Attributes, parent_fd: int, name: bytes) -> int | None:
        """Keeps what a name leads to while the name is removed.

        Without it the blocks of a large file would be freed here, inline: 0.2 s for 1 GiB.
        """
        if node.file is not None or node.stub is not None or node.is_directory:
            return None
        small = before.blocks * 512 <= LONG_FREE
        if small and before.nlink == 1 and stat.S_ISREG(before.status.st_mode):
            return None
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)

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
        pin: int | None,
    ) -> None:
        self.nodes.remove_name(node, parent, name)
        if before.nlink > 1 or not stat.S_ISREG(before.status.st_mode):
            if node.stub is not None and node.file is not None:
                node.file.native.nlink = before.nlink - 1
            self._keep_pin(node, pin)
        else:
            self._file_gone(node, before, parent_fd, pin)
        if before.nlink <= 1:
            self.nodes.clear_names(node)
            self.nodes.release_key(node)
        self.nodes.drop_if_unused(node)

    @staticmethod
    def _keep_pin(node: Node, pin: int | None) -> None:
        """What has no name that we know is reached by its descriptor."""
        if pin is not None and not node.names and node.fd is None:
            node.fd = pin
        elif pin is not None:
            os.close(pin)

    def _file_gone(self, node: Node, before: Attributes, parent_fd: int, pin: int | None) -> None:
        """The last name of a regular file was removed."""
        device = self._home_device if node.stub is None else self.devices[node.stub.device_id]
        device.files -= 1
        node.gone = before.status
        if node.stub is not None:
            self.upkeep.stub_removed(parent_fd)
        if node.file is not None:
            node.file.native.nlink = 0
            return  # closing it does the rest
        if node.stub is not None:
            self.upkeep.remove(node.stub)
        elif pin is not None:
            self.upkeep.free(pin, device, before.blocks * 512)
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
        target, before, pin = self._rename_target(new_parent, new)
        if target is moved:
            if pin is not None:
                os.close(pin)
            return
        if target is not None and target.is_directory and not flags & RENAME_EXCHANGE:
            self.nodes.pin_directory(target)
        old_fd = self.nodes.directory_fd(old_parent)
        new_fd = self.nodes.directory_fd(new_parent)
        try:
            _native.rename(old_fd, old, new_fd, new, flags)
        except OSError:
            if pin is not None:
                os.close(pin)
            raise
        self.nodes.remove_name(moved, old_parent, old)
        self.nodes.add_name(moved, new_parent, new)
        if target is not None and before is not None:
            if flags & RENAME_EXCHANGE:
                self.nodes.remove_name(target, new_parent, new)
                self.nodes.add_name(target, old_parent, old)
            elif target.is_directory:
                self._directory_gone(target)
            else:
                self._name_gone(target, new_parent, new, before, new_fd, pin)
                pin = None
        if pin is not None:
            os.close(pin)
        await self.name_made(new_parent, *([] if old_parent is new_parent else [old_parent]))

    def _rename_target(
        self, parent: Node, name: bytes
    ) -> tuple[Node | None, Attributes | None, int | None]:
        try:
            target = self.lookup(parent, name)
        except FileNotFoundError:
            return None, None, None
        before = self.attributes(target)
        return target, before, self._pin(target, before, self.nodes.directory_fd(parent), name)

    # -- opening and attributes ---------------------------------------------------------------

    @staticmethod
    def is_bulk_data(node: Node) -> bool:
        """Whether a file is a segment of a topic, by its name."""
        return bool(node.names) and _is_bulk_name(*node.names[0])

    def open(self, node: Node, *, writable: bool) -> int:
        """A new handle of a file.  Touches no slow device."""
        return self.files.add_handle(self._opened(node, writable=writable))

    def _opened(self, node: Node, *, writable: bool) -> OpenFile:
        """The open file of a node, opened if it was not."""
        file = node.file
        if file is None:
            file = self._open_object(node) if node.stub is not None else self._open_plain(node)
        elif writable and file.read_only:
            self._make_writable(file)
        return file

    def _open_plain(self, node: Node) -> OpenFile:
        if not node.names:
            raise OSError(errno.ESTALE, "the file has no name any more")
        parent, name = node.names[0]
        fd, read_only = open_data(name, self.nodes.directory_fd(parent))
        return self.files.attach_plain(node, self._home_device, fd, read_only=read_only)

    def _open_object(self, node: Node) -> OpenFile:
        assert node.stub is not None
        device = self.devices[node.stub.device_id]
        fd = open_shadow(node.stub.shadow, self.home.shadows_fd)
        links = self._stub_links(node)
        return self.files.attach_object(node, device, fd, create=False, nlink=links)

    def _make_writable(self, file: OpenFile) -> None:
        """Opened with mode 0400 and no privilege; the mode allows writing by now."""
        if not file.node.names or file.node.stub is not None:
            return
        parent, name = file.node.names[0]
        fd = os.open(
            name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.nodes.directory_fd(parent)
        )
        file.native.repoint_plain(self._home_device.native, fd)
        file.read_only = False

    async def set_attributes(self, node: Node, changes: Changes) -> None:
        """truncate, chmod, chown and utimens, in an order in which none undoes another."""
        if changes.size is not None:
            async with self.files.used(self._opened(node, writable=True)) as file:
                await file.truncate(changes.size)
                self._set_on_fd(node, changes)
        else:
            self._set_on_fd(node, changes)
        if node.stub is not None:
            self.upkeep.attributes_changed(node.stub)

    def _set_on_fd(self, node: Node, changes: Changes) -> None:
        if node.file is not None:
            apply_changes(f"/proc/self/fd/{node.file.native.attr_fd}", changes)
            return
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        if node.is_directory:
            fd = os.dup(self.nodes.directory_fd(node))
        elif node.gone is not None:
            # Its inode is being freed; only who holds an O_PATH descriptor can still ask.
            node.gone = with_changes(node.gone, changes)
            return
        elif node.stub is not None:
            fd = os.open(node.stub.shadow, flags, dir_fd=self.home.shadows_fd)
        elif node.fd is not None:
            fd = os.dup(node.fd)
        else:
            parent, name = node.names[0]
            fd = os.open(name, flags, dir_fd=self.nodes.directory_fd(parent))
        try:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                self._set_on_symlink(node, changes)
            else:
                apply_changes(f"/proc/self/fd/{fd}", changes)
        finally:
            os.close(fd)

    def _set_on_symlink(self, node: Node, changes: Changes) -> None:
        parent, name = node.names[0]
        parent_fd = self.nodes.directory_fd(parent)
        if changes.uid is not None or changes.gid is not None:
            uid = -1 if changes.uid is None else changes.uid
            gid = -1 if changes.gid is None else changes.gid
            os.chown(name, uid, gid, dir_fd=parent_fd, follow_symlinks=False)
        times = changed_times(os.stat(name, dir_fd=parent_fd, follow_symlinks=False), changes)
        if times is not None:
            os.utime(name, ns=times, dir_fd=parent_fd, follow_symlinks=False)


def _is_bulk_name(parent: Node, name: bytes) -> bool:
    directory = parent.names[0][1] if parent.names else b""
    return kafka.is_bulk_data(os.fsdecode(directory), os.fsdecode(name))
