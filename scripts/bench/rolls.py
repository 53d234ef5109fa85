"""What a new segment costs, and what filling the pool costs the appends beside it.

Paced writers append batches to a partition each: once in segments that roll all the time, once in
ones that do not roll at all; on mounts that differ in where new segments come from.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kafkarun.distribution import default_cache

from bench import loadgen, processes, report
from bench.errors import BenchError
from bench.report import Sample
from bench.targets import Devices, Target, memory_fast_device, mounted, status

# Where a new segment comes from, and the options of the mount that has it so.
WAYS = {
    "plain": ("--pmem", "off"),
    "pool empty": ("--pmem", "on", "--pool-ratio", "0"),
    "pool full": ("--pmem", "on"),
}
REFERENCE = "plain"
ROLLING, STEADY = "rolling", "no rolls"
_NEVER_MIB = 2047
_FULL_TIMEOUT_S = 60.0
_QUANTILES = ("p50", "p99", "p999")


@dataclass(frozen=True)
class Settings:
    """The load; the rate is that of each writer."""

    writers: int
    batch_kib: int
    rate_mib_per_s: float
    segment_mib: int
    seconds: float
    repeats: int


def parse() -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="scripts/bench/rolls", description=__doc__)
    add = parser.add_argument
    add("--fast", type=Path, metavar="DIR",
        help="a directory on the fast device, of DAX say (default: a tmpfs)")  # fmt: skip
    add("--slow", type=Path, metavar="DIR", default=Path("/var/tmp"))
    add("--writers", type=int, default=4)
    add("--batch-kib", type=int, default=16)
    add("--rate-mib", type=float, default=10, help="of each writer, per second")
    add("--segment-mib", type=int, default=4, help="where the rolling load rolls")
    add("--seconds", type=float, default=10)
    add("--repeats", type=int, default=5)
    add("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    settings = Settings(
        asked.writers,
        asked.batch_kib,
        asked.rate_mib,
        asked.segment_mib,
        asked.seconds,
        asked.repeats,
    )
    return settings, asked


def main() -> int:
    settings, asked = parse()
    try:
        samples = bench(settings, asked.fast, asked.slow)
    except BenchError as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    print(report.table(report.summarise(samples, REFERENCE)))
    print()
    print(refill_table(samples))
    if asked.json is not None:
        rows = [asdict(sample) for sample in samples]
        asked.json.write_text(json.dumps({"settings": asdict(settings), "samples": rows}, indent=1))
    return 0


def bench(settings: Settings, fast: Path | None, slow: Path) -> list[Sample]:
    """All rounds; who begins changes from round to round."""
    samples = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=slow)))
        devices = make_devices(stack, work, fast)
        program = loadgen.build(default_cache() / "bench")
        for round_ in range(settings.repeats):
            ways = list(WAYS)
            for way in ways[round_ % len(ways) :] + ways[: round_ % len(ways)]:
                for load, mib in ((ROLLING, settings.segment_mib), (STEADY, _NEVER_MIB)):
                    name = f"{way} {load} {round_}".replace(" ", "-")
                    with mounted(devices, work, name, WAYS[way]) as target:
                        metrics = measure(program, settings, target, mib)
                    samples.append(Sample(load, way, round_, metrics))
                    where = f"round {round_ + 1}/{settings.repeats}  {way:12}{load:10}"
                    print(f"{where}write_p50_us {metrics['write_p50_us']:.4g}", file=sys.stderr)
    return samples


def make_devices(stack: ExitStack, work: Path, fast: Path | None) -> Devices:
    (work / "slow").mkdir()
    if fast is None:
        options = stack.enter_context(memory_fast_device(work / "fast"))
        return Devices(work / "fast", work / "slow", f"tmpfs {options}")
    directory = stack.enter_context(tempfile.TemporaryDirectory(dir=fast))
    return Devices(Path(directory), work / "slow", str(fast))


def measure(
    program: Path, settings: Settings, target: Target, segment_mib: int
) -> dict[str, float]:
    """The load on one mount, from when its pool is as full as it gets."""
    await_pool(target.directory)
    command = [str(program), "--readers", "0", "--fsync-on-roll"]
    command += ["--writers", f"{settings.writers}", "--batch-kib", f"{settings.batch_kib}"]
    command += ["--rate-mib", f"{settings.rate_mib_per_s}", "--segment-mib", f"{segment_mib}"]
    command += ["--seconds", f"{settings.seconds}", str(target.directory)]
    server_before = target.server_cpu_seconds()
    done = processes.run(command, timeout_s=60 + 10 * settings.seconds)
    server_cpu_s = target.server_cpu_seconds() - server_before
    found = json.loads(done.stdout)
    metrics = {f"write_{quantile}_us": found["write_us"][quantile] for quantile in _QUANTILES}
    if found["roll_us"]["count"]:
        for kind in ("first_write", "first_append", "roll"):  # too few for more nines
            metrics |= {f"{kind}_{q}_us": found[f"{kind}_us"][q] for q in ("p50", "p99")}
    metrics["rolls"] = found["roll_us"]["count"]
    metrics["server_cpu_s_per_gb"] = server_cpu_s / (found["written_bytes"] / 1e9)
    pool = status(target.directory)["pool"]
    metrics["pool_files_left"] = 0 if pool is None else pool["files"]
    return metrics


def await_pool(mountpoint: Path) -> None:
    """Until it grows no more."""
    deadline, before = time.monotonic() + _FULL_TIMEOUT_S, -1
    while (files := pool_files(mountpoint)) != before:
        if time.monotonic() > deadline:
            raise BenchError(f"the pool was not full after {_FULL_TIMEOUT_S:.0f} s")
        before = files
        time.sleep(1)


def pool_files(mountpoint: Path) -> int:
    pool: dict[str, Any] | None = status(mountpoint)["pool"]
    return 0 if pool is None else int(pool["files"])


def refill_table(samples: list[Sample]) -> str:
    """Appends that did not roll: beside rolls, and what fills the pool again, to without."""
    metrics = [f"write_{quantile}_us" for quantile in _QUANTILES]
    by_rolling = [
        Sample(s.target, s.workload, s.round, {m: s.metrics[m] for m in metrics}) for s in samples
    ]
    return report.table(report.summarise(by_rolling, STEADY))


if __name__ == "__main__":
    sys.exit(main())
