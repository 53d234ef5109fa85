"""Runs in the VM: a stock broker on a mount whose fast tier is persistent memory, and a producer,
until the power is cut.

    python broker.py TOPIC CLASSES FORMATTED

CLASSES is a class archive for the JVM, FORMATTED a log directory of no use yet that is copied to a
new mount. After `ready`, each line on standard output is one ack: `acked PARTITION SEQ OFFSET`.
"""

from __future__ import annotations  # Message is generic for type checkers only

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, Message
from kafka.powercut import (
    IN_FLIGHT_MAX,
    KAFKA_VERSION,
    PARTITIONS,
    PAYLOADS,
    START_TIMEOUT_S,
    TOPIC_CONFIG,
    jvm,
)
from kafkarun import distribution, topics
from kafkarun.broker import Broker
from kafkarun.traffic import CheckedProducer
from mounting import MOUNTPOINT, mount

# Sealed segments go down while others are appended to.
OPTIONS = {"max-age": "1s", "interval": "0.5s"}


class TellingProducer(CheckedProducer):
    """Tells the host each ack as it comes."""

    def _delivered(
        self, partition: int, seq: int, error: KafkaError | None, message: Message[Any, Any]
    ) -> None:
        super()._delivered(partition, seq, error, message)
        offset = self.ledger.acked(partition).get(seq)
        said = f"failed {error}" if error else f"acked {partition} {seq} {offset}"
        os.write(1, f"{said}\n".encode())


def main() -> None:
    topic, classes, formatted = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    mount(Path("/pmem"), MOUNTPOINT, OPTIONS)
    if not (MOUNTPOINT / "meta.properties").exists():
        shutil.copytree(formatted, MOUNTPOINT, dirs_exist_ok=True)
    broker = Broker(
        distribution.fetch(KAFKA_VERSION), [MOUNTPOINT], Path("/tmp/broker"), jvm=jvm(classes)
    )
    broker.start(within_s=START_TIMEOUT_S)
    topics.create(broker.bootstrap, topic, PARTITIONS, TOPIC_CONFIG)
    # What the client holds is what can be in flight: it takes no more before an ack was told.
    client = {"queue_buffering_max_messages": IN_FLIGHT_MAX, "linger_ms": 2}
    producer = TellingProducer(broker.bootstrap, topic, PARTITIONS, PAYLOADS, **client)
    os.write(1, b"ready\n")
    while broker.running:
        producer.send(1)
    print("\n".join(broker.errors()), file=sys.stderr)


main()
