"""The tree that the mount shows: finding nodes, opening their files, their attributes.

All of it system calls on the fast tier.  It knows nodes, stubs and shadows, and nothing of FUSE.
Errors are the OSErrors of the home filesystem.  Methods that are not async are atomic: one trio
thread runs them all, inline.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator

from pafkafs import kafka, layout
from pafkafs.attributes import (
    Changes,
    apply_changes,
    as_empty_file,
    changed_times,
    with_changes,
    with_size,
)
from pafkafs.catalogue import Catalogue, Entry, Place
from pafkafs.device import Device, Home
from pafkafs.files import OpenFile, OpenFiles, open_data, open_shadow
from pafkafs.layout import Stub
from pafkafs.nodes import Attributes, Node, NodeTable
from pafkafs.objects import ObjectUpkeep
from pafkafs.survey import Survey, recovered


class Tree:
    """What is there."""

    def __init__(
        self,
        home: Home,
        devices: dict[str, Device],
        nodes: NodeTable,
        files: OpenFiles,
        upkeep: ObjectUpkeep,
        catalogue: Catalogue,
        survey: Survey,
    ) -> None:
        self.home = home
        self.devices = devices
        self.files = files
        self.upkeep = upkeep
        self.nodes = nodes
        self.catalogue = catalogue
        self.survey = survey
        self.home_device = next(iter(devices.values()))
        self._device_numbers = {id: number for number, id in enumerate(devices)}

    # -- finding ------------------------------------------------------------------------------

    def lookup(self, parent: Node, name: bytes) -> Node:
        """The node of a name; its attributes are one stat away."""
        parent_fd = self.nodes.directory_fd(parent)
        status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        node = self.node_of(parent, parent_fd, name, status)
        self.nodes.add_name(node, parent, name)
        return node

    def node_of(self, parent: Node, parent_fd: int, name: bytes, status: os.stat_result) -> Node:
        """The node of a name with this status, which the kernel does not get to know by it."""
        stub, refused = None, False
        if stat.S_ISLNK(status.st_mode):
            text = os.readlink(name, dir_fd=parent_fd)
            try:
                stub = layout.parse_stub(text, self.survey.paths)
            except layout.DamagedStub:
                refused = True
                self.survey.damaged[status.st_ino] = os.path.join(parent.path(), name)
        elif stat.S_ISREG(status.st_mode):
            status = recovered(self.survey.sizes, parent_fd, name, status)
        if stub is not None:
            status = self._shadow_status(stub)
        node = self.nodes.obtain(status.st_ino, status, stub)
        node.refused = refused
        return node

    def _shadow_status(self, stub: Stub) -> os.stat_result:
        try:
            return layout.shadow_status(self.home.shadows_fd, stub)
        except FileNotFoundError as error:
            raise OSError(errno.EIO, "the shadow is missing") from error

    def attributes(self, node: Node) -> Attributes:
        """What stat shows of a node, open or not, named or not."""
        file = node.file
        if file is not None:
            status = os.fstat(file.native.attr_fd)
            if (growing := file.native.growing) is not None:
                size, mtime_ns = growing
                status = with_size(status, size, mtime_ns)
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
        if node.refused:
            # A file that can be listed, renamed and removed, and not opened: a broker whose
            # lookup of a segment fails would drop its indexes.
            status = as_empty_file(status)
        if node.stub is None:
            return Attributes(node.ino, status, status.st_nlink, status.st_blocks)
        blocks = -(-status.st_size // 512)
        if file is not None and file.native.data_fd >= 0:
            blocks = file.native.counted_bytes // 512
        links = self.stub_links(node) if file is None else file.native.nlink
        return Attributes(node.ino, status, links, blocks)

    def stub_links(self, node: Node) -> int:
        """Names of a demoted file."""
        if not node.names:
            return 0
        parent, name = node.names[0]
        parent_fd = self.nodes.directory_fd(parent)
        return os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_nlink

    def names_changed(self, node: Node) -> None:
        """What happened to the stub changes the ctime of the file, which its shadow has."""
        if node.stub is not None and node.file is not None:
            fd = node.file.native.attr_fd
            os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode))
        elif node.stub is not None:
            mode = stat.S_IMODE(self._shadow_status(node.stub).st_mode)
            os.chmod(node.stub.shadow, mode, dir_fd=self.home.shadows_fd)

    def readlink(self, node: Node) -> bytes:
        """The text of a symlink."""
        parent, name = node.names[0]
        return os.readlink(name, dir_fd=self.nodes.directory_fd(parent))

    def list_names(self, node: Node) -> list[bytes]:
        """All names in a directory, without . and .."""
        fd = layout.reopen_directory(self.nodes.directory_fd(node))
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

    # -- the catalogue ------------------------------------------------------------------------

    def entry(self, node: Node) -> Entry | None:
        """What the catalogue has of a node, if it is a segment."""
        if not node.names:
            return None
        parent, name = node.names[0]
        self.survey.know(parent, self.nodes.directory_fd(parent))
        return self.catalogue.entry(parent.key, name)

    def is_active_segment(self, node: Node) -> bool:
        """Whether Kafka appends to a file, by the names around it."""
        entry = self.entry(node)
        return entry is not None and entry.is_active and entry.directory.rule is not None

    def refresh(self, node: Node) -> None:
        """Tells the catalogue what there is to be known of a node now.  An error leaves what is
        known as it was: whatever this follows is done already."""
        try:
            for parent, name in node.names:
                entry = self.catalogue.entry(parent.key, name)
                if entry is not None:
                    place = self.place_of(node, self.attributes(node))
                    self.catalogue.put(entry.directory, name, place)
        except OSError as error:
            self.home_device.failed(f"cannot look at {os.fsdecode(node.path())}: {error.strerror}")

    def place_of(self, node: Node, attributes: Attributes) -> Place:
        """Where the data of a node is, and how much."""
        device = self.home_device.id if node.stub is None else node.stub.device_id
        return Place(
            self._device_numbers[device], attributes.blocks * 512, attributes.status.st_mtime_ns
        )

    # -- opening and attributes ---------------------------------------------------------------

    @staticmethod
    def is_bulk_data(node: Node) -> bool:
        """Whether a file is a segment of a topic, by its name."""
        return bool(node.names) and is_bulk_name(*node.names[0])

    def open(self, node: Node, *, writable: bool) -> int:
        """A new handle of a file.  Touches no slow device."""
        return self.files.add_handle(self.opened(node, writable=writable))

    def opened(self, node: Node, *, writable: bool = True) -> OpenFile:
        """The open file of a node, opened if it was not; the caller uses or adds a handle to it
        before the next await."""
        file = node.file
        if file is None:
            if node.names:
                self.survey.know(node.names[0][0], self.nodes.directory_fd(node.names[0][0]))
            file = self._open_object(node) if node.stub is not None else self._open_plain(node)
        elif writable and file.read_only:
            self._make_writable(file)
        return file

    def _open_plain(self, node: Node) -> OpenFile:
        if not node.names:
            raise OSError(errno.ESTALE, "the file has no name any more")
        if node.refused:
            raise OSError(errno.EIO, "a stub that does not lead to a device of this set")
        parent, name = node.names[0]
        fd, read_only = open_data(name, self.nodes.directory_fd(parent))
        try:
            if self.survey.sizes is not None and self.survey.sizes.must_not_be_opened(fd):
                raise OSError(errno.EIO, "it was growing, and could not be recovered")
        except OSError:
            os.close(fd)
            raise
        return self.files.attach_plain(node, self.home_device, fd, read_only=read_only)

    def _open_object(self, node: Node) -> OpenFile:
        assert node.stub is not None
        device = self.devices[node.stub.device_id]
        fd = open_shadow(node.stub.shadow, self.home.shadows_fd)
        links = self.stub_links(node)
        return self.files.attach_object(node, device, fd, create=False, nlink=links)

    def _make_writable(self, file: OpenFile) -> None:
        """Opened with mode 0400 and no privilege; the mode allows writing by now."""
        if not file.node.names or file.node.stub is not None:
            return
        parent, name = file.node.names[0]
        fd = os.open(
            name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.nodes.directory_fd(parent)
        )
        file.native.repoint_plain(self.home_device.native, fd)
        file.read_only = False

    async def set_attributes(self, node: Node, changes: Changes) -> None:
        """truncate, chmod, chown and utimens, in an order in which none undoes another."""
        if changes.size is not None:
            async with self.files.used(self.opened(node, writable=True)) as file:
                await file.truncate(changes.size)
                self._set_on_fd(node, changes)
        else:
            self._set_on_fd(node, changes)
        self.refresh(node)
        if node.file is not None and node.file.native.growing is not None:
            node.file.native.mark_changed()
        if node.stub is not None:
            if node.file is not None:
                node.file.native.mark_changed()  # a fsync is to cover the shadow
            else:
                self.files.unsynced_objects.add(node.stub.object_id)
            self.upkeep.attributes_changed(node.stub)

    def _set_on_fd(self, node: Node, changes: Changes) -> None:
        if node.file is not None:
            apply_changes(f"/proc/self/fd/{node.file.native.attr_fd}", changes)
            if changes.mode is not None:
                node.file.native.mode_changed()
            if changes.mtime_ns is not None and node.file.native.growing is not None:
                node.file.native.set_mtime(max(0, changes.mtime_ns))  # since 1970
                node.file.mtime_set_ns = changes.mtime_ns
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


def is_bulk_name(parent: Node, name: bytes) -> bool:
    """Whether a file of this name is a segment of a topic."""
    directory = parent.names[0][1] if parent.names else b""
    return kafka.is_bulk_data(os.fsdecode(directory), os.fsdecode(name))
