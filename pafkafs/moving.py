"""Moves the data of one file from a device to another, under its open handles.

The order, which can be cut anywhere:

1. fsync what it is, for an error that nobody has been told of yet; copy it, while readers and
   writers go on; what they change meanwhile is copied again
2. size, attributes; fsync the copy and its directories
3. close the gate: changes wait, reads go on
4. copy what has changed since, and do 2 again if anything has; fsync its shadow
5. check that the name is still what it was; one rename puts the stub, or the copy, in its place
6. point the open file at the copy; fsync the directory
7. open the gate, and remove what the file was

**Invariant:** until the rename the file is what it was, and afterwards the copy is durable.
Whatever fails before the rename costs only garbage.
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from pafkafs import layout
from pafkafs.copying import PATIENCE_S, Copy, Pace, SourceError, from_source, new_object, new_plain
from pafkafs.device import Device, Home
from pafkafs.files import OpenFile
from pafkafs.layout import Stub
from pafkafs.namespace import Namespace

log = logging.getLogger(__name__)

# What may be left to copy with the gate closed; and how often a copy is brought up to date
# before its writer is called too fast.
CUT_OVER_BYTES_MAX = 4 << 20
_PASSES_MAX = 8
# Reasons for which a segment moves though Kafka appends to it.
_ACTIVE_TOO = ("spilled", "full")


# Where a file goes: a tier down, a tier up, or to another device of the same tier.
DEMOTE, PROMOTE, SIDEWAYS = DIRECTIONS = ("demote", "promote", "sideways")


class MountBroken(BaseException):
    """An open file and its name lead to different data: the mount must not go on."""


class TooFast(OSError):
    """The file changes faster than it can be copied."""

    def __init__(self) -> None:
        super().__init__(errno.EBUSY, "it changes faster than it can be copied")


@dataclass
class Move:
    """A move under way, for status; bytes are those copied so far."""

    path: str
    source: str
    target: str
    why: str
    direction: str
    size_bytes: int
    started: float
    copied_bytes: int = 0
    cut_over_s: float = 0.0

    def add_copied(self, count: int) -> None:
        """So many bytes more; what changed meanwhile is copied, and counted, again."""
        self.copied_bytes += count


@dataclass(frozen=True)
class MoveTotals:
    """What has been moved since the mount."""

    files: int = 0
    bytes: int = 0
    failed: int = 0
    cut_over_max_s: float = 0.0

    def __add__(self, other: "MoveTotals") -> "MoveTotals":
        return MoveTotals(
            self.files + other.files,
            self.bytes + other.bytes,
            self.failed + other.failed,
            max(self.cut_over_max_s, other.cut_over_max_s),
        )


class Mover:
    """Moves files, any number at once, each by one."""

    def __init__(
        self, namespace: Namespace, home: Home, devices: Mapping[str, Device], pace: Pace
    ) -> None:
        self._namespace = namespace
        self._home = home
        self._home_device = next(iter(devices.values()))
        self.pace = pace
        self.running: list[Move] = []
        self._scopes: list[trio.CancelScope] = []
        self._ending: trio.Event | None = None  # set when nothing moves any more
        self.totals = dict.fromkeys(DIRECTIONS, MoveTotals())
        self.degraded: str | None = None

    def may_move(self, file: OpenFile) -> bool:
        """One rename replaces one name: a file with several links stays where it is, and so
        does one that is left with a name that we do not know."""
        known = bool(file.node.names) or file.node.gone is not None
        return known and self._namespace.attributes(file.node).nlink <= 1

    async def end(self) -> None:
        """Nothing moves any more when this returns: copies that are not the file yet are thrown
        away."""
        self._ending = trio.Event()
        for scope in self._scopes:
            scope.cancel()
        if self._scopes:
            await self._ending.wait()

    @contextmanager
    def _until_end(self) -> Iterator[None]:
        if self._ending is not None:
            raise OSError(errno.ECANCELED, "the mount ends")
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                yield
            finally:
                self._scopes.remove(scope)
                if self._ending is not None and not self._scopes:
                    self._ending.set()
        if scope.cancelled_caught:
            raise OSError(errno.ECANCELED, "the mount ends")

    async def move(
        self, file: OpenFile, target: Device, why: str, *, gate_closed: bool = False
    ) -> None:
        """Moves an open file.  gate_closed: the caller has closed the gate, and opens it.

        Raises OSError; then the file is what it was.
        """
        if not self.may_move(file):
            raise OSError(errno.EMLINK, "a file with several names does not move")
        self._check_sound(file)
        if file.moving and not gate_closed:
            raise OSError(errno.EBUSY, "it is being moved already")
        path = os.fsdecode(file.node.path())
        size = self._namespace.attributes(file.node).status.st_size
        move = Move(
            path,
            os.fsdecode(file.device.path),
            os.fsdecode(target.path),
            why,
            _direction(file.device, target),
            size,
            trio.current_time(),
        )
        self.running.append(move)
        if not gate_closed:
            file.moving = True
        try:
            with self._until_end():
                async with self._namespace.files.used(file):
                    await self._move(file, target, move, gate_closed)
        except OSError:
            self._count(move, MoveTotals(failed=1, cut_over_max_s=move.cut_over_s))
            raise
        finally:
            self.running.remove(move)
            if not gate_closed:
                file.moving = False
        self._count(move, MoveTotals(1, move.size_bytes, 0, move.cut_over_s))

    async def _move(self, file: OpenFile, target: Device, move: Move, gate_closed: bool) -> None:
        source = file.device
        stub = layout.make_stub(target.id, target.path, file.node.path())
        plain = target is self._home_device
        need = self._namespace.attributes(file.node).blocks * 512
        if plain:
            copy = new_plain(target, self._home.tmp_fd, stub.shadow)
        else:
            self._namespace.files.object_made(stub.object_id)
            copy = await new_object(target, stub)
        target.reserve(need)
        try:
            if not gate_closed:
                await self._copy_live(file, copy, move)
            began = trio.current_time()
            if not gate_closed:
                await file.close_gate()
            try:
                if file.device is not source:
                    raise OSError(errno.EBUSY, "it had to be moved for lack of room meanwhile")
                await self._cut_over(file, target, copy, None if plain else stub, move)
            finally:
                if not gate_closed:
                    file.open_gate()
                move.cut_over_s = trio.current_time() - began
        except BaseException:
            # A cancellation may come when the copy is the file already.
            if copy.committed:
                raise
            if plain:
                os.unlink(stub.shadow, dir_fd=self._home.tmp_fd)
            else:
                self._namespace.upkeep.remove(stub, counted=False)
            raise
        finally:
            target.reserve(-need)
            copy.close()

    # -- copying ------------------------------------------------------------------------------

    async def _copy_live(self, file: OpenFile, copy: Copy, move: Move) -> None:
        """Copies while the file changes, until little is left to do."""
        source = file.device
        file.native.take_changes()
        await self._open_data(file)
        if file.node.stub is None:
            # What was closed without an fsync may have failed to be written since: the next one
            # would have told, and nobody would after the move.
            with trio.move_on_after(PATIENCE_S) as patience:
                await self._sync_source(file, file.sync)
            if patience.cancelled_caught:
                raise SourceError(errno.ETIMEDOUT, "its device does not answer")
        if file.device is not source:
            raise OSError(errno.EBUSY, "it had to be moved for lack of room meanwhile")
        await self._add(file, copy, move, 0, self._size(file))
        for _ in range(_PASSES_MAX):
            await copy.finish(self._namespace.attributes(file.node).status)
            changes = file.native.take_changes()
            if changes is None:
                return
            start, end, _ = changes
            await self._add_changes(file, copy, move, changes, at_once=False)
            if end - start <= CUT_OVER_BYTES_MAX:
                await copy.finish(self._namespace.attributes(file.node).status)
                return
        raise TooFast

    async def _add_changes(
        self,
        file: OpenFile,
        copy: Copy,
        move: Move,
        changes: tuple[int, int, int],
        *,
        at_once: bool,
    ) -> None:
        start, end, cut = changes
        if cut < end or cut < move.copied_bytes:
            await copy.cut(cut)  # what comes behind it now is zeros until it is written
        end = min(end, self._size(file))
        await self._add(file, copy, move, start, end, again=True, at_once=at_once)

    async def _add(
        self,
        file: OpenFile,
        copy: Copy,
        move: Move,
        start: int,
        end: int,
        *,
        again: bool = False,
        at_once: bool = False,
    ) -> None:
        source = file.device
        try:
            await copy.add(
                source,
                lambda: file.native.data_fd,
                start,
                end,
                self.pace,
                again=again,
                at_once=at_once,
                on_copied=move.add_copied,
            )
        except SourceError as error:
            source.failed(f"cannot read {move.path}: {error.strerror}")
            raise

    async def _sync_source(self, file: OpenFile, sync: Callable[[], Awaitable[None]]) -> None:
        try:
            await sync()
        except OSError as error:
            raise SourceError(error.errno or errno.EIO, error.strerror or "") from error

    def _size(self, file: OpenFile) -> int:
        return self._namespace.attributes(file.node).status.st_size

    async def _open_data(self, file: OpenFile) -> None:
        """Also of an empty file: its first opening looks whether its object is longer."""
        if file.native.data_fd >= 0:
            return
        try:
            await from_source(file.device, file.native.open_data)
        except OSError as error:
            never_made = self._size(file) == 0 and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not never_made:
                raise SourceError(error.errno or errno.EIO, error.strerror or "") from error

    # -- the cut-over -------------------------------------------------------------------------

    async def _cut_over(
        self, file: OpenFile, target: Device, copy: Copy, stub: Stub | None, move: Move
    ) -> None:
        """With the gate closed."""
        await file.seal_at_gate()
        await self._open_data(file)
        if file.native.unsynced:
            # An error that the source has not told yet must not be lost with it.
            await self._sync_source(
                file, lambda: from_source(file.device, file.native.sync_at_gate)
            )
        status = os.fstat(file.native.attr_fd)
        if move.copied_bytes == 0:
            await self._add(file, copy, move, 0, status.st_size, at_once=True)
        elif (changes := file.native.take_changes()) is not None:
            await self._add_changes(file, copy, move, changes, at_once=True)
        allocated = await copy.finish(status)
        source, old_stub = file.device, file.node.stub
        counted = file.native.counted_bytes
        if stub is None:
            self._commit_plain(file, copy, move.why)
        else:
            await self._commit_object(file, copy, stub, allocated, move.why)
        target.reserve(allocated)
        durable = await self._sync_parent(file)
        if not durable or not _alike(file.native.attr_fd, status):
            file.native.mark_changed()  # the next fsync has something to do
        if old_stub is None:
            source.native.add_used(-counted)
        elif durable:
            self._namespace.upkeep.remove(old_stub)
        if stub is not None:
            self._namespace.upkeep.attributes_changed(stub)

    async def _commit_object(
        self, file: OpenFile, copy: Copy, stub: Stub, allocated: int, why: str
    ) -> None:
        status = os.fstat(file.native.attr_fd)
        shadow_fd = layout.create_shadow(self._home.shadows_fd, stub, status)
        try:
            await trio.to_thread.run_sync(layout.sync_all, (shadow_fd, self._home.shadows_fd))
            self._put_stub_in_place(file, copy, stub, shadow_fd, why)
        except BaseException:
            os.close(shadow_fd)
            raise
        try:
            file.native.repoint_object(
                copy.target.native, shadow_fd, copy.take_fd(), stub.object, allocated
            )
        except OSError as error:
            # Committed, and not in effect.  No error of a device: the mount must not go on.
            raise MountBroken("cannot re-point an open file") from error
        file.native.nlink = 1 if file.node.names else 0
        self._arrived(file, copy.target, why)

    def _put_stub_in_place(
        self, file: OpenFile, copy: Copy, stub: Stub, shadow_fd: int, why: str
    ) -> None:
        """Atomic for the trio thread: the name is what it is found to be here."""
        node = file.node
        self._check_still_movable(file, why)
        # chmod, chown and utimens do not wait at the gate.
        layout.copy_attributes(os.fstat(file.native.attr_fd), shadow_fd)
        key = os.fstat(shadow_fd).st_ino
        if not node.names:
            node.stub = stub  # removed, and still open: the object goes when it is closed
            copy.committed = True
            return
        parent, name = node.names[0]
        parent_fd = self._namespace.nodes.directory_fd(parent)
        layout.replace_with_stub(self._home.tmp_fd, parent_fd, name, copy.target.path, stub)
        copy.committed = True
        self._namespace.nodes.rekey(node, key, stub)

    def _commit_plain(self, file: OpenFile, copy: Copy, why: str) -> None:
        """The mirror image: the copy itself takes the place of the stub.  Atomic, too."""
        node = file.node
        self._check_still_movable(file, why)
        layout.copy_attributes(os.fstat(file.native.attr_fd), copy.fd)
        key = os.fstat(copy.fd).st_ino  # nothing may fail between the rename and its effect
        if node.names:
            parent, name = node.names[0]
            parent_fd = self._namespace.nodes.directory_fd(parent)
            layout.replace_stub(self._home.tmp_fd, copy.name, parent_fd, name)
            copy.committed = True
            self._namespace.nodes.rekey(node, key, None)
        else:
            # Removed, and still open: it needs no name here either.
            os.unlink(copy.name, dir_fd=self._home.tmp_fd)
            copy.committed = True
            node.stub = None
        try:
            file.native.repoint_plain(copy.target.native, copy.take_fd())
        except OSError as error:
            raise MountBroken("cannot re-point an open file") from error
        self._arrived(file, copy.target, why)

    def _check_sound(self, file: OpenFile) -> None:
        """**Invariant:** a file whose fsync has failed, whoever asked for it, does not move while
        this mount lasts: the copy would be of what is on the device."""
        if self._namespace.files.is_unsound(file):
            raise SourceError(errno.EIO, "an fsync of it failed: what is on the device may be old")

    def _check_still_movable(self, file: OpenFile, why: str) -> None:
        self._check_sound(file)
        if not self.may_move(file):
            raise OSError(errno.EMLINK, "it got a second link meanwhile")
        entry = self._namespace.entry(file.node)
        if entry is None or why in _ACTIVE_TOO:
            return
        if entry.is_active or entry.directory.rule is None:
            raise OSError(errno.EBUSY, "it became the active segment, or is being deleted")

    def _arrived(self, file: OpenFile, target: Device, why: str) -> None:
        if file.node.names:
            file.device.files -= 1
            target.files += 1
        file.device = target
        file.read_only = False
        self._namespace.arrived(file.node, why)

    async def _sync_parent(self, file: OpenFile) -> bool:
        """**Invariant:** what the file was is not removed before its new name is durable."""
        if not file.node.names:
            return True
        try:
            await self._namespace.sync_directory(file.node.names[0][0])
            return True
        except OSError as error:
            # The device may come back with the old file under this name.
            self.degraded = f"fsync of a directory failed ({error.strerror}) after a file moved"
            log.critical("%s: %s", os.fsdecode(file.node.path()), self.degraded)
            return False

    def _count(self, move: Move, more: MoveTotals) -> None:
        self.totals[move.direction] += more


def _direction(source: Device, target: Device) -> str:
    if source.tier == target.tier:
        return SIDEWAYS
    return DEMOTE if target.tier > source.tier else PROMOTE


def _alike(fd: int, known: os.stat_result) -> bool:
    """Whether nobody is known to have set attributes meanwhile."""
    keys = ("st_mode", "st_uid", "st_gid", "st_mtime_ns")
    try:
        found = os.fstat(fd)
    except OSError:  # the file has arrived all the same
        return False
    return all(getattr(found, key) == getattr(known, key) for key in keys)
