"""The pyfuse3 adapter: decodes requests of the namespace, calls it, encodes answers.

Requests for the contents of open files never come here; the native front answers them.
"""

import errno
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from pafkafs.attributes import Changes
from pafkafs.device import Device
from pafkafs.making import Caller
from pafkafs.namespace import Namespace
from pafkafs.nodes import Attributes, Node

log = logging.getLogger(__name__)

# The daemon is the only writer of the tree: what the kernel knows stays true until it is told.
_VALID_S = 3600.0
_BLOCK = 4096

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[P, Coroutine[Any, Any, R]]


def _kernel_errors(handler: Handler[P, R]) -> Handler[P, R]:
    """An OSError keeps its errno; all else is a bug of ours: EIO, and a traceback in the log."""

    @wraps(handler)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Exception:
            log.exception("unexpected error in %s", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped


class _Listing:
    """An open directory: its names as they were when it was opened or rewound."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: list[bytes] | None = None


class Filesystem(pyfuse3.Operations):
    """The operations of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # its dirty pages would die with the daemon

    def __init__(self, namespace: Namespace, devices: Sequence[Device]) -> None:
        super().__init__()
        self._namespace = namespace
        self._devices = devices
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1
        self._no_entry = pyfuse3.EntryAttributes()  # ino 0: the kernel remembers the absence
        self._no_entry.entry_timeout = _VALID_S

    def _node(self, ino: int) -> Node:
        node = self._namespace.nodes.find(ino)
        if node is None:
            raise OSError(errno.ESTALE, "unknown inode")
        return node

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """The reply that makes the kernel know the node once more."""
        entry = _encode(self._namespace.attributes(node))
        node.lookups += 1
        return entry

    @_kernel_errors
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            node = self._namespace.lookup(self._node(parent_inode), name)
        except FileNotFoundError:
            return self._no_entry
        return self._entry(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, lookups in inode_list:
            self._namespace.nodes.forget(ino, lookups)

    @_kernel_errors
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _encode(self._namespace.attributes(self._node(inode)))

    @_kernel_errors
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        changes = Changes(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        await self._namespace.set_attributes(node, changes)
        return _encode(self._namespace.attributes(node))

    @_kernel_errors
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._namespace.readlink(self._node(inode))

    @_kernel_errors
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._node(parent_inode)
        return self._entry(await self._namespace.mknod(parent, name, mode, rdev, _caller(ctx)))

    @_kernel_errors
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._node(parent_inode)
        return self._entry(await self._namespace.mkdir(parent, name, mode, _caller(ctx)))

    @_kernel_errors
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._node(parent_inode)
        return self._entry(await self._namespace.symlink(parent, name, target, _caller(ctx)))

    @_kernel_errors
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        node, parent = self._node(inode), self._node(new_parent_inode)
        return self._entry(await self._namespace.link(node, parent, new_name))

    @_kernel_errors
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._namespace.unlink(self._node(parent_inode), name)

    @_kernel_errors
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._namespace.rmdir(self._node(parent_inode), name)

    @_kernel_errors
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = self._node(parent_inode_old), self._node(parent_inode_new)
        await self._namespace.rename(old, name_old, new, name_new, flags)

    @_kernel_errors
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent = self._node(parent_inode)
        try:
            node, handle = await self._namespace.create(parent, name, mode, _caller(ctx))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node = self._namespace.lookup(parent, name)
            handle = self._namespace.open(node, writable=True)
        return self._opened(node, handle, writable=True), self._entry(node)

    @_kernel_errors
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        node = self._node(inode)
        handle = self._namespace.open(node, writable=writable)
        return self._opened(node, handle, writable=writable)

    def _opened(self, node: Node, handle: int, *, writable: bool) -> pyfuse3.FileInfo:
        """Through the page cache, a batch that ends within a page takes two WRITEs, and a READ of
        that page later: who writes segments bypasses it.  sendfile still reads from the cache.
        """
        direct = writable and self._namespace.is_bulk_data(node)
        direct = direct and self._namespace.files.may_bypass_cache
        return pyfuse3.FileInfo(fh=handle, keep_cache=True, direct_io=direct)

    @_kernel_errors
    async def release(self, fh: int) -> None:
        self._namespace.files.release(fh)

    @_kernel_errors
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = _Listing(self._node(inode))
        return handle

    @_kernel_errors
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    @_kernel_errors
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 or listing.names is None:
            listing.names = self._namespace.list_names(listing.node)
        names = ((i, listing.names[i]) for i in range(start_id, len(listing.names)))
        for number, name, node, attributes in self._namespace.entries(listing.node, names):
            if not pyfuse3.readdir_reply(token, name, _encode(attributes), number + 1):
                self._namespace.nodes.drop_if_unused(node)
                break
            node.lookups += 1

    @_kernel_errors
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._namespace.sync_directory(self._listings[fh].node)

    @_kernel_errors
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        home = os.fstatvfs(self._namespace.home.tree_fd)
        rooms = [device.room for device in self._devices]
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        data.f_blocks = sum(device.capacity_bytes for device in self._devices) // _BLOCK
        data.f_bfree = data.f_bavail = sum(room.free_bytes for room in rooms) // _BLOCK
        data.f_files, data.f_ffree, data.f_favail = home.f_files, home.f_ffree, home.f_favail
        data.f_namemax = home.f_namemax
        return data


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid)


def _encode(attributes: Attributes) -> pyfuse3.EntryAttributes:
    status = attributes.status
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = attributes.ino
    entry.generation = 0
    entry.entry_timeout = _VALID_S
    entry.attr_timeout = _VALID_S
    entry.st_mode = status.st_mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = status.st_uid
    entry.st_gid = status.st_gid
    entry.st_rdev = status.st_rdev
    entry.st_size = status.st_size
    entry.st_blksize = _BLOCK
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = status.st_atime_ns
    entry.st_mtime_ns = status.st_mtime_ns
    entry.st_ctime_ns = status.st_ctime_ns
    return entry
