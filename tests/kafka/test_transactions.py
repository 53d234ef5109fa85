"""Transactions: readers of committed data see all of each commit and nothing of an abort."""

from functools import partial

from kafkarun.check import Ledger
from kafkarun.clients import Setting
from kafkarun.traffic import check_topic

from kafka.cluster import Cluster

TRANSACTIONS = 40
RECORDS_EACH = 1000
TRANSACTIONAL: dict[str, Setting] = {"transactional_id": "teller", "delivery_timeout_ms": 60_000}


def test_committed_transactions_are_read_whole_and_aborted_ones_not_at_all(
    cluster: Cluster,
) -> None:
    producer = cluster.topic("ledger", client=TRANSACTIONAL)
    committed = Ledger()
    producer.client.init_transactions(60)
    for number in range(TRANSACTIONS):
        producer.ledger = Ledger()
        producer.client.begin_transaction()
        producer.send(RECORDS_EACH)
        producer.flush()
        if number % 4 == 3:
            producer.client.abort_transaction(60)
        else:
            producer.client.commit_transaction(60)
            committed.merge(producer.ledger)
        if number == TRANSACTIONS // 2:
            cluster.restart()
    cluster.logdir.expect_both_tiers()
    check = partial(check_topic, cluster.bootstrap, "ledger", committed, cluster.payloads)
    everything = check(isolation="read_uncommitted")
    assert everything.consumed == TRANSACTIONS * RECORDS_EACH, everything
    visible = check(isolation="read_committed")
    assert len(committed) == TRANSACTIONS * RECORDS_EACH * 3 // 4
    assert visible.intact, visible
    assert visible.unacked == 0, visible
    cluster.stop_and_compare()
