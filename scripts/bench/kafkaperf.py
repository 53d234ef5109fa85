"""The Kafka workloads: a broker on each target, loaded with Kafka's own performance tools."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from kafkarun import topics
from kafkarun.broker import Broker
from kafkarun.distribution import Distribution
from kafkarun.polling import wait_until

from bench import processes
from bench.errors import BenchError
from bench.targets import Target

# The first version whose producer tool can leave its own start-up out of its statistics: without
# that, the JVM's first second is all that a 99th percentile shows.
KAFKA_VERSION = "4.2.0"

PARTITIONS = 4
RECORD_BYTES = 1024
PACED_RECORDS_PER_S = 20_000
PACED_NAME = f"kafka producer at {PACED_RECORDS_PER_S}/s"

_TOOL_TIMEOUT_S = 300
_CLIENT_JVM = ("-Xms512m", "-Xmx512m")
_TOPIC_CONFIG = {"segment.bytes": str(64 << 20)}
_BROKER_PROPERTIES = {
    # So that a deleted topic leaves its device before the next measurement begins.
    "log.segment.delete.delay.ms": "100",
    "log.initial.task.delay.ms": "500",
    # As in the server.properties that Kafka ships: a lone consumer waits for no other.
    "group.initial.rebalance.delay.ms": "0",
}

_PRODUCED = re.compile(
    r"steady state records sent, (?P<rate>[\d.]+) records/sec.*?, "
    r"(?P<p50>\d+) ms 50th, \d+ ms 95th, (?P<p99>\d+) ms 99th, (?P<p999>\d+) ms 99\.9th"
)


@dataclass(frozen=True)
class Volume:
    """How many records a run sends, warm-up included, and how many of them are warm-up."""

    records: int
    warmup_records: int

    @property
    def gigabytes(self) -> float:
        return self.records * RECORD_BYTES / 1e9


@dataclass(frozen=True)
class Station:
    """A broker whose only log directory lies on the target."""

    target: Target
    broker: Broker
    broker_pid: int
    log_dir: Path

    def cpu_seconds(self) -> float:
        return processes.cpu_seconds(self.broker_pid)


@contextmanager
def station(distribution: Distribution, target: Target, work: Path) -> Iterator[Station]:
    """Start a broker on the target; at the end it is shut down cleanly."""
    log_dir = target.directory / "kafka"
    log_dir.mkdir()
    with Broker(
        distribution,
        [log_dir],
        work / f"broker-{target.name}",
        properties=_BROKER_PROPERTIES,
        heap="1g",
    ) as broker:
        broker.format()
        broker.start()
        yield Station(target, broker, _pid_of(broker), log_dir)
        broker.stop()


def _pid_of(broker: Broker) -> int:
    config = str(broker.log_file.parent)
    for child in psutil.Process().children():
        if any(argument.startswith(config) for argument in child.cmdline()):
            return child.pid
    raise BenchError(f"the broker of {config} is not among this program's processes")


@dataclass(frozen=True)
class _Cost:
    client_cpu_seconds: float
    broker_cpu_seconds: float
    server_cpu_seconds: float

    def metrics(self, gigabytes: float) -> dict[str, float]:
        total = self.client_cpu_seconds + self.broker_cpu_seconds + self.server_cpu_seconds
        return {
            "cpu_s_per_gb": total / gigabytes,
            "server_cpu_s_per_gb": self.server_cpu_seconds / gigabytes,
        }


def measure_throughput(
    station: Station, topic: str, volume: Volume
) -> tuple[dict[str, float], dict[str, float]]:
    """Produce as fast as it goes, then consume it all; the metrics of both."""
    with _topic(station, topic):
        rate, cost = _produce(station, topic, volume, throughput=-1)
        produced = {"mb_per_s": rate["rate"] * RECORD_BYTES / 1e6, **cost.metrics(volume.gigabytes)}
        return produced, _consume(station, topic, volume)


def measure_latency(station: Station, topic: str, volume: Volume) -> dict[str, float]:
    """Produce at a fixed rate; latencies are whole milliseconds, as the tool reports them."""
    with _topic(station, topic):
        found, cost = _produce(station, topic, volume, throughput=PACED_RECORDS_PER_S)
        latencies = {f"{name}_ms": found[name] for name in ("p50", "p99", "p999")}
        return {**latencies, **cost.metrics(volume.gigabytes)}


@contextmanager
def _topic(station: Station, topic: str) -> Iterator[None]:
    """The topic exists, and is gone from the device at the end."""
    topics.create(station.broker.bootstrap, topic, PARTITIONS, _TOPIC_CONFIG)
    yield
    topics.delete(station.broker.bootstrap, topic)
    wait_until(
        lambda: not any(station.log_dir.glob(f"{topic}-*")),
        within_s=60,
        what=f"deletion of topic {topic} from {station.target.name}",
    )


def _run_tool(station: Station, tool: str, *arguments: str) -> tuple[str, _Cost]:
    main_class = f"org.apache.kafka.tools.{tool}"
    command = station.broker.distribution.command(
        main_class, "--bootstrap-server", station.broker.bootstrap, *arguments, jvm=_CLIENT_JVM
    )
    broker_before, server_before = station.cpu_seconds(), station.target.server_cpu_seconds()
    finished = processes.run(command, timeout_s=_TOOL_TIMEOUT_S)
    return finished.stdout, _Cost(
        finished.cpu_seconds,
        station.cpu_seconds() - broker_before,
        station.target.server_cpu_seconds() - server_before,
    )


def _produce(
    station: Station, topic: str, volume: Volume, throughput: int
) -> tuple[dict[str, float], _Cost]:
    said, cost = _run_tool(
        station,
        "ProducerPerformance",
        *("--topic", topic, "--record-size", str(RECORD_BYTES), "--throughput", str(throughput)),
        *("--num-records", str(volume.records), "--warmup-records", str(volume.warmup_records)),
    )
    found = _PRODUCED.search(said)
    if found is None:
        raise BenchError(f"ProducerPerformance reported no steady state: {said[-200:]!r}")
    return {name: float(value) for name, value in found.groupdict().items()}, cost


def _consume(station: Station, topic: str, volume: Volume) -> dict[str, float]:
    arguments = ("--topic", topic, "--num-records", str(volume.records), "--hide-header")
    said, cost = _run_tool(station, "ConsumerPerformance", *arguments)
    fields = said.strip().splitlines()[-1].split(", ")
    records, fetch_ms = int(fields[4]), float(fields[7])
    if records < volume.records:
        raise BenchError(f"ConsumerPerformance got {records} of {volume.records} records")
    rate_bytes_per_ms = records * RECORD_BYTES / fetch_ms
    return {"mb_per_s": rate_bytes_per_ms / 1e3, **cost.metrics(volume.gigabytes)}
