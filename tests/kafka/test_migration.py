"""A broker whose segments move between the tiers all the time, by policy and by command."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Mount
from kafkarun.distribution import Distribution

from kafka.cluster import TIDY, Cluster
from kafka.load import BackgroundLoad, Beside, StallWatch
from kafka.logdirs import MountedDirectory
from pafkafs import control

# Lines so low and times so short that something moves at any time, in both directions.
RESTLESS = (
    *("--fast-capacity", "96MiB", "--threshold", "0.3", "--low-watermark", "0.2"),
    *("--interval", "200ms", "--cool-down", "0s", "--migrate-threads", "2"),
)
KILL_EVERY_S = 15.0
STALL_MAX_S = 5.0
SMALL_SEGMENTS = {"segment.bytes": str(1 << 20)}


class Storm(Beside):
    """Asks for a random segment to be moved to a random tier, all the time."""

    def __init__(self, mountpoint: Path) -> None:
        super().__init__()
        self._mountpoint = mountpoint
        self._choose = random.Random(20_261_122)

    def tick(self) -> None:
        segments = [str(p.relative_to(self._mountpoint)) for p in self._mountpoint.glob("*/*.log")]
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
        started = time.monotonic()
        with (
            StallWatch(logdir.path) as watch,
            Storm(logdir.path),
            BackgroundLoad(orders, records_per_s=2000) as load,
            BackgroundLoad(kept_short, records_per_s=1000) as other,
        ):
            while time.monotonic() - started < seconds:
                load.wait_for_acks(more=round(KILL_EVERY_S * 1000))
                cluster.broker.kill()
                cluster.broker.start()
            load.catch_up()
            other.catch_up()
            assert watch.worst_s < STALL_MAX_S
        cluster.expect_exactly("orders", orders)
        moved = logdir.mount.status()["migration"]
        assert moved["files"] > seconds, moved
        cluster.stop_and_compare()
    finally:
        cluster.broker.close()
