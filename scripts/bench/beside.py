"""What appends and tail reads, or Kafka's producer, notice of files that move beside them.

    scripts/bench/beside [--kafka] [--fast DIR] [--slow DIR] [--seconds N] [--repeats N] [--mib N]
                         [--migrate-rate RATE]

Each round loads the fast tier at a fixed rate three times: with nothing else to do; while a process
of its own copies as much from the fast device to the slow one, at nice 19 and past the page cache,
which is what any mover costs on this machine; and with segments on their way to the slow tier all
the time (and back, once all are there).  Who begins changes from round to round.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from kafkarun.distribution import default_cache, fetch

from bench import kafkaperf, loadgen
from bench.appends import tmpfs
from bench.errors import BenchError
from bench.moves import MIB, migrate, pafkafs, status, write
from bench.targets import Target
from pafkafs.units import parse_size

LOAD = loadgen.Load(4, 16, rate_mib_per_s=5)
SEGMENT_MIB = 64
_POLL_S = 0.05  # moves by policy are asked about by nobody
_QUANTILES = ("p50", "p99", "p999")
METRICS = [f"{what}_{q}_us" for what in ("append", "tail_read") for q in _QUANTILES]
KAFKA_METRICS = [f"{q}_ms" for q in _QUANTILES]
KAFKA_WARMUP_S = 5

WAYS = ("idle", "copying", "moving")

Measure = Callable[[], dict[str, float]]
Round = dict[str, dict[str, float]]  # by way and metric


class Copying:
    """A plain copy of a file, over and over, while `on`."""

    def __init__(self, source: Path, target: Path, bytes_per_s: int) -> None:
        """bytes_per_s: 0 is no bound."""
        self._command = ["nice", "-n", "19", sys.executable, "-m", "bench.plaincopy"]
        self._arguments = [str(source), str(target), str(bytes_per_s)]

    @contextmanager
    def on(self) -> Iterator[None]:
        with subprocess.Popen([*self._command, *self._arguments]) as process:
            try:
                yield
                if process.poll() is not None:
                    raise BenchError("the plain copy has ended; see above")
            finally:
                process.terminate()


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
        devices = [home / "device", slow / "device"]
        for device in devices:
            device.mkdir()
        pafkafs("mount", "--threshold", "-1", *rate, *map(str, devices), str(mountpoint))
        stack.callback(pafkafs, "umount", str(mountpoint))
        target = Target("pafkafs", mountpoint, int(status(mountpoint)["pid"]), "", "")
        moving = Moving(mountpoint, asked.mib)
        source = home / "plain"
        write(source, SEGMENT_MIB, sync=False)
        copying = Copying(source, slow / "plain", parse_size(asked.migrate_rate))
        if asked.kafka:
            metrics, name = KAFKA_METRICS, kafkaperf.PACED_NAME
            measure = with_kafka(stack, target, asked.seconds)
        else:
            metrics, name = METRICS, LOAD.name
            measure = with_loadgen(target, asked.seconds)
        beside = {"idle": nullcontext, "copying": copying.on, "moving": moving.on}
        rounds = [one_round(measure, beside, n) for n in range(asked.repeats)]
        moved = moving.moved_mib * MIB / 1e6 / moving.seconds
        print(f"{name}; medians of {len(rounds)} rounds; {os.cpu_count()} processors")
        report(metrics, rounds, status(mountpoint)["migration"]["cut_over_max_s"], moved)


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


def one_round(
    measure: Measure, beside: dict[str, Callable[[], AbstractContextManager[None]]], number: int
) -> Round:
    found: Round = {}
    for turn in range(len(WAYS)):
        way = WAYS[(number + turn) % len(WAYS)]
        with beside[way]():
            found[way] = measure()
    return found


def report(
    metrics: Sequence[str], rounds: list[Round], cut_over_s: float, moved_mb_per_s: float
) -> None:
    """Medians, and the medians of the ratios to idle, with the smallest and the largest."""
    print(f"{'':20}{'idle':>8}{'copying':>9}{'moving':>8}   {'ratios to idle':>20}")
    for metric in metrics:
        medians = [statistics.median(r[way][metric] for r in rounds) for way in WAYS]
        ratios = [spread([r[way][metric] / r["idle"][metric] for r in rounds]) for way in WAYS[1:]]
        print(
            f"{metric:20}{medians[0]:8.0f}{medians[1]:9.0f}{medians[2]:8.0f}"
            f"   copying {ratios[0]}, moving {ratios[1]}"
        )
    print(f"moved meanwhile, MB/s     {moved_mb_per_s:.0f}")
    print(f"longest cut-over, ms      {cut_over_s * 1000:.1f}")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


if __name__ == "__main__":
    main()
