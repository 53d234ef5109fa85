"""What moving a file costs: demotion of a segment against writing as much to the slow device.

    scripts/bench/moves [--fast DIR] [--slow DIR] [--mib N] [--repeats N]

Each round writes N MiB with fsync to a file on the slow device, and demotes a sealed segment of
that size through a mount; then it reads both, the page cache dropped before. Who begins changes
from round to round.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.appends import tmpfs
from pafkafs import control

PAFKAFS = str(Path(sys.executable).with_name("pafkafs"))
MIB = 1 << 20
POLL_S = 0.01


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


def migrate(mountpoint: Path, path: Path, tier: str, poll_s: float = POLL_S) -> None:
    """As `pafkafs migrate --wait` does it, without the time that takes to start.  poll_s: to ask
    often is a load, too."""
    where, relative = str(mountpoint), str(path.relative_to(mountpoint))
    number = control.ask(where, "migrate", path=relative, to=tier)
    while (job := control.ask(where, "job", job=number))["state"] not in ("done", "there"):
        if job["state"] == "failed":
            sys.exit(f"bench: {path} was not moved: {job['error']}")
        time.sleep(poll_s)


def read_cold(path: Path) -> float:
    """Seconds to read a file sequentially that is in no page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    return time.monotonic() - began


@dataclass(frozen=True)
class Demotion:
    """Seconds of a demotion, of the daemon's CPU time for it, and of a cold read afterwards."""

    wall_s: float
    cpu_s: float
    read_s: float


def demote(mountpoint: Path, number: int, mib: int) -> Demotion:
    """Demotes a new segment, and reads it."""
    path = mountpoint / "bench-0" / f"{number:020}.log"
    write(path, mib, sync=True)
    daemon = psutil.Process(status(mountpoint)["pid"])
    before, began = daemon.cpu_times(), time.monotonic()
    migrate(mountpoint, path, "slow")
    took, after = time.monotonic() - began, daemon.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    found = Demotion(took, cpu_s, read_cold(path))
    path.unlink()
    return found


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
) -> tuple[list[tuple[float, float]], list[Demotion], float]:
    """Seconds of the raw writes and reads, the demotions, and the longest cut-over."""
    mountpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (slow / "device").mkdir()
    pafkafs("mount", "--threshold", "-1", str(fast), str(slow / "device"), str(mountpoint))
    stack.callback(pafkafs, "umount", str(mountpoint))
    (mountpoint / "bench-0").mkdir()
    (mountpoint / "bench-0" / f"{10**12:020}.log").touch()  # the active segment
    raw: list[tuple[float, float]] = []
    moved: list[Demotion] = []
    for number in range(repeats):
        for way in ("raw", "move") if number % 2 == 0 else ("move", "raw"):
            if way == "raw":
                written_s = write(slow / "raw", mib, sync=True)
                raw.append((written_s, read_cold(slow / "raw")))
                (slow / "raw").unlink()
            else:
                moved.append(demote(mountpoint, number, mib))
    return raw, moved, status(mountpoint)["migration"]["cut_over_max_s"]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f})"


def compare(name: str, raw_s: list[float], ours_s: list[float], mib: int) -> None:
    megabytes = mib * MIB / 1e6
    ratio = statistics.median(r / o for r, o in zip(raw_s, ours_s, strict=True))
    print(
        f"{name}, MB/s: raw {spread([megabytes / s for s in raw_s])}, "
        f"pafkafs {spread([megabytes / s for s in ours_s])}, median of the ratios {ratio:.2f}"
    )


def report(
    raw: list[tuple[float, float]], moved: list[Demotion], cut_over_s: float, mib: int
) -> None:
    cpu = statistics.median(move.cpu_s for move in moved) / (mib * MIB / 1e9)
    compare("write + fsync", [w for w, _ in raw], [move.wall_s for move in moved], mib)
    compare("cold sequential read", [r for _, r in raw], [move.read_s for move in moved], mib)
    print(f"longest cut-over, ms     {cut_over_s * 1000:.1f}")
    print(f"CPU seconds of the daemon per GB moved  {cpu:.2f}")


if __name__ == "__main__":
    main()
