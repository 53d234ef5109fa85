"""A broker on a log directory, and the comparison that ends every scenario."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kafkarun import topics
from kafkarun.broker import Broker
from kafkarun.check import Report
from kafkarun.clients import Setting
from kafkarun.distribution import Distribution
from kafkarun.payload import Payloads
from kafkarun.traffic import CheckedProducer, check_topic

from kafka.logdirs import LogDir, differences, snapshot

RECORD_BYTES = 1024
# Brokers here start often and never live long enough for the second compiler to pay off.
JVM = ("-XX:TieredStopAtLevel=1",)
DIFFERENCES_SHOWN_MAX = 20
SEGMENT_BYTES = 4 << 20
# Properties of a broker that looks for things to clean all the time, not every few minutes.
TIDY = {
    "log.initial.task.delay.ms": "200",
    "log.retention.check.interval.ms": "500",
    "log.cleaner.backoff.ms": "200",
    "log.segment.delete.delay.ms": "500",
}


class Cluster:
    """One broker whose log directories are in `logdir`: itself, or directories below it."""

    def __init__(
        self,
        logdir: LogDir,
        distribution: Distribution,
        work_dir: Path,
        *,
        subdirectories: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
    ) -> None:
        self.logdir = logdir
        log_dirs = [logdir.path / name for name in subdirectories] or [logdir.path]
        self.broker = Broker(distribution, log_dirs, work_dir, properties=properties, jvm=JVM)
        self.payloads = Payloads(seed=20_240_229, size=RECORD_BYTES)
        self.broker.format()
        self.broker.start()

    @property
    def bootstrap(self) -> str:
        return self.broker.bootstrap

    def topic(
        self,
        name: str,
        partitions: int = 4,
        *,
        config: dict[str, str] | None = None,
        client: dict[str, Setting] | None = None,
    ) -> CheckedProducer:
        """Create a topic with small segments and return an idempotent producer for it."""
        settings = {"segment.bytes": str(SEGMENT_BYTES)} | (config or {})
        topics.create(self.bootstrap, name, partitions, settings)
        # Long enough to sit out any restart of the broker.
        client = {"delivery_timeout_ms": 240_000} | (client or {})
        return CheckedProducer(self.bootstrap, name, partitions, self.payloads, **client)

    def check(
        self, topic: str, producer: CheckedProducer, log_starts: Mapping[int, int] | None = None
    ) -> Report:
        """Check the topic; what was acked before its partitions' `log_starts` may be gone."""
        ledger = producer.ledger if log_starts is None else producer.ledger.retained(log_starts)
        return check_topic(self.bootstrap, topic, ledger, self.payloads)

    def expect_exactly(self, topic: str, producer: CheckedProducer) -> None:
        """Fail unless the topic holds every acked record once, and nothing else."""
        report = self.check(topic, producer)
        assert report.intact, report
        assert producer.failed == 0, f"{producer.failed} records were not accepted; {report}"
        assert report.unacked == 0, report

    def restart(self) -> None:
        self.broker.stop()
        self.broker.start()

    def stop_and_compare(self) -> None:
        """Stop the broker, detach, and fail unless the tiers hold what the mount showed."""
        self.broker.stop()
        shown = snapshot(self.logdir.path)
        self.logdir.detach()
        kept = snapshot(self.logdir.home)
        assert shown, "the mount shows nothing"
        found = differences(shown, kept)
        assert not found, "\n".join(found[:DIFFERENCES_SHOWN_MAX])
        errors = self.broker.errors()
        assert not errors, "\n".join(errors)


StartCluster = Callable[..., Cluster]
