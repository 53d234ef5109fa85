"""Samples, what they amount to (median, spread, ratio to raw) and how that is shown."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from bench.targets import Target

REFERENCE = "raw"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Sample:
    """One workload on one target in one round."""

    workload: str
    target: str
    round: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One metric over all rounds; the ratio is the median of the rounds' own ratios to the
    reference, which has none itself."""

    workload: str
    target: str
    metric: str
    median: float
    min: float
    max: float
    ratio: float | None


def summarise(samples: Sequence[Sample], reference: str = REFERENCE) -> list[Figure]:
    """A figure for each workload, metric and target, in the order in which they first came."""
    by_place: dict[tuple[str, str, str], dict[int, float]] = {}
    for sample in samples:
        for metric, value in sample.metrics.items():
            place = sample.workload, metric, sample.target
            by_place.setdefault(place, {})[sample.round] = value
    return [
        _figure(place, values, by_place.get((*place[:2], reference), {}), reference)
        for place, values in by_place.items()
    ]


def _figure(
    place: tuple[str, str, str],
    values: Mapping[int, float],
    base: Mapping[int, float],
    reference: str,
) -> Figure:
    workload, metric, target = place
    # Rounds are compared with themselves: a machine that slows down slows both sides.
    ratios = [value / base[n] for n, value in values.items() if base.get(n)]
    return Figure(
        workload=workload,
        target=target,
        metric=metric,
        median=statistics.median(values.values()),
        min=min(values.values()),
        max=max(values.values()),
        ratio=statistics.median(ratios) if ratios and target != reference else None,
    )


def table(figures: Sequence[Figure]) -> str:
    """One block for each workload: a row for each metric, a column for each target."""
    targets = list(dict.fromkeys(figure.target for figure in figures))
    workloads = dict.fromkeys(figure.workload for figure in figures)
    return "\n\n".join(
        _block(workload, [f for f in figures if f.workload == workload], targets)
        for workload in workloads
    )


def _block(workload: str, figures: Sequence[Figure], targets: Sequence[str]) -> str:
    cells = {(figure.metric, figure.target): _cell(figure) for figure in figures}
    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    rows = [[workload, *targets]]
    rows += [[metric, *(cells.get((metric, t), "") for t in targets)] for metric in metrics]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(figure: Figure) -> str:
    spread = f"{_short(figure.median)} ({_short(figure.min)}..{_short(figure.max)})"
    if figure.ratio is None:
        return spread
    return f"{spread} x{figure.ratio:.2f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def document(
    targets: Iterable[Target], settings: Mapping[str, Any], samples: Sequence[Sample]
) -> dict[str, Any]:
    """All there is to know about a run, for programs."""
    return {
        "version": FORMAT_VERSION,
        "machine": _machine(),
        "settings": dict(settings),
        "targets": {
            target.name: {"options": target.options, "version": target.version}
            for target in targets
        },
        "samples": [asdict(sample) for sample in samples],
        "summary": [asdict(figure) for figure in summarise(samples)],
    }


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }
