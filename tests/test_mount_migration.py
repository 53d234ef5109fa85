"""Segments on their way between the tiers, under open handles, mappings, writers and readers."""

import fcntl
import mmap
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from filetools import MIB, Background, is_spilled, opened
from harness import (
    GROWING,
    PLAIN,
    Mount,
    fast_memory,
    is_dead_mount,
    run_pafkafs,
    wait_until,
)

from pafkafs import control
from pafkafs.errors import PafkafsError
from pafkafs.migration import Rest

# Nothing moves by itself.
STILL = ("--threshold", "-1")


@pytest.fixture(params=["plain", "growing"])
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mount]:
    with fast_memory(tmp_path / "memory", "256m") as fast:
        slow, mountpoint = tmp_path / "slow", tmp_path / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        options = (*STILL, *(GROWING if request.param == "growing" else PLAIN))
        mount = Mount(fast, slow, mountpoint, options, tmp_path / "pafkafs.log")
        try:
            yield mount.start()
        finally:
            mount.clean_up()
        assert "Traceback" not in mount.log_text(), mount.log_text()


def segment(mount: Mount, offset: int = 0, content: bytes = b"") -> Path:
    """A sealed segment: a newer one is there."""
    directory = mount.mountpoint / "topic-0"
    directory.mkdir(exist_ok=True)
    (directory / f"{10**12:020}.log").touch()
    path = directory / f"{offset:020}.log"
    path.write_bytes(content)
    return path


def migrate(tier: str, *paths: Path) -> None:
    result = run_pafkafs("migrate", "--wait", "--to", tier, *map(str, paths))
    assert result.returncode == 0, result.stderr


def moving(mount: Mount) -> list[dict[str, Any]]:
    """What is on its way; without starting a program, which may take longer than the move."""
    found: list[dict[str, Any]] = control.ask(str(mount.mountpoint), "status")["migration"][
        "running"
    ]
    return found


def status_of(path: Path) -> tuple[int, ...]:
    s = path.stat()
    return (s.st_ino, s.st_size, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns)


def leaves_nothing_behind(mount: Mount) -> bool:
    stubs = [path.readlink() for path in mount.tree.rglob("*") if path.is_symlink()]
    shadows = set(os.listdir(mount.fast / "shadows"))
    tmp = os.listdir(mount.fast / "tmp")
    ids = {stub.name.rpartition(".")[2] for stub in stubs}
    return sorted(mount.objects) == sorted(stubs) and shadows == ids and not tmp


def test_file_is_the_same_after_a_way_down_and_up(mount: Mount) -> None:
    content = os.urandom(20 * MIB + 12345)
    path = segment(mount, content=content)
    path.chmod(0o640)
    os.utime(path, ns=(10**18, 10**18 + 7))
    with path.open("r+b", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), len(content))
        fcntl.lockf(file, fcntl.LOCK_EX)
        before = status_of(path)
        for tier in ("slow", "fast", "slow", "fast"):
            migrate(tier, path)
            assert is_spilled(mount, path) == (tier == "slow")
            assert status_of(path) == before
            assert path.read_bytes() == content
            assert mapping[MIB : 2 * MIB] == content[MIB : 2 * MIB]
            assert os.pread(file.fileno(), 100, 0) == content[:100]
        mapping.close()
    wait_until(lambda: leaves_nothing_behind(mount), "the copies to be removed")


def test_size_and_times_of_the_object_are_those_of_the_file(mount: Mount) -> None:
    path = segment(mount, content=os.urandom(MIB))
    os.utime(path, ns=(10**18, 10**18 + 7))
    path.chmod(0o604)
    migrate("slow", path)
    (object_,) = mount.objects

    def alike() -> bool:
        s = object_.stat()
        return (s.st_size, s.st_mode & 0o777, s.st_mtime_ns) == (MIB, 0o604, 10**18 + 7)

    wait_until(alike, "the attributes")


def test_older_time_that_was_set_on_a_demoted_file_survives_the_daemon(mount: Mount) -> None:
    path = segment(mount, content=os.urandom(MIB))
    migrate("slow", path)
    (object_,) = mount.objects
    times = (10**18, 10**18 + 7)
    pid = mount.pid
    os.utime(path, ns=times)
    os.kill(pid, signal.SIGKILL)  # before the object has got it
    wait_until(lambda: is_dead_mount(mount.mountpoint), "the daemon's death")
    assert object_.stat().st_mtime_ns != times[1]
    mount.start()
    wait_until(lambda: object_.stat().st_mtime_ns == times[1], "the object to get it")
    assert path.stat().st_mtime_ns == times[1]


@pytest.mark.parametrize("tier", ["slow", "fast"])
def test_writes_and_truncations_during_the_copy_are_in_the_result(mount: Mount, tier: str) -> None:
    path = segment(mount, content=os.urandom(24 * MIB))
    if tier == "fast":
        migrate("slow", path)
    expected = bytearray(path.read_bytes())
    stop = threading.Event()

    def change() -> None:
        with opened(path, os.O_RDWR) as fd:
            while not stop.is_set():
                # Near the end: changes all over the file may be faster than its copy.
                at, data = len(expected) - 5000 - int.from_bytes(os.urandom(2)), os.urandom(5000)
                os.pwrite(fd, data, at)
                expected[at : at + len(data)] = data
                cut = len(expected) - 1000
                os.ftruncate(fd, cut)
                del expected[cut:]
                os.lseek(fd, 0, os.SEEK_END)
                tail = os.urandom(1500)
                os.write(fd, tail)
                expected.extend(tail)

    writer = Background(change)
    try:
        migrate(tier, path)
        assert writer.running
    finally:
        stop.set()
        writer.join()
    assert is_spilled(mount, path) == (tier == "slow")
    assert path.read_bytes() == bytes(expected)
    mount.restart()
    assert path.read_bytes() == bytes(expected)


def test_file_cut_and_made_longer_during_the_copy_has_zeros_between(mount: Mount) -> None:
    mount.restart("--migrate-rate", "16MiB")
    content = os.urandom(32 * MIB)
    path = segment(mount, content=content)
    run_pafkafs("migrate", "--to", "slow", str(path))
    wait_until(lambda: moving(mount), "the copy to begin")
    with opened(path, os.O_RDWR) as fd:
        os.ftruncate(fd, MIB)
        os.pwrite(fd, b"behind a hole", 20 * MIB)
    wait_until(lambda: is_spilled(mount, path), "it to arrive")
    mount.restart()
    assert path.read_bytes() == content[:MIB] + bytes(19 * MIB) + b"behind a hole"


def test_malformed_requests_are_answered_and_the_mount_goes_on(mount: Mount) -> None:
    where = str(mount.mountpoint)
    for path in ("\ud800", "", "a//b", "../x", "a/../b", "x\0y", "a" * 3000, "not-there"):
        with suppress(PafkafsError):
            control.ask(where, "migrate", path=path, to="slow")
    for arguments in ({}, {"path": 7, "to": "slow"}, {"path": "a", "to": "up"}):
        with pytest.raises(PafkafsError, match="needs a path"):
            control.ask(where, "migrate", **arguments)
    with pytest.raises(PafkafsError, match="no such job"):
        control.ask(where, "job", job="x")
    assert mount.status()["state"] == "healthy"


def test_appends_go_on_while_the_file_moves_back_and_forth(mount: Mount) -> None:
    path = segment(mount, content=os.urandom(8 * MIB))
    expected = bytearray(path.read_bytes())
    stop = threading.Event()

    def append() -> None:
        with opened(path, os.O_RDWR | os.O_APPEND) as fd:
            while not stop.wait(0.001):
                batch = os.urandom(16_000)
                os.write(fd, batch)
                expected.extend(batch)
                assert os.fstat(fd).st_size == len(expected)
                assert os.pread(fd, 1 << 20, len(expected) - 16_000) == batch

    writer = Background(append)
    try:
        for tier in ("slow", "fast") * 3:
            before = len(expected)
            migrate(tier, path)
            assert len(expected) > before
    finally:
        stop.set()
        writer.join()
    assert path.read_bytes() == bytes(expected)


def test_removed_during_the_copy_leaves_nothing(mount: Mount) -> None:
    mount.restart("--migrate-rate", "32MiB")
    path = segment(mount, content=os.urandom(64 * MIB))
    run_pafkafs("migrate", "--to", "slow", str(path))
    wait_until(lambda: moving(mount), "the copy to begin")
    path.unlink()
    wait_until(lambda: not moving(mount), "the moves to end")
    wait_until(lambda: leaves_nothing_behind(mount), "the copies to be removed")


def test_second_request_for_a_file_that_moves_is_refused(mount: Mount) -> None:
    mount.restart("--migrate-rate", "32MiB")
    path = segment(mount, content=os.urandom(64 * MIB))
    run_pafkafs("migrate", "--to", "slow", str(path))
    wait_until(lambda: moving(mount), "the copy to begin")
    second = run_pafkafs("migrate", "--wait", "--to", "slow", str(path))
    assert second.returncode == 1
    assert "being moved already" in second.stderr
    wait_until(lambda: is_spilled(mount, path), "the first to arrive")


def test_segment_that_becomes_the_active_one_during_the_copy_stays(mount: Mount) -> None:
    mount.restart("--migrate-rate", "32MiB")
    content = os.urandom(64 * MIB)
    path = segment(mount, content=content)
    results: list[str] = []
    command = Background(
        lambda: results.append(run_pafkafs("migrate", "--wait", "--to", "slow", str(path)).stderr)
    )
    wait_until(lambda: moving(mount), "the copy to begin")
    path.with_name(f"{10**12:020}.log").unlink()  # as a follower does that truncates
    command.join()
    assert "became the active segment" in results[0]
    assert not is_spilled(mount, path)
    assert path.read_bytes() == content
    wait_until(lambda: leaves_nothing_behind(mount), "the copy to be removed")


def test_renamed_with_its_directory_during_the_copy_arrives(mount: Mount) -> None:
    mount.restart("--migrate-rate", "32MiB")
    content = os.urandom(64 * MIB)
    path = segment(mount, content=content)
    command = Background(lambda: migrate("slow", path))
    wait_until(lambda: moving(mount), "the copy to begin")
    moved = path.parent.rename(path.parent.with_name("renamed-0"))
    command.join()
    assert is_spilled(mount, moved / path.name)
    assert (moved / path.name).read_bytes() == content


def test_daemon_killed_during_moves_leaves_one_intact_version(mount: Mount) -> None:
    contents = {segment(mount, n, os.urandom(8 * MIB)): b"" for n in range(6)}
    for path in contents:
        contents[path] = path.read_bytes()
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
    for round_ in range(4):
        tier = "slow" if round_ % 2 == 0 else "fast"
        run_pafkafs("migrate", "--to", tier, *map(str, contents))
        wait_until(lambda: mount.status()["migration"]["files"] >= 1, "the first to arrive")
        mount.kill()
        mount.start()
        for path, content in contents.items():
            assert path.read_bytes() == content
    migrate("fast", *contents)
    mount.restart()
    for path, content in contents.items():
        assert path.read_bytes() == content
    wait_until(lambda: not os.listdir(mount.fast / "tmp"), "tmp/ to be empty")


def test_file_with_two_names_is_not_moved(mount: Mount) -> None:
    path = segment(mount, content=b"content")
    os.link(path, path.with_name("other"))
    result = run_pafkafs("migrate", "--wait", "--to", "slow", str(path))
    assert result.returncode == 1
    assert "several names" in result.stderr


def test_active_segment_and_what_is_no_segment_are_not_moved(mount: Mount) -> None:
    segment(mount)
    active = mount.mountpoint / "topic-0" / f"{10**12:020}.log"
    index = active.with_suffix(".index")
    index.write_bytes(b"index")
    metadata = mount.mountpoint / "__cluster_metadata-0"
    metadata.mkdir()
    log = metadata / f"{0:020}.log"
    log.write_bytes(b"metadata")
    for path, reason in ((active, "active"), (index, "only segments"), (log, "only segments")):
        result = run_pafkafs("migrate", "--wait", "--to", "slow", str(path))
        assert result.returncode == 1
        assert reason in result.stderr


def test_full_slow_tier_leaves_the_file_where_it_was(make_mount: MakeMount) -> None:
    mount = make_mount(*STILL, "--slow-capacity", "4MiB")
    mount.start()
    path = segment(mount, content=os.urandom(8 * MIB))
    result = run_pafkafs("migrate", "--wait", "--to", "slow", str(path))
    assert result.returncode == 1
    assert "no room" in result.stderr
    assert not is_spilled(mount, path)


def test_path_outside_a_mount_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run_pafkafs("migrate", "--to", "slow", str(file))
    assert result.returncode == 1
    assert "not in a pafkafs mount" in result.stderr


# -- by policy ----------------------------------------------------------------------------------


def fast_share(mount: Mount) -> float:
    device = mount.device("fast")
    share: float = device["used_bytes"] / device["capacity_bytes"]
    return share


def write_segments(mount: Mount, count: int) -> dict[Path, bytes]:
    contents = {}
    for number in range(count):
        content = os.urandom(4 * MIB)
        contents[segment(mount, number, content)] = content
        os.utime(segment_path(mount, number), ns=(10**18 + number, 10**18 + number))
    return contents


def segment_path(mount: Mount, number: int) -> Path:
    return mount.mountpoint / "topic-0" / f"{number:020}.log"


def test_oldest_sealed_segments_go_down_to_the_low_watermark(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "64MiB", "--interval", "100ms", "--threshold", "0.5",
                       "--low-watermark", "0.25")  # fmt: skip
    mount.start()
    run_pafkafs("pause", str(mount.mountpoint))
    contents = write_segments(mount, 12)
    assert not mount.objects
    run_pafkafs("resume", str(mount.mountpoint))
    wait_until(lambda: fast_share(mount) <= 0.25, "usage to fall")
    wait_until(lambda: not moving(mount), "the last move")
    down = [is_spilled(mount, path) for path in contents]
    assert down == sorted(down, reverse=True)  # the oldest, without a gap
    assert 7 <= sum(down) <= 9
    for path, content in contents.items():
        assert path.read_bytes() == content


def test_nearly_full_fast_tier_drains_to_a_slow_tier_that_is_half_full(
    make_mount: MakeMount,
) -> None:
    mount = make_mount(*STILL, "--fast-capacity", "64MiB", "--slow-capacity", "64MiB")
    mount.start()
    contents = write_segments(mount, 8)
    migrate("slow", *contents)
    run_pafkafs("pause", str(mount.mountpoint))
    run_pafkafs("set", str(mount.mountpoint), "threshold=0.9", "interval=100ms", "cool-down=1h")
    for number in range(8, 22):
        content = os.urandom(4 * MIB)
        contents[segment(mount, number, content)] = content
    (mount.mountpoint / "filler").write_bytes(bytes(6 * MIB))
    assert fast_share(mount) > 0.95
    run_pafkafs("resume", str(mount.mountpoint))
    wait_until(lambda: fast_share(mount) <= 0.9, "usage to fall")
    for path, content in contents.items():
        assert path.read_bytes() == content


def test_active_segments_go_down_before_their_writers_have_to_wait(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "64MiB", "--interval", "100ms")
    mount.start()
    run_pafkafs("pause", str(mount.mountpoint))
    contents = {}
    for number in range(4):  # of each partition the only one, and so the active one
        path = mount.mountpoint / f"topic-{number}" / f"{0:020}.log"
        path.parent.mkdir()
        contents[path] = os.urandom(15 * MIB)
        path.write_bytes(contents[path])
    (mount.mountpoint / "filler").write_bytes(bytes(2 * MIB))
    assert fast_share(mount) > 0.95
    assert not mount.objects
    run_pafkafs("resume", str(mount.mountpoint))
    wait_until(lambda: fast_share(mount) <= 0.95 and mount.objects, "one to go down")
    for path, content in contents.items():
        assert path.read_bytes() == content


def test_segments_come_up_again_when_there_is_room(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "64MiB", "--interval", "100ms", "--cool-down", "0s")
    mount.start()
    contents = write_segments(mount, 12)
    wait_until(lambda: fast_share(mount) <= 0.5, "usage to fall")
    for number in range(11, 5, -1):
        segment_path(mount, number).unlink()
        del contents[segment_path(mount, number)]
    wait_until(lambda: not any(is_spilled(mount, p) for p in list(contents)[-3:]), "them to rise")
    for path, content in contents.items():
        assert path.read_bytes() == content


def test_old_segments_go_down_though_there_is_room(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "100ms", "--max-age", "1h")
    mount.start()
    old, young = segment(mount, 1, b"old"), segment(mount, 2, b"young")
    os.utime(old, ns=(10**18, 10**18))
    wait_until(lambda: is_spilled(mount, old), "the old one to go down")
    assert not is_spilled(mount, young)


def test_segment_that_is_given_the_time_of_an_old_one_goes_down(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "10ms", "--max-age", "1h")
    mount.start()
    path = segment(mount, 1, b"cleaned")
    mount.status()  # takes longer than the first look
    os.utime(path, ns=(10**18, 10**18))
    wait_until(lambda: is_spilled(mount, path), "it to go down")


def test_pinned_paths_stay(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "100ms", "--max-age", "1h", "--pin", "topic-0/*1.log")
    mount.start()
    pinned, free = segment(mount, 1, b"pinned"), segment(mount, 2, b"free")
    for path in (pinned, free):
        os.utime(path, ns=(10**18, 10**18))
    wait_until(lambda: is_spilled(mount, free), "the other one to go down")
    assert not is_spilled(mount, pinned)


KEPT = """
[[topics]]
name = "topic"
keep = "fast"
"""


@pytest.mark.parametrize("by", ["pin", "topic"])
def test_status_says_that_what_stays_alone_is_more_than_the_threshold(
    make_mount: MakeMount, tmp_path: Path, by: str
) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text(KEPT if by == "topic" else 'pin = ["topic-0/*"]')
    lines = ("--fast-capacity", "64MiB", "--threshold", "0.2")
    mount = make_mount(*lines, "--config", str(config)).start()
    contents = write_segments(mount, 4)
    wait_until(
        lambda: any("alone take more" in note for note in mount.status()["migration"]["notes"]),
        "the note",
    )
    assert not any(is_spilled(mount, path) for path in contents)


def test_file_that_is_written_to_faster_than_it_is_copied_stays_and_says_so(
    make_mount: MakeMount,
) -> None:
    mount = make_mount(*STILL, "--migrate-rate", "32MiB").start()
    content = os.urandom(16 * MIB)
    path = segment(mount, content=content)
    ending = threading.Event()

    def rewrite() -> None:
        with opened(path, os.O_RDWR) as fd:
            while not ending.is_set():
                for at in range(0, len(content), MIB):
                    os.pwrite(fd, content[at : at + MIB], at)

    writer = Background(rewrite)
    try:
        result = run_pafkafs("migrate", "--wait", "--to", "slow", str(path))
    finally:
        ending.set()
        writer.join()
    assert result.returncode == 1
    assert "it changes faster than it can be copied" in result.stderr
    assert path.read_bytes() == content
    wait_until(lambda: leaves_nothing_behind(mount), "the copy to be removed")
    migrate("slow", path)
    assert path.read_bytes() == content


def test_failing_slow_device_is_left_alone_for_longer_each_time() -> None:
    rest = Rest()
    now_s, found = 1000.0, []
    for _ in range(9):
        rest.begin(now_s, "Input/output error")
        rest.begin(now_s + 0.1, "another file, which failed at the same time")
        found.append(rest.until_s - now_s)
        now_s = rest.until_s
    assert found == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert rest.why == "Input/output error"


def test_failing_slow_device_is_told_and_nothing_is_lost(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "100ms", "--max-age", "1h")
    mount.start()
    shutil.rmtree(mount.slow / "objects")
    path = segment(mount, 1, b"content")
    os.utime(path, ns=(10**18, 10**18))
    wait_until(lambda: mount.status()["migration"]["last_error"], "the error")
    (note,) = mount.status()["migration"]["notes"]
    assert re.fullmatch(rf"nothing moves to {mount.slow} for \d+ s: .*", note)
    assert path.read_bytes() == b"content"
    assert not is_spilled(mount, path)


def test_contradictory_lines_are_refused(make_mount: MakeMount) -> None:
    mount = make_mount("--threshold", "0.3", "--low-watermark", "0.6")
    result = mount.mount()
    assert result.returncode == 2
    assert "low-watermark" in result.stderr


def test_status_shows_what_moves(make_mount: MakeMount) -> None:
    mount = make_mount(*STILL, "--migrate-rate", "8MiB")
    mount.start()
    path = segment(mount, content=os.urandom(64 * MIB))
    run_pafkafs("migrate", "--to", "slow", str(path))
    found = wait_until(lambda: moving(mount), "the move")
    assert found[0]["path"] == str(path.relative_to(mount.mountpoint))
    assert found[0]["size_bytes"] == 64 * MIB
    assert "moving topic-0" in run_pafkafs("status", str(mount.mountpoint)).stdout
    path.unlink()


@pytest.mark.parametrize("tier", ["slow", "fast"])
def test_unmount_leaves_nothing_of_a_copy_that_was_under_way(
    make_mount: MakeMount, tier: str
) -> None:
    mount = make_mount(*STILL)
    mount.start()
    content = os.urandom(64 * MIB)
    path = segment(mount, content=content)
    if tier == "fast":
        migrate("slow", path)
    there = mount.objects
    run_pafkafs("set", str(mount.mountpoint), "migrate-rate=4MiB")
    run_pafkafs("migrate", "--to", tier, str(path))
    wait_until(lambda: moving(mount) and moving(mount)[0]["copied_bytes"], "the copy")
    mount.stop()
    assert mount.objects == there
    assert list((mount.fast / "tmp").iterdir()) == []
    mount.start()
    assert path.read_bytes() == content
