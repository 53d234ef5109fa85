"""The loadgen workloads: builds the C load generator and turns its report into metrics."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.errors import BenchError
from bench.targets import Target

_SOURCES = ("loadgen.c", "partition.c", "histogram.c")
_HEADERS = ("partition.h", "histogram.h")
_CFLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_BUILD_TIMEOUT_S = 120


@dataclass(frozen=True)
class Load:
    """Writers appending batches, each with a reader at its tail."""

    writers: int
    batch_kib: int
    rate_mib_per_s: float = 0  # of each writer; 0 for unlimited

    @property
    def name(self) -> str:
        paced = f", {self.writers * self.rate_mib_per_s:g} MiB/s" if self.rate_mib_per_s else ""
        return f"loadgen {self.writers} x {self.batch_kib} KiB{paced}"


HEAVIEST = Load(4, 64)
LOADS = (
    Load(1, 16),
    Load(1, 64),
    Load(4, 16),
    HEAVIEST,
    Load(4, 16, rate_mib_per_s=5),
)


def build(directory: Path) -> Path:
    """Compile the load generator into the directory unless it is there and up to date."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("cc not found: apt-get install gcc libc6-dev")
    directory.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    program = directory / "loadgen"
    newest = max((here / name).stat().st_mtime for name in _SOURCES + _HEADERS)
    if not program.exists() or program.stat().st_mtime < newest:
        sources = [str(here / name) for name in _SOURCES]
        command = [compiler, *_CFLAGS, "-o", str(program), *sources]
        processes.run(command, timeout_s=_BUILD_TIMEOUT_S)
    return program


def measure(program: Path, load: Load, target: Target, seconds: float) -> dict[str, float]:
    """Load the target once; the directory is empty again afterwards."""
    directory = target.directory / "load"
    directory.mkdir()
    command = [str(program), "--fsync-on-roll", "--seconds", f"{seconds}"]
    command += ["--writers", f"{load.writers}", "--readers", f"{load.writers}"]
    command += ["--batch-kib", f"{load.batch_kib}", "--rate-mib", f"{load.rate_mib_per_s}"]
    server_before = target.server_cpu_seconds()
    finished = processes.run([*command, str(directory)], timeout_s=60 + 10 * seconds)
    server_cpu_seconds = target.server_cpu_seconds() - server_before
    directory.rmdir()
    return _metrics(json.loads(finished.stdout), server_cpu_seconds)


def _metrics(report: dict[str, Any], server_cpu_seconds: float) -> dict[str, float]:
    gigabytes = report["written_bytes"] / 1e9
    append, tail_read = report["append_us"], report["tail_read_us"]
    return {
        "write_mb_per_s": report["write_mb_per_s"],
        "tail_read_mb_per_s": report["read_mb_per_s"],
        "append_p50_us": append["p50"],
        "append_p99_us": append["p99"],
        "append_p999_us": append["p999"],
        "tail_read_p50_us": tail_read["p50"],
        "tail_read_p99_us": tail_read["p99"],
        "tail_read_p999_us": tail_read["p999"],
        "cpu_s_per_gb": (report["cpu_seconds"] + server_cpu_seconds) / gigabytes,
        "server_cpu_s_per_gb": server_cpu_seconds / gigabytes,
    }
