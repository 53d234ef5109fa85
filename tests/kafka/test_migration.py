"""A broker whose segments move between the tiers all the time, by policy and by command."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount
from kafkarun import topics
from kafkarun.beside import BackgroundLoad, Beside, TailReader
from kafkarun.distribution import Distribution
from kafkarun.traffic import CheckedProducer, read_topic

from kafka.cluster import TIDY, Cluster
from kafka.logdirs import MountedDirectory
from kafka.stallwatch import StallWatch
from pafkafs import control

# Lines so low and times so short that something moves at any time, in both directions.
RESTLESS = (
    *("--fast-capacity", "96MiB", "--threshold", "0.3", "--low-watermark", "0.2"),
    *("--interval", "200ms", "--cool-down", "0s", "--migrate-threads", "2"),
)
KILL_EVERY_S = 15.0
STALL_MAX_S = 5.0
SMALL_SEGMENTS = {"segment.bytes": str(1 << 20), "file.delete.delay.ms": "500"}
COMPACTED = SMALL_SEGMENTS | {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.01"}
KEYS = 500


class Storm(Beside):
    """Asks for a random segment to be moved to a random tier, all the time."""

    def __init__(self, mountpoint: Path) -> None:
        super().__init__()
        self._mountpoint = mountpoint
        self._choose = random.Random(20_261_122)

    def tick(self) -> None:
        try:
            found = list(self._mountpoint.glob("*/*.log"))
        except FileNotFoundError:
            return  # a topic was deleted meanwhile
        segments = [str(path.relative_to(self._mountpoint)) for path in found]
        if not segments:
            return
        path, tier = self._choose.choice(segments), self._choose.choice(["fast", "slow"])
        control.ask(str(self._mountpoint), "migrate", path=path, to=tier)


@pytest.fixture
def logdir(
    make_mount: Callable[..., Mount], request: pytest.FixtureRequest
) -> Iterator[MountedDirectory]:
    provider = MountedDirectory(make_mount(*RESTLESS, *request.param))
    provider.attach()
    yield provider
    provider.discard()


def come_and_go(cluster: Cluster, number: int) -> None:
    """A topic that is made, filled and read; the one before it is deleted."""
    name = f"passing-{number}"
    producer = cluster.topic(name, config=SMALL_SEGMENTS)
    producer.send(4000)
    producer.flush()
    cluster.expect_exactly(name, producer)
    if number > 0:
        topics.delete(cluster.bootstrap, f"passing-{number - 1}")


def read_from_the_beginning(cluster: Cluster, topic: str) -> None:
    """All that is there now is whole, and in order."""
    expected: dict[int, int] = {}
    for record in read_topic(cluster.bootstrap, topic):
        origin = cluster.payloads.origin(record.value)
        assert origin is not None, f"corrupt record at offset {record.offset}"
        assert origin.seq == expected.get(record.partition, 0), record.offset
        expected[record.partition] = origin.seq + 1


def expect_last_values(cluster: Cluster, producer: CheckedProducer) -> None:
    """Of each key the last value that was acked is the last one there."""
    last: dict[bytes | None, int] = {}
    for record in read_topic(cluster.bootstrap, "state"):
        origin = cluster.payloads.origin(record.value)
        assert origin is not None, f"corrupt record at offset {record.offset}"
        last[record.key] = origin.seq
    assert producer.failed == 0
    assert last == {b"%d" % (seq % KEYS): seq for seq in range(producer.sent)[-KEYS:]}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("logdir", [(), ("--pmem", "on")], ids=["plain", "growing"], indirect=True)
@pytest.mark.parametrize("seconds", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_nothing_is_lost_doubled_or_reordered_in_a_storm_of_moves(
    logdir: MountedDirectory, kafka: Distribution, tmp_path: Path, seconds: float
) -> None:
    properties = {**TIDY, "broker.session.timeout.ms": "1000"}
    cluster = Cluster(logdir, kafka, tmp_path / "broker", properties=properties)
    try:
        orders = cluster.topic("orders", config=SMALL_SEGMENTS)
        retention = {**SMALL_SEGMENTS, "retention.bytes": str(4 << 20)}
        kept_short = cluster.topic("short", config=retention)
        state = cluster.topic("state", partitions=1, config=COMPACTED)
        started = time.monotonic()
        with (
            StallWatch(logdir.path) as watch,
            Storm(logdir.path),
            TailReader(cluster.bootstrap, "orders", cluster.payloads) as tail,
        ):
            with (
                BackgroundLoad(orders, records_per_s=2000) as load,
                BackgroundLoad(kept_short, records_per_s=1000) as other,
                BackgroundLoad(state, records_per_s=500, keys=KEYS) as compacted,
            ):
                for number in itertools.count():
                    come_and_go(cluster, number)
                    read_from_the_beginning(cluster, "orders")
                    load.wait_for_acks(more=round(KILL_EVERY_S * 1000))
                    if time.monotonic() - started > seconds:
                        break
                    cluster.broker.kill()
                    cluster.broker.start()
                for each in (load, other, compacted):
                    each.catch_up()
            tail.catch_up(orders)
            assert watch.worst_s < STALL_MAX_S
        assert tail.seen > 0
        cluster.expect_exactly("orders", orders)
        expect_last_values(cluster, state)
        moved = logdir.mount.status()["migration"]
        assert moved["files"] > seconds, moved
        cluster.stop_and_compare()
    finally:
        cluster.broker.close()
