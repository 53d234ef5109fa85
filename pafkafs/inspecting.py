"""Reads all that lies on the devices of a set and finds what is wrong, without changing anything.

Findings come while it reads.  What is kept of each file are two numbers, the id and the place of
its object, so that a million files fit into some dozens of MiB.  The order:

1. the own directories, tmp/ and the devices themselves
2. the home tree: each stub with its shadow and its object; files that were growing
3. shadows/ and objects/: what no stub leads to
4. the home tree again, if need be: stubs whose object is elsewhere, missing, or another's too
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from pafkafs import deviceset, layout
from pafkafs.checking import (
    Attributes,
    Finding,
    Kind,
    Place,
    Totals,
    judge_elsewhere,
    judge_state_directory,
    judge_stub,
    show,
    too_many,
)
from pafkafs.deviceset import SetDevice
from pafkafs.garbage import allowed
from pafkafs.layout import DamagedStub, Stub
from pafkafs.references import References
from pafkafs.slots import Slot, nonce_of, read_slots
from pafkafs.units import format_size, printable
from pafkafs.walking import (
    DIRECTORY,
    Entry,
    entries,
    read_link,
    status_beneath,
    status_of,
    walk,
)

_HOME_ONLY = (layout.TREE, layout.SHADOWS, layout.TMP)
_KNOWN = {layout.OBJECTS, layout.LOST, layout.RECORD, "lost+found"}
_KNOWN_AT_HOME = {*_KNOWN, *_HOME_ONLY, "sizes"}
_NO_STUB = "no stub leads to any object: is the home tree the right one?"
_SEVERAL_NAMES = "it has several names: remove all but one of them through the mount first"
_TEMPORARY = re.compile(r"\.pafkafs(\.json\.|-)[0-9a-f]{8}|sizes\.new")


class Inspection:
    """One look at all devices.  serving: a mount is using them; then tmp/ and the sizes of growing
    files are its business, and so is what it made."""

    def __init__(
        self, devices: Sequence[SetDevice], *, serving: bool = False, since_ns: int | None = None
    ) -> None:
        """since_ns: when the daemon began; objects without a stub that were changed since may be
        on their way.  None: all may."""
        self._devices = devices
        self.paths = [device.member.path for device in devices]
        self._stub_paths: Mapping[str, tuple[bytes, ...]] = {
            device.member.device: device.all_paths for device in devices
        }
        self._numbers = {device.member.device: n for n, device in enumerate(devices)}
        self._serving = serving
        self._since_ns = since_ns
        self._root = os.geteuid() == 0
        self._fds: dict[tuple[int, str], int] = {}
        self._unread: set[tuple[int, str]] = set()  # own directories that were not read whole
        self._unopened: set[tuple[int, str]] = set()
        self._seen = References()
        self._later: set[int] = set()  # ids of stubs that are looked at a second time
        self._elsewhere: dict[int, list[tuple[Place, int]]] = {}  # places and sizes
        self._objects_of: dict[int, int] = {}  # how many each device has
        self._without_stub: Counter[int] = Counter()
        self._slots: dict[int, list[Slot]] = {}
        self._slots_met: set[int] = set()
        self._has_sizes = False
        self._copied = False  # growing files have other inode numbers than their slots say
        self.totals = Totals()

    def open(self) -> None:
        """Opens the own directories that can be."""
        for number, device in enumerate(self._devices):
            for area in _areas(number):
                with suppress(OSError):  # run tells what is wrong with it
                    self._fds[number, area] = os.open(area, DIRECTORY, dir_fd=device.fd)

    def close(self) -> None:
        """Closes the own directories."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    @property
    def read_whole(self) -> bool:
        """Whether all names of the home tree were seen."""
        return (0, layout.TREE) not in self._unread

    @property
    def slots_may_go(self) -> bool:
        """Whether no file needs those that none was found for."""
        return self.read_whole and not self._copied

    def run(self) -> Iterator[Finding]:
        """All that is wrong, as it is found."""
        self.open()
        for number in range(len(self._devices)):
            yield from self._device(number)
        if (0, layout.TREE) not in self._fds:
            return
        yield from self._leftovers()
        if not self._serving:
            yield from self._read_slots()
        yield from self._tree()
        yield from self._slots_left()
        self._seen.sort()
        shared = set(self._seen.shared())
        for number in range(len(self._devices)):
            yield from self._objects(number)
        for number, count in self._without_stub.items():
            yield from self._garbage(number, count)
        yield from self._shadows()
        # Last: its repairs make objects and shadows, which must not be taken for garbage.
        if self._later or shared:
            yield from self._tree_again(shared)

    # -- the devices ----------------------------------------------------------------------------

    def _device(self, number: int) -> Iterator[Finding]:
        device = self._devices[number]
        uid = deviceset.owner(device.fd)
        for area in _areas(number):
            where = Place(number, area, b"")
            status = status_of(device.fd, area.encode())
            found = judge_state_directory(where, status, uid)
            if (number, area) not in self._fds:
                self._unopened.add((number, area))
            if found is not None:
                yield found
            elif (number, area) not in self._fds:
                yield Finding(Kind.UNREADABLE, where, "the directory cannot be opened")
        known = _KNOWN_AT_HOME if number == 0 else _KNOWN
        for entry in entries(device.fd):
            name = os.fsdecode(entry.name)
            if name in known:
                continue
            where = Place(number, "", entry.name)
            if name == layout.ADOPTING:
                why = "run the same pafkafs adopt command again"
                what = "a log directory is only half adopted"
                yield Finding(Kind.UNKNOWN_ENTRY, where, what, hopeless=why)
            elif _TEMPORARY.fullmatch(name) and not self._serving:
                yield Finding(Kind.LEFTOVER, where, "was left by a mount that was killed")
            elif not _TEMPORARY.fullmatch(name):
                yield Finding(Kind.UNKNOWN_ENTRY, where, "is nothing that pafkafs makes")

    def _leftovers(self) -> Iterator[Finding]:
        """A mount that serves has its stubs and copies there."""
        fd = self._fds.get((0, layout.TMP))
        if fd is None or self._serving:
            return
        for entry in entries(fd):
            where = Place(0, layout.TMP, entry.name)
            yield Finding(Kind.LEFTOVER, where, "was left by a mount that was killed")

    # -- files that grow in persistent memory ---------------------------------------------------

    def _read_slots(self) -> Iterator[Finding]:
        try:
            slots = read_slots(self._devices[0].fd)
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
            yield Finding(Kind.UNREADABLE, Place(0, "", b"sizes"), what)
            return
        for slot in slots or ():
            self._slots.setdefault(slot.ino, []).append(slot)
        self._has_sizes = slots is not None

    def _plain(self, entry: Entry) -> Iterator[Finding]:
        where = Place(0, layout.TREE, entry.path)
        if self._serving or not self._has_sizes:
            return
        nonce = nonce_of(entry.dir_fd, entry.name)
        if nonce is None:
            return
        slots = self._slots.get(entry.status.st_ino, ())
        slot = next((slot for slot in slots if slot.nonce == nonce), None)
        if slot is None:
            what = "is marked as growing, and has no slot"
            yield Finding(
                Kind.NONCE_WITHOUT_SLOT, where, what, hopeless=self._why_not_unmarked(nonce)
            )
            return
        self._slots_met.add(slot.number)
        size = entry.status.st_size
        if slot.is_ours(size):
            what = f"was growing when its mount ended: {slot.size} bytes of {size} are written"
        else:
            what = f"was changed since it was growing: {size} bytes, {slot.size} by its slot"
        yield Finding(Kind.SLOT_OF_FILE, where, what)

    def _why_not_unmarked(self, nonce: int) -> str:
        """Slots say by inode number where their files are, which a copy of a device changes."""
        slot = next((s for slots in self._slots.values() for s in slots if s.nonce == nonce), None)
        if slot is None:
            return ""
        self._copied = True
        return (
            f"its slot is that of another inode: the device was copied while it grew; "
            f"{slot.size} bytes of it are written: truncate -s {slot.size}, and check again"
        )

    def _slots_left(self) -> Iterator[Finding]:
        numbers = {slot.number for slots in self._slots.values() for slot in slots}
        left = len(numbers - self._slots_met)
        if left and self.slots_may_go:
            what = f"{left} slots are of files that are gone"
            yield Finding(Kind.SLOTS_WITHOUT_FILE, Place(0, "", b"sizes"), what)

    # -- the home tree --------------------------------------------------------------------------

    def _tree(self) -> Iterator[Finding]:
        for entry in self.walk(0, layout.TREE):
            if isinstance(entry, Finding):
                yield entry
                continue
            mode = entry.status.st_mode
            if stat.S_ISREG(mode):
                self.totals.files += 1
                self.totals.bytes += entry.status.st_size
                yield from self._plain(entry)
            elif stat.S_ISLNK(mode):
                yield from self._symlink(entry)

    def _symlink(self, entry: Entry) -> Iterator[Finding]:
        text = read_link(entry)
        if text is None or not layout.looks_like_stub(text):
            return
        self.totals.files += 1
        id = int(layout.object_id_of(text), 16)
        stub = self._parse(text)
        if stub is None:
            self._seen.add(id, entry.status)
            self._later.add(id)
            return
        number = self._numbers[stub.device_id]
        self._seen.add(id, entry.status, (number, stub.object))
        found = self._look_at_stub(entry, stub)
        if found is not None and found.kind is Kind.OBJECT_MISSING:
            self._later.add(id)
        elif found is not None:
            yield found

    def _parse(self, text: bytes) -> Stub | None:
        """None for a refused one."""
        try:
            return layout.parse_stub(text, self._stub_paths)
        except DamagedStub:
            return None

    def _look_at_stub(self, entry: Entry, stub: Stub) -> Finding | None:
        where = Place(0, layout.TREE, entry.path)
        number = self._numbers[stub.device_id]
        if {(number, layout.OBJECTS), (0, layout.SHADOWS)} & self._unopened:
            return None  # which was told
        objects_fd = self._fds.get((number, layout.OBJECTS))
        shadows_fd = self._fds.get((0, layout.SHADOWS))
        try:
            shadow = None if shadows_fd is None else status_of(shadows_fd, stub.shadow)
            object_ = None if objects_fd is None else status_beneath(objects_fd, stub.object)
        except OSError as error:
            what = f"its object cannot be looked at: {error.strerror}"
            return Finding(Kind.UNREADABLE, where, what, stub, evidence=(stub, error.errno))
        return judge_stub(where, stub, _attributes(shadow), _attributes(object_), root=self._root)

    def _tree_again(self, shared: set[int]) -> Iterator[Finding]:
        """Stubs that need what objects/ has, or the other stubs."""
        first: dict[int, tuple[bytes, int]] = {}
        for entry in self.walk(0, layout.TREE):
            if isinstance(entry, Finding) or not stat.S_ISLNK(entry.status.st_mode):
                continue
            text = read_link(entry)
            if text is None or not layout.looks_like_stub(text):
                continue
            id = int(layout.object_id_of(text), 16)
            if id in self._later:
                found = self._judge_missing(entry, text, id)
                if found is not None:
                    yield found
                    continue
            if id in shared:
                yield from self._judge_shared(entry, text, id, first)

    def _judge_missing(self, entry: Entry, text: bytes, id: int) -> Finding | None:
        where = Place(0, layout.TREE, entry.path)
        stub = self._parse(text)
        if stub is None:
            what = printable(f"leads to no device of the set: {os.fsdecode(text)}")
            missing: Finding | None = Finding(
                Kind.STUB_REFUSED,
                where,
                what,
                Stub(layout.device_id_of(text), layout.object_id_of(text), b""),
                evidence=(text,),
            )
        else:
            missing = self._look_at_stub(entry, stub)
        if missing is None or missing.kind not in (Kind.OBJECT_MISSING, Kind.STUB_REFUSED):
            return missing
        candidates = self._elsewhere.get(id)
        if not candidates:
            return missing
        shadow = self._shadow_size(id)
        whole = [place for place, size in candidates if size == shadow]
        found = (whole or [place for place, _ in candidates])[0]
        judged = judge_elsewhere(missing, found, show(self.paths, found))
        if len(candidates) > 1 and not whole:
            return replace(judged, hopeless="several objects have its id, and none its size")
        if entry.status.st_nlink > 1:
            return replace(judged, hopeless=_SEVERAL_NAMES)
        return judged

    def _shadow_size(self, id: int) -> int | None:
        fd = self._fds.get((0, layout.SHADOWS))
        status = None if fd is None else status_of(fd, b"%016x" % id)
        return None if status is None else status.st_size

    def _judge_shared(
        self, entry: Entry, text: bytes, id: int, first: dict[int, tuple[bytes, int]]
    ) -> Iterator[Finding]:
        stub = self._parse(text)
        if id not in first or stub is None:
            first.setdefault(id, (entry.path, entry.status.st_ino))
            return
        other, ino = first[id]
        if ino == entry.status.st_ino:
            return  # another name of the same symlink
        what = printable(f"leads to the object of {os.fsdecode(other)}")
        where = Place(0, layout.TREE, entry.path)
        why = _SEVERAL_NAMES if entry.status.st_nlink > 1 else ""
        yield Finding(Kind.OBJECT_SHARED, where, what, stub, evidence=(text, other), hopeless=why)

    # -- objects and shadows --------------------------------------------------------------------

    def _objects(self, number: int) -> Iterator[Finding]:
        """What is none; and it counts those without a stub, and notes those that stubs miss."""
        before = self.totals.objects
        for entry in self.walk(number, layout.OBJECTS):
            if isinstance(entry, Finding):
                yield entry
                continue
            if stat.S_ISDIR(entry.status.st_mode):
                continue
            where = Place(number, layout.OBJECTS, entry.path)
            name = layout.split_object_name(entry.path)
            if name is None or not stat.S_ISREG(entry.status.st_mode):
                yield Finding(Kind.UNKNOWN_ENTRY, where, "is nothing that pafkafs makes")
                continue
            self.totals.objects += 1
            self.totals.bytes += entry.status.st_size
            if not self._seen.has_place(number, entry.path):
                id = int(name[2], 16)
                if id in self._later:
                    self._elsewhere.setdefault(id, []).append((where, entry.status.st_size))
                elif not self._seen.has_id(id):
                    self._without_stub[number] += 1
        self._objects_of[number] = self.totals.objects - before

    def _garbage(self, number: int, count: int) -> Iterator[Finding]:
        """Objects without a stub, of which the device has so many."""
        hopeless = ""
        if not self.read_whole:
            hopeless = "the home tree could not be read whole: it may have a stub"
        elif self.totals.objects == sum(self._without_stub.values()):
            hopeless = _NO_STUB
        elif count > allowed(self._objects_of[number]):
            hopeless = too_many(self._objects_of[number], count)
        for entry in self.walk(number, layout.OBJECTS):
            if isinstance(entry, Finding) or not stat.S_ISREG(entry.status.st_mode):
                continue
            where = Place(number, layout.OBJECTS, entry.path)
            if self._has_no_stub(where) and self._is_settled(entry.status):
                what = f"has no stub, {format_size(entry.status.st_size)}"
                evidence = (Attributes.of(entry.status),)
                yield Finding(
                    Kind.OBJECT_WITHOUT_STUB, where, what, evidence=evidence, hopeless=hopeless
                )

    def _has_no_stub(self, where: Place) -> bool:
        name = layout.split_object_name(where.path)
        # As at a mount: while a stub has its id, it may be the one that is whole.
        return name is not None and not self._seen.has_id(int(name[2], 16))

    def _shadows(self) -> Iterator[Finding]:
        fd = self._fds.get((0, layout.SHADOWS))
        if fd is None:
            return
        without, count = 0, 0
        for entry in entries(fd):
            count += 1
            without += self._is_shadow(entry) and not self._has_stub(entry)
        hopeless = ""
        if not self.read_whole:
            hopeless = "the home tree could not be read whole: it may have a stub"
        elif without == count:
            hopeless = _NO_STUB
        elif without > allowed(count):
            hopeless = f"{without} of {count} are too many to be garbage: are stubs missing?"
        for entry in entries(fd):
            where = Place(0, layout.SHADOWS, entry.name)
            if not self._is_shadow(entry):
                yield Finding(Kind.UNKNOWN_ENTRY, where, "is nothing that pafkafs makes")
            elif not self._has_stub(entry) and self._is_settled(entry.status):
                what = "is a shadow without a stub"
                evidence = (Attributes.of(entry.status),)
                yield Finding(
                    Kind.SHADOW_WITHOUT_STUB, where, what, evidence=evidence, hopeless=hopeless
                )

    @staticmethod
    def _is_shadow(entry: Entry) -> bool:
        name = os.fsdecode(entry.name)
        return layout.is_object_id(name) and stat.S_ISREG(entry.status.st_mode)

    def _has_stub(self, shadow: Entry) -> bool:
        return self._seen.has_id(int(shadow.name, 16))

    def _is_settled(self, status: os.stat_result) -> bool:
        """Whether what has no stub is not on its way: that of a mount that serves may be."""
        if not self._serving:
            return True
        return self._since_ns is not None and status.st_ctime_ns < self._since_ns

    # -- reading --------------------------------------------------------------------------------

    def walk(self, number: int, area: str) -> Iterator[Entry | Finding]:
        """All entries below an own directory; a Finding for what cannot be read."""
        top_fd = self._fds.get((number, area))
        if top_fd is None:
            return
        for entry in walk(top_fd):
            if isinstance(entry, Entry):
                yield entry
            elif not self._is_passing(entry.error):
                self._unread.add((number, area))
                what = f"cannot be read: {entry.error.strerror}"
                where = Place(number, area, entry.path)
                yield Finding(Kind.UNREADABLE, where, what, evidence=(entry.error.errno,))

    def _is_passing(self, error: OSError) -> bool:
        """A mount that serves removes and renames directories."""
        return self._serving and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def _areas(number: int) -> tuple[str, ...]:
    return (layout.OBJECTS, layout.LOST, *(_HOME_ONLY if number == 0 else ()))


def _attributes(status: os.stat_result | None) -> Attributes | None:
    return None if status is None else Attributes.of(status)
