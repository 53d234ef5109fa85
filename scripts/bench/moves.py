"""What moving a file costs: demotion of a segment against writing as much to the slow device.

    scripts/bench/moves [--fast DIR] [--slow DIR] [--mib N] [--repeats N]

Each round writes N MiB with fsync to a file on the slow device, and demotes a sealed segment of
that size through a mount; who begins changes from round to round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from appends import tmpfs

PAFKAFS = str(Path(sys.executable).with_name("pafkafs"))
MIB = 1 << 20


def pafkafs(*arguments: str) -> str:
    done = subprocess.run([PAFKAFS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"bench: {done.stderr.strip()}")
    return done.stdout


def status(mountpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pafkafs("status", "--json", str(mountpoint)))["mounts"][0]
    return found


def write(path: Path, mib: int, *, sync: bool) -> float:
    """Seconds to write a file sequentially."""
    block = os.urandom(MIB)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(mib):
            file.write(block)
        if sync:
            os.fsync(file.fileno())
    return time.monotonic() - began


def demote(mountpoint: Path, number: int, mib: int) -> tuple[float, float]:
    """Wall and CPU seconds to demote a new segment."""
    path = mountpoint / "bench-0" / f"{number:020}.log"
    write(path, mib, sync=True)
    daemon = psutil.Process(status(mountpoint)["pid"])
    before, began = daemon.cpu_times(), time.monotonic()
    pafkafs("migrate", "--wait", "--to", "slow", str(path))
    took, after = time.monotonic() - began, daemon.cpu_times()
    path.unlink()
    return took, after.user + after.system - before.user - before.system


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/moves", description=__doc__)
    parser.add_argument(
        "--fast", type=Path, help="a directory on the fast device (default: a tmpfs)"
    )
    parser.add_argument("--slow", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with ExitStack() as stack:
        slow = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.slow)))
        fast = tempfile.TemporaryDirectory(dir=asked.fast) if asked.fast else None
        home = tmpfs(stack) if fast is None else Path(stack.enter_context(fast))
        report(*measure(stack, home, slow, asked.mib, asked.repeats), asked.mib)


def measure(
    stack: ExitStack, fast: Path, slow: Path, mib: int, repeats: int
) -> tuple[list[float], list[tuple[float, float]], float]:
    """Seconds of the raw writes, of the demotions with their CPU time, and the longest cut-over."""
    mountpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (slow / "device").mkdir()
    pafkafs("mount", "--threshold", "-1", str(fast), str(slow / "device"), str(mountpoint))
    stack.callback(pafkafs, "umount", str(mountpoint))
    (mountpoint / "bench-0").mkdir()
    (mountpoint / "bench-0" / f"{10**12:020}.log").touch()  # the active segment
    raw: list[float] = []
    moved: list[tuple[float, float]] = []
    for number in range(repeats):
        for way in ("raw", "move") if number % 2 == 0 else ("move", "raw"):
            if way == "raw":
                raw.append(write(slow / "raw", mib, sync=True))
                (slow / "raw").unlink()
            else:
                moved.append(demote(mountpoint, number, mib))
    return raw, moved, status(mountpoint)["migration"]["cut_over_max_s"]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f})"


def report(raw: list[float], moved: list[tuple[float, float]], cut_over_s: float, mib: int) -> None:
    ratios = [r / m for r, (m, _) in zip(raw, moved, strict=True)]
    speeds = [mib * MIB / 1e6 / seconds for seconds in raw]
    moves = [mib * MIB / 1e6 / seconds for seconds, _ in moved]
    cpu = statistics.median(cpu_s for _, cpu_s in moved) / (mib * MIB / 1e9)
    print(f"raw write + fsync, MB/s  {spread(speeds)}")
    print(f"demotion, MB/s           {spread(moves)}")
    print(f"ratio, median of rounds  {statistics.median(ratios):.2f}")
    print(f"longest cut-over, ms     {cut_over_s * 1000:.1f}")
    print(f"CPU seconds of the daemon per GB moved  {cpu:.2f}")


if __name__ == "__main__":
    main()
