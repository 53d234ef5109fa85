"""A broker over a hard disk: a burst beyond the fast tier costs time, and no record."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeMount
from harness import wait_until
from kafkarun.distribution import Distribution

from kafka.cluster import RECORD_BYTES, Cluster
from kafka.disks import made_disk, over_disk
from kafka.logdirs import MountedDirectory

MIB = 1 << 20
FAST_BYTES = 64 * MIB
DISK_BYTES_PER_S = 10_000_000
THRESHOLD, LOW_WATERMARK = 0.5, 0.4
DRAINED_WITHIN_S = 120.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with made_disk(tmp_path, DISK_BYTES_PER_S) as disk:
        yield disk


@pytest.fixture
def logdir(disk: Path, make_mount: MakeMount) -> Iterator[MountedDirectory]:
    mount = make_mount("--fast-capacity", str(FAST_BYTES), "--threshold", str(THRESHOLD),
                       "--interval", "200ms")  # fmt: skip
    with over_disk(mount, disk) as provider:
        yield provider


def fast_share(logdir: MountedDirectory) -> float:
    device = logdir.mount.device("fast")
    share: float = device["used_bytes"] / device["capacity_bytes"]
    return share


def test_burst_of_twice_the_fast_tier_loses_nothing_and_drains(
    logdir: MountedDirectory, kafka: Distribution, tmp_path: Path
) -> None:
    cluster = Cluster(logdir, kafka, tmp_path / "broker")
    try:
        orders = cluster.topic("orders")
        began = time.monotonic()
        orders.send(FAST_BYTES // RECORD_BYTES * 3 // 4)
        orders.flush()
        fits_s = time.monotonic() - began
        orders.send(FAST_BYTES // RECORD_BYTES * 5 // 4)
        orders.flush(240)
        all_s = time.monotonic() - began
        print(f"what fits: {fits_s:.1f} s; all: {all_s:.1f} s")
        assert orders.failed == 0
        assert fits_s < FAST_BYTES * 3 / 4 / DISK_BYTES_PER_S  # faster than the disk
        wait_until(
            lambda: fast_share(logdir) <= LOW_WATERMARK, "the fast tier to drain", DRAINED_WITHIN_S
        )
        cluster.expect_exactly("orders", orders)
        assert logdir.mount.status()["migration"]["failed"] == 0
        cluster.broker.stop()
        assert not cluster.broker.errors()
    finally:
        cluster.broker.close()
