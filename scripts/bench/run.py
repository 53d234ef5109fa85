"""The benchmark driver: takes every workload through every target, round by round.

Targets alternate within each round and begin in another order in the next, so that a machine
that gets slower or faster for a while does so for all of them.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from kafkarun.distribution import default_cache, fetch
from kafkarun.errors import KafkaRunError

from bench import kafkaperf, loadgen, options, report
from bench.errors import BenchError
from bench.options import Options, Settings
from bench.report import Sample
from bench.targets import TARGETS, Devices, Target, memory_fast_device

T = TypeVar("T")


class Recorder:
    """Collects samples and says on stderr what has just been measured."""

    def __init__(self, repeats: int) -> None:
        self.samples: list[Sample] = []
        self._repeats = repeats

    def add(self, workload: str, target: Target, round_: int, metrics: Mapping[str, float]) -> None:
        self.samples.append(Sample(workload, target.name, round_, metrics))
        metric, value = next(iter(metrics.items()))
        place = f"round {round_ + 1}/{self._repeats}  {workload:30}{target.name:10}"
        progress(f"{place}{metric} {value:.5g}")


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    asked = options.parse()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, leave)
    try:
        samples = bench(asked)
    except (BenchError, KafkaRunError) as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    print(report.table(report.summarise(samples)))
    print(f"\nall figures: {asked.json}")
    return 0


def leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that brokers and mounts are taken down.

    Not by KeyboardInterrupt, after which `subprocess` does not wait for the child it kills: a
    file system that this child still uses cannot be unmounted.
    """
    raise SystemExit(128 + signal_number)


def bench(asked: Options) -> list[Sample]:
    """Run what was asked for, write the JSON file, return the samples."""
    settings = asked.settings
    recorder = Recorder(settings.repeats)
    with ExitStack() as stack:
        work = stack.enter_context(scratch(asked.slow))
        devices = make_devices(asked, work, stack)
        targets = [stack.enter_context(TARGETS[name](devices, work)) for name in asked.targets]
        if "loadgen" in asked.suites:
            run_loads(targets, settings, recorder)
        if "kafka" in asked.suites:
            run_kafka(targets, settings, recorder, work)
    document = report.document(targets, asdict(settings), recorder.samples)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(document, indent=1) + "\n")
    return recorder.samples


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory of this run's own."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="pafkafs-bench-", dir=parent))
    except OSError as failure:
        raise BenchError(f"{parent}: {failure.strerror}") from failure
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def make_devices(asked: Options, work: Path, stack: ExitStack) -> Devices:
    slow = work / "slow"
    slow.mkdir()
    if asked.fast is not None:
        return Devices(stack.enter_context(scratch(asked.fast)), slow, str(asked.fast))
    fast = work / "fast"
    mounted = stack.enter_context(memory_fast_device(fast))
    return Devices(fast, slow, f"tmpfs {mounted}")


def run_loads(targets: Sequence[Target], settings: Settings, recorder: Recorder) -> None:
    program = loadgen.build(default_cache() / "bench")
    # The first use of memory is slow in a virtual machine, whose host provides it lazily.
    for target in targets:
        progress(f"warming up {target.name}")
        loadgen.measure(program, loadgen.HEAVIEST, target, settings.load_seconds)
    for round_ in range(settings.repeats):
        for load in loadgen.LOADS:
            for target in rotated(targets, round_):
                metrics = loadgen.measure(program, load, target, settings.load_seconds)
                recorder.add(load.name, target, round_, metrics)


def run_kafka(
    targets: Sequence[Target], settings: Settings, recorder: Recorder, work: Path
) -> None:
    distribution = fetch(kafkaperf.KAFKA_VERSION)
    with ExitStack() as stack:
        stations = [
            stack.enter_context(kafkaperf.station(distribution, target, work)) for target in targets
        ]
        # The brokers live through all rounds: their first minute is spent in the JIT compiler.
        for station in stations:
            progress(f"warming up the broker on {station.target.name}")
            kafkaperf.measure_throughput(station, "warmup", settings.throughput)
        for round_ in range(settings.repeats):
            for station in rotated(stations, round_):
                topic = f"throughput-{round_}"
                produced, consumed = kafkaperf.measure_throughput(
                    station, topic, settings.throughput
                )
                recorder.add("kafka producer", station.target, round_, produced)
                recorder.add("kafka consumer", station.target, round_, consumed)
            for station in rotated(stations, round_):
                paced = kafkaperf.measure_latency(station, f"paced-{round_}", settings.paced)
                recorder.add(kafkaperf.PACED_NAME, station.target, round_, paced)


def rotated(items: Sequence[T], by: int) -> list[T]:
    first = by % len(items)
    return [*items[first:], *items[:first]]


if __name__ == "__main__":
    sys.exit(main())
