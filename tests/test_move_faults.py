"""Faults at each system call of a move, on either device and both ways: the file stays whole.

A first move counts the calls; then one move for each of them has it fail, fall short, hang, or
be the last of the daemon.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from faults import ERRORS, Action, Faults
from filetools import is_spilled
from harness import Mount, is_dead_mount, is_mounted, is_running, wait_until

from pafkafs import control

MIB = 1 << 20
SAMPLE = 3  # calls of each way and device that are hit in the default run
ENDED = ("done", "there", "failed")
OTHER = {"slow": "fast", "fast": "slow"}


@dataclass
class Scene:
    """A mount with one sealed segment, which has a hole."""

    mount: Mount
    faults: Faults
    path: Path
    content: bytes = b""
    attributes: tuple[int, ...] = ()

    def start(self) -> None:
        with self.faults.daemon():
            self.mount.start()

    def start_again(self) -> None:
        """The inode number is that of the daemon that gave it."""
        self.start()
        self.attributes = (self.path.stat().st_ino, *self.attributes[1:])

    def status(self) -> dict[str, Any]:
        """Without starting a program for it."""
        found: dict[str, Any] = control.ask(str(self.mount.mountpoint), "status")
        return found

    def root(self, device: str) -> Path:
        return self.mount.fast if device == "fast" else self.mount.slow

    def where(self) -> str:
        return "slow" if is_spilled(self.mount, self.path) else "fast"

    def is_hit_or_at(self, tier: str) -> bool:
        return self.faults.hit is not None or self.where() == tier

    def begin(self, tier: str) -> int:
        relative = str(self.path.relative_to(self.mount.mountpoint))
        number: int = control.ask(str(self.mount.mountpoint), "migrate", path=relative, to=tier)
        return number

    def move(self, tier: str) -> dict[str, Any]:
        number = self.begin(tier)

        def ended() -> dict[str, Any] | None:
            job = control.ask(str(self.mount.mountpoint), "job", job=number)
            return job if job["state"] in ENDED else None

        found: dict[str, Any] = wait_until(ended, "the move to end", 60)
        return found

    def bring_to(self, tier: str) -> None:
        if self.where() != tier:
            assert self.move(tier)["state"] == "done"
        self.expect_tidy()

    def expect_whole(self) -> None:
        """Through the mount and without it."""
        assert self.path.read_bytes() == self.content
        assert (self.mount.tree / "topic-0" / self.path.name).read_bytes() == self.content
        assert attributes(self.path) == self.attributes

    def expect_tidy(self) -> None:
        wait_until(lambda: not self.garbage(), f"no garbage: {self.garbage()}")

    def garbage(self) -> list[str]:
        """What no name refers to."""
        try:
            objects = self.mount.objects
        except FileNotFoundError:  # a directory is being removed
            return ["objects"]
        stubs = [p.readlink() for p in self.mount.tree.rglob("*") if p.is_symlink()]
        ids = {stub.name.rpartition(".")[2] for stub in stubs}
        return [
            *(str(o) for o in objects if o not in stubs),
            *(s for s in os.listdir(self.mount.fast / "shadows") if s not in ids),
            *os.listdir(self.mount.fast / "tmp"),
        ]

    def count(self, tier: str, device: str) -> int:
        """The calls on a device of a move to a tier."""
        self.bring_to(OTHER[tier])
        self.faults.arm(self.root(device), Action.COUNT)
        assert self.move(tier)["state"] == "done"
        calls = self.faults.disarm()
        self.expect_tidy()
        assert calls > 5
        return calls


def attributes(path: Path) -> tuple[int, ...]:
    s = path.stat()
    return (s.st_ino, s.st_size, s.st_mode, s.st_mtime_ns)


@pytest.fixture
def scene(make_mount: MakeMount, tmp_path: Path) -> Iterator[Scene]:
    mount = make_mount("--threshold", "-1")
    faults = Faults(tmp_path)
    directory = mount.mountpoint / "topic-0"
    scene = Scene(mount, faults, directory / f"{7:020}.log")
    scene.start()
    directory.mkdir()
    (directory / f"{10**12:020}.log").touch()
    with scene.path.open("wb") as file:
        file.write(os.urandom(MIB + 4097))
        file.seek(2 * MIB)
        file.write(os.urandom(100_001))
    scene.path.chmod(0o640)
    os.utime(scene.path, ns=(10**18, 10**18 + 7))
    scene.content, scene.attributes = scene.path.read_bytes(), attributes(scene.path)
    yield scene
    faults.disarm()


def is_gone(pid: int) -> bool:
    return not is_running(pid)


def spread(calls: int, sample: int | None, turn: int) -> list[int]:
    """All calls, or some that differ from turn to turn."""
    if sample is None:
        return list(range(1, calls + 1))
    return sorted({1 + (turn * 2 + i * calls // sample) % calls for i in range(sample)})


def fail_one(scene: Scene, tier: str, device: str, which: int, action: Action, error: int) -> str:
    """A move of which one call fails; what came of it."""
    scene.bring_to(OTHER[tier])
    scene.faults.arm(scene.root(device), action, which, error)
    job = scene.move(tier)
    scene.faults.disarm()
    hit = scene.faults.hit
    if hit is None:
        return "not reached"
    problems = " ".join(p["problem"] for p in scene.status()["problems"])
    arrived = scene.where() == tier
    assert arrived == (job["state"] == "done"), (hit, job)
    scene.expect_whole()
    if not arrived:
        assert os.strerror(error) in job["error"], (hit, job)
        assert device == "fast" or os.strerror(error) in problems, (hit, problems)
    unsafe = "fsync of a directory failed" in problems
    if hit.startswith(("fsync", "fdatasync")):
        assert not arrived or unsafe, f"{hit}: a failed fsync was not told"
    if unsafe:  # both copies are kept, until the next mount finds one of them
        scene.mount.stop()
        scene.start_again()
    scene.expect_tidy()
    assert scene.move(tier)["state"] == ("there" if arrived else "done"), hit
    scene.expect_whole()
    return f"{hit}: {'arrived' if arrived else 'stayed'}{', degraded' if unsafe else ''}"


WAYS = [(tier, device) for tier in ("slow", "fast") for device in ("slow", "fast")]


@pytest.mark.parametrize("sample", [SAMPLE, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_error_at_any_call_of_a_move_leaves_the_file_whole(
    scene: Scene, sample: int | None
) -> None:
    for turn, (tier, device) in enumerate(WAYS):
        for which in spread(scene.count(tier, device), sample, turn):
            for error in ERRORS if sample is None else (ERRORS[which % len(ERRORS)],):
                print(tier, device, which, errno.errorcode[error], end=" ")
                print(fail_one(scene, tier, device, which, Action.FAIL, error))
    scene.mount.stop()
    scene.start_again()
    scene.expect_whole()
    scene.expect_tidy()


@pytest.mark.parametrize("sample", [2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_short_and_interrupted_transfers_of_a_move_are_completed(
    scene: Scene, sample: int | None
) -> None:
    for turn, (tier, device) in enumerate(WAYS):
        for which in spread(scene.count(tier, device), sample, turn + 5):
            scene.bring_to(OTHER[tier])
            short = which % 2 == 0
            scene.faults.arm(
                scene.root(device), Action.SHORT if short else Action.FAIL, which, errno.EINTR
            )
            job = scene.move(tier)
            scene.faults.disarm()
            hit = scene.faults.hit or ""
            if short or hit.startswith(("pread", "pwrite", "fallocate")):
                assert job["state"] == "done", (hit, job)
            scene.expect_whole()


@pytest.mark.parametrize("sample", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_daemon_that_dies_at_any_call_of_a_move_leaves_one_version(
    scene: Scene, sample: int | None
) -> None:
    for turn, (tier, device) in enumerate(WAYS if sample is None else WAYS[1:3]):
        for which in spread(scene.count(tier, device), sample, turn + 4):
            scene.bring_to(OTHER[tier])
            scene.faults.arm(scene.root(device), Action.DIE, which)
            scene.begin(tier)
            wait_until(lambda: is_dead_mount(scene.mount.mountpoint), "the end of the daemon", 60)
            scene.faults.disarm()
            scene.start_again()
            scene.expect_whole()
            scene.expect_tidy()


@pytest.mark.parametrize("sample", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_unmount_during_any_call_of_a_move_leaves_one_version(
    scene: Scene, sample: int | None
) -> None:
    for turn, tier in enumerate(("slow", "fast") if sample is None else ("slow",)):
        for which in spread(scene.count(tier, "slow"), sample, turn + 3):
            scene.bring_to(OTHER[tier])
            scene.faults.arm(scene.root("slow"), Action.HANG, which)
            scene.begin(tier)
            wait_until(lambda: scene.faults.hit, "the call")
            pid = scene.status()["pid"]
            os.kill(pid, 15)
            wait_until(lambda: not is_mounted(scene.mount.mountpoint), "the unmount", 60)
            scene.faults.disarm()
            wait_until(partial(is_gone, pid), "the end of the daemon", 60)
            scene.start_again()
            scene.expect_whole()
            scene.expect_tidy()


@pytest.mark.parametrize("sample", [2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_daemon_answers_while_any_call_of_a_move_hangs_in_the_slow_device(
    scene: Scene, sample: int | None
) -> None:
    other = scene.path.with_name("other")
    for turn, tier in enumerate(("slow", "fast")):
        for which in spread(scene.count(tier, "slow"), sample, 8 * turn + 5):
            scene.bring_to(OTHER[tier])
            scene.faults.arm(scene.root("slow"), Action.HANG, which)
            scene.begin(tier)
            wait_until(partial(scene.is_hit_or_at, tier), "the call")
            scene.status()
            other.write_bytes(b"goes on")
            other.unlink()
            scene.faults.disarm()
            wait_until(lambda: not scene.status()["migration"]["running"], "the move to end")
            scene.expect_whole()
