"""Devices are lost: a stock broker serves what `pafkafs rescue` made of the others.

The steps are those of docs/rescue.md.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from harness import run_pafkafs
from kafkarun import topics
from kafkarun.broker import Broker
from kafkarun.distribution import Distribution
from kafkarun.traffic import read_topic

from kafka.cluster import JVM, Cluster
from kafka.logdirs import MountedDirectory

RECORDS = 40 * 1024
PARTITIONS = 4


def fill(cluster: Cluster, logdir: MountedDirectory) -> dict[int, int]:
    """Acked records of topic orders, most of them on the slow tier; their number by partition."""
    producer = cluster.topic("orders", PARTITIONS)
    producer.send(RECORDS)
    producer.flush()
    moved = run_pafkafs("migrate", "--wait", "--to", "slow", str(logdir.path))
    assert moved.returncode == 0, moved.stderr
    cluster.broker.stop()
    logdir.mount.stop()
    return {p: len(producer.ledger.acked(p)) for p in range(PARTITIONS)}


def demoted(logdir: MountedDirectory) -> list[Path]:
    """Stubs of segments of the topic, in order."""
    return sorted(path for path in logdir.home.glob("orders-*/*.log") if path.is_symlink())


def rescue(target: Path, *arguments: str) -> dict[str, Any]:
    result = run_pafkafs("rescue", "--json", *arguments, str(target))
    assert result.stderr == ""
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def expected_offsets(report: dict[str, Any], ends: dict[int, int]) -> dict[int, set[int]]:
    """All that was written, but what the report says is missing."""
    found = {}
    for partition, end in ends.items():
        left = set(range(end))
        for gap in report["partitions"].get(f"orders-{partition}", {}).get("missing", []):
            upto = end if gap["to"] is None else gap["to"]
            left -= set(range(gap["from"], upto))
        found[partition] = left
    return found


def offsets_read(cluster: Cluster, broker: Broker) -> dict[int, set[int]]:
    """Every record is whole, and where it was."""
    found: dict[int, set[int]] = {partition: set() for partition in range(PARTITIONS)}
    for record in read_topic(broker.bootstrap, "orders"):
        origin = cluster.payloads.origin(record.value)
        assert origin is not None, f"corrupt record at offset {record.offset}"
        assert (origin.partition, origin.seq) == (record.partition, record.offset)
        assert record.offset not in found[record.partition]
        found[record.partition].add(record.offset)
    return found


def put_into_new_cluster(
    rescued: Path, distribution: Distribution, work: Path
) -> tuple[Broker, Path]:
    """docs/rescue.md, step by step."""
    log_dir = work / "logs"
    log_dir.mkdir(parents=True)
    broker = Broker(distribution, [log_dir], work / "broker", jvm=JVM)
    try:
        broker.format()
        broker.start()
        topics.create(broker.bootstrap, "orders", PARTITIONS, {"retention.ms": "-1"})
        broker.stop()
        script = """
            set -eu
            cd "$1"
            for partition in orders-*; do
                rm -f "$2/$partition"/*.log "$2/$partition"/*.index "$2/$partition"/*.timeindex
                rm -f "$2/$partition"/*.snapshot "$2/$partition"/leader-epoch-checkpoint
                cp -a "$partition"/. "$2/$partition"/
            done
        """
        subprocess.run(["sh", "-c", script, "sh", str(rescued), str(log_dir)], check=True)
        broker.start()
    except BaseException:
        broker.close()
        raise
    return broker, log_dir


def test_without_the_fast_tier_a_new_cluster_serves_what_was_demoted(
    cluster: Cluster, logdir: MountedDirectory, kafka: Distribution, tmp_path: Path
) -> None:
    ends = fill(cluster, logdir)
    stubs = demoted(logdir)
    assert {stub.parent.name for stub in stubs} == {f"orders-{p}" for p in range(PARTITIONS)}
    # As if one more had been lost, and another one were torn.
    stubs[len(stubs) // 3].readlink().unlink()
    torn = stubs[2 * len(stubs) // 3].readlink()
    os.truncate(torn, torn.stat().st_size - 1000)
    shutil.rmtree(logdir.mount.fast)

    target = tmp_path / "rescued"
    report = rescue(target, "--slow", str(logdir.mount.slow))
    assert len(report["damaged"]) == 1
    expected = expected_offsets(report, ends)
    assert sum(map(len, expected.values())) > RECORDS // 2
    broker, _ = put_into_new_cluster(target, kafka, tmp_path / "new")
    with broker:
        assert offsets_read(cluster, broker) == expected
        broker.kill()
        broker.start()
        assert offsets_read(cluster, broker) == expected


def test_without_the_slow_tier_the_broker_starts_on_what_is_left(
    cluster: Cluster, logdir: MountedDirectory, tmp_path: Path
) -> None:
    ends = fill(cluster, logdir)
    assert demoted(logdir)
    shutil.rmtree(logdir.mount.slow)
    target = tmp_path / "rescued"
    report = rescue(target, "--fast", str(logdir.mount.fast))
    assert report["lost"]
    logdir.mount.slow.mkdir()

    broker = cluster.broker
    broker.use([target])
    broker.start()
    assert offsets_read(cluster, broker) == expected_offsets(report, ends)
    broker.stop()


def test_full_export_is_a_log_directory_with_every_record(
    cluster: Cluster, logdir: MountedDirectory, tmp_path: Path
) -> None:
    ends = fill(cluster, logdir)
    target = tmp_path / "rescued"
    devices = "--fast", str(logdir.mount.fast), "--slow", str(logdir.mount.slow)
    report = rescue(target, *devices)
    assert report["complete"]
    broker = cluster.broker
    broker.use([target])
    broker.start()
    assert offsets_read(cluster, broker) == {p: set(range(end)) for p, end in ends.items()}
    broker.stop()
    assert not broker.errors()
