"""The meaning of names below log.dirs, against names that Kafka 4.1 made."""

import pytest

from pafkafs.kafka import (
    DirectoryState,
    FileKind,
    FileState,
    KafkaFile,
    Partition,
    active_base_offset,
    is_bulk_data,
    parse_directory,
    parse_file,
)

CURRENT = FileState.CURRENT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("orders-0", Partition("orders", 0, DirectoryState.CURRENT)),
        ("my-topic-12", Partition("my-topic", 12, DirectoryState.CURRENT)),
        ("__consumer_offsets-49", Partition("__consumer_offsets", 49, DirectoryState.CURRENT)),
        ("__cluster_metadata-0", Partition("__cluster_metadata", 0, DirectoryState.CURRENT)),
        ("a.b-3", Partition("a.b", 3, DirectoryState.CURRENT)),
        (
            "orders-3.1c3c1b5a4f4a4e0c8a2b4a9d7f0e6c55-delete",
            Partition("orders", 3, DirectoryState.DELETE),
        ),
        (
            "a.b-3.1c3c1b5a4f4a4e0c8a2b4a9d7f0e6c55-future",
            Partition("a.b", 3, DirectoryState.FUTURE),
        ),
        (
            "orders-3.1c3c1b5a4f4a4e0c8a2b4a9d7f0e6c55-stray",
            Partition("orders", 3, DirectoryState.STRAY),
        ),
        ("orders-delete-7", Partition("orders-delete", 7, DirectoryState.CURRENT)),
        ("lost+found", None),
        ("orders", None),
        ("orders-", None),
        ("orders-x", None),
        ("-3", None),
        ("", None),
    ],
)
def test_directory_name(name: str, expected: Partition | None) -> None:
    assert parse_directory(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("00000000000004200000.log", KafkaFile(FileKind.SEGMENT, CURRENT, 4200000)),
        ("00000000000000000000.index", KafkaFile(FileKind.OFFSET_INDEX, CURRENT, 0)),
        ("00000000000000000000.timeindex", KafkaFile(FileKind.TIME_INDEX, CURRENT, 0)),
        ("00000000000000000000.txnindex", KafkaFile(FileKind.TRANSACTION_INDEX, CURRENT, 0)),
        ("00000000000000000007.snapshot", KafkaFile(FileKind.PRODUCER_SNAPSHOT, CURRENT, 7)),
        ("00000000000000000007.log.deleted", KafkaFile(FileKind.SEGMENT, FileState.DELETED, 7)),
        ("00000000000000000007.log.cleaned", KafkaFile(FileKind.SEGMENT, FileState.CLEANED, 7)),
        ("00000000000000000007.log.swap", KafkaFile(FileKind.SEGMENT, FileState.SWAP, 7)),
        (
            "00000000000000000042-0000000003.checkpoint",
            KafkaFile(FileKind.CHECKPOINT, CURRENT, 42),
        ),
        ("recovery-point-offset-checkpoint", KafkaFile(FileKind.CHECKPOINT, CURRENT, None)),
        ("leader-epoch-checkpoint", KafkaFile(FileKind.CHECKPOINT, CURRENT, None)),
        ("partition.metadata", KafkaFile(FileKind.OTHER, CURRENT, None)),
        ("meta.properties", KafkaFile(FileKind.OTHER, CURRENT, None)),
        ("123.log", KafkaFile(FileKind.OTHER, CURRENT, None)),
        (".lock", KafkaFile(FileKind.OTHER, CURRENT, None)),
    ],
)
def test_file_name(name: str, expected: KafkaFile) -> None:
    assert parse_file(name) == expected


def test_active_segment_is_the_highest_base_offset_that_is_not_on_its_way_out() -> None:
    names = [
        "00000000000000000000.log",
        "00000000000000000500.log",
        "00000000000000000500.index",
        "00000000000000000900.log.deleted",
        "00000000000000000950.log.cleaned",
        "00000000000000000999.snapshot",
    ]
    assert active_base_offset(names) == 500
    assert active_base_offset([]) is None


@pytest.mark.parametrize(
    ("directory", "name", "bulk"),
    [
        ("orders-0", "00000000000000000000.log", True),
        ("orders-0.0a-future", "00000000000000000000.log", True),
        ("orders-0", "00000000000000000000.index", False),
        ("__cluster_metadata-0", "00000000000000000000.log", False),
        ("", "meta.properties", False),
    ],
)
def test_bulk_data_is_segments_of_topics(directory: str, name: str, bulk: bool) -> None:
    assert is_bulk_data(directory, name) is bulk
