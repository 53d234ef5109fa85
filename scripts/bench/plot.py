"""Draws the samples of a soak (tests/kafka/test_soak.py) as an SVG.

python -m bench.plot soak.csv docs/soak.svg
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

PANELS = (
    ("rss_mib", "memory of the daemon, MiB"),
    ("descriptors", "descriptors"),
    ("write_p99_us", "append p99, us (upper end of its bucket)"),
    ("moved_files", "files moved since the mount"),
)
WIDTH, HEIGHT, LEFT, GAP = 720, 100, 60, 40


def panel(times: Sequence[float], values: Sequence[float], title: str, top: float) -> str:
    """A line from the first sample to the last one, and the values at its ends."""
    highest = max(values) or 1.0
    right = WIDTH - 10
    points = " ".join(
        f"{LEFT + (right - LEFT) * (at / times[-1]):.1f},{top + HEIGHT * (1 - value / highest):.1f}"
        for at, value in zip(times, values, strict=True)
    )
    bottom = top + HEIGHT
    return (
        f'<text x="{LEFT}" y="{top - 8}">{title}</text>'
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{highest:g}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>'
        f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#888"/>'
        f'<polyline points="{points}" fill="none" stroke="#1565c0"/>'
    )


def drawing(rows: Sequence[dict[str, str]]) -> str:
    """All panels, one below the other, over the same time."""
    times = [float(row["at_s"]) for row in rows]
    tops = [GAP + number * (HEIGHT + GAP) for number in range(len(PANELS))]
    panels = "\n".join(
        panel(times, [float(row[name]) for row in rows], title, top)
        for (name, title), top in zip(PANELS, tops, strict=True)
    )
    height = tops[-1] + HEIGHT + GAP
    minutes = f"{times[-1] / 60:.0f} min"
    end = f'<text x="{WIDTH - 10}" y="{height - 18}" text-anchor="end">{minutes}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{panels}\n{end}\n</svg>\n'
    )


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with source.open(newline="") as stream:
        target.write_text(drawing(list(csv.DictReader(stream))))


if __name__ == "__main__":
    main()
