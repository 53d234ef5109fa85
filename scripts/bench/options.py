"""What a user can ask of a benchmark run, and the settings that follow from it."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from kafkarun.distribution import default_cache

from bench.kafkaperf import Volume
from bench.targets import TARGETS

SUITES = ("loadgen", "kafka")


@dataclass(frozen=True)
class Settings:
    """How long and how often; the same for every target."""

    repeats: int
    load_seconds: float
    throughput: Volume
    paced: Volume


FULL = Settings(
    repeats=5,
    load_seconds=3,
    throughput=Volume(records=800_000, warmup_records=200_000),
    paced=Volume(records=140_000, warmup_records=40_000),
)
QUICK = Settings(
    repeats=1,
    load_seconds=1,
    throughput=Volume(records=200_000, warmup_records=50_000),
    paced=Volume(records=60_000, warmup_records=20_000),
)


@dataclass(frozen=True)
class Options:
    """One run, as asked for on the command line."""

    settings: Settings
    targets: tuple[str, ...]
    suites: tuple[str, ...]
    fast: Path | None
    slow: Path
    json: Path


def parse() -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/run",
        description="Compare log directories: the raw fast device, mergerfs and pafkafs on it.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one short round, to see that all of it works")
    add("--repeats", type=_positive, metavar="N", help=f"rounds (default: {FULL.repeats})")
    add("--targets", type=_some_of(TARGETS), metavar="LIST", default=tuple(TARGETS),
        help=f"comma-separated, of {','.join(TARGETS)} (default: all)")  # fmt: skip
    add("--suites", type=_some_of(SUITES), metavar="LIST", default=SUITES,
        help=f"comma-separated, of {','.join(SUITES)} (default: all)")  # fmt: skip
    add("--fast", type=Path, metavar="DIR",
        help="a directory on the fast device (default: a tmpfs mounted for the run)")  # fmt: skip
    add("--slow", type=Path, metavar="DIR", default=Path("/var/tmp"),
        help="a directory on the slow device (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", default=default_cache() / "bench" / "results.json",
        help="where the figures go for programs (default: %(default)s)")  # fmt: skip
    given = parser.parse_args()
    base = QUICK if given.quick else FULL
    return Options(
        settings=replace(base, repeats=given.repeats or base.repeats),
        targets=given.targets,
        suites=given.suites,
        fast=given.fast,
        slow=given.slow,
        json=given.json,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, not {text!r}")
    return int(text)


def _some_of(names: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def chosen(text: str) -> tuple[str, ...]:
        given = text.split(",")
        if unknown := set(given) - set(names):
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is not one of {','.join(names)}")
        return tuple(name for name in names if name in given)

    return chosen
