"""The write path for persistent memory by itself: appends.c, by way, batch and number of writers.

    scripts/bench/appends [--directory DIR] [--sync] [--repeats N] [--json FILE]

Ways alternate within each round; a figure is the median of the rounds, its ratio the median of the
rounds' ratios to plain non-temporal copies.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAYS = ("memcpy", "pmem", "pwrite", "pwrite+fsync")
BATCHES = (4 << 10, 16 << 10, 64 << 10, 1 << 20)
WRITERS = (1, 4)
FILE_MIB = 256


def build(directory: Path) -> Path:
    """Compiles appends.c with the helper as it is in native/."""
    program = directory / "appends"
    native = ROOT / "native"
    sources = [str(native / f"{name}.c") for name in ("media", "persist", "pmem", "sizes")]
    command = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread", f"-I{native}"]
    here = str(Path(__file__).with_suffix(".c"))
    subprocess.run([*command, here, *sources, "-lpmem", "-o", str(program)], check=True)
    return program


def measure(
    program: Path, directory: Path, way: str, batch: int, writers: int, mib: int, sync: bool
) -> dict[str, float]:
    command = [str(program), str(directory), way, str(batch), str(writers), str(mib)]
    done = subprocess.run(
        [*command, *(["sync"] if sync else [])], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"bench: {done.stderr.strip()}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def tmpfs(stack: ExitStack) -> Path:
    """A tmpfs with huge pages, for the run."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    options = "size=6g,huge=within_size"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    stack.callback(subprocess.run, ["umount", str(path)], check=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/appends", description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to write (default: a tmpfs)")
    parser.add_argument(
        "--sync", action="store_true", help="DIRECTORY is on DAX: map with MAP_SYNC"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--file-mib", type=int, default=FILE_MIB)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if shutil.which("cc") is None:
        sys.exit("bench: no C compiler: apt-get install gcc libc6-dev")
    samples: dict[tuple[int, int, str], list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        program = build(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        directory = asked.directory or tmpfs(stack)
        for round_ in range(asked.repeats):
            for batch in BATCHES:
                for writers in WRITERS:
                    for way in WAYS[round_ % len(WAYS) :] + WAYS[: round_ % len(WAYS)]:
                        sync = asked.sync and way == "pmem"
                        figures = measure(
                            program, directory, way, batch, writers, asked.file_mib, sync
                        )
                        samples[batch, writers, way].append(figures)
    print(f"{'batch':>10} {'writers':>8}", *(f"{way:>30}" for way in WAYS))
    for batch in BATCHES:
        for writers in WRITERS:
            cells = [cell(samples, batch, writers, way) for way in WAYS]
            print(f"{batch >> 10:>6} KiB {writers:>8}", *(f"{text:>30}" for text in cells))
    print("MB per CPU second (smallest..largest), ratio to memcpy")
    if asked.json is not None:
        rows = [{"samples": found, "key": key} for key, found in samples.items()]
        asked.json.write_text(json.dumps(rows, indent=1))


def cell(
    samples: dict[tuple[int, int, str], list[dict[str, float]]], batch: int, writers: int, way: str
) -> str:
    values = [s["bytes_per_cpu_s"] / 1e6 for s in samples[batch, writers, way]]
    base = [s["bytes_per_cpu_s"] / 1e6 for s in samples[batch, writers, "memcpy"]]
    ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
    return f"{statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f}) x{ratio:.2f}"


if __name__ == "__main__":
    main()
