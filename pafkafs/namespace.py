"""The namespace: names that come and go, all of them system calls on the fast tier.

Errors are the OSErrors of the home filesystem.  Methods that are not async are atomic: one trio
thread runs them all, inline.
"""

import errno
import math
import os
import stat
from contextlib import AbstractContextManager

from pafkafs import _native
from pafkafs.catalogue import Entry
from pafkafs.files import LONG_FREE, OpenFile
from pafkafs.making import Making
from pafkafs.nodes import Attributes, Node

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


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


class Namespace(Making):
    """Names that are made, removed and renamed."""

    def unlink(self, parent: Node, name: bytes) -> None:
        """Removes a name; with the last one the file, once it is closed."""
        self._known(parent)
        parent_fd = self.nodes.directory_fd(parent)
        status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        node = self.node_of(parent, parent_fd, name, status)
        before = self.attributes(node)
        with self._pin(node, before, parent_fd, name) as pin:
            os.unlink(name, dir_fd=parent_fd)
            self._name_gone(node, parent, name, before, pin)

    def _pin(self, node: Node, before: Attributes, parent_fd: int, name: bytes) -> _Pin:
        """Before a name is removed: all that may fail.  An error after it would be a lie."""
        if node.stub is not None:
            self.upkeep.stub_goes(parent_fd)
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
            self._file_gone(node, before, pin)
        if before.nlink <= 1:
            self.nodes.clear_names(node)
            self.nodes.release_key(node)
        self.nodes.drop_if_unused(node)

    def _file_gone(self, node: Node, before: Attributes, pin: _Pin) -> None:
        """The last name of a regular file was removed."""
        device = self.home_device if node.stub is None else self.devices[node.stub.device_id]
        if node.refused:
            self.survey.damaged.pop(before.status.st_ino, None)
        else:
            device.files -= 1
        node.gone = before.status
        if node.file is not None:
            node.file.native.nlink = 0
            self.files.close_if_unused(node.file)
            return  # closing it does the rest
        self.files.forget(node.key)
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
                self._name_gone(target, new_parent, new, before, pin)
        before_old = self.catalogue.remove(old_parent.key, old)
        before_new = self.catalogue.remove(new_parent.key, new)
        self._took_name(moved, new_parent, new, before_old)
        if target is not None and flags & RENAME_EXCHANGE:
            self._took_name(target, old_parent, old, before_new)
        await self.name_made(new_parent, *([] if old_parent is new_parent else [old_parent]))

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
