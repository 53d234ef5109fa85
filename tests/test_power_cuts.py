"""Power is cut at random moments under writers, renames, removals and moves both ways.

What was acked and fsynced is noted outside of the devices.  After each cut every name has one
intact version of its file, with all that had to survive; then the same devices go on.
"""

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from filetools import MIB
from harness import Mount, wait_until
from machine import Machine

from pafkafs import control
from pafkafs.errors import PafkafsError

PARTITIONS = 3
SEGMENTS_MAX = 6  # in a partition; more are removed, the oldest first
SECTOR = 512
FILE_BYTES_MAX = 3 * MIB
RESTLESS = (
    *("--fast-capacity", "24MiB", "--threshold", "0.5", "--low-watermark", "0.3"),
    *("--interval", "50ms", "--cool-down", "0s", "--migrate-threads", "2"),
)


def content(ident: str, start: int, end: int) -> bytes:
    """What a file has at these bytes."""
    return hashlib.shake_128(ident.encode()).digest(end)[start:]


def _cut(path: Path, size: int) -> None:
    """As Kafka cuts off what its checksums do not cover."""
    with open(path, "r+b") as stream:
        stream.truncate(size)
        os.fsync(stream.fileno())


@dataclass
class File:
    """What is known of a file from outside."""

    ident: str
    names: set[str]  # that it may have after a cut
    must_exist: bool = False
    may_exist: bool = True
    acked: int = 0
    floor: int = 0  # bytes that have to survive
    ceiling: int = 0  # bytes that it may have

    def check(self, directory: Path) -> None:
        """One name, the right bytes, and as many as there must be."""
        there = [name for name in self.names if (directory / name).exists()]
        assert len(there) <= 1, f"{self.ident} has the names {there}"
        assert there or not self.must_exist, f"{self.ident} is gone"
        assert not there or self.may_exist, f"{self.ident} is there again"
        if not there:
            self.must_exist = self.may_exist = False
            return
        data = (directory / there[0]).read_bytes()
        assert self.floor <= len(data) <= self.ceiling, (
            f"{directory / there[0]} has {len(data)} bytes, not {self.floor} to {self.ceiling}"
        )
        good = self._good_bytes(data)
        assert good >= self.floor, f"{directory / there[0]} has other bytes from {good} on"
        if good < len(data):
            _cut(directory / there[0], good)
        self.names, self.must_exist = {there[0]}, True
        self.acked = self.floor = self.ceiling = good

    def _good_bytes(self, data: bytes) -> int:
        """Beyond what had to survive ext4 and xfs may have the size without the data: zeros.
        Nothing else may be there."""
        expected = content(self.ident, 0, len(data))
        good = len(data)
        for at in range(0, len(data), SECTOR):
            if data[at : at + SECTOR] == expected[at : at + SECTOR]:
                continue
            sector = list(zip(data[at : at + SECTOR], expected[at : at + SECTOR], strict=True))
            wrong = [number for number, (found, right) in enumerate(sector) if found != right]
            good = min(good, at + wrong[0])
            zeros = all(sector[number][0] == 0 for number in wrong)
            assert zeros, f"{self.ident} has foreign bytes at {at}"
        return good


@dataclass
class Partition:
    """A directory with one thread that changes it, until it fails.

    **Invariant:** before each system call the files allow for what it may do, after it they
    demand what it has promised.
    """

    name: str  # the first one, by which its files are known
    power: bool
    places: set[str] = field(default_factory=set)  # the names that it may have
    must_exist: bool = False
    files: list[File] = field(default_factory=list)
    steps: int = 0
    _next: int = 0
    _fd: int = -1

    def __post_init__(self) -> None:
        self.places = {self.name}

    def check(self, root: Path) -> None:
        there = [place for place in self.places if (root / place).exists()]
        assert len(there) <= 1, f"{self.name} has the names {there}"
        if not there:
            assert not self.must_exist, f"{self.name} is gone"
            assert not any(file.must_exist for file in self.files)
            self.files.clear()
            return
        self.places, directory = {there[0]}, root / there[0]
        for file in self.files:
            file.check(directory)
        self.files = [file for file in self.files if file.may_exist]
        known = {name for file in self.files for name in file.names}
        assert set(os.listdir(directory)) == known

    def work(self, root: Path, choose: random.Random) -> None:
        """Runs in a thread of its own; ends with the first error."""
        try:
            self._directory(root).mkdir(exist_ok=True)
            self._sync_directory(root)
            self.must_exist = True
            while True:
                if choose.random() < 0.02:
                    self._move_directory(root)
                step = choose.choices(
                    (self._roll, self._append, self._sync, self._cut, self._rename, self._remove),
                    (4, 8, 3, 1, 2, 2),
                )[0]
                step(self._directory(root), choose)
                self.steps += 1
        except OSError:
            return
        finally:
            if self._fd >= 0:
                with suppress(OSError):
                    os.close(self._fd)
                self._fd = -1

    def _directory(self, root: Path) -> Path:
        (place,) = self.places
        return root / place

    def _move_directory(self, root: Path) -> None:
        """Of the objects of its files, and what is on its way, nothing changes its name."""
        old = self._directory(root)
        new = root / (f"moved-{self.name}" if old.name == self.name else self.name)
        self.places = {old.name, new.name}
        old.rename(new)
        if not self.power:
            self._sync_directory(root)
        self.places = {new.name}

    @staticmethod
    def _sync_directory(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_names(self, directory: Path) -> None:
        self._sync_directory(directory)
        for file in self.files:
            file.must_exist = file.must_exist or file.may_exist

    def _roll(self, directory: Path, choose: random.Random) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        name = f"{self._next:020}.log"
        self._next += 1
        file = File(f"{self.name}/{name}", {name})
        self.files.append(file)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._fd = os.open(directory / name, flags, 0o644)
        file.must_exist = self.power
        while len(self.files) > SEGMENTS_MAX:
            self._remove(directory, choose)
            self.files = [file for file in self.files if file.may_exist]

    def _append(self, directory: Path, choose: random.Random) -> None:
        if self._fd < 0:
            return
        file, size = self.files[-1], choose.choice((100, 4096, 70_000, 500_000))
        if file.acked + size > FILE_BYTES_MAX:
            return
        file.ceiling = max(file.ceiling, file.acked + size)
        written = os.write(self._fd, content(file.ident, file.acked, file.acked + size))
        file.acked += written
        if self.power:
            file.floor = file.acked

    def _sync(self, directory: Path, choose: random.Random) -> None:
        if self._fd < 0:
            return
        file = self.files[-1]
        os.fsync(self._fd)
        file.floor = file.ceiling = file.acked
        if not file.must_exist:
            self._sync_names(directory)

    def _cut(self, directory: Path, choose: random.Random) -> None:
        """Shortens the newest file, as a follower does."""
        if self._fd < 0:
            return
        file = self.files[-1]
        size = choose.randint(0, file.acked)
        file.floor = min(file.floor, size)
        os.ftruncate(self._fd, size)
        file.acked = size
        os.lseek(self._fd, size, os.SEEK_SET)
        self._sync(directory, choose)

    def _rename(self, directory: Path, choose: random.Random) -> None:
        """As Kafka marks what it is about to delete."""
        sealed = [file for file in self.files[:-1] if len(file.names) == 1]
        if not sealed:
            return
        file = choose.choice(sealed)
        (old,) = file.names
        new = old.removesuffix(".deleted") if old.endswith(".deleted") else f"{old}.deleted"
        file.names = {old, new}
        os.rename(directory / old, directory / new)
        if not self.power:
            self._sync_names(directory)
        file.names = {new}

    def _remove(self, directory: Path, choose: random.Random) -> None:
        if len(self.files) < 2:
            return
        file = self.files[0]
        (name,) = file.names
        file.must_exist = False
        os.unlink(directory / name)
        self._sync_directory(directory)
        file.may_exist = False
        self.files = self.files[1:]


class Moves(threading.Thread):
    """Asks for random files to be moved, until the daemon is gone."""

    def __init__(self, mount: Mount, choose: random.Random) -> None:
        super().__init__(daemon=True)
        self._mount = mount
        self._choose = choose

    def run(self) -> None:
        with suppress(OSError, PafkafsError):
            while True:
                if segments := self._segments():
                    path = self._choose.choice(segments).relative_to(self._mount.mountpoint)
                    tier = self._choose.choice(("fast", "slow"))
                    control.ask(str(self._mount.mountpoint), "migrate", path=str(path), to=tier)
                time.sleep(0.01)  # the pace of the requests; nothing waits for it

    def _segments(self) -> list[Path]:
        with suppress(FileNotFoundError):  # a directory is being renamed
            return list(self._mount.mountpoint.glob("*/*.log"))
        return []


def expect_no_garbage(mount: Mount) -> None:
    """What no name leads to is put aside, soon after the mount."""

    def is_clean() -> bool:
        if mount.status()["migration"]["running"]:
            return False
        stubs = [path for path in mount.tree.rglob("*") if path.is_symlink()]
        shadows = list((mount.fast / "shadows").iterdir())
        leftovers = list((mount.fast / "tmp").iterdir())
        return len(stubs) == len(mount.objects) == len(shadows) and not leftovers

    control.ask(str(mount.mountpoint), "pause")
    wait_until(is_clean, "garbage to be collected", 60)
    control.ask(str(mount.mountpoint), "resume")


class Witness:
    """What a machine has promised, kept outside of it."""

    def __init__(self, power: bool) -> None:
        self.partitions = [Partition(f"topic-{n}", power) for n in range(PARTITIONS)]
        self.moves = 0

    @property
    def steps(self) -> int:
        return sum(partition.steps for partition in self.partitions)

    def note(self) -> dict[str, File]:
        """All files as they are now.  A filesystem that is being shut down may still tell success:
        promises count that were made before."""
        return {
            file.ident: replace(file, names=set(file.names))
            for partition in self.partitions
            for file in list(partition.files)
        }

    def forget_after(self, noted: dict[str, File]) -> None:
        """What was promised since is allowed, and not demanded."""
        for partition in self.partitions:
            now = {file.ident: file for file in partition.files}
            mine = {i: file for i, file in noted.items() if i.startswith(f"{partition.name}/")}
            for ident, file in now.items():
                before = mine.pop(ident, File(ident, set()))
                file.names |= before.names
                file.must_exist = file.must_exist and before.must_exist
                file.may_exist = True
                file.floor = min(file.floor, before.floor)
                file.ceiling = max(file.ceiling, before.ceiling)
            for file in mine.values():  # removed since
                file.must_exist, file.floor = False, 0
                partition.files.insert(0, file)


def moves(mount: Mount) -> int:
    """That are done."""
    done: int = mount.status()["migration"]["files"]
    return done


def live(machine: Machine, witness: Witness, choose: random.Random) -> None:
    """One life, until the power is cut; and what is there after it."""
    mount = machine.mount
    threads = [
        threading.Thread(
            target=partition.work, args=(mount.mountpoint, random.Random(choose.random()))
        )
        for partition in witness.partitions
    ]
    threads.append(Moves(mount, random.Random(choose.random())))
    until = witness.steps + choose.randint(20, 250)
    for thread in threads:
        thread.start()
    wait_until(lambda: witness.steps >= until and moves(mount) > 0, "the work to get on", 120)
    witness.moves += moves(mount)
    directories = [(p.must_exist, set(p.places)) for p in witness.partitions]
    noted = witness.note()
    machine.cut_power(*choose.sample(("fast", "slow"), 2))
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    witness.forget_after(noted)
    mount.start()
    for partition, (must_exist, places) in zip(witness.partitions, directories, strict=True):
        partition.must_exist = must_exist
        partition.places |= places
        partition.check(mount.mountpoint)
    expect_no_garbage(mount)


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    kind, durability = request.param
    machine = Machine(tmp_path / "machine", kind, (*RESTLESS, "--durability", durability))
    yield machine
    machine.close()
    assert "Traceback" not in machine.mount.log_text(), machine.mount.log_text()


SETTINGS = [(kind, mode) for kind in ("ext4", "xfs") for mode in ("process", "power")]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", SETTINGS, ids="-".join, indirect=True)
@pytest.mark.parametrize("cuts", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_what_was_promised_before_power_cuts_is_there_after_them(
    machine: Machine, request: pytest.FixtureRequest, cuts: int
) -> None:
    seed = int(os.environ.get("PAFKAFS_TEST_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"PAFKAFS_TEST_SEED={seed}")
    choose = random.Random(seed)
    witness = Witness(power="power" in machine.mount.options)
    machine.mount.start()
    for _ in range(cuts):
        live(machine, witness, choose)
    print(f"{cuts} cuts, {witness.steps} steps, {witness.moves} moves")
