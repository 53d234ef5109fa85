"""What very many files cost: time until a mount serves, memory for each file, status, decisions.

    scripts/bench/files [--files N] [--demoted SHARE]

Makes a home tree of N empty segments on a tmpfs, some of them demoted, and mounts it twice: with
nothing to move, and with everything older than a day to go down.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.appends import tmpfs
from bench.moves import pafkafs
from pafkafs import control, layout

SEGMENTS_PER_PARTITION = 1000
STATUS_SAMPLES = 50
NOTHING = ("--threshold", "-1")


@contextmanager
def mounted(*arguments: str) -> Iterator[float]:
    """Seconds until it served."""
    began = time.monotonic()
    pafkafs("mount", *arguments)
    try:
        yield time.monotonic() - began
    finally:
        pafkafs("umount", arguments[-1])


def ask(mountpoint: Path) -> dict[str, Any]:
    answer: dict[str, Any] = control.ask(str(mountpoint), "status")
    return answer


def populate(fast: Path, slow: Path, device_id: str, files: int, share: float) -> None:
    """Sealed segments, every n-th of them demoted, with times an hour apart."""
    now, number = time.time_ns(), 0
    for partition in range(-(-files // SEGMENTS_PER_PARTITION)):
        name = f"bench-{partition}"
        directory = fast / "tree" / name
        directory.mkdir()
        (slow / "objects" / name).mkdir()
        for offset in range(min(SEGMENTS_PER_PARTITION, files - number)):
            path = directory / f"{offset:020}.log"
            mtime_ns = now - (number % 100_000) * 10**9
            demoted = int(number * share) != int((number + 1) * share)
            number += 1
            if demoted:
                demote(fast, slow, device_id, path, mtime_ns)
            else:
                path.touch()
                os.utime(path, ns=(mtime_ns, mtime_ns))


def demote(fast: Path, slow: Path, device_id: str, path: Path, mtime_ns: int) -> None:
    relative = os.fsencode(path.relative_to(fast / "tree"))
    stub = layout.make_stub(device_id, os.fsencode(slow), relative)
    text = layout.stub_text(os.fsencode(slow), stub)
    for made in (os.fsdecode(text), fast / "shadows" / stub.object_id):
        os.close(os.open(made, os.O_CREAT | os.O_WRONLY, 0o644))
        os.utime(made, ns=(mtime_ns, mtime_ns))
    os.symlink(text, path)


def until_all_known(mountpoint: Path, began: float) -> float:
    while not ask(mountpoint)["all_known"]:
        time.sleep(0.05)
    return time.monotonic() - began


def status_times(mountpoint: Path) -> list[float]:
    """Milliseconds of one request and its answer; each plans what would move, too."""
    found = []
    for _ in range(STATUS_SAMPLES):
        began = time.monotonic()
        ask(mountpoint)
        found.append((time.monotonic() - began) * 1000)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench/files", description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--demoted", type=float, default=0.5, metavar="SHARE")
    asked = parser.parse_args()
    with ExitStack() as stack:
        memory = tmpfs(stack)
        fast, slow = memory / "fast", memory / "slow"
        mountpoint = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fast.mkdir()
        slow.mkdir()
        where = (str(fast), str(slow), str(mountpoint))
        with mounted(*NOTHING, *where):
            empty = psutil.Process(ask(mountpoint)["pid"]).memory_info().rss
        populate(fast, slow, device_of(slow), asked.files, asked.demoted)
        report(asked.files, empty, mountpoint, where)


def device_of(slow: Path) -> str:
    record: dict[str, Any] = json.loads((slow / layout.RECORD).read_text())
    device: str = record["member"]["device"]
    return device


def report(files: int, empty: int, mountpoint: Path, where: tuple[str, str, str]) -> None:
    began = time.monotonic()
    with mounted(*NOTHING, *where) as served_s:
        during = status_times(mountpoint)
        known_s = until_all_known(mountpoint, began)
        memory = psutil.Process(ask(mountpoint)["pid"]).memory_info().rss - empty
        after = status_times(mountpoint)
    # All of it is to move, and nothing does: what is planned is made anew for each status.
    with mounted("--max-age", "1s", "--interval", "7d", *where):
        until_all_known(mountpoint, began)
        planned = ask(mountpoint)["migration"]["planned"]
        deciding = status_times(mountpoint)
    print(f"files                            {files}")
    print(f"serves after, s                  {served_s:.2f}")
    print(f"all known after, s               {known_s:.1f}")
    print(f"memory, bytes a file             {memory / files:.0f}")
    print(f"status while reading, ms         {spread(during)}")
    print(f"status, ms                       {spread(after)}")
    print(f"status with {planned} moves planned, ms  {spread(deciding)}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} (at most {max(values):.1f})"


if __name__ == "__main__":
    main()
