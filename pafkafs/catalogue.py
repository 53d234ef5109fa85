"""All segments of a mount: where each one is, how large and how old; sealed ones in order of age.

In memory only, and all of it owned by the trio thread.  The survey tells it what was there, the
namespace and the mover what changes.
"""

import heapq
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sortedcontainers import SortedKeyList

from pafkafs import kafka
from pafkafs.policy import Rules, Segment

# Many files may have one time.  With a number behind it no two entries of an order are alike, so
# that each one is found by bisection.
_SEQUENCE_BITS = 24
_SEQUENCE_MASK = (1 << _SEQUENCE_BITS) - 1


class Directory:
    """A directory of the home tree.  Its place changes by one assignment, whatever is below it."""

    __slots__ = ("active", "ino", "name", "parent", "rule", "segments")

    def __init__(self, ino: int, parent: "Directory | None", name: bytes) -> None:
        self.ino = ino
        self.parent = parent
        self.name = name
        self.segments: dict[int, Entry] = {}  # by base offset
        self.active: int | None = None  # the highest of them
        self.rule: int | None = None  # None: its segments do not move

    @property
    def path(self) -> bytes:
        """Relative to the mount; empty for the root."""
        names: list[bytes] = []
        directory = self
        while directory.parent is not None:
            names.append(directory.name)
            directory = directory.parent
        return b"/".join(reversed(names))


class Entry:
    """A segment; device is a number, bytes are those allocated.

    moved_s is when it was moved, on the monotonic clock; held_until, on the same, until when it is
    left alone after a move of it failed.
    """

    __slots__ = (
        "base_offset",
        "bytes",
        "device",
        "directory",
        "held_until",
        "key",
        "moved_s",
        "order",
        "why",
    )

    def __init__(
        self, directory: Directory, base_offset: int, place: "Place", key: int, moved_s: float
    ) -> None:
        self.directory = directory
        self.base_offset = base_offset
        self.device = place.device
        self.bytes = place.bytes
        self.key = key
        self.moved_s = moved_s
        self.held_until = 0.0
        self.order: _Order | None = None
        self.why = ""  # it was moved where it is, since the mount

    @property
    def mtime_ns(self) -> int:
        """Its last write, as far as it is known."""
        return self.key >> _SEQUENCE_BITS

    @property
    def path(self) -> bytes:
        """Relative to the mount."""
        return os.path.join(self.directory.path, kafka.segment_name(self.base_offset))

    @property
    def is_active(self) -> bool:
        """Whether Kafka appends to it."""
        return self.directory.active == self.base_offset


class _Order:
    """The sealed segments of one tier and rule, the oldest first."""

    def __init__(self) -> None:
        self.entries: SortedKeyList[Entry, int] = SortedKeyList(key=_key_of)
        self.bytes = 0

    def add(self, entry: Entry) -> None:
        self.entries.add(entry)
        self.bytes += entry.bytes
        entry.order = self

    def remove(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.bytes -= entry.bytes
        entry.order = None


def _key_of(entry: Entry) -> int:
    return entry.key


@dataclass(frozen=True, slots=True)
class Place:
    """What is known of a file: its device's number, bytes allocated, time of the last write."""

    device: int
    bytes: int
    mtime_ns: int


class Catalogue:
    """**Invariant:** a segment is in the order of its tier and rule exactly while it may move: not
    active, not held, in a directory whose segments move."""

    def __init__(self, tiers: Sequence[int], rules: Rules, root_ino: int, mounted_s: float) -> None:
        """tiers has the tier of each device.  What is on a lower tier at the mount counts as moved
        then."""
        self._tiers = tuple(tiers)
        self._rules = rules
        self._mounted_s = mounted_s
        self.root = Directory(root_ino, None, b"")
        self._directories: dict[int, Directory] = {root_ino: self.root}
        self._orders: dict[tuple[int, int], _Order] = {}
        self._sequence = itertools.count()
        self.settled = True
        self._held: list[tuple[float, int, Entry]] = []  # a heap by the time at which it ends

    # -- directories --------------------------------------------------------------------------

    def find(self, ino: int) -> Directory | None:
        """The directory with this inode number on the home filesystem."""
        return self._directories.get(ino)

    def directory(self, ino: int, parent: Directory, name: bytes) -> Directory:
        """The directory with this inode number; it is at this place now."""
        found = self._directories.get(ino)
        if found is None:
            found = self._directories[ino] = Directory(ino, parent, name)
            found.rule = self._rule_of(name)
        elif (found.parent, found.name) != (parent, name):
            found.parent, found.name = parent, name
            self._reclassify(found)
        return found

    def directory_gone(self, ino: int) -> None:
        """It was removed, and so had nothing in it."""
        gone = self._directories.pop(ino, None)
        for entry in list(gone.segments.values()) if gone is not None else ():
            self._take_out(entry)

    def is_known(self, directory: Directory) -> bool:
        """Whether it is there still."""
        return self._directories.get(directory.ino) is directory

    def _rule_of(self, name: bytes) -> int | None:
        text = os.fsdecode(name)
        if not kafka.may_migrate(text, "0" * 20 + ".log"):
            return None
        partition = kafka.parse_directory(text)
        return 0 if partition is None else self._rules.of_topic(partition.topic)

    def _reclassify(self, directory: Directory) -> None:
        directory.rule = self._rule_of(directory.name)
        for entry in directory.segments.values():
            self._arrange(entry)

    def follow(self, rules: Rules) -> Iterator[None]:
        """Takes other rules; what is returned works them off, directory by directory, so that
        others may run.  Until it is settled again, the orders have segments by either rules."""
        self.settled = False
        self._rules = rules
        directories = list(self._directories.values())
        for directory in directories:
            directory.rule = self._rule_of(directory.name)
        return self._settle(directories)

    def _settle(self, directories: Sequence[Directory]) -> Iterator[None]:
        for directory in directories:
            self._reclassify(directory)
            yield
        self.settled = True

    # -- segments -----------------------------------------------------------------------------

    def entry(self, ino: int, name: bytes) -> Entry | None:
        """The segment with this name in the directory with this inode number."""
        directory, offset = self._directories.get(ino), kafka.segment_base_offset(name)
        return None if directory is None or offset is None else directory.segments.get(offset)

    def put(
        self, directory: Directory, name: bytes, place: Place, moved_s: float = -math.inf
    ) -> Entry | None:
        """A segment is there, or is known better now; returns one that was sealed by it."""
        offset = kafka.segment_base_offset(name)
        if offset is None:
            return None
        key = place.mtime_ns << _SEQUENCE_BITS | next(self._sequence) & _SEQUENCE_MASK
        entry = directory.segments.get(offset)
        if entry is None:
            entry = Entry(directory, offset, place, key, moved_s)
            directory.segments[offset] = entry
        else:
            self._take_out(entry)
            entry.device, entry.bytes, entry.key = place.device, place.bytes, key
        sealed = None
        if directory.active is None or offset > directory.active:
            before, directory.active = directory.active, offset
            sealed = None if before is None else directory.segments[before]
            if sealed is not None:
                self._arrange(sealed)
        self._arrange(entry)
        return sealed

    def found(self, directory: Directory, places: Iterable[tuple[bytes, Place]]) -> None:
        """What was in a directory at the mount; what is known already is known better."""
        for name, place in places:
            if self.entry(directory.ino, name) is None:
                moved_s = self._mounted_s if self._tiers[place.device] > 0 else -math.inf
                self.put(directory, name, place, moved_s)

    def remove(self, ino: int, name: bytes) -> Entry | None:
        """A name is gone from a directory; what it was."""
        entry = self.entry(ino, name)
        if entry is None:
            return None
        directory = entry.directory
        self._take_out(entry)
        del directory.segments[entry.base_offset]
        if directory.active == entry.base_offset:
            directory.active = max(directory.segments, default=None)
            if directory.active is not None:
                self._arrange(directory.segments[directory.active])
        return entry

    def moved(self, entry: Entry, place: Place, now_s: float, why: str) -> None:
        """It is on another device now."""
        entry.moved_s, entry.why = now_s, why
        self.put(entry.directory, kafka.segment_name(entry.base_offset), place)

    def hold(self, entry: Entry, until_s: float) -> None:
        """Leaves it alone for a while."""
        entry.held_until = until_s
        heapq.heappush(self._held, (until_s, next(self._sequence), entry))
        self._arrange(entry)

    def release(self, now_s: float) -> None:
        """What was left alone for long enough may move again."""
        while self._held and self._held[0][0] <= now_s:
            _, _, entry = heapq.heappop(self._held)
            there = entry.directory.segments.get(entry.base_offset) is entry
            if there and entry.held_until <= now_s:
                entry.held_until = 0.0
                self._arrange(entry)

    # -- orders -------------------------------------------------------------------------------

    def _arrange(self, entry: Entry) -> None:
        self._take_out(entry)
        directory = entry.directory
        if directory.rule is None or entry.is_active or entry.held_until:
            return
        rule = directory.rule
        if self._rules.pins and self._rules.is_pinned(os.fsdecode(entry.path)):
            rule = self._rules.pinned
        self._order(self._tiers[entry.device], rule).add(entry)

    @staticmethod
    def _take_out(entry: Entry) -> None:
        if entry.order is not None:
            entry.order.remove(entry)

    def _order(self, tier: int, rule: int) -> _Order:
        return self._orders.setdefault((tier, rule), _Order())

    def sealed(self, tier: int, rule: int) -> Sequence[Entry]:
        """The sealed segments of a rule on a tier that may move, the oldest first."""
        return self._order(tier, rule).entries

    def sealed_bytes(self, tier: int, rule: int) -> int:
        """What the sealed segments of a rule take on a tier."""
        return self._order(tier, rule).bytes

    def active_entries(self, tier: int) -> Iterator[Entry]:
        """The segments of a tier that Kafka appends to."""
        for directory in self._directories.values():
            if directory.rule is not None and directory.active is not None:
                entry = directory.segments[directory.active]
                if self._tiers[entry.device] == tier and not entry.held_until:
                    yield entry

    def directories_below(self, path: bytes) -> list[Directory]:
        """Those at or below a path that have segments, by path; of an empty path, all."""
        below = path + b"/" if path else b""
        found = [
            (where, directory)
            for directory in self._directories.values()
            if directory.segments and ((where := directory.path) == path or where.startswith(below))
        ]
        return [directory for _, directory in sorted(found, key=lambda f: f[0])]


class CatalogueView:
    """The catalogue at one moment, as policy reads it: valid until the next await."""

    def __init__(
        self,
        catalogue: Catalogue,
        tiers: Sequence[int],
        now_ns: int,
        now_s: float,
        active: Callable[[int], list[Segment]],
    ) -> None:
        self._catalogue = catalogue
        self._tiers = tiers
        self._now_ns = now_ns
        self._now_s = now_s
        self.active = active

    def oldest(self, tier: int, rule: int) -> Iterator[Segment]:
        """See policy.View."""
        return map(self.segment, self._catalogue.sealed(tier, rule))

    def newest(self, tier: int, rule: int) -> Iterator[Segment]:
        """See policy.View."""
        return map(self.segment, reversed(self._catalogue.sealed(tier, rule)))

    def segment(self, entry: Entry) -> Segment:
        """What policy knows of a segment."""
        return Segment(
            path=entry.path,
            tier=self._tiers[entry.device],
            bytes=entry.bytes,
            age_s=max(0.0, (self._now_ns - entry.mtime_ns) / 1e9),
            moved_s=self._now_s - entry.moved_s,
        )
