"""Segments that grow through a mapping: here on a tmpfs, which keeps what a dead daemon wrote.

What survives a power cut is in test_dax_power.py and in tests/native/test_pmem.c.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filetools import MIB, is_spilled, opened
from harness import Mount, tmpfs, wait_until

NONCE = "user.pafkafs.nonce"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with tmpfs(tmp_path / "memory", "96m") as fast:
        slow, mountpoint = tmp_path / "slow", tmp_path / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        mount = Mount(fast, slow, mountpoint, ("--pmem", "on"), tmp_path / "pafkafs.log")
        try:
            yield mount.start()
        finally:
            mount.clean_up()
        assert "Traceback" not in mount.log_text(), mount.log_text()


def segment(mount: Mount, offset: int = 0) -> Path:
    directory = mount.mountpoint / "topic-0"
    directory.mkdir(exist_ok=True)
    return directory / f"{offset:020}.log"


def home(mount: Mount, path: Path) -> Path:
    return mount.tree / path.relative_to(mount.mountpoint)


def create(mount: Mount, path: Path) -> int:
    """A descriptor of a new segment that grows: it is one of the pool's."""
    wait_until(lambda: mount.status()["pool"]["files"] > 0, "the pool")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(fd, b"first")
    wait_until(lambda: home(mount, path).stat().st_size > 5, f"{path.name} to grow")
    return fd


def test_growing_file_is_longer_in_the_tree_and_as_long_as_written_in_the_mount(
    mount: Mount,
) -> None:
    path = segment(mount)
    fd = create(mount, path)
    assert path.stat().st_size == os.fstat(fd).st_size == 5
    assert path.read_bytes() == b"first"
    os.close(fd)
    wait_until(lambda: home(mount, path).stat().st_size == 5, "the seal at the last close")


def test_older_segment_is_sealed_when_a_newer_one_appears(mount: Mount) -> None:
    older, newer = segment(mount, 0), segment(mount, 100)
    older_fd = create(mount, older)
    newer_fd = create(mount, newer)
    wait_until(lambda: home(mount, older).stat().st_size == 5, "the older one to be sealed")
    os.write(older_fd, b"late")
    assert older.read_bytes() == b"firstlate"
    os.close(older_fd)
    os.close(newer_fd)


def kill_and_restart(mount: Mount) -> None:
    mount.kill()
    mount.start()


def test_sizes_and_times_are_those_of_the_last_write_after_the_daemon_died(mount: Mount) -> None:
    contents = {}
    for number in range(5):
        path = segment(mount, number)
        fd = create(mount, path)
        os.write(fd, os.urandom(100_000 * number + 1))
        contents[path] = (path.read_bytes(), path.stat().st_mtime_ns)
    empty = mount.mountpoint / "other-0"
    empty.mkdir()
    (empty / f"{0:020}.log").touch()
    kill_and_restart(mount)
    for path, (content, mtime_ns) in contents.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == mtime_ns
        assert home(mount, path).stat().st_size == len(content)
    assert (empty / f"{0:020}.log").stat().st_size == 0


def test_time_that_was_set_survives_the_daemon(mount: Mount) -> None:
    path = segment(mount)
    create(mount, path)
    os.utime(path, ns=(10**18, 10**18 + 1))
    kill_and_restart(mount)
    assert path.stat().st_mtime_ns == 10**18 + 1


def test_segment_that_is_reopened_grows_on(mount: Mount) -> None:
    path = segment(mount)
    os.close(create(mount, path))
    kill_and_restart(mount)
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, b"second")
        wait_until(
            lambda: os.write(fd, b".") and home(mount, path).stat().st_size > MIB, "it to grow"
        )
        size = os.fstat(fd).st_size
        assert os.pread(fd, 20, 0).startswith(b"firstsecond.")
    kill_and_restart(mount)
    assert path.stat().st_size == size


def test_slot_is_not_applied_to_another_file(mount: Mount) -> None:
    path = segment(mount)
    create(mount, path)
    mount.kill()
    in_tree = home(mount, path)
    os.setxattr(in_tree, NONCE, bytes(8))
    length = in_tree.stat().st_size
    mount.start()
    assert path.stat().st_size == length  # nothing is cut by the slot of another file
    mount.restart()
    assert path.stat().st_size == length


def test_slot_with_more_bytes_than_its_file_is_refused_and_reported(mount: Mount) -> None:
    path = segment(mount)
    create(mount, path)
    mount.kill()
    os.truncate(home(mount, path), 3)
    mount.start()
    assert path.read_bytes() == b"fir"
    status = mount.status()
    assert status["state"] == "degraded"
    assert any(path.name in problem["problem"] for problem in status["problems"])


def test_removed_segment_leaves_its_slot_and_its_room(mount: Mount) -> None:
    path = segment(mount)
    fd = create(mount, path)
    path.unlink()
    os.write(fd, b"goes on")
    assert os.pread(fd, 100, 0) == b"firstgoes on"
    os.close(fd)
    kill_and_restart(mount)
    assert mount.status()["state"] == "healthy"


def test_room_of_the_pool_is_used_before_anything_spills(mount: Mount) -> None:
    path = segment(mount)
    fd = create(mount, path)
    pooled = mount.status()["pool"]
    assert pooled["files"] > 0
    # More than is free beside the pool, less than with it: 2 % of 96 MiB are kept.
    wanted = 96 * MIB - 6 * MIB
    while os.fstat(fd).st_size < wanted:
        os.write(fd, bytes(MIB))
    assert not is_spilled(mount, path)
    os.close(fd)


def test_growing_file_spills_when_nothing_is_left(mount: Mount) -> None:
    path = segment(mount)
    fd = create(mount, path)
    block = os.urandom(MIB)
    for _ in range(120):
        os.write(fd, block)
    assert is_spilled(mount, path)
    os.close(fd)
    assert path.read_bytes() == b"first" + block * 120


@pytest.mark.parametrize(
    "step",
    [
        lambda fd: os.ftruncate(fd, 2),
        lambda fd: os.ftruncate(fd, 100_000),
        lambda fd: os.posix_fallocate(fd, 0, 50_000),
    ],
    ids=["down", "up", "fallocate"],
)
def test_size_that_was_set_survives_the_daemon(mount: Mount, step: Callable[[int], None]) -> None:
    path = segment(mount)
    fd = create(mount, path)
    step(fd)
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, b"behind")
    content = path.read_bytes()
    kill_and_restart(mount)
    assert path.read_bytes() == content


def test_without_pmem_what_grew_before_is_recovered_and_nothing_grows(mount: Mount) -> None:
    path = segment(mount)
    create(mount, path)
    mount.kill()
    mount.options = ("--pmem", "off")
    mount.start()
    assert path.read_bytes() == b"first"
    with opened(segment(mount, 1), os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"plain")
        assert home(mount, segment(mount, 1)).stat().st_size == 5
    assert mount.status()["pool"] is None


def test_what_kafka_appended_in_the_tree_after_a_crash_is_kept(mount: Mount) -> None:
    path = segment(mount)
    create(mount, path)
    mount.kill()
    in_tree = home(mount, path)
    os.truncate(in_tree, 5)  # Kafka's recovery cuts the zeros
    with in_tree.open("ab") as file:
        file.write(b"appended by a broker on the tree")
    mount.start()
    assert path.read_bytes() == b"firstappended by a broker on the tree"
    assert any(path.name in problem["problem"] for problem in mount.status()["problems"])
    mount.restart()
    assert mount.status()["state"] == "healthy"
    assert path.read_bytes() == b"firstappended by a broker on the tree"


def used_bytes(mount: Mount) -> int:
    used: int = mount.device("fast")["used_bytes"] - mount.status()["pool"]["bytes"]
    return used


def test_seal_gives_back_what_was_allocated_ahead(mount: Mount) -> None:
    mount.stop()
    mount.start("--fast-capacity", "64MiB", "--pool-ratio", "0.1")
    before = used_bytes(mount)
    for number in range(5):
        os.close(create(mount, segment(mount, number)))
    wait_until(lambda: used_bytes(mount) <= before + 5 * 4096, "the tails to be given back")
    for path in segment(mount).parent.iterdir():
        path.unlink()
    wait_until(lambda: used_bytes(mount) == before, "the rest to be given back")


def test_reopened_segment_is_sealed_when_a_newer_one_appears(mount: Mount) -> None:
    path = segment(mount)
    os.close(create(mount, path))
    mount.restart()
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        wait_until(
            lambda: os.write(fd, b".") and home(mount, path).stat().st_size > MIB, "it to grow"
        )
        newer_fd = create(mount, segment(mount, 100))
        size = path.stat().st_size
        wait_until(lambda: home(mount, path).stat().st_size == size, "it to be sealed")
        os.close(newer_fd)


def test_cleaned_segment_does_not_seal_the_active_one(mount: Mount) -> None:
    active = segment(mount, 100)
    fd = create(mount, active)
    cleaned = active.with_name(f"{0:020}.log.cleaned")
    with opened(cleaned, os.O_RDWR | os.O_CREAT) as cleaned_fd:
        os.write(cleaned_fd, b"cleaned")
        os.fsync(cleaned_fd)
        assert home(mount, active).stat().st_size > active.stat().st_size
    os.close(fd)


def test_preallocated_segment_does_not_take_its_room(mount: Mount) -> None:
    path = segment(mount)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.ftruncate(fd, 64 * MIB)
    os.write(fd, b"first")
    os.fsync(fd)
    os.write(fd, b"second")
    mount.status()  # answered behind what the write has begun
    assert home(mount, path).stat().st_blocks * 512 < MIB
    os.close(fd)


def test_power_durability_is_refused_where_stores_are_not_durable(mount: Mount) -> None:
    mount.stop()
    result = mount.mount("--durability", "power")
    assert result.returncode == 1
    assert "not on DAX" in result.stderr
