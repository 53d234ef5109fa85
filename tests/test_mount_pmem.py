"""Segments that grow through a mapping, in memory that keeps what a dead daemon wrote.

What survives a power cut is in test_dax_power.py and in tests/native/test_pmem.c.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from filetools import MIB, is_spilled, opened
from harness import DAX, Mount, fast_memory, run_pafkafs, wait_until

NONCE = "user.pafkafs.nonce"
SLOT_BYTES = 64
SIZES_MAGIC = 0x315A495346415031


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with fast_memory(tmp_path / "memory", "96m") as fast:
        slow, mountpoint = tmp_path / "slow", tmp_path / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        options = ("--fast-capacity", "96MiB") if DAX else ("--pmem", "on")
        mount = Mount(fast, slow, mountpoint, options, tmp_path / "pafkafs.log")
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


def test_segment_that_is_sealed_or_recovered_is_tied_to_no_slot(mount: Mount) -> None:
    sealed, recovered = segment(mount, 0), segment(mount, 100)
    create(mount, sealed)
    fd = create(mount, recovered)
    wait_until(lambda: NONCE not in os.listxattr(home(mount, sealed)), "the older one to be sealed")
    assert home(mount, sealed).stat().st_size == 5
    assert NONCE in os.listxattr(home(mount, recovered))
    kill_and_restart(mount)
    assert NONCE not in os.listxattr(home(mount, recovered))
    with suppress(OSError):  # its mount is gone
        os.close(fd)


def test_segment_that_cannot_be_recovered_fails_to_be_opened_until_it_can(mount: Mount) -> None:
    path, other = segment(mount), mount.mountpoint / "other"
    create(mount, path)
    other.write_bytes(b"other")
    mount.kill()
    in_tree = home(mount, path)
    subprocess.run(["chattr", "+i", str(in_tree)], check=True)
    try:
        mount.start()
        assert path.exists()
        for flags in (os.O_RDONLY, os.O_RDWR):
            with pytest.raises(OSError, match="Input/output error"):
                os.open(path, flags)
        with pytest.raises(OSError, match="Input/output error"):
            os.truncate(path, 100)
        assert other.read_bytes() == b"other"
        status = mount.status()
        assert status["state"] == "degraded"
        assert any(path.name in p["problem"] and "EIO" in p["problem"] for p in status["problems"])
    finally:
        subprocess.run(["chattr", "-i", str(in_tree)], check=True)
    mount.restart()
    assert path.read_bytes() == b"first"
    assert mount.status()["state"] == "healthy"


def test_without_free_slots_segments_are_plain_and_no_slot_is_lost(mount: Mount) -> None:
    mount.stop()
    slots = 8
    with (mount.fast / "sizes").open("r+b") as file:
        file.truncate(64 * (slots + 1))  # and the header
    mount.start()
    for round_ in range(3):
        wait_until(lambda: mount.status()["pool"]["files"] == slots, "the pool to take all slots")
        segments = {}
        for number in range(slots + 4):
            path = mount.mountpoint / f"topic-{round_}{number:02}" / f"{0:020}.log"
            path.parent.mkdir()
            segments[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.write(segments[path], b"first")
        grow = [home(mount, path).stat().st_size > 5 for path in segments]
        assert grow == [True] * slots + [False] * 4
        for number, (path, fd) in enumerate(segments.items()):
            assert path.read_bytes() == b"first"
            if number % 2:
                path.unlink()
            os.close(fd)
    assert mount.status()["state"] == "healthy"


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


def test_status_tells_what_grows_what_it_holds_ahead_and_its_slots(mount: Mount) -> None:
    mount.stop()
    mount.start("--fast-capacity", "64MiB", "--pool-ratio", "0.1")
    fds = [create(mount, segment(mount))]
    other = mount.mountpoint / "topic-1"
    other.mkdir()
    fds.append(create(mount, other / f"{0:020}.log"))
    os.write(fds[0], bytes(MIB))

    def is_all_ahead() -> bool:
        on_device = sum(p.stat().st_blocks * 512 for p in mount.tree.rglob("*.log"))
        return bool(mount.status()["pool"]["ahead_bytes"] == on_device - (MIB + 5) - 5)

    wait_until(is_all_ahead, "the growth to end")
    pool = mount.status()["pool"]
    assert pool["growing"] == 2
    # And one that is being made, perhaps.
    assert pool["slots_used"] - pool["growing"] - pool["files"] in (0, 1)
    assert pool["slots"] == (mount.fast / "sizes").stat().st_size // SLOT_BYTES - 1
    for fd in fds:
        os.close(fd)
    wait_until(lambda: mount.status()["pool"]["growing"] == 0, "the seals")
    pool = mount.status()["pool"]
    assert pool["ahead_bytes"] == 0
    assert pool["slots_used"] - pool["files"] in (0, 1)


def test_what_segments_hold_ahead_counts_for_no_line_of_migration(mount: Mount) -> None:
    mount.stop()
    mount.options = ("--pmem", "on", "--fast-capacity", "64MiB", "--pool-ratio", "0.1")
    mount.start("--threshold", "0.25", "--cool-down", "0s", "--interval", "0.1s")
    fds = []
    for number in range(10):
        directory = mount.mountpoint / f"growing-{number}"
        directory.mkdir()
        fds.append(create(mount, directory / f"{0:020}.log"))
    assert mount.status()["pool"]["ahead_bytes"] > 64 * MIB // 4
    sealed = segment(mount, 1)
    sealed.write_bytes(b"sealed")
    segment(mount, 2).touch()
    result = run_pafkafs("migrate", "--wait", "--to", "slow", str(sealed))
    assert result.returncode == 0, result.stderr
    # Over the threshold it would stay there, and its like would follow it.
    wait_until(lambda: not is_spilled(mount, sealed), "the segment to come up again")
    assert mount.status()["migration"]["files"] == 2
    for fd in fds:
        os.close(fd)


def test_segment_grows_no_further_than_where_kafka_rolls_and_on_when_it_does_not(
    mount: Mount,
) -> None:
    mount.restart("--segment-size", "4MiB")
    path = segment(mount)
    fd = create(mount, path)
    os.write(fd, bytes(3 * MIB))
    wait_until(lambda: home(mount, path).stat().st_size == 4 * MIB, "it to grow")
    os.write(fd, bytes(MIB - 4096))
    mount.status()  # answered behind what the write has begun
    assert home(mount, path).stat().st_size == 4 * MIB
    os.write(fd, b"on" * 100_000)
    wait_until(lambda: home(mount, path).stat().st_size > 5 * MIB, "it to grow on")
    assert path.read_bytes() == b"first" + bytes(4 * MIB - 4096) + b"on" * 100_000
    os.close(fd)


def test_slots_that_were_in_use_when_the_daemon_died_are_counted_once(mount: Mount) -> None:
    create(mount, segment(mount))
    mount.kill()
    mount.options = ("--pmem", "on", "--pool-ratio", "0")
    mount.start()
    wait_until(lambda: mount.status()["pool"]["slots_used"] == 0, "slots to be free again")


def test_lack_of_slots_is_noted_and_segments_are_written_all_the_same(mount: Mount) -> None:
    assert not any("slots" in note for note in mount.status()["notes"])
    mount.stop()
    slots = SIZES_MAGIC.to_bytes(8, "little") + bytes(5 * SLOT_BYTES - 8)
    (mount.fast / "sizes").write_bytes(slots)
    mount.start()
    wait_until(lambda: mount.status()["pool"]["slots_used"] == 4, "the pool to take all slots")
    assert any("4 of 4 slots" in note for note in mount.status()["notes"])
    assert mount.status()["state"] == "healthy"
    for partition in range(6):
        directory = mount.mountpoint / f"topic-{partition}"
        directory.mkdir()
        (directory / f"{0:020}.log").write_bytes(b"x" * 5000)
        assert (directory / f"{0:020}.log").read_bytes() == b"x" * 5000


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


@pytest.mark.skipif(DAX is not None, reason="there they are")
def test_power_durability_is_refused_where_stores_are_not_durable(mount: Mount) -> None:
    mount.stop()
    result = mount.mount("--durability", "power")
    assert result.returncode == 1
    assert "not on DAX" in result.stderr
