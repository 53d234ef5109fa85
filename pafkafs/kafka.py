"""What the names below Kafka's log.dirs mean.  Pure: it reads names, never files.

The rules are those of Kafka's `LogFileUtils`, `UnifiedLog.parseTopicPartitionName` and raft
`Snapshots`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

METADATA_TOPIC = "__cluster_metadata"


class DirectoryState(Enum):
    """What Kafka is doing with a partition directory."""

    CURRENT = ""
    DELETE = "-delete"
    FUTURE = "-future"
    STRAY = "-stray"


@dataclass(frozen=True)
class Partition:
    """The partition that a directory belongs to."""

    topic: str
    number: int
    state: DirectoryState


class FileKind(Enum):
    """What a file in a partition directory holds."""

    SEGMENT = ".log"
    OFFSET_INDEX = ".index"
    TIME_INDEX = ".timeindex"
    TRANSACTION_INDEX = ".txnindex"
    PRODUCER_SNAPSHOT = ".snapshot"
    CHECKPOINT = ".checkpoint"
    OTHER = ""


class FileState(Enum):
    """The step of a segment's life that its last suffix names."""

    CURRENT = ""
    DELETED = ".deleted"
    CLEANED = ".cleaned"
    SWAP = ".swap"


@dataclass(frozen=True)
class KafkaFile:
    """A file by its name; base_offset is None where the name has none."""

    kind: FileKind
    state: FileState
    base_offset: int | None


_MARKED_DIRECTORY = re.compile(r"(.+)-(\d+)\.[^.]+(-delete|-future|-stray)")
_DIRECTORY = re.compile(r"(.+)-(\d+)")
_NUMBERED_FILE = re.compile(r"(\d{20})(?:-\d{10})?(\.[a-z]+)")


def parse_directory(name: str) -> Partition | None:
    """The partition of a directory name, or None when it is not a partition's."""
    marked = _MARKED_DIRECTORY.fullmatch(name)
    if marked is not None:
        return Partition(marked[1], int(marked[2]), DirectoryState(marked[3]))
    plain = _DIRECTORY.fullmatch(name)
    if plain is not None:
        return Partition(plain[1], int(plain[2]), DirectoryState.CURRENT)
    return None


def parse_file(name: str) -> KafkaFile:
    """What a file name in a log or partition directory says."""
    stem, state = name, FileState.CURRENT
    for suffix in (FileState.DELETED, FileState.CLEANED, FileState.SWAP):
        if name.endswith(suffix.value):
            stem, state = name.removesuffix(suffix.value), suffix
            break
    numbered = _NUMBERED_FILE.fullmatch(stem)
    if numbered is not None and numbered[2] in FileKind._value2member_map_:
        return KafkaFile(FileKind(numbered[2]), state, int(numbered[1]))
    if stem.endswith("-checkpoint") or stem.endswith(".checkpoint"):
        return KafkaFile(FileKind.CHECKPOINT, state, None)
    return KafkaFile(FileKind.OTHER, state, None)


def active_base_offset(names: Iterable[str]) -> int | None:
    """The base offset of the active segment among the names of one partition directory."""
    return max(
        (
            file.base_offset
            for file in map(parse_file, names)
            if file.kind is FileKind.SEGMENT
            and file.state is FileState.CURRENT
            and file.base_offset is not None
        ),
        default=None,
    )


def is_bulk_data(directory: str, name: str) -> bool:
    """Whether a file is what the slow tier is for: segments of topics.

    Indexes, checkpoints and the metadata log are small, and read in full at every start.
    """
    partition = parse_directory(directory)
    if partition is not None and partition.topic == METADATA_TOPIC:
        return False
    return parse_file(name).kind is FileKind.SEGMENT


def may_migrate(directory: str, name: str) -> bool:
    """Whether a file may be moved in the background: a segment that is not about to die."""
    partition = parse_directory(directory)
    if partition is not None and partition.state is DirectoryState.DELETE:
        return False
    return is_bulk_data(directory, name) and parse_file(name).state is FileState.CURRENT


def segment_base_offset(name: bytes) -> int | None:
    """The base offset in the name of a segment in use; None for all else.

    The same that parse_file says of such names, for who asks about a million of them.
    """
    digits, suffix = name[:20], name[20:]
    return int(digits) if suffix == b".log" and digits.isdigit() and len(digits) == 20 else None


def segment_name(base_offset: int) -> bytes:
    """The name of the segment in use with this base offset."""
    return b"%020d.log" % base_offset
