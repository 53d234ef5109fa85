"""Reads each directory of the home tree once after a mount, while the mount serves.

What is there counts as used room, goes into the catalogue, and is compared with its objects.
"""

import errno
import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from pafkafs import _native, kafka, layout
from pafkafs.catalogue import Catalogue, Directory, Place
from pafkafs.device import Device, Home
from pafkafs.growing import Recovery
from pafkafs.layout import Stub
from pafkafs.nodes import Node

log = logging.getLogger(__name__)

# One hop to a thread reads directories until so many names were found.
_BATCH_NAMES = 2000
_BATCH_DIRECTORIES = 64
# Stubs of a device that has moved are rewritten in the trio thread: so many between two awaits.
_REWRITES = 32
_TRIES_MAX = 5
# Errors that say nothing of what is read.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class FoundStub:
    """A symlink that looks like a stub.  shadow is its shadow's status, None when it is missing."""

    name: bytes
    ino: int
    links: int
    text: bytes
    stub: Stub | None  # None: refused
    shadow: os.stat_result | None


@dataclass(slots=True)
class Listing:
    """What was found in one directory."""

    ino: int
    files: int = 0
    allocated: int = 0  # bytes, by files with one name
    linked: list[tuple[int, int]] = field(default_factory=list)  # inode, bytes; of others
    segments: list[tuple[bytes, int, int]] = field(default_factory=list)  # name, bytes, mtime in ns
    stubs: list[FoundStub] = field(default_factory=list)
    directories: list[tuple[bytes, int]] = field(default_factory=list)
    unreadable: str | None = None  # one of the names about which nothing could be learnt


Batch = list[tuple[Directory, bytes]]
Reading = Listing | OSError


class Survey:
    """**Invariant:** before a name in a directory changes, or a file in it is opened, the directory
    was read: so what changes is never counted twice, and never missed.

    Whoever is first reads it: the walk, in a thread, or `know`, inline.  A reading of the walk that
    comes late, because `know` was there meanwhile, is thrown away.
    """

    def __init__(
        self,
        home: Home,
        devices: Mapping[str, Device],
        paths: Mapping[str, tuple[bytes, ...]],
        catalogue: Catalogue,
        sizes: Recovery | None,
    ) -> None:
        """paths has, for each device, where it is and where it was before."""
        self._home = home
        self._devices = devices
        self._numbers = {device: number for number, device in enumerate(devices)}
        self.paths = paths
        self._catalogue = catalogue
        self.sizes = sizes
        self.done = trio.Event()
        self.files = 0  # read so far
        self.damaged: dict[int, bytes] = {}  # inodes of refused stubs: where
        self.copied: set[str] = set()  # ids of objects that several stubs have
        self.unreadable: str | None = None  # a directory that could not be read, and why
        self.ids: set[int] = set()  # of the objects of all stubs that were found
        self.uncounted: set[int] = set()  # of those whose room nobody has counted yet
        self._read: set[int] = set()
        self._linked: set[int] = set()
        self._queue: deque[Directory] = deque([catalogue.root])
        self._tries: Counter[int] = Counter()  # to read directories that were moved meanwhile
        self._linked_stubs: dict[int, int] = {}  # inodes of stubs with several names, by object
        # Stubs that say where their device was before.
        self._old_texts: list[tuple[Directory, FoundStub]] = []
        self._old_linked: dict[int, list[tuple[Directory, FoundStub]]] = {}  # by inode
        channels = {id: trio.open_memory_channel[Directory](float("inf")) for id in devices}
        self._to_compare = {id: send for id, (send, _) in channels.items()}
        # Directories with stubs of each device; ended when all were read.
        self.with_stubs = {id: receive for id, (_, receive) in channels.items()}

    # -- what others ask ----------------------------------------------------------------------

    def know(self, node: Node, fd: int) -> Directory:
        """The directory of a node, read by now; fd is a descriptor of it."""
        directory = self._directory_of(node)
        if not self.done.is_set() and node.key not in self._read:
            self._read_inline(directory, fd)
        return directory

    def _directory_of(self, node: Node) -> Directory:
        found = self._catalogue.find(node.key)
        if found is not None or not node.names:
            return found or self._catalogue.root
        parent, name = node.names[0]
        return self._catalogue.directory(node.key, self._directory_of(parent), name)

    def _read_inline(self, directory: Directory, fd: int) -> None:
        own = layout.reopen_directory(fd)
        try:
            listing = self._list(own)
        finally:
            os.close(own)
        self._apply(directory, listing)

    def directory_gone(self, ino: int) -> None:
        """A directory was removed: its inode number may come back with another one."""
        self._read.discard(ino)
        self._catalogue.directory_gone(ino)

    def take_uncounted(self, object_id: str) -> bool:
        """Whether the room of an object from before the mount is to be counted, or not to be given
        back, now: once for each."""
        try:
            self.uncounted.remove(int(object_id, 16))  # one step, for threads too
        except KeyError:
            return False
        return True

    def is_referenced(self, object_id: str) -> bool:
        """Whether a stub with this object was found."""
        return layout.is_object_id(object_id) and int(object_id, 16) in self.ids

    # -- the walk -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Reads all that was not read yet."""
        while batch := self.take_batch():
            readings = await trio.to_thread.run_sync(self.read_batch, batch)
            self.apply_batch(batch, readings)
            await self._rewrite_all()
        self._rewrite_linked()
        self.done.set()
        self._read.clear()
        self._linked.clear()
        self._linked_stubs.clear()
        self._tries.clear()
        for channel in self._to_compare.values():
            channel.close()
        log.info("%d files are known", self.files)

    def take_batch(self) -> Batch:
        """Directories to be read next, with their paths of now; empty when all were read."""
        batch: Batch = []
        while self._queue and len(batch) < _BATCH_DIRECTORIES:
            directory = self._queue.popleft()
            if directory.ino not in self._read and self._catalogue.is_known(directory):
                batch.append((directory, directory.path))
        return batch

    def read_batch(self, batch: Batch) -> list[Reading]:
        """What was found in each, or why not; of the first ones, if there are many names.  The only
        part that runs in a thread."""
        readings: list[Reading] = []
        names = 0
        for directory, path in batch:
            if names > _BATCH_NAMES:
                break
            try:
                listing = self._list_path(path, directory.ino)
            except OSError as error:
                readings.append(error)
                continue
            readings.append(listing)
            names += listing.files + len(listing.stubs)
        return readings

    def apply_batch(self, batch: Batch, readings: list[Reading]) -> None:
        """Takes over what is still news."""
        for (directory, _), reading in zip(batch, readings, strict=False):
            if directory.ino in self._read or not self._catalogue.is_known(directory):
                continue
            if isinstance(reading, Listing):
                self._apply(directory, reading)
            elif isinstance(reading, FileNotFoundError) or reading.errno in _PASSING:
                self._try_again(directory, reading)
            else:
                self._note_unreadable(directory, reading)
        self._queue.extendleft(directory for directory, _ in batch[len(readings) :])

    def _try_again(self, directory: Directory, error: OSError) -> None:
        """It was moved while it was to be read, or removed behind the mount; or the process had too
        much open."""
        self._tries[directory.ino] += 1
        if self._tries[directory.ino] < _TRIES_MAX:
            self._queue.append(directory)
        else:
            self._note_unreadable(directory, error)

    def _list_path(self, path: bytes, ino: int) -> Listing:
        fd = open_directory(self._home, path, ino)
        try:
            return self._list(fd)
        finally:
            os.close(fd)

    def _note_unreadable(self, directory: Directory, error: OSError) -> None:
        name = os.fsdecode(directory.path) or "tree"
        log.error("cannot read %s: %s", name, error.strerror)
        self.unreadable = f"{name} ({error.strerror})"

    # -- one directory ------------------------------------------------------------------------

    def _list(self, fd: int) -> Listing:
        listing = Listing(os.fstat(fd).st_ino)
        with os.scandir(fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                try:
                    self._look_at(fd, name, listing)
                except FileNotFoundError:
                    continue  # removed meanwhile
                except OSError as error:
                    if error.errno in _PASSING:
                        raise
                    listing.unreadable = f"{entry.name} ({error.strerror})"
        return listing

    def _look_at(self, fd: int, name: bytes, listing: Listing) -> None:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            listing.directories.append((name, status.st_ino))
        elif stat.S_ISREG(status.st_mode):
            status = recovered(self.sizes, fd, name, status)
            self._note_plain(name, status, listing)
        elif stat.S_ISLNK(status.st_mode):
            text = os.readlink(name, dir_fd=fd)
            if layout.looks_like_stub(text):
                listing.stubs.append(self._stub_at(name, status, text))

    @staticmethod
    def _note_plain(name: bytes, status: os.stat_result, listing: Listing) -> None:
        allocated = status.st_blocks * 512
        if status.st_nlink > 1:
            listing.linked.append((status.st_ino, allocated))
            return
        listing.files += 1
        listing.allocated += allocated
        if kafka.segment_base_offset(name) is not None:
            listing.segments.append((name, allocated, status.st_mtime_ns))

    def _stub_at(self, name: bytes, status: os.stat_result, text: bytes) -> FoundStub:
        try:
            stub = layout.parse_stub(text, self.paths)
        except layout.DamagedStub:
            stub = None
        shadow = None if stub is None else self._shadow_status(stub)
        return FoundStub(name, status.st_ino, status.st_nlink, text, stub, shadow)

    def _shadow_status(self, stub: Stub) -> os.stat_result | None:
        try:
            return layout.shadow_status(self._home.shadows_fd, stub)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return None

    def _apply(self, directory: Directory, listing: Listing) -> None:
        """Atomic for the trio thread."""
        self._read.add(listing.ino)
        if listing.unreadable is not None:
            self.unreadable = os.path.join(os.fsdecode(directory.path), listing.unreadable)
            log.error("cannot read %s", self.unreadable)
        for name, ino in listing.directories:
            self._queue.append(self._catalogue.directory(ino, directory, name))
        self._count(listing)
        places = [(n, Place(0, size, mtime_ns)) for n, size, mtime_ns in listing.segments]
        devices: set[str] = set()
        for found in listing.stubs:
            if found.stub is None:
                self._refuse(directory, found)
                continue
            self._note_object(found, found.stub)
            devices.add(found.stub.device_id)
            if found.shadow is not None and found.links == 1:
                number = self._numbers[found.stub.device_id]
                size, mtime_ns = found.shadow.st_size, found.shadow.st_mtime_ns
                places.append((found.name, Place(number, size, mtime_ns)))
            if found.text != self._text_now(found.stub):
                self._old_texts.append((directory, found))
        self._catalogue.found(directory, places)
        for id in devices:
            self._to_compare[id].send_nowait(directory)

    def _count(self, listing: Listing) -> None:
        home = next(iter(self._devices.values()))
        files, size = listing.files, listing.allocated
        for ino, allocated in listing.linked:
            if ino not in self._linked:
                self._linked.add(ino)
                files, size = files + 1, size + allocated
        home.files += files
        home.reserve(size)
        self.files += files + len(listing.stubs)

    def _refuse(self, directory: Directory, found: FoundStub) -> None:
        path = os.path.join(directory.path, found.name)
        log.error("refused stub %s -> %s", os.fsdecode(path), os.fsdecode(found.text))
        self.damaged[found.ino] = path
        self.ids.add(int(layout.object_id_of(found.text), 16))

    def _note_object(self, found: FoundStub, stub: Stub) -> None:
        id = int(stub.object_id, 16)
        if id not in self.ids:
            self.ids.add(id)
            self.uncounted.add(id)
            self._devices[stub.device_id].files += 1
        elif found.links == 1 or self._linked_stubs.get(id) != found.ino:
            # A symlink with several names is one file; several symlinks are copies made by hand.
            self.copied.add(stub.object_id)
        if found.links > 1:
            self._linked_stubs[id] = found.ino

    def _text_now(self, stub: Stub) -> bytes:
        return layout.stub_text(self._devices[stub.device_id].path, stub)

    # -- devices that are mounted elsewhere than before -------------------------------------------

    async def _rewrite_all(self) -> None:
        """Until one is rewritten, it is found where its device was before."""
        old, self._old_texts = self._old_texts, []
        for number, (directory, found) in enumerate(old):
            if found.links > 1:
                self._old_linked.setdefault(found.ino, []).append((directory, found))
            else:
                self._rewrite([(directory, found)])
            if number % _REWRITES == 0:
                await trio.lowlevel.checkpoint()

    def _rewrite_linked(self) -> None:
        """Those with several names, once all names are known: in between, one of them would look
        like the only one.  Atomic for the trio thread."""
        for names in self._old_linked.values():
            self._rewrite(names)
        self._old_linked.clear()

    def _rewrite(self, names: list[tuple[Directory, FoundStub]]) -> None:
        """All names of one stub, or none: they stay names of one stub."""
        with ExitStack() as stack:
            try:
                places = [(self._place(stack, d, f.name, f.stub), f.name) for d, f in names]
                links = {os.stat(n, dir_fd=fd, follow_symlinks=False).st_nlink for fd, n in places}
                if links == {len(names)}:
                    self._replace(places, names[0][1])
            except FileNotFoundError:
                return  # removed or moved meanwhile
            except OSError as error:
                log.error("cannot rewrite a stub of a device that has moved: %s", error.strerror)

    def is_there(self, directory: Directory, name: bytes, stub: Stub) -> bool:
        """Whether a stub was not removed or moved since its directory was read."""
        with ExitStack() as stack:
            try:
                self._place(stack, directory, name, stub)
            except FileNotFoundError:
                return False
        return True

    def _place(self, stack: ExitStack, directory: Directory, name: bytes, stub: Stub | None) -> int:
        """A descriptor of its directory; FileNotFoundError when it is not there any more."""
        fd = open_directory(self._home, directory.path, directory.ino)
        stack.callback(os.close, fd)
        there = stub_at(name, fd, self.paths)
        if there is None or stub is None or there.object_id != stub.object_id:
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        return fd

    def _replace(self, places: list[tuple[int, bytes]], found: FoundStub) -> None:
        assert found.stub is not None
        (first_fd, first), *others = places
        path = self._devices[found.stub.device_id].path
        layout.replace_with_stub(self._home.tmp_fd, first_fd, first, path, found.stub)
        shadow, tmp_fd = found.stub.shadow, self._home.tmp_fd
        for fd, name in others:
            os.link(first, shadow, src_dir_fd=first_fd, dst_dir_fd=tmp_fd, follow_symlinks=False)
            _native.rename(tmp_fd, shadow, fd, name, 0)


def open_directory(home: Home, path: bytes, ino: int) -> int:
    """Opens a directory of the home tree by its path; FileNotFoundError when another one, or
    something else, is there by now.  No symlink leads out of the tree."""
    try:
        fd = _native.open_beneath(home.tree_fd, path or b".", layout.DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise FileNotFoundError(errno.ENOENT, "moved meanwhile") from error
        raise
    status = os.fstat(fd)
    if (status.st_ino, status.st_dev) != (ino, home.device_number):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "moved meanwhile")
    return fd


def recovered(
    sizes: Recovery | None, dir_fd: int, name: bytes, status: os.stat_result
) -> os.stat_result:
    """The status of a regular file, which was cut to its size first if it was growing when the
    last mount ended."""
    if sizes is None or not sizes.file_found(dir_fd, name, status.st_ino):
        return status
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def stub_at(name: bytes, dir_fd: int, paths: Mapping[str, tuple[bytes, ...]]) -> Stub | None:
    """The stub with this name; None for what is none, or is gone."""
    try:
        return layout.parse_stub(os.readlink(name, dir_fd=dir_fd), paths)
    except (OSError, layout.DamagedStub):
        return None


def stubs_in(
    home: Home, path: bytes, ino: int, device_id: str, paths: Mapping[str, tuple[bytes, ...]]
) -> Iterator[tuple[bytes, Stub]]:
    """The stubs of one device in a directory; FileNotFoundError when it was moved."""
    fd = open_directory(home, path, ino)
    try:
        for name in map(os.fsencode, os.listdir(fd)):
            stub = stub_at(name, fd, paths)
            if stub is not None and stub.device_id == device_id:
                yield name, stub
    finally:
        os.close(fd)
