"""A slow device that hangs under a broker costs it nothing but the reads of what is on it."""

import os
import signal
from pathlib import Path

from conftest import MakeMount
from kafkarun.distribution import Distribution

from kafka.cluster import Cluster
from kafka.logdirs import MountedDirectory

FILLER_BYTES = 20 << 20
SPILLING_RECORDS = 32 * 1024
ROLLING_RECORDS = 18 * 1024  # more than a segment for each of the four partitions
# What an active segment preallocates: 10 MiB in whole entries of 8 or 12 bytes.
ACTIVE_INDEX_BYTES = (10_485_760, 10_485_756)


def segments_and_indexes(root: Path) -> dict[str, int]:
    """Size of every segment and index of the topic."""
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.glob("orders-*/*")
        if path.suffix in (".log", ".index", ".timeindex")
    }


def active_segments(root: Path) -> list[Path]:
    """The last segment of each partition of the topic."""
    return [max(directory.glob("*.log")) for directory in root.glob("orders-*")]


def test_broker_restarted_while_the_slow_device_hangs_keeps_every_index_and_offset(
    make_mount: MakeMount, kafka: Distribution, tmp_path: Path
) -> None:
    device = make_mount(name="device").start()
    mount = make_mount("--fast-capacity", "32MiB")
    mount.slow_list = str(device.mountpoint)
    mount.start()
    logdir = MountedDirectory(mount)
    cluster = Cluster(logdir, kafka, tmp_path / "broker")
    pid = device.pid
    try:
        # Sealed segments on the slow device, active ones on the fast: as migration leaves them.
        producer = cluster.topic("orders")
        filler = mount.mountpoint / "__cluster_metadata-0" / "filler"
        filler.write_bytes(bytes(FILLER_BYTES))
        producer.send(SPILLING_RECORDS)
        producer.flush()
        filler.unlink()
        producer.send(ROLLING_RECORDS)
        producer.flush()
        assert any(path.is_symlink() for path in mount.tree.glob("orders-*/*.log"))
        assert not any(path.is_symlink() for path in active_segments(mount.tree))
        cluster.broker.stop()
        before = segments_and_indexes(mount.mountpoint)
        mount.restart()
        os.kill(pid, signal.SIGSTOP)

        cluster.broker.start()
        after = segments_and_indexes(mount.mountpoint)
        assert after.keys() == before.keys()
        assert {n for n in after if after[n] not in (before[n], *ACTIVE_INDEX_BYTES)} == set()

        os.kill(pid, signal.SIGCONT)
        cluster.expect_exactly("orders", producer)
        producer.send(1000)
        producer.flush()
        cluster.expect_exactly("orders", producer)
        assert not cluster.broker.errors()
    finally:
        os.kill(pid, signal.SIGCONT)
        cluster.broker.close()
        mount.clean_up()
