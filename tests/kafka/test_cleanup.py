"""Kafka's own ways of getting rid of data: deletion, compaction, retention, moving replicas."""

import json
from functools import partial
from pathlib import Path

from kafkarun import topics
from kafkarun.beside import BackgroundLoad
from kafkarun.polling import wait_until
from kafkarun.traffic import read_topic

from kafka.cluster import SEGMENT_BYTES, TIDY, Cluster, StartCluster
from kafka.logdirs import LogDir

MIB = 1 << 20
SPILLING_RECORDS = 64 * 1024
REASSIGN = "org.apache.kafka.tools.reassign.ReassignPartitionsCommand"
# What a broker and an empty topic take is far less; a topic's data here is far more.
REMAINDER_BYTES = 8 * MIB
RETENTION_BYTES = 5 * MIB
DELETE_SOON = {"file.delete.delay.ms": "500"}
COMPACTED = DELETE_SOON | {
    "cleanup.policy": "compact",
    "segment.bytes": str(MIB),
    "min.cleanable.dirty.ratio": "0.01",
}


def test_deleting_a_topic_frees_its_space_on_both_tiers(tidy: Cluster) -> None:
    before = tidy.logdir.used_bytes()
    producer = tidy.topic("doomed", config=DELETE_SOON)
    producer.send(SPILLING_RECORDS)
    producer.flush()
    tidy.logdir.expect_both_tiers()
    assert tidy.logdir.used_bytes() > before + SPILLING_RECORDS * 1024
    topics.delete(tidy.bootstrap, "doomed")
    wait_until(
        lambda: tidy.logdir.used_bytes() < before + REMAINDER_BYTES,
        within_s=60,
        what="space of the deleted topic",
    )
    wait_until(
        lambda: not list(tidy.logdir.path.glob("doomed-*")),
        within_s=60,
        what="the directories of the deleted topic to go",
    )
    tidy.stop_and_compare()


def test_retention_deletes_the_oldest_segments_and_keeps_the_rest(tidy: Cluster) -> None:
    producer = tidy.topic("short", config=DELETE_SOON)
    producer.send(SPILLING_RECORDS)
    producer.flush()
    before = tidy.logdir.used_bytes()
    topics.alter(tidy.bootstrap, "short", {"retention.bytes": str(RETENTION_BYTES)})
    partitions = [tidy.logdir.path / f"short-{p}" for p in range(4)]
    kept_max = RETENTION_BYTES + SEGMENT_BYTES
    wait_until(
        lambda: all(_log_bytes(directory) < kept_max for directory in partitions),
        within_s=60,
        what="retention",
    )
    wait_until(lambda: tidy.logdir.used_bytes() < before - 20 * MIB, within_s=60, what="space")
    starts = topics.log_starts(tidy.bootstrap, "short")
    assert all(start > 0 for start in starts.values())
    report = tidy.check("short", producer, starts)
    assert report.intact, report
    assert 0 < report.acked < SPILLING_RECORDS
    tidy.restart()
    assert tidy.check("short", producer, starts) == report
    tidy.stop_and_compare()


def test_compaction_ends_with_the_last_value_of_each_key(tidy: Cluster) -> None:
    keys, rounds = 500, 100
    producer = tidy.topic("state", partitions=1, config=COMPACTED)
    producer.send(keys * rounds, keys=keys)
    producer.flush()
    tidy.logdir.expect_both_tiers()

    def remaining() -> int:
        return sum(1 for _ in read_topic(tidy.bootstrap, "state"))

    # The active segment is never compacted: a MiB of it, and one record for each key, stay.
    wait_until(lambda: remaining() < 2 * keys + 1024, within_s=90, what="compaction", every_s=1)
    _expect_last_values(tidy, keys, rounds)
    tidy.restart()
    _expect_last_values(tidy, keys, rounds)
    tidy.stop_and_compare()


def test_replicas_move_between_two_log_directories_of_the_mount(
    start_cluster: StartCluster, logdir: LogDir, tmp_path: Path
) -> None:
    cluster = start_cluster(subdirectories=("a", "b"), properties=TIDY)
    producer = cluster.topic("orders")
    producer.send(SPILLING_RECORDS // 2)
    producer.flush()
    with BackgroundLoad(producer, records_per_s=1000):
        for name in ("a", "b"):
            target = logdir.path / name
            _move_replicas(cluster, target, tmp_path / f"to-{name}.json")
            wait_until(partial(_has_settled_in, target), within_s=60, what=f"replicas in {target}")
    cluster.expect_exactly("orders", producer)
    cluster.restart()
    cluster.expect_exactly("orders", producer)
    cluster.logdir.expect_both_tiers()
    cluster.stop_and_compare()


def _expect_last_values(cluster: Cluster, keys: int, rounds: int) -> None:
    last: dict[bytes | None, int] = {}
    for record in read_topic(cluster.bootstrap, "state"):
        origin = cluster.payloads.origin(record.value)
        assert origin is not None, f"corrupt record at offset {record.offset}"
        assert origin.seq == record.offset  # one partition, nothing else was ever sent
        last[record.key] = origin.seq
    first_of_last_round = keys * (rounds - 1)
    assert last == {b"%d" % key: first_of_last_round + key for key in range(keys)}


def _move_replicas(cluster: Cluster, target: Path, plan: Path) -> None:
    moves = [
        {"topic": "orders", "partition": p, "replicas": [1], "log_dirs": [str(target)]}
        for p in range(4)
    ]
    plan.write_text(json.dumps({"version": 1, "partitions": moves}))
    where = ("--bootstrap-server", cluster.bootstrap, "--reassignment-json-file", str(plan))
    cluster.broker.distribution.run_tool(REASSIGN, *where, "--execute")


def _log_bytes(partition: Path) -> int:
    """Bytes of the segments that are not deleted yet."""
    total = 0
    for segment in partition.glob("*.log"):
        try:
            total += segment.stat().st_size
        except FileNotFoundError:  # deleted since it was listed
            continue
    return total


def _has_settled_in(log_dir: Path) -> bool:
    """Whether all partitions are there and none is on its way: `-future` in its name."""
    there = {path.name for path in log_dir.glob("orders-*")}
    return there == {f"orders-{p}" for p in range(4)}
