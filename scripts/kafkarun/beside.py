"""What runs beside a scenario: a steady producer, and a consumer at the tail."""

from collections.abc import Callable
from threading import Event, Thread
from types import TracebackType
from typing import Self

from confluent_kafka import OFFSET_END, Consumer, TopicPartition

from kafkarun.clients import client_config
from kafkarun.errors import KafkaRunError
from kafkarun.payload import Payloads
from kafkarun.polling import wait_until
from kafkarun.topics import partitions_of
from kafkarun.traffic import CheckedProducer

_TICK_S = 0.02
BACKLOG_MAX_S = 60


class Beside:
    """A thread that calls `tick` until the block ends; its exception ends the block with it."""

    def __init__(self) -> None:
        self._ending = Event()
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)

    def tick(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join(60)
        if kind is None:
            if self._thread.is_alive():
                raise KafkaRunError(f"{type(self).__name__} hangs")
            if self._failure is not None:
                raise self._failure

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until it is true, or the thread has failed, which ends the block."""
        wait_until(
            lambda: condition() or self._failure is not None, within_s=BACKLOG_MAX_S, what=what
        )

    def _run(self) -> None:
        try:
            while not self._ending.wait(_TICK_S):
                self.tick()
        except BaseException as failure:
            self._failure = failure


class BackgroundLoad(Beside):
    """Produces at a steady rate; afterwards the fate of every record is known."""

    def __init__(
        self, producer: CheckedProducer, records_per_s: int, keys: int | None = None
    ) -> None:
        super().__init__()
        self._producer = producer
        self._keys = keys
        self._records_per_s = records_per_s
        self._per_tick = max(1, round(records_per_s * _TICK_S))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, value, trace)
        if kind is None:
            self._producer.flush()

    def wait_for_acks(self, more: int) -> None:
        """Return when `more` records than now have been acknowledged."""
        wanted = len(self._producer.ledger) + more
        self._wait(lambda: len(self._producer.ledger) >= wanted, f"{more} acks")

    def catch_up(self) -> None:
        """Return when no more than a second's records wait for their acks."""
        self._wait(lambda: self._backlog() <= self._records_per_s, "acks of the backlog")

    def _backlog(self) -> int:
        return self._producer.sent - len(self._producer.ledger)

    def tick(self) -> None:
        self._producer.send(self._per_tick, self._keys)


class TailReader(Beside):
    """Consumes a topic at its end: every record from now on, once and in order.

    A broker that is not there is waited for.
    """

    def __init__(self, bootstrap: str, topic: str, payloads: Payloads) -> None:
        super().__init__()
        self.seen = 0
        self._payloads = payloads
        self._next: dict[int, int] = {}
        config = client_config(bootstrap, group_id="tail", enable_auto_commit=False)
        self._consumer = Consumer(config)
        partitions = partitions_of(bootstrap, topic)
        self._consumer.assign([TopicPartition(topic, p, OFFSET_END) for p in partitions])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, value, trace)
        self._consumer.close()

    def catch_up(self, producer: CheckedProducer) -> None:
        """Return when the last record of each partition was seen, and nobody sends more."""
        self._wait(lambda: self._next == producer.next_seq, "the tail")

    def tick(self) -> None:
        for message in self._consumer.consume(500, _TICK_S):
            if message.error() is not None:
                continue  # of the connection, while the broker starts
            origin = self._payloads.origin(message.value())
            if origin is None:
                raise KafkaRunError(f"corrupt record at offset {message.offset()} of the tail")
            expected = self._next.get(origin.partition, origin.seq)
            if origin.seq != expected:
                raise KafkaRunError(f"record {origin.seq} instead of {expected} at the tail")
            self._next[origin.partition] = origin.seq + 1
            self.seen += 1
