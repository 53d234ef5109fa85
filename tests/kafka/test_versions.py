"""Kafka's oldest and newest supported versions, which map and truncate files differently."""

import pytest
from kafkarun import distribution

from kafka.cluster import StartCluster

SPILLING_RECORDS = 40 * 1024


@pytest.mark.parametrize("version", ["3.9.1", "4.3.1"])
def test_version_writes_restarts_and_reads_back(start_cluster: StartCluster, version: str) -> None:
    cluster = start_cluster(distribution.fetch(version))
    producer = cluster.topic("orders")
    producer.send(SPILLING_RECORDS)
    producer.flush()
    cluster.restart()
    producer.send(SPILLING_RECORDS // 4)
    producer.flush()
    cluster.expect_exactly("orders", producer)
    cluster.logdir.expect_both_tiers()
    cluster.stop_and_compare()
