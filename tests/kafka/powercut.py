"""What the test of a broker in power cuts, its program in the VM and the check share."""

from pathlib import Path

from kafkarun.payload import Payloads

KAFKA_VERSION = "4.1.1"
START_TIMEOUT_S = 400
PARTITIONS = 2
# The smallest that Kafka takes; what is flushed is left to it.
TOPIC_CONFIG = {"segment.bytes": str(1 << 20)}
IN_FLIGHT_MAX = 100
PAYLOADS = Payloads(seed=20_261_101, size=1024)


def jvm(classes: Path, *, dump: bool = False) -> tuple[str, ...]:
    """What an emulated CPU would spend most of its time on is left out or done before."""
    archive = "ArchiveClassesAtExit" if dump else "SharedArchiveFile"
    return ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", f"-XX:{archive}={classes}")
