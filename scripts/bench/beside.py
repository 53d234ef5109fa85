"""What appends and tail reads, or Kafka's producer, notice of files that move beside them.

    scripts/bench/beside [--kafka] [--fast DIR] [--slow DIR] [--seconds N] [--repeats N] [--mib N]
                         [--migrate-rate RATE]

Each round loads the fast tier at a fixed rate twice: with nothing else to do, and with segments on
their way to the slow tier all the time (and back, once all are there); who begins changes from
round to round.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kafkarun.distribution import default_cache, fetch

from bench import kafkaperf, loadgen
from bench.appends import tmpfs
from bench.moves import MIB, migrate, pafkafs, status, write
from bench.targets import Target

LOAD = loadgen.Load(4, 16, rate_mib_per_s=5)
SEGMENT_MIB = 64
_POLL_S = 0.2  # moves by policy are asked about by nobody
_QUANTILES = ("p50", "p99", "p999")
METRICS = [f"{what}_{q}_us" for what in ("append", "tail_read") for q in _QUANTILES]
KAFKA_METRICS = [f"{q}_ms" for q in _QUANTILES]
KAFKA_WARMUP_S = 5

Measure = Callable[[], dict[str, float]]
Round = dict[str, list[float]]  # metric: [idle, moving]


class Moving:
    """Segments on their way, one after the other, while `on`."""

    def __init__(self, mountpoint: Path, mib: int) -> None:
        self._mountpoint = mountpoint
        directory = mountpoint / "bench-0"
        directory.mkdir()
        (directory / f"{10**12:020}.log").touch()  # the active segment
        count = max(1, mib // SEGMENT_MIB)
        self._paths = [directory / f"{number:020}.log" for number in range(count)]
        for path in self._paths:
            write(path, SEGMENT_MIB, sync=True)
        self.moved_mib, self.seconds = 0, 0.0

    @contextmanager
    def on(self) -> Iterator[None]:
        """All segments are on the fast tier when it begins."""
        ending = threading.Event()
        thread = threading.Thread(target=self._run, args=(ending,))
        began = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
            self.seconds += time.monotonic() - began
            for path in self._paths:
                migrate(self._mountpoint, path, "fast")

    def _run(self, ending: threading.Event) -> None:
        for tier in itertools.cycle(("slow", "fast")):
            for path in self._paths:
                if ending.is_set():
                    return
                migrate(self._mountpoint, path, tier, _POLL_S)
                self.moved_mib += SEGMENT_MIB


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/beside", description=__doc__)
    add = parser.add_argument
    add("--fast", type=Path, help="a directory on the fast device (default: a tmpfs)")
    add("--slow", type=Path, default=Path("/var/tmp"))
    add("--seconds", type=float, default=5.0)
    add("--repeats", type=int, default=5)
    add("--mib", type=int, default=2048, help="of segments that move (default: %(default)s)")
    add("--kafka", action="store_true", help="load it with a broker and Kafka's own producer")
    add("--migrate-rate", default="0", help="of pafkafs, like 80MiB (default: no bound)")
    asked = parser.parse_args()
    with ExitStack() as stack:
        slow = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.slow)))
        fast = tempfile.TemporaryDirectory(dir=asked.fast) if asked.fast else None
        home = tmpfs(stack) if fast is None else Path(stack.enter_context(fast))
        mountpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rate = ("--migrate-rate", asked.migrate_rate)
        pafkafs("mount", "--threshold", "-1", *rate, str(home), str(slow), str(mountpoint))
        stack.callback(pafkafs, "umount", str(mountpoint))
        target = Target("pafkafs", mountpoint, int(status(mountpoint)["pid"]), "", "")
        moving = Moving(mountpoint, asked.mib)
        if asked.kafka:
            metrics, name = KAFKA_METRICS, kafkaperf.PACED_NAME
            measure = with_kafka(stack, target, asked.seconds)
        else:
            metrics, name = METRICS, LOAD.name
            measure = with_loadgen(target, asked.seconds)
        rounds = [one_round(measure, metrics, moving, n) for n in range(asked.repeats)]
        moved = moving.moved_mib * MIB / 1e6 / moving.seconds
        print(f"{name}; medians of {len(rounds)} rounds; {os.cpu_count()} processors")
        report(rounds, status(mountpoint)["migration"]["cut_over_max_s"], moved)


def with_loadgen(target: Target, seconds: float) -> Measure:
    program = loadgen.build(default_cache() / "bench")
    return lambda: loadgen.measure(program, LOAD, target, seconds)


def with_kafka(stack: ExitStack, target: Target, seconds: float) -> Measure:
    """A broker on the target until the stack ends; each measurement in a topic of its own."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    distribution = fetch(kafkaperf.KAFKA_VERSION)
    station = stack.enter_context(kafkaperf.station(distribution, target, work))
    warmup = KAFKA_WARMUP_S * kafkaperf.PACED_RECORDS_PER_S
    volume = kafkaperf.Volume(warmup + int(seconds * kafkaperf.PACED_RECORDS_PER_S), warmup)
    numbers = itertools.count()
    return lambda: kafkaperf.measure_latency(station, f"paced-{next(numbers)}", volume)


def one_round(measure: Measure, metrics: Sequence[str], moving: Moving, number: int) -> Round:
    """Each metric, idle and while segments move."""
    found: dict[str, dict[str, float]] = {}
    for way in ("idle", "moving") if number % 2 == 0 else ("moving", "idle"):
        if way == "idle":
            found[way] = measure()
        else:
            with moving.on():
                found[way] = measure()
    return {metric: [found["idle"][metric], found["moving"][metric]] for metric in metrics}


def report(rounds: list[Round], cut_over_s: float, moved_mb_per_s: float) -> None:
    print(f"{'':20}{'idle':>10}{'moving':>10}{'ratio':>8}  (smallest..largest)")
    for metric in rounds[0]:
        idle, moving = zip(*(r[metric] for r in rounds), strict=True)
        ratios = [m / i for i, m in zip(idle, moving, strict=True)]
        print(
            f"{metric:20}{statistics.median(idle):10.0f}{statistics.median(moving):10.0f}"
            f"{statistics.median(ratios):8.2f}  ({min(ratios):.2f}..{max(ratios):.2f})"
        )
    print(f"moved meanwhile, MB/s     {moved_mb_per_s:.0f}")
    print(f"longest cut-over, ms      {cut_over_s * 1000:.1f}")


if __name__ == "__main__":
    main()
