"""Producing records that are accounted for, and reading a topic back to check every one."""

from __future__ import annotations  # Message is generic for type checkers only

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, Producer
from confluent_kafka import TopicPartition as Position

from kafkarun.check import UNKNOWN_OFFSET, Ledger, PartitionCheck, Report, total
from kafkarun.clients import Setting, client_config
from kafkarun.errors import KafkaRunError
from kafkarun.payload import Payloads
from kafkarun.topics import partitions_of

_BATCH = 2000
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Record:
    """One record as a consumer got it."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class CheckedProducer:
    """Sends numbered records round robin to the partitions, and keeps the ledger of the acks.

    Numbers go on from one `send` to the next. To be used by one thread.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        partitions: int,
        payloads: Payloads,
        **settings: Setting,
    ) -> None:
        self.ledger = Ledger()
        self.failed = 0
        self._topic = topic
        self._payloads = payloads
        self._next_seq = [0] * partitions
        self._turn = 0
        defaults: dict[str, Setting] = {"acks": "all", "enable_idempotence": True, "linger_ms": 5}
        self.client = Producer(client_config(bootstrap, **(defaults | settings)))

    @property
    def next_seq(self) -> dict[int, int]:
        """The number that the next record of each partition gets, where there is one already."""
        return {partition: seq for partition, seq in enumerate(self._next_seq) if seq > 0}

    @property
    def sent(self) -> int:
        """Records handed to the client so far, whatever has become of them."""
        return sum(self._next_seq)

    def send(self, count: int, keys: int | None = None) -> None:
        """Hand `count` records to the client, waiting whenever its queue is full.

        With `keys`, the records of a partition go through that many keys in turn.
        """
        for _ in range(count):
            partition = self._turn
            self._turn = (self._turn + 1) % len(self._next_seq)
            seq = self._next_seq[partition]
            self._next_seq[partition] += 1
            self._produce(partition, seq, None if keys is None else b"%d" % (seq % keys))
        self.client.poll(0)

    def flush(self, within_s: float = 120) -> None:
        """Wait until the fate of everything sent is known."""
        waiting = self.client.flush(within_s)
        if waiting:
            raise KafkaRunError(f"{waiting} records were neither acked nor refused in {within_s} s")

    def _produce(self, partition: int, seq: int, key: bytes | None) -> None:
        record = self._payloads.make(partition, seq)
        on_delivery = partial(self._delivered, partition, seq)
        while True:
            try:
                self.client.produce(
                    self._topic, record, key, partition=partition, on_delivery=on_delivery
                )
                return
            except BufferError:  # its deliveries make room, or time out and make room
                self.client.poll(_POLL_S)

    def _delivered(
        self, partition: int, seq: int, error: KafkaError | None, message: Message[Any, Any]
    ) -> None:
        if error is not None:
            self.failed += 1
            return
        offset = message.offset()
        self.ledger.add(partition, seq, UNKNOWN_OFFSET if offset is None else offset)


def read_topic(
    bootstrap: str, topic: str, *, within_s: float = 120, **settings: Setting
) -> Iterator[Record]:
    """Every record of the topic from its log start to its end; in order within a partition."""
    config = client_config(
        bootstrap,
        group_id="kafkarun",
        enable_auto_commit=False,
        enable_partition_eof=True,
        check_crcs=True,
        **settings,
    )
    consumer = Consumer(config)
    try:
        waiting = set(partitions_of(bootstrap, topic))
        consumer.assign([Position(topic, partition, OFFSET_BEGINNING) for partition in waiting])
        deadline = time.monotonic() + within_s
        while waiting:
            for message in consumer.consume(_BATCH, _POLL_S):
                # Neither is None in what a consumer returns.
                partition, offset = cast(int, message.partition()), cast(int, message.offset())
                if (error := message.error()) is None:
                    yield Record(partition, offset, message.key(), message.value())
                elif error.code() == KafkaError._PARTITION_EOF:
                    waiting.discard(partition)
                else:
                    raise KafkaRunError(f"consuming {topic} failed: {error.str()}")
            if waiting and time.monotonic() > deadline:
                raise KafkaRunError(f"topic {topic} was not read to its end within {within_s:g} s")
    finally:
        consumer.close()


def check_topic(
    bootstrap: str,
    topic: str,
    ledger: Ledger,
    payloads: Payloads,
    *,
    isolation: str = "read_uncommitted",
) -> Report:
    """Compare all of the topic with what was acked."""
    checks = {
        partition: PartitionCheck(partition, ledger.acked(partition), payloads)
        for partition in partitions_of(bootstrap, topic)
    }
    missing = [p for p in ledger.partitions() if p not in checks]
    if missing:
        raise KafkaRunError(f"topic {topic} has lost its partitions {missing}")
    for record in read_topic(bootstrap, topic, isolation_level=isolation):
        checks[record.partition].see(record.offset, record.value)
    return total(check.report() for check in checks.values())
