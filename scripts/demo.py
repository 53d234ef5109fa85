"""Stock Kafka on a pafkafs mount: more records than the fast tier holds, every one checked.

The tiers are a tmpfs and a directory on disk, both in a work directory that goes away with
everything else in the end; only after a failure its logs stay.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kafkarun import distribution, topics
from kafkarun.beside import BackgroundLoad, TailReader
from kafkarun.broker import Broker
from kafkarun.check import Ledger, Report
from kafkarun.errors import KafkaRunError
from kafkarun.payload import Payloads
from kafkarun.traffic import CheckedProducer, check_topic

KAFKA_VERSION = "4.1.1"
TOPIC = "orders"
PARTITIONS = 4
RECORDS = 300_000
RECORDS_PER_S = 5_000  # while segments move
RECORD_BYTES = 1024
SEGMENT_BYTES = 16 << 20
FAST_CAPACITY = "160MiB"
MEMORY_SIZE = "512M"
MIB = 1 << 20

PAFKAFS = str(Path(sys.executable).with_name("pafkafs"))
STEPS = 11
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """A step did not do what it should; one line."""


@dataclass(frozen=True)
class Layout:
    """The places of one run."""

    work: Path

    @property
    def memory(self) -> Path:
        return self.work / "memory"

    @property
    def disk(self) -> Path:
        return self.work / "disk"

    @property
    def mountpoint(self) -> Path:
        return self.work / "kafka-logs"

    @property
    def logs(self) -> Path:
        return self.work / "logs"


class EndSignals:
    """SIGINT, SIGTERM and SIGHUP all end the demo by a KeyboardInterrupt, and are remembered:
    raised inside a C library, that may come out as another exception or not at all."""

    def __init__(self) -> None:
        self.received = False
        self._held = False
        for number in END_SIGNALS:
            signal.signal(number, self._handle)

    def check(self) -> None:
        """Raise if a signal has been received."""
        if self.received:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put signals off to the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def ignore(self) -> None:
        """From now on nothing interrupts."""
        self._held = True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True
        if not self._held:
            raise KeyboardInterrupt


class Progress:
    """Numbered steps on the terminal, each with the time it took."""

    def __init__(self, signals: EndSignals) -> None:
        self._signals = signals
        self.current = "preparing"
        self._number = 0

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """One step; what is put into the list it gives is said at its end."""
        self._number += 1
        self.current = f"step {self._number} ({what})"
        results: list[str] = []
        print(f"[{self._number}/{STEPS}] {what} ", end="", flush=True)
        started = time.monotonic()
        try:
            yield results
            self._signals.check()
        except BaseException:
            print("- failed")
            raise
        taken = f"({time.monotonic() - started:.1f} s)"
        print(" ".join(["-", *results, taken]) if results else taken)


def main() -> int:
    signals = EndSignals()
    layout = Layout(Path(tempfile.mkdtemp(prefix="pafkafs-demo.", dir="/var/tmp")))
    progress = Progress(signals)
    cleanup = ExitStack()
    failures: list[str] = []
    seen = ""
    try:
        seen = run(layout, progress, signals, cleanup)
    except (Exception, KeyboardInterrupt) as error:
        failures.append(f"{progress.current} {reason(error, signals)}")
    finally:
        signals.ignore()
        failures += clean_up(layout, cleanup)
    for failure in failures:
        print(f"demo: {failure}", file=sys.stderr)
    if failures:
        print(f"demo: logs are in {layout.logs}", file=sys.stderr)
        return 1
    shutil.rmtree(layout.work)
    print(f"\n{seen}\n  Nothing is left running or mounted.")
    return 0


def reason(error: BaseException, signals: EndSignals) -> str:
    """What ended a step; an error that nobody can foresee is raised on."""
    if signals.received:
        return "was interrupted"
    if isinstance(error, (DemoError, KafkaRunError, OSError)):
        return f"failed: {error}"
    raise error


def clean_up(layout: Layout, cleanup: ExitStack) -> list[str]:
    """End and unmount everything; what cannot be is returned."""
    try:
        cleanup.close()
    except (DemoError, subprocess.CalledProcessError) as error:
        return [f"cleaning up failed: {error}"]
    shutil.rmtree(layout.disk, ignore_errors=True)  # not there yet if interrupted early
    return []


def run(layout: Layout, progress: Progress, signals: EndSignals, cleanup: ExitStack) -> str:
    """The demo itself: returns what was seen. Undoing what it started is left to `cleanup`."""
    started = time.monotonic()
    for directory in (layout.memory, layout.disk, layout.mountpoint, layout.logs):
        directory.mkdir()
    with progress.step(f"fetch Kafka {KAFKA_VERSION} from Maven Central"):
        kafka = distribution.fetch(KAFKA_VERSION)
    mounting = f"mount pafkafs: {FAST_CAPACITY} of memory over a directory on disk"
    with progress.step(mounting), signals.held():  # a child cut short might still mount
        mount(layout, cleanup)
    broker = Broker(kafka, [layout.mountpoint], layout.logs)
    cleanup.callback(broker.close)
    with progress.step(f"start a Kafka broker with log.dirs={layout.mountpoint}"):
        broker.format()
        with signals.held():  # until it is known which process to kill
            broker.spawn()
        broker.wait_ready()
    with progress.step(f"create topic {TOPIC} with {PARTITIONS} partitions"):
        topics.create(broker.bootstrap, TOPIC, PARTITIONS, {"segment.bytes": str(SEGMENT_BYTES)})
    payloads = Payloads(seed=os.getpid(), size=RECORD_BYTES)
    with progress.step(f"produce {RECORDS:,} records of {RECORD_BYTES} bytes, acks=all") as said:
        producer = produce(broker, payloads)
        said.append(f"{RECORDS * RECORD_BYTES // MIB} MiB")
    with progress.step("consume them from the beginning and check every one") as said:
        report = check_topic(broker.bootstrap, TOPIC, producer.ledger, payloads)
        expect_complete(report, RECORDS)
        said.append("all there, once and in order")
    moving = "move all sealed segments to disk, some back, reading the beginning and the tail"
    with progress.step(moving) as said:
        tail = read_while_moving(layout, broker, producer, payloads, cleanup)
        said.append(f"{moved_files(layout)} moves, {tail:,} new records seen at the tail")
    with progress.step("check every record again") as said:
        report = check_topic(broker.bootstrap, TOPIC, producer.ledger, payloads)
        expect_complete(report, producer.sent)
        said.append("all there, once and in order")
    with progress.step("look where the files are") as said:
        fast, slow = tier_files(layout)
        said.append(f"{fast} in memory, {slow} on disk")
    print(pafkafs("status", str(layout.mountpoint)))
    with progress.step("stop the broker"):
        broker.stop()
        if errors := broker.errors():
            raise DemoError(f"Kafka logged an error: {errors[0]}")
    with progress.step("unmount"):
        pafkafs("umount", str(layout.mountpoint))
    return summary(report, fast, slow, time.monotonic() - started)


def mount(layout: Layout, cleanup: ExitStack) -> None:
    cleanup.callback(unmount_memory, layout.memory)
    mount_memory(layout.memory)
    cleanup.callback(unmount_pafkafs, layout.mountpoint)
    options = ("--fast-capacity", FAST_CAPACITY, "--log-file", str(layout.logs / "pafkafs.log"))
    pafkafs("mount", *options, str(layout.memory), str(layout.disk), str(layout.mountpoint))


def mount_memory(path: Path) -> None:
    """A tmpfs in huge pages, which is several times faster, or in small ones if it has to be."""
    refused = ""
    for options in (f"size={MEMORY_SIZE},huge=within_size", f"size={MEMORY_SIZE}"):
        command = ["mount", "-t", "tmpfs", "-o", options, "pafkafs-demo", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        refused = done.stderr.strip()
    raise DemoError(f"cannot mount a tmpfs: {refused}")


def produce(broker: Broker, payloads: Payloads) -> CheckedProducer:
    producer = CheckedProducer(
        broker.bootstrap, TOPIC, PARTITIONS, payloads, delivery_timeout_ms=30_000
    )
    producer.send(RECORDS)
    producer.flush()
    if producer.failed:
        broker.expect_running()
        raise DemoError(f"the broker did not take {producer.failed:,} records")
    return producer


def expect_complete(report: Report, records: int) -> None:
    if not report.intact or report.acked != records or report.unacked:
        raise DemoError(f"what was consumed is not what was produced: {report}")


def read_while_moving(
    layout: Layout,
    broker: Broker,
    producer: CheckedProducer,
    payloads: Payloads,
    cleanup: ExitStack,
) -> int:
    """Checks all records from the beginning while their segments move under the broker, and more
    come in and are read at once: how many were."""
    before = Ledger()
    before.merge(producer.ledger)
    with TailReader(broker.bootstrap, TOPIC, payloads) as tail:
        with BackgroundLoad(producer, RECORDS_PER_S) as load:
            load.wait_for_acks(RECORDS_PER_S // 10)
            mover = start_moves(layout, cleanup)
            report = check_topic(broker.bootstrap, TOPIC, before, payloads)
            if mover.wait() != 0:
                raise DemoError((layout.logs / "migrate.log").read_text().strip())
        tail.catch_up(producer)
    if not report.intact or report.acked != RECORDS:
        raise DemoError(f"what was consumed is not what was produced: {report}")
    return tail.seen


def start_moves(layout: Layout, cleanup: ExitStack) -> subprocess.Popen[bytes]:
    """All partitions down, and the first one up again: more has no room."""
    directories = sorted(map(str, layout.mountpoint.glob(f"{TOPIC}-*")))
    commands = [
        [PAFKAFS, "migrate", "--wait", "--to", "slow", *directories],
        [PAFKAFS, "migrate", "--wait", "--to", "fast", directories[0]],
    ]
    script = " && ".join(shlex.join(command) for command in commands)
    with (layout.logs / "migrate.log").open("w") as log:
        mover = subprocess.Popen(
            ["sh", "-c", script], stdout=log, stderr=log, start_new_session=True
        )
    cleanup.callback(mover.wait)
    return mover


def moved_files(layout: Layout) -> int:
    """How many files have been moved since the mount."""
    status: dict[str, Any] = json.loads(pafkafs("status", "--json", str(layout.mountpoint)))
    moved: int = status["mounts"][0]["migration"]["files"]
    return moved


def tier_files(layout: Layout) -> tuple[int, int]:
    """How many files are on the fast and on the slow tier."""
    status: dict[str, Any] = json.loads(pafkafs("status", "--json", str(layout.mountpoint)))
    tiers = status["mounts"][0]["tiers"]
    files = {t["name"]: sum(device["files"] for device in t["devices"]) for t in tiers}
    if not all(files.values()):
        raise DemoError(f"files were to be on both tiers: {files}")
    return files["fast"], files["slow"]


def summary(report: Report, fast: int, slow: int, seconds: float) -> str:
    return (
        f"Seen in {seconds:.0f} s: an unmodified Kafka {KAFKA_VERSION} wrote and read"
        f" {report.consumed:,} records through one log directory.\n"
        f"  {fast} of its files were in memory and {slow} on disk, without Kafka noticing.\n"
        f"  {report.acked:,} records acknowledged, {report.lost} lost,"
        f" {report.duplicated} duplicated, {report.reordered} reordered,"
        f" {report.corrupt} corrupt; no error in Kafka's log."
    )


def unmount_memory(path: Path) -> None:
    if is_mounted(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


def unmount_pafkafs(mountpoint: Path) -> None:
    if is_mounted(mountpoint):
        pafkafs("umount", "--lazy", str(mountpoint))


def is_mounted(path: Path) -> bool:
    """Asks the kernel's list: the path itself may belong to a daemon that has died."""
    return f" {path} " in Path("/proc/self/mounts").read_text()


def pafkafs(*arguments: str) -> str:
    # In a session of its own, because a Ctrl-C in the terminal would hit it as well.
    done = subprocess.run(
        [PAFKAFS, *arguments], capture_output=True, text=True, start_new_session=True
    )
    if done.returncode != 0:
        raise DemoError(done.stderr.strip() or f"pafkafs {arguments[0]}: {done.stdout.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
