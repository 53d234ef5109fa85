"""Every acknowledged record is read back, whatever the broker goes through."""

import pytest
from kafkarun.beside import BackgroundLoad
from kafkarun.polling import wait_until

from kafka.cluster import Cluster, StartCluster
from kafka.logdirs import LogDir
from kafka.stallwatch import StallWatch

# Twice the fast tier, so that most segments spill.
SPILLING_RECORDS = 64 * 1024
STALL_MAX_S = 5.0
KILLED_WHILE_STARTING_EVERY = 5


@pytest.mark.parametrize(
    "records",
    [SPILLING_RECORDS, pytest.param(2_000_000, marks=pytest.mark.slow)],
)
def test_all_records_come_back_from_both_tiers(cluster: Cluster, records: int) -> None:
    producer = cluster.topic("orders")
    producer.send(records)
    producer.flush()
    cluster.logdir.expect_both_tiers()
    cluster.expect_exactly("orders", producer)
    cluster.stop_and_compare()


def test_a_clean_restart_keeps_spilled_segments_and_goes_on_appending(cluster: Cluster) -> None:
    producer = cluster.topic("orders")
    producer.send(SPILLING_RECORDS)
    producer.flush()
    cluster.restart()
    cluster.expect_exactly("orders", producer)
    producer.send(SPILLING_RECORDS // 4)
    producer.flush()
    cluster.expect_exactly("orders", producer)
    cluster.logdir.expect_both_tiers()
    cluster.stop_and_compare()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_sigkills_under_load_lose_nothing_and_never_stall_the_mount(
    start_cluster: StartCluster, logdir: LogDir, kills: int
) -> None:
    # Otherwise a killed broker's next life starts with waiting for its last session's end.
    cluster = start_cluster(properties={"broker.session.timeout.ms": "1000"})
    producer = cluster.topic("orders")
    with StallWatch(logdir.path) as watch, BackgroundLoad(producer, records_per_s=3000) as load:
        for kill in range(kills):
            if kill % 2 == 0:
                load.wait_for_acks(more=1000)  # in the burst after the last restart
            else:
                load.catch_up()  # in steady traffic; no partition may starve
            cluster.broker.kill()
            if kill % KILLED_WHILE_STARTING_EVERY == 0:
                _kill_while_loading_logs(cluster)
            cluster.broker.start()
        load.catch_up()
        assert watch.worst_s < STALL_MAX_S
    cluster.expect_exactly("orders", producer)
    cluster.logdir.expect_both_tiers()
    cluster.stop_and_compare()


def test_five_hundred_partitions_survive_a_restart(cluster: Cluster) -> None:
    producer = cluster.topic("wide", partitions=500)
    producer.send(20_000)
    producer.flush()
    cluster.restart()
    cluster.expect_exactly("wide", producer)
    cluster.stop_and_compare()


def _kill_while_loading_logs(cluster: Cluster) -> None:
    """A second crash, in the middle of the recovery from the first one."""
    broker = cluster.broker
    broker.spawn()
    wait_until(
        lambda: broker.has_logged("Loading logs from log dirs"),
        within_s=60,
        what="loading of logs",
        every_s=0.005,
    )
    broker.kill()
