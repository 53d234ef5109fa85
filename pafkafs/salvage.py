"""What can be rescued of a set that has lost devices, and what is missing then.  Pure: who reads
and copies is `rescuing`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pafkafs import kafka
from pafkafs.batches import Extent
from pafkafs.kafka import DirectoryState, FileKind, FileState


@dataclass(frozen=True)
class Name:
    """Where an object belongs, by the path that the file had when it moved.

    path is None when it is left out, and note says why; else note says what is not certain.
    rank: of objects with the same path, those with the lower one go first.
    """

    path: bytes | None
    rank: int = 0
    note: str = ""


def name_of(path: bytes) -> Name:
    """What Kafka would call now what was at path when it was moved.

    Kafka renames what it is about to remove, to swap in, or to promote; an object's path stays.
    """
    directories, _, last = path.rpartition(b"/")
    parent, _, directory = directories.rpartition(b"/")
    partition = kafka.parse_directory(os.fsdecode(directory))
    file = kafka.parse_file(os.fsdecode(last))
    if last in (b"", b".", b".."):
        return Name(None, note="its path has no name")
    if partition is None and file.kind is FileKind.SEGMENT:
        return Name(None, note="its path does not say of which topic it is")
    if partition is not None and partition.state is DirectoryState.DELETE:
        return Name(None, note="its partition was being deleted when it moved")
    if partition is not None and partition.state is DirectoryState.STRAY:
        return Name(None, note="its partition was a stray one when it moved")
    if file.state is FileState.DELETED:
        return Name(None, note="it was being deleted when it moved")
    rank, notes = 0, []
    if file.state is not FileState.CURRENT:
        last = last.removesuffix(file.state.value.encode())
        if last in (b"", b".", b".."):
            return Name(None, note="its path has no name")
        rank += 1
        notes.append(f"was {file.state.value} when it moved: a compaction was writing it")
    if partition is not None and partition.state is DirectoryState.FUTURE:
        directory = f"{partition.topic}-{partition.number}".encode()
        rank += 2
        notes.append("was of a replica on its way from another log directory")
    joined = b"/".join(part for part in (parent, directory, last) if part)
    return Name(joined, rank, "; ".join(notes))


@dataclass(frozen=True)
class Candidate:
    """An object that may be a file; extent is None for what is no segment."""

    key: int  # the caller's
    rank: int
    size: int
    mtime_ns: int
    extent: Extent | None


def best(candidates: Iterable[Candidate]) -> Candidate:
    """The one to take of those with the same path: one that has batches, in its right name, the
    longest by offset, the newest.  A copy that was cut off is new, and short."""
    return max(candidates, key=_worth)


def _worth(candidate: Candidate) -> tuple[bool, int, int, int]:
    extent = candidate.extent
    if extent is None:
        return (candidate.size > 0, -candidate.rank, candidate.mtime_ns, candidate.size)
    whole = extent.next_offset is not None
    return (whole, -candidate.rank, extent.next_offset or 0, candidate.mtime_ns)


@dataclass(frozen=True)
class Segment:
    """A segment that was rescued: records from base on, up to before next; torn: there was more
    in it, that is none."""

    base: int
    next: int
    torn: bool = False


@dataclass(frozen=True)
class Gap:
    """Offsets without records, from start up to before end; None: to where is not known."""

    start: int
    end: int | None
    why: str


_BEFORE = "removed by retention, or lost"
_BETWEEN = "lost, or removed by compaction"
_AFTER = "what was written last was on the fast tier"
_TORN = "its segment is damaged from there on"
_LOST = "the object is lost"


def gaps(segments: Iterable[Segment], lost: Iterable[int], *, names_known: bool) -> list[Gap]:
    """What is missing of a partition.

    lost are base offsets of segments that are known to have been there.  names_known: no other
    ones were, so what else has no records never had any, or not any more.
    """
    found: list[Gap] = []
    ordered = sorted(segments, key=lambda segment: segment.base)
    missing = sorted(lost)
    at = 0  # everything before is settled
    torn = False
    for segment in ordered:
        inside = [base for base in missing if base < segment.base]
        missing = [base for base in missing if base >= segment.base]
        found.extend(_between(at, segment.base, inside, torn, names_known, first=at == 0))
        at, torn = max(at, segment.next), segment.torn
    if torn:
        found.append(Gap(at, missing[0] if missing else None, _TORN))
    if missing:
        found.append(Gap(max(at, missing[0]), None, _LOST))
    elif not names_known:
        found.append(Gap(at, None, _AFTER))
    return found


def _between(
    start: int, end: int, lost: list[int], torn: bool, names_known: bool, *, first: bool
) -> Iterable[Gap]:
    if start >= end:
        return
    if torn:
        yield Gap(start, end, _TORN)
    elif lost:
        yield Gap(max(start, lost[0]), end, _LOST)
    elif not names_known:
        yield Gap(start, end, _BEFORE if first else _BETWEEN)


@dataclass
class Partition:
    """What became of a partition; its path is relative to the target."""

    segments: list[Segment] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def gaps(self, *, names_known: bool) -> list[Gap]:
        """What is missing."""
        return gaps(self.segments, self.lost, names_known=names_known)


@dataclass(frozen=True)
class Outcome:
    """What a rescue has done.  Paths are relative to the target, but those left out, which are
    those of the devices."""

    names_known: bool
    files: int
    bytes: int
    partitions: Mapping[str, Partition]
    lost: list[str]  # names whose data is lost
    damaged: dict[str, str]  # names of which a part is lost, and what
    left_out: dict[str, str]  # and why
    notes: dict[str, str]  # names that may not be what they seem, and why

    @property
    def complete(self) -> bool:
        """Whether nothing is known to be missing."""
        return self.names_known and not (self.lost or self.damaged)
