"""Random operations on a segment that moves up and down all the while: whatever is done, it holds
what was written, byte by byte, through every handle, cold in the home tree, and after SIGKILL.

The operations are made and checked by tests/exerciser, a C program, against a copy in memory."""

import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest
from filetools import MIB, Background, shared_mount
from harness import GROWING, PLAIN, SLOWNESS, Mount, wait_until

from pafkafs import control
from pafkafs.errors import PafkafsError

SOURCES = Path(__file__).parent / "exerciser"
# Why a move may fail here: the newer segment beside it is not there, or it is written to too fast.
NONCE = "user.pafkafs.nonce"  # what a growing file has in its xattrs
# Of the long run: 12 campaigns of millions of operations.
ROUNDS, OPERATIONS = 10, 100_000
MAY_FAIL = ("active segment", "faster than it can be copied")


@pytest.fixture(scope="module")
def exerciser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("exerciser") / "exerciser"
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    sources = sorted(map(str, SOURCES.glob("*.c")))
    subprocess.run(["gcc", *flags, "-o", str(program), *sources], check=True)
    return program


@pytest.fixture(params=["plain", "growing"])
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mount]:
    options = GROWING if request.param == "growing" else PLAIN
    with shared_mount(tmp_path, "--threshold", "-1", *options) as mount:
        yield mount


def newer_than(path: Path) -> Path:
    """What seals a segment: it may move then."""
    return path.with_name(f"{10**12:020}.log")


def grows(mount: Mount, path: Path) -> bool:
    home = mount.tree / path.relative_to(mount.mountpoint)
    return not home.is_symlink() and NONCE in os.listxattr(home)


@dataclass
class Storm:
    """Moves a segment up and down, without a pause, until it is stopped.  Now and then the newer
    segment beside it goes and comes: opened meanwhile, it is the active one, and may grow."""

    mount: Mount
    path: Path
    moved: Counter[str] = field(default_factory=Counter)
    grown: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._be_the_active_one()
                for _ in range(8):
                    self._move("slow")
                    self._move("fast")
        except (PafkafsError, OSError):
            if not self.stopping.is_set():  # else the daemon was killed
                raise

    def _move(self, tier: str) -> None:
        where, path = str(self.mount.mountpoint), self.path.relative_to(self.mount.mountpoint)
        job = control.ask(where, "migrate", path=str(path), to=tier)
        while (told := control.ask(where, "job", job=job))["state"] in ("waiting", "running"):
            self.stopping.wait(0.002)
        if told["state"] == "failed":
            assert any(reason in told["error"] for reason in MAY_FAIL), told
        self.moved[tier] += told["state"] == "done"

    def _be_the_active_one(self) -> None:
        newer = newer_than(self.path)
        newer.unlink(missing_ok=True)
        for _ in range(50 if self.mount.status()["pool"] is not None else 5):
            # As long as it may take to be opened again.
            if grows(self.mount, self.path):
                self.grown += 1
                break
            self.stopping.wait(0.02)
        newer.touch()


@dataclass
class Campaign:
    """One segment, exercised in rounds; what it must hold is in a file beside the mount."""

    mount: Mount
    program: Path
    expected: Path
    moved: Counter[str] = field(default_factory=Counter)
    grown: int = 0

    @property
    def path(self) -> Path:
        return self.mount.mountpoint / "topic-0" / f"{0:020}.log"

    @property
    def may_grow(self) -> bool:
        return self.mount.status()["pool"] is not None

    def _opened(self) -> BinaryIO:
        """A new one is of the pool, and grows until the last handle is closed."""
        stream = self.path.open("ab", buffering=0)
        self.grown += grows(self.mount, self.path)
        return stream

    @contextmanager
    def exercised(self, seed: int, operations: int, writers: int, size_max: int) -> Iterator[None]:
        """All operations are made, the handles are open still, and the storm goes on."""
        newer_than(self.path).unlink(missing_ok=True)  # so that it grows from the first write on
        arguments = [self.path, self.expected, seed, operations, writers, size_max]
        storm = Storm(self.mount, self.path)
        with (
            self._opened() as first,
            subprocess.Popen(
                [self.program, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None

            def comes_to(word: str) -> None:
                if process.stdout.readline() != f"{word}\n":
                    pytest.fail(process.stderr.read())

            comes_to("opened")
            first.close()
            moves = Background(storm.run)
            try:
                comes_to("done")
                wait_until(lambda: min(storm.moved["slow"], storm.moved["fast"]), "a move each way")
                storm.stopping.set()
                yield
            finally:
                storm.stopping.set()
                process.stdin.close()
                moves.join()
        self.moved += storm.moved
        self.grown += storm.grown

    def end_with_unmount(self) -> None:
        """Read cold: the home tree alone, its stubs followed."""
        self.mount.stop()
        assert self.cold() == self.expected.read_bytes()
        self.mount.start()

    def cold(self) -> bytes:
        return (self.mount.tree / self.path.relative_to(self.mount.mountpoint)).read_bytes()

    def check(self) -> None:
        assert self.path.read_bytes() == self.expected.read_bytes()
        assert self.path.stat().st_size == self.expected.stat().st_size

    def run(self, seed: int, operations: int, writers: int, size_max: int) -> None:
        """Two rounds: one ends with a clean unmount, the other one with SIGKILL under the open
        handles, and perhaps a move."""
        with self.exercised(seed, operations // 2, writers, size_max):
            pass
        self.end_with_unmount()
        self.check()
        with self.exercised(seed + 1, operations // 2, writers, size_max):
            self.mount.kill()
        self.mount.start()
        self.check()


@pytest.fixture
def campaign(mount: Mount, exerciser: Path, tmp_path: Path) -> Campaign:
    campaign = Campaign(mount, exerciser, tmp_path / "expected")
    campaign.path.parent.mkdir()
    if campaign.may_grow:
        wait_until(lambda: mount.status()["pool"]["files"] > 0, "the pool")
    return campaign


@pytest.mark.parametrize("writers", [1, 2])
def test_segment_that_moves_all_the_time_holds_what_was_written(
    campaign: Campaign, writers: int
) -> None:
    campaign.run(seed=1, operations=20_000, writers=writers, size_max=MIB)
    campaign.end_with_unmount()
    assert campaign.moved["slow"] > 0
    assert campaign.moved["fast"] > 0
    assert (campaign.grown > 0) == campaign.may_grow


@pytest.mark.slow
@pytest.mark.timeout(3600 * SLOWNESS)
@pytest.mark.parametrize("size_max", [MIB // 4, MIB, 16 * MIB], ids=["small", "medium", "large"])
@pytest.mark.parametrize("writers", [1, 2])
def test_segment_that_moves_all_the_time_holds_what_was_written_in_a_long_run(
    campaign: Campaign, writers: int, size_max: int
) -> None:
    first = int.from_bytes(os.urandom(4))
    for seed in range(first, first + 2 * ROUNDS, 2):
        print(f"seed {seed}, writers {writers}, at most {size_max} bytes")
        campaign.run(seed, OPERATIONS, writers, size_max)
    campaign.end_with_unmount()
    print(f"moved {dict(campaign.moved)}, grew {campaign.grown} times")
