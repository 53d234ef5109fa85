"""Leaving is possible at any time: the home tree is a Kafka log directory by itself."""

import pytest
from kafkarun import topics
from kafkarun.polling import wait_until

from kafka.cluster import Cluster
from kafka.logdirs import LogDir, MountedDirectory

SPILLING_RECORDS = 40 * 1024


def test_a_broker_runs_on_the_home_tree_and_the_next_mount_sees_what_it_did(
    tidy: Cluster, logdir: LogDir
) -> None:
    producer = tidy.topic("kept")
    doomed = tidy.topic("doomed", config={"file.delete.delay.ms": "500"})
    for sender in (producer, doomed):
        sender.send(SPILLING_RECORDS)
        sender.flush()
    logdir.expect_both_tiers()
    tidy.stop_and_compare()

    broker = tidy.broker
    broker.use([logdir.home])
    broker.start()
    tidy.expect_exactly("kept", producer)
    tidy.expect_exactly("doomed", doomed)
    if isinstance(logdir, MountedDirectory):
        with pytest.raises(AssertionError, match=r"a Kafka broker .* stop it first"):
            logdir.attach()
    producer.send(SPILLING_RECORDS // 4)
    producer.flush()
    broker.kill()  # recovery truncates the active segments' indexes, through the stubs
    broker.start()
    tidy.expect_exactly("kept", producer)
    topics.delete(tidy.bootstrap, "doomed")
    wait_until(
        lambda: not list(logdir.home.glob("doomed-*")), within_s=60, what="deletion of the topic"
    )
    broker.stop()

    logdir.attach()
    broker.use([logdir.path])
    broker.start()
    tidy.expect_exactly("kept", producer)
    assert not list(logdir.path.glob("doomed-*"))
    producer.send(SPILLING_RECORDS // 4)
    producer.flush()
    tidy.expect_exactly("kept", producer)
    tidy.stop_and_compare()
