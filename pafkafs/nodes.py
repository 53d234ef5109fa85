"""Nodes: what the kernel holds an inode number for, and how to reach it on the home tree.

A node outlives its names: after unlink, rmdir or the rename of a directory above it, requests
for its open and mapped files keep coming.
"""

import itertools
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pafkafs.layout import Stub

if TYPE_CHECKING:
    from pafkafs.files import OpenFile

ROOT_INO = 1
# Inode numbers of the home filesystem are used as they are, so that they survive a remount;
# where one is taken (a demoted file keeps its number, its old inode is reused), one from here.
_FIRST_OWN_INO = 1 << 48
_DIRECTORY_FDS_MAX = 1024

_O_DIRECTORY_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Attributes(NamedTuple):
    """What a caller's stat shows: status is the inode that holds the attributes."""

    ino: int
    status: os.stat_result
    nlink: int
    blocks: int


class Node:
    """One inode as the kernel knows it.

    key is the inode number, on the home filesystem, of what holds its attributes: the file
    itself, or the shadow of a demoted one.
    """

    __slots__ = (
        "children",
        "fd",
        "file",
        "gone",
        "ino",
        "is_directory",
        "key",
        "lookups",
        "names",
        "refused",
        "stub",
    )

    def __init__(self, ino: int, key: int, *, is_directory: bool, stub: Stub | None) -> None:
        self.ino = ino
        self.key = key
        self.is_directory = is_directory
        self.stub = stub
        self.names: list[tuple[Node, bytes]] = []  # those that the kernel has looked up
        self.children = 0  # names of other nodes that are in this directory
        self.lookups = 0  # references of the kernel
        self.file: OpenFile | None = None
        # O_PATH: of a directory while it is cached, of all else once no name is known.
        self.fd: int | None = None
        self.gone: os.stat_result | None = None  # last status of a removed regular file
        self.refused = False  # a stub that does not lead to a device of the set

    def path(self) -> bytes:
        """Relative to the mount; for messages and the names of objects."""
        parts: list[bytes] = []
        node = self
        while node.ino != ROOT_INO:
            if not node.names:
                parts.append(b"(removed)")
                break
            node, name = node.names[0]
            parts.append(name)
        return b"/".join(reversed(parts))


class NodeTable:
    """All nodes that the kernel knows, and the descriptors of their directories.

    **Invariant:** a node is in the table while lookups > 0, its file is open or a node in the
    table has a name in it; no two nodes have the same ino or the same key.
    """

    def __init__(self, tree_fd: int) -> None:
        status = os.fstat(tree_fd)
        self.root = Node(ROOT_INO, status.st_ino, is_directory=True, stub=None)
        self.root.fd = tree_fd
        self.root.lookups = 1
        self._by_ino: dict[int, Node] = {ROOT_INO: self.root}
        self._by_key: dict[int, Node] = {self.root.key: self.root}
        self._own_inos: Iterator[int] = itertools.count(_FIRST_OWN_INO)
        self._open_directories: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_ino)

    def __getitem__(self, ino: int) -> Node:
        return self._by_ino[ino]

    def find(self, ino: int) -> Node | None:
        """The node with this inode number."""
        return self._by_ino.get(ino)

    def known(self, key: int) -> Node | None:
        """The node whose attributes are in this inode of the home filesystem."""
        return self._by_key.get(key)

    def obtain(
        self, key: int, status: os.stat_result, stub: Stub | None, ino: int | None = None
    ) -> Node:
        """The node of a key, made if the kernel did not know it; ino, if given, is a new_ino."""
        node = self._by_key.get(key)
        if node is None:
            if ino is None:
                ino = key if key not in self._by_ino else next(self._own_inos)
            node = Node(ino, key, is_directory=stat.S_ISDIR(status.st_mode), stub=stub)
            self._by_ino[ino] = node
            self._by_key[key] = node
        return node

    def new_ino(self) -> int:
        """An inode number of our own, which no file on a device has."""
        return next(self._own_inos)

    def add_name(self, node: Node, parent: Node, name: bytes) -> None:
        """The node can be reached by this name, too; a directory only by it."""
        if (parent, name) in node.names:
            return
        if node.is_directory:
            self.clear_names(node)
        node.names.append((parent, name))
        parent.children += 1

    def remove_name(self, node: Node, parent: Node, name: bytes) -> None:
        """The node cannot be reached by this name any more."""
        if (parent, name) in node.names:
            node.names.remove((parent, name))
            parent.children -= 1
            self.drop_if_unused(parent)

    def clear_names(self, node: Node) -> None:
        """The node cannot be reached by any name any more."""
        for parent, name in list(node.names):
            self.remove_name(node, parent, name)

    def rekey(self, node: Node, key: int, stub: Stub | None) -> None:
        """A migration moved the attributes of the node to another inode."""
        del self._by_key[node.key]
        node.key = key
        node.stub = stub
        self._by_key[key] = node

    def release_key(self, node: Node) -> None:
        """The node lost its last name: its backing inode number may be reused any time."""
        if self._by_key.get(node.key) is node:
            del self._by_key[node.key]
            node.key = -node.ino
            self._by_key[node.key] = node

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel drops references; with the last one the node's memory is returned."""
        node = self._by_ino.get(ino)
        if node is None or node is self.root:
            return
        node.lookups -= lookups
        self.drop_if_unused(node)

    def drop_if_unused(self, node: Node) -> None:
        """Returns the node's memory once neither the kernel nor a handle refers to it."""
        used = node.lookups > 0 or node.file is not None or node.children > 0
        if used or self._by_ino.get(node.ino) is not node or node is self.root:
            return
        del self._by_ino[node.ino]
        del self._by_key[node.key]
        self._close_fd(node)
        self.clear_names(node)

    def directory_fd(self, node: Node) -> int:
        """An O_PATH descriptor of a directory node, valid until the next await.

        Descriptors are re-opened name by name from the root, never following a symlink, and
        only so many are kept; those of removed directories cannot be re-opened and are.
        """
        if node.fd is not None:
            if node in self._open_directories:
                self._open_directories.move_to_end(node)
            return node.fd
        if not node.names:
            raise FileNotFoundError(2, "directory was removed")
        parent, name = node.names[0]
        node.fd = os.open(name, _O_DIRECTORY_PATH, dir_fd=self.directory_fd(parent))
        self._open_directories[node] = None
        self._close_oldest(keep=node)
        return node.fd

    def pin_directory(self, node: Node) -> None:
        """Keeps the descriptor of a directory that is about to lose its name."""
        self.directory_fd(node)
        self._open_directories.pop(node, None)

    def _close_oldest(self, keep: Node) -> None:
        # Far more than a path is deep: a descriptor just given to a caller stays open.
        while len(self._open_directories) > _DIRECTORY_FDS_MAX:
            oldest, _ = self._open_directories.popitem(last=False)
            assert oldest is not keep
            assert oldest.fd is not None
            os.close(oldest.fd)
            oldest.fd = None

    def _close_fd(self, node: Node) -> None:
        if node.fd is not None:
            self._open_directories.pop(node, None)
            os.close(node.fd)
            node.fd = None
