"""Makes a log directory of what is left of a set: copies, and changes nothing on the devices."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pafkafs import _native, batches, brokers, deviceset, kafka, layout
from pafkafs.batches import Extent
from pafkafs.copies import copy_into
from pafkafs.errors import PafkafsError
from pafkafs.kafka import FileKind, FileState
from pafkafs.salvage import Candidate, Name, Outcome, Partition, Segment, best, name_of
from pafkafs.slots import Slot, nonce_of, read_slots
from pafkafs.units import format_size
from pafkafs.walking import DIRECTORY, Entry, Unreadable, entries, status_of, walk

_FILE = layout.LOOKING | os.O_NONBLOCK
# What ends with one file; all else, like ENOSPC, is the target's.
_OF_ONE_FILE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.ELOOP)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# What is left of a device has one of these.
_OF_A_DEVICE = (layout.OBJECTS, layout.TREE, layout.RECORD)


@dataclass(frozen=True, slots=True)
class _Object:
    """An object on one of the devices."""

    objects_fd: int
    device: str
    path: bytes
    status: os.stat_result

    @property
    def shown(self) -> str:
        return os.path.join(self.device, layout.OBJECTS, os.fsdecode(self.path))

    def open(self) -> int:
        return _native.open_beneath(self.objects_fd, self.path, _FILE)


@dataclass(frozen=True, slots=True)
class _Source:
    """What a file is copied from; attributes are those of status, but for size and mtime."""

    open: Callable[[], int]
    status: os.stat_result
    size: int
    mtime_ns: int


@dataclass
class _Work:
    files: int = 0
    bytes: int = 0
    partitions: dict[str, Partition] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def open_sources(fast: Sequence[str], slow: Sequence[str]) -> list[int]:
    """Opens and locks the devices; PafkafsError when one is in use, or not what it is given as."""
    paths = [*fast, *slow]
    fds = [deviceset.open_device(path, "given") for path in paths]
    for path, fd in zip(paths, fds, strict=True):
        if not any(layout.exists(name, fd) for name in _OF_A_DEVICE):
            raise PafkafsError(f"{path} is no device of pafkafs: it has no {layout.OBJECTS}/")
        brokers.refuse_running_on_tree(fd, path, fds)
    if fast and not layout.exists(layout.TREE, fds[0]):
        raise PafkafsError(
            f"{fast[0]} has no home tree: it is not the first fast device; without that one give "
            "all other devices as --slow"
        )
    return fds


def make_target(path: str, sources: Sequence[str]) -> int:
    """A new or empty directory that is on none of the devices; its descriptor.

    It is refused when somebody else may write to it: it could put symlinks in the way of what is
    made there.
    """
    real = Path(os.path.realpath(path))
    for source in map(Path, map(os.path.realpath, sources)):
        if real.is_relative_to(source) or source.is_relative_to(real):
            raise PafkafsError(f"{path} and the device {source} are inside each other")
    with suppress(FileExistsError):
        os.mkdir(real, 0o755)
    fd = os.open(real, layout.DIRECTORY)
    why = _why_no_target(fd)
    if why:
        os.close(fd)
        raise PafkafsError(f"{path} {why}")
    return fd


def _why_no_target(fd: int) -> str:
    status = os.fstat(fd)
    if os.listdir(fd):
        return "is not empty: give a new directory; nothing is rescued in place"
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}, who could redirect what is written: give a new one"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"has mode {mode:o}, others could redirect what is written: give a new directory"
    return ""


class Rescue:
    """One rescue: devices that are there, and the directory that is made."""

    def __init__(
        self,
        fast: Sequence[tuple[str, int]],
        slow: Sequence[tuple[str, int]],
        target_fd: int,
        progress: Callable[[int], None],
    ) -> None:
        """Devices are paths with their descriptors; the first fast one has the home tree.
        progress is told the bytes of each file."""
        self._home = fast[0] if fast else None
        self._devices = [*fast, *slow]
        self._target_fd = target_fd
        self._progress = progress
        self._objects: list[_Object] = []
        self._directories: dict[bytes, tuple[int, int, int]] = {}  # uid, gid, mode, by path
        self._work = _Work()

    def run(self) -> Outcome:
        """Copies all that is there, durably.  OSError when the target cannot take it."""
        for path, fd in self._devices:
            self._list_objects(path, fd)
        if self._home is None:
            self._by_objects()
        else:
            self._by_names(*self._home)
        self._give_directories_away()
        _native.syncfs(self._target_fd)
        work = self._work
        return Outcome(
            names_known=self._home is not None,
            files=work.files,
            bytes=work.bytes,
            partitions=dict(sorted(work.partitions.items())),
            lost=sorted(work.lost),
            damaged=work.damaged,
            left_out=work.left_out,
            notes=work.notes,
        )

    def _list_objects(self, path: str, fd: int) -> None:
        try:
            objects_fd = os.open(layout.OBJECTS, DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            return
        for entry in walk(objects_fd):
            if isinstance(entry, Unreadable):
                where = os.path.join(path, layout.OBJECTS, os.fsdecode(entry.path))
                self._work.damaged[where] = f"cannot be read: {entry.error.strerror}"
            elif stat.S_ISREG(entry.status.st_mode):
                self._objects.append(_Object(objects_fd, path, entry.path, entry.status))
        self._note_lost(path, fd)

    def _note_lost(self, path: str, fd: int) -> None:
        try:
            lost_fd = os.open(layout.LOST, DIRECTORY, dir_fd=fd)
        except OSError:
            return
        try:
            count = sum(1 for _ in entries(lost_fd))
        finally:
            os.close(lost_fd)
        if count:
            where = os.path.join(path, layout.LOST)
            self._work.left_out[where] = f"{count} entries that had no name before"

    # -- with the home tree -------------------------------------------------------------------

    def _by_names(self, path: str, fd: int) -> None:
        tree_fd = os.open(layout.TREE, DIRECTORY, dir_fd=fd)
        shadows_fd = _open_if_there(fd, layout.SHADOWS)
        slots = self._read_slots(path, fd)
        by_id: dict[bytes, list[_Object]] = {}
        for found in self._objects:
            by_id.setdefault(found.path[-16:], []).append(found)
        taken: set[str] = set()
        for entry in walk(tree_fd):
            if isinstance(entry, Unreadable):
                name = os.fsdecode(entry.path) or "."
                self._work.damaged[name] = f"cannot be read: {entry.error.strerror}"
                continue
            try:
                self._entry(entry, slots, by_id, shadows_fd, taken)
            except OSError as error:
                if error.errno not in _OF_ONE_FILE:
                    raise
                self._work.damaged[os.fsdecode(entry.path)] = f"{error.strerror}"
        for found in self._objects:
            if found.shown not in taken:
                self._work.left_out[found.shown] = "no name leads to it"
        status = os.fstat(tree_fd)
        self._directories[b"."] = status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)

    def _entry(
        self,
        entry: Entry,
        slots: dict[int, Slot],
        by_id: dict[bytes, list[_Object]],
        shadows_fd: int | None,
        taken: set[str],
    ) -> None:
        if stat.S_ISDIR(entry.status.st_mode):
            self._make_directory(entry.path, entry.status)
        elif stat.S_ISREG(entry.status.st_mode):
            self._copy(entry.path, _plain(entry, slots))
        elif stat.S_ISLNK(entry.status.st_mode):
            self._symlink(entry, by_id, shadows_fd, taken)

    def _read_slots(self, path: str, fd: int) -> dict[int, Slot]:
        """By nonce.  Without them a growing file is cut after its last whole batch, as any is."""
        try:
            return {slot.nonce: slot for slot in read_slots(fd) or ()}
        except OSError as error:
            self._work.notes[f"{path}/sizes"] = f"cannot be read: {error.strerror}"
            return {}

    def _symlink(
        self,
        entry: Entry,
        by_id: dict[bytes, list[_Object]],
        shadows_fd: int | None,
        taken: set[str],
    ) -> None:
        text = os.readlink(entry.name, dir_fd=entry.dir_fd)
        if not layout.looks_like_stub(text):
            self._make_symlink(entry, text)
            return
        id = text[-16:]
        shadow = None if shadows_fd is None else status_of(shadows_fd, id)
        found = _object_of(text, by_id.get(id, []), shadow)
        if found is not None:
            taken.add(found.shown)
            if shadow is not None and found.status.st_size < shadow.st_size:
                self._work.damaged[os.fsdecode(entry.path)] = (
                    f"its object has {found.status.st_size} of {shadow.st_size} bytes"
                )
            status = found.status if shadow is None else shadow
            size, mtime_ns = found.status.st_size, found.status.st_mtime_ns
            self._copy(entry.path, _Source(found.open, status, size, mtime_ns))
        elif shadow is not None and shadow.st_size == 0:
            self._copy(entry.path, _Source(_open_nothing, shadow, 0, shadow.st_mtime_ns))
        else:
            self._note_missing(entry.path)

    def _note_missing(self, path: bytes) -> None:
        self._work.lost.append(os.fsdecode(path))
        partition, base = _segment(path)
        if partition is not None:
            self._partition(partition).lost.append(base)

    # -- by the objects alone ---------------------------------------------------------------------

    def _by_objects(self) -> None:
        named: dict[bytes, list[tuple[_Object, Name]]] = {}
        for found in self._objects:
            parts = layout.split_object_name(found.path)
            name = Name(None, note="it is no object") if parts is None else name_of(parts[0])
            if name.path is None:
                self._work.left_out[found.shown] = name.note
            else:
                named.setdefault(name.path, []).append((found, name))
        for path, candidates in sorted(named.items()):
            try:
                self._copy_best(path, candidates)
            except OSError as error:
                if error.errno not in _OF_ONE_FILE:
                    raise
                self._work.damaged[os.fsdecode(path)] = f"{error.strerror}"

    def _copy_best(self, path: bytes, candidates: list[tuple[_Object, Name]]) -> None:
        chosen = 0
        if len(candidates) > 1:
            worth = [
                Candidate(
                    number,
                    name.rank,
                    found.status.st_size,
                    found.status.st_mtime_ns,
                    _extent_of(found, path),
                )
                for number, (found, name) in enumerate(candidates)
            ]
            chosen = best(worth).key
        for number, (found, name) in enumerate(candidates):
            if number != chosen:
                why = f"another object has this name, and more: {candidates[chosen][0].shown}"
                self._work.left_out[found.shown] = why
            elif name.note:
                self._work.notes[os.fsdecode(path)] = f"it {name.note}"
        found = candidates[chosen][0]
        self._make_parents(path, found.status)
        status = found.status
        self._copy(path, _Source(found.open, status, status.st_size, status.st_mtime_ns))

    def _make_parents(self, path: bytes, status: os.stat_result) -> None:
        """Directories of who owns the files in them."""
        parts = path.split(b"/")[:-1]
        for count in range(1, len(parts) + 1):
            directory = b"/".join(parts[:count])
            if directory not in self._directories:
                self._make_closed(directory)
                self._directories[directory] = status.st_uid, status.st_gid, 0o755

    # -- the target -------------------------------------------------------------------------------

    def _make_directory(self, path: bytes, status: os.stat_result) -> None:
        self._make_closed(path)
        self._directories[path] = status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)

    def _make_closed(self, path: bytes) -> None:
        with self._parent(path) as (parent_fd, name):
            os.mkdir(name, 0o700, dir_fd=parent_fd)

    @contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory where a path is to be made, and its name there.  OSError
        ENOTDIR when that directory is none of those that were made: what has its name may lead
        elsewhere, on a target that takes two names for one."""
        directory, _, name = path.rpartition(b"/")
        if directory and directory not in self._directories:
            raise OSError(errno.ENOTDIR, "its directory could not be made")
        fd = _native.open_beneath(self._target_fd, directory or b".", DIRECTORY)
        try:
            yield fd, name
        finally:
            os.close(fd)

    def _give_directories_away(self) -> None:
        """The deepest first.  **Invariant:** who is to own a directory cannot reach it before all
        below it was made: it could put a symlink in the way."""
        depths = {path: path.count(b"/") + (path != b".") for path in self._directories}
        for path in sorted(self._directories, key=lambda path: -depths[path]):
            uid, gid, mode = self._directories[path]
            fd = _native.open_beneath(self._target_fd, path, DIRECTORY)
            try:
                if os.geteuid() == 0:
                    os.fchown(fd, uid, gid)
                os.fchmod(fd, mode)
            finally:
                os.close(fd)

    def _make_symlink(self, entry: Entry, text: bytes) -> None:
        ids = entry.status.st_uid, entry.status.st_gid
        with self._parent(entry.path) as (parent_fd, name):
            os.symlink(text, name, dir_fd=parent_fd)
            if os.geteuid() == 0:
                os.chown(name, *ids, dir_fd=parent_fd, follow_symlinks=False)

    def _copy(self, path: bytes, source: _Source) -> None:
        name = os.fsdecode(path)
        try:
            source_fd = source.open()
        except OSError as error:
            self._work.damaged[name] = f"cannot be opened: {error.strerror}"
            self._note_missing(path)
            return
        try:
            with self._parent(path) as (parent_fd, last):
                target_fd = os.open(last, _NEW, 0o600, dir_fd=parent_fd)
            try:
                self._fill(path, source, source_fd, target_fd)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)
        self._work.files += 1
        self._progress(source.size)

    def _fill(self, path: bytes, source: _Source, source_fd: int, target_fd: int) -> None:
        name = os.fsdecode(path)
        copied = copy_into(source_fd, target_fd, source.size)
        if copied < source.size:
            self._work.damaged[name] = (
                f"cannot be read from byte {copied} on; it has {source.size} bytes"
            )
        partition, base = _segment(path)
        if partition is not None:
            copied = self._cut(name, partition, base, target_fd, copied)
        if os.geteuid() == 0:
            os.fchown(target_fd, source.status.st_uid, source.status.st_gid)
        os.fchmod(target_fd, stat.S_IMODE(source.status.st_mode))
        os.utime(target_fd, ns=(source.status.st_atime_ns, source.mtime_ns))
        self._work.bytes += copied

    def _cut(self, name: str, partition: str, base: int, fd: int, size: int) -> int:
        """Kafka removes all segments after one that ends with something else than a batch."""
        extent = batches.extent(fd, size, base)
        torn = extent.whole_bytes < size
        if torn:
            os.ftruncate(fd, extent.whole_bytes)
            self._work.damaged.setdefault(
                name,
                f"only {extent.whole_bytes} of {size} bytes are whole batches: the rest, "
                f"{format_size(size - extent.whole_bytes)}, was left out",
            )
        unread = name in self._work.damaged
        next_offset = base if extent.next_offset is None else extent.next_offset
        segment = Segment(base, next_offset, torn or unread)
        self._partition(partition).segments.append(segment)
        return extent.whole_bytes

    def _partition(self, path: str) -> Partition:
        return self._work.partitions.setdefault(path, Partition())


def _plain(entry: Entry, slots: dict[int, Slot]) -> _Source:
    """A file of the home tree; one that was growing in persistent memory has room beyond what was
    written to it."""
    dir_fd, name, status = entry.dir_fd, entry.name, entry.status
    size, mtime_ns = status.st_size, status.st_mtime_ns
    nonce = nonce_of(dir_fd, name) if slots else None
    slot = None if nonce is None else slots.get(nonce)
    if slot is not None and slot.is_ours(size):
        size, mtime_ns = slot.size, slot.mtime_ns
    return _Source(lambda: os.open(name, _FILE, dir_fd=dir_fd), status, size, mtime_ns)


def _object_of(text: bytes, found: list[_Object], shadow: os.stat_result | None) -> _Object | None:
    """Of the objects with its id, the one that a stub's text names, if it is as long as it should
    be; else one that is, or the longest: devices may be mounted elsewhere than before, and copies
    of them may have been cut off."""

    def worth(each: _Object) -> tuple[bool, bool, int]:
        is_whole = shadow is not None and each.status.st_size == shadow.st_size
        return (is_whole, text.endswith(b"/objects/" + each.path), each.status.st_size)

    return max(found, key=worth, default=None)


def _open_nothing() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _open_if_there(dir_fd: int, name: str) -> int | None:
    try:
        return os.open(name, DIRECTORY, dir_fd=dir_fd)
    except FileNotFoundError:
        return None


def _segment(path: bytes) -> tuple[str | None, int]:
    """(partition's directory, base offset) of a segment in use; (None, 0) of all else."""
    directory, _, name = os.fsdecode(path).rpartition("/")
    file = kafka.parse_file(name)
    is_segment = file.kind is FileKind.SEGMENT and file.state is FileState.CURRENT
    if not is_segment or kafka.parse_directory(directory.rpartition("/")[2]) is None:
        return None, 0
    return directory, file.base_offset or 0


def _extent_of(found: _Object, path: bytes) -> Extent | None:
    partition, base = _segment(path)
    if partition is None:
        return None
    try:
        fd = found.open()
    except OSError:
        return Extent(0, None)
    try:
        return batches.extent(fd, found.status.st_size, base)
    except OSError:
        return Extent(0, None)
    finally:
        os.close(fd)
