"""Topics as an administrator sees them; each call returns when the broker has done it."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import Consumer, KafkaException
from confluent_kafka import TopicPartition as Position
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not in __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from kafkarun.clients import client_config
from kafkarun.errors import KafkaRunError
from kafkarun.polling import wait_until

_TIMEOUT_S = 60


def create(
    bootstrap: str, topic: str, partitions: int, config: Mapping[str, str] | None = None
) -> None:
    """Create the topic and wait until every partition has a leader."""
    admin = _admin(bootstrap)
    new = NewTopic(topic, partitions, replication_factor=1, config=dict(config or {}))
    _finish(admin.create_topics([new]), f"creating topic {topic}")
    wait_until(
        lambda: len(_led_partitions(admin, topic)) == partitions,
        within_s=_TIMEOUT_S,
        what=f"leaders for topic {topic}",
    )


def delete(bootstrap: str, topic: str) -> None:
    """Have the topic deleted; its files go after file.delete.delay.ms."""
    admin = _admin(bootstrap)  # has to outlive its answers
    _finish(admin.delete_topics([topic]), f"deleting topic {topic}")


def alter(bootstrap: str, topic: str, config: Mapping[str, str]) -> None:
    """Set these of the topic's properties and leave its others as they are."""
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        for name, value in config.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    admin = _admin(bootstrap)
    _finish(admin.incremental_alter_configs([resource]), f"altering topic {topic}")


def partitions_of(bootstrap: str, topic: str) -> list[int]:
    """The partitions that have a leader; raises if there is no such topic."""
    led = _led_partitions(_admin(bootstrap), topic)
    if not led:
        raise KafkaRunError(f"there is no topic {topic}")
    return led


def log_starts(bootstrap: str, topic: str) -> dict[int, int]:
    """The first offset that each partition still has."""
    consumer = Consumer(client_config(bootstrap, group_id="kafkarun"))
    try:
        return {
            partition: consumer.get_watermark_offsets(
                Position(topic, partition), timeout=_TIMEOUT_S, cached=False
            )[0]
            for partition in partitions_of(bootstrap, topic)
        }
    finally:
        consumer.close()


def _admin(bootstrap: str) -> AdminClient:
    return AdminClient(client_config(bootstrap))


def _led_partitions(admin: AdminClient, topic: str) -> list[int]:
    found = admin.list_topics(topic, timeout=_TIMEOUT_S).topics[topic]
    return sorted(p for p, state in found.partitions.items() if state.leader >= 0)


def _finish(futures: Mapping[Any, Future[Any]], what: str) -> None:
    for future in futures.values():
        try:
            future.result(_TIMEOUT_S)
        except KafkaException as failure:
            raise KafkaRunError(f"{what}: {failure.args[0].str()}") from failure
