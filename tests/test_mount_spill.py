"""Placement and spilling: files without room on the fast tier go on on the slow one."""

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import (
    FALLOC_KEEP_SIZE,
    MIB,
    Background,
    fallocate,
    frozen,
    in_children,
    is_spilled,
    is_stopped_by_a_freeze,
    shared_mount,
    start_writeback,
    write_all,
)
from harness import Mount, loop_filesystem, tmpfs, wait_until

FAST_MIB = 16  # of which 1 MiB is kept for metadata
SLOW_MIB = 64
ROOMY = ("--fast-capacity", f"{FAST_MIB}MiB")
SMALL = (*ROOMY, "--slow-capacity", f"{SLOW_MIB}MiB")


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that differ from page to page, so that a page in the wrong place is seen."""
    unit = b"".join((seed * 1_000_003 + i).to_bytes(8, "big") for i in range(8192))
    return (unit * (length // len(unit) + 1))[:length]


def write_in_pieces(path: Path, data: bytes, piece: int = MIB) -> None:
    with open(path, "ab", buffering=0) as file:
        for start in range(0, len(data), piece):
            write_all(file.fileno(), data[start : start + piece])


def fill(path: Path) -> int:
    """Writes until ENOSPC; the bytes that were written."""
    written = 0
    with open(path, "ab", buffering=0) as file:
        while True:
            try:
                written += file.write(pattern(MIB))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return written


def fill_fast_tier(mount: Mount, name: str = "filler") -> Path:
    """Leaves less than 1 MiB on the fast tier."""
    path = mount.mountpoint / name
    write_in_pieces(path, pattern((FAST_MIB - 1) * MIB, seed=99))
    assert not is_spilled(mount, path)
    return path


def used_bytes(mount: Mount, tier: str) -> int:
    used: int = mount.device(tier)["used_bytes"]
    return used


def assert_consistent(mount: Mount) -> None:
    """Each stub has its object and shadow, with the same size, mode and owner, and each object
    and shadow a stub."""
    stubs = [path.readlink() for path in mount.tree.rglob("*") if path.is_symlink()]
    wait_until(lambda: sorted(mount.objects) == sorted(stubs), "objects to be those of the stubs")
    ids = {stub.name.rpartition(".")[2] for stub in stubs}
    wait_until(lambda: set(os.listdir(mount.fast / "shadows")) == ids, "shadows to be those, too")
    shadows = {path.name: path for path in (mount.fast / "shadows").iterdir()}
    for stub in stubs:
        shadow = shadows[stub.name.rpartition(".")[2]]
        # The object gets its attributes in the background.
        wait_until(lambda s=stub, d=shadow: alike(s, d), f"{stub} to follow its shadow", 5)


def alike(object_: Path, shadow: Path) -> bool:
    keys = ("st_size", "st_mode", "st_uid", "st_gid")
    return all(getattr(object_.stat(), key) == getattr(shadow.stat(), key) for key in keys)


def free_bytes(mount: Mount) -> int:
    shown = os.statvfs(mount.mountpoint)
    return shown.f_bavail * shown.f_frsize


@contextmanager
def emptied_afterwards(mount: Mount) -> Iterator[Mount]:
    """An empty mount that is empty again for the next test, with all its room back."""
    room = free_bytes(mount)
    try:
        yield mount
        for path in mount.mountpoint.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        assert_consistent(mount)
        wait_until(lambda: free_bytes(mount) == room, "the room to come back")
    except BaseException:
        start_anew(mount)
        raise


def start_anew(mount: Mount) -> None:
    """One test that failed does not make all the others fail."""
    mount.clean_up()
    for directory in (mount.fast, mount.slow):
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    mount.start()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with shared_mount(tmp_path_factory.mktemp("spill"), *SMALL) as mount:
        yield mount


@pytest.fixture
def mount(shared: Mount) -> Iterator[Mount]:
    """A mount with 16 MiB of fast and 64 MiB of slow tier."""
    with emptied_afterwards(shared) as mount:
        yield mount


# -- where files start --------------------------------------------------------------------------


def test_new_files_start_fast_until_it_is_full_and_then_slow(mount: Mount) -> None:
    first, second = mount.mountpoint / "first", mount.mountpoint / "second"
    write_in_pieces(first, pattern((FAST_MIB - 1) * MIB))
    write_in_pieces(second, pattern(4 * MIB, seed=1))
    assert [is_spilled(mount, path) for path in (first, second)] == [False, True]
    assert first.read_bytes() == pattern((FAST_MIB - 1) * MIB)
    assert second.read_bytes() == pattern(4 * MIB, seed=1)
    assert_consistent(mount)


def test_new_segments_but_no_indexes_start_slow_when_the_fast_tier_is_nearly_full(
    mount: Mount,
) -> None:
    (mount.mountpoint / "filler").write_bytes(bytes((FAST_MIB - 1) * MIB - MIB // 2))
    partition = mount.mountpoint / "orders-0"
    partition.mkdir()
    segment = partition / "00000000000000000000.log"
    index = partition / "00000000000000000000.index"
    segment.touch()
    index.touch()
    assert [is_spilled(mount, path) for path in (segment, index)] == [True, False]


def test_mode_slow_starts_files_on_the_slow_tier(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    path = mount.mountpoint / "file"
    path.write_bytes(pattern(MIB))
    assert is_spilled(mount, path)
    assert path.read_bytes() == pattern(MIB)
    assert_consistent(mount)


def test_mode_slow_goes_on_on_the_fast_tier_when_the_slow_one_is_full(
    make_mount: MakeMount,
) -> None:
    mount = make_mount("--mode", "slow", "--slow-capacity", "8MiB").start()
    small, large = mount.mountpoint / "small", mount.mountpoint / "large"
    small.write_bytes(pattern(MIB))
    large.write_bytes(pattern(12 * MIB))
    assert [is_spilled(mount, path) for path in (small, large)] == [True, False]
    assert large.read_bytes() == pattern(12 * MIB)
    assert_consistent(mount)


def test_mode_fast_is_enospc_when_the_fast_tier_is_full(make_mount: MakeMount) -> None:
    mount = make_mount(*ROOMY, "--mode", "fast").start()
    path = mount.mountpoint / "file"
    written = fill(path)
    assert written == (FAST_MIB - 1) * MIB
    assert path.stat().st_size == written
    assert mount.objects == []
    path.unlink()
    path.write_bytes(pattern(MIB))
    assert path.read_bytes() == pattern(MIB)


def test_full_fast_filesystem_spills_though_the_capacity_says_more(tmp_path: Path) -> None:
    """Somebody else may have filled it, or the option promised too much."""
    with tmpfs(tmp_path / "fast", "8m") as fast, ExitStack() as stack:
        slow, mountpoint = tmp_path / "slow", tmp_path / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        mount = Mount(
            fast, slow, mountpoint, ("--fast-capacity", "64MiB"), tmp_path / "pafkafs.log"
        )
        stack.callback(mount.clean_up)
        mount.start()
        path = mountpoint / "file"
        writing = Background(lambda: write_in_pieces(path, pattern(12 * MIB)))
        stack.callback(lambda: writing.running and mount.kill())
        writing.join(10)
        assert path.read_bytes() == pattern(12 * MIB)
        assert is_spilled(mount, path)


# -- spilling under open handles ----------------------------------------------------------------


def test_growing_file_spills_without_an_error_and_keeps_its_content(mount: Mount) -> None:
    path, data = mount.mountpoint / "file", pattern(40 * MIB)
    path.touch()
    inode = path.stat().st_ino
    write_in_pieces(path, data)
    assert is_spilled(mount, path)
    assert path.stat().st_ino == inode
    assert path.read_bytes() == data
    mount.restart()
    assert path.read_bytes() == data


def test_open_mapped_and_locked_file_spills_unnoticed(mount: Mount) -> None:
    path, data = mount.mountpoint / "file", pattern(24 * MIB)
    with open(path, "w+b", buffering=0) as file, open(path, "rb", buffering=0) as reader:
        write_all(file.fileno(), data[:MIB])
        mapping = mmap.mmap(file.fileno(), MIB)
        assert reader.read(100) == data[:100]
        mapping[:6] = b"before"
        write_all(file.fileno(), data[MIB:])
        assert is_spilled(mount, path)
        assert mapping[:6] == b"before"
        mapping[6:11] = b"after"
        assert reader.read(100) == data[100:200]
        assert os.fstat(reader.fileno()).st_size == len(data)
        mapping.close()
    assert path.read_bytes() == b"beforeafter" + data[11:]
    mount.restart()
    assert path.read_bytes() == b"beforeafter" + data[11:]


def test_stores_into_a_mapping_spill_the_file(mount: Mount) -> None:
    path, data = mount.mountpoint / "file", pattern(24 * MIB)
    with open(path, "w+b") as file:
        os.ftruncate(file.fileno(), len(data))
        with mmap.mmap(file.fileno(), len(data)) as mapping:
            mapping[:] = data
            mapping.flush()
    assert is_spilled(mount, path)
    assert path.read_bytes() == data
    mount.restart()
    assert path.read_bytes() == data


def test_readers_see_every_byte_while_the_file_spills(mount: Mount) -> None:
    path, data = mount.mountpoint / "file", pattern(40 * MIB)
    path.touch()
    writing = Background(lambda: write_in_pieces(path, data, 256 * 1024))

    def read_to_the_end() -> None:
        """A consumer at the tail."""
        with open(path, "rb", buffering=0) as file:
            position = 0
            while position < len(data):
                # Not bounded by fstat: the kernel may show a size before it lets it be read.
                complete = not writing.running
                got = os.pread(file.fileno(), 4 * MIB, position)
                assert got or not complete
                assert got == data[position : position + len(got)]
                position += len(got)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_to_the_end) for _ in range(2)]
        for reader in readers:
            reader.result()
    writing.join()
    assert is_spilled(mount, path)


def test_holes_stay_holes_when_the_file_spills(mount: Mount) -> None:
    fill_fast_tier(mount)
    path = mount.mountpoint / "file"
    with open(path, "w+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 256 * MIB)
        os.pwrite(file.fileno(), pattern(2 * MIB), 100 * MIB)
        assert os.pread(file.fileno(), 2 * MIB, 100 * MIB) == pattern(2 * MIB)
    assert is_spilled(mount, path)
    assert path.stat().st_size == 256 * MIB
    assert sum(p.stat().st_blocks for p in mount.objects) * 512 <= 4 * MIB


def test_appends_of_several_processes_stay_whole_while_the_file_spills(mount: Mount) -> None:
    path = mount.mountpoint / "file"
    path.touch()
    records, length = 100, 64 * 1024

    def append(writer: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for number in range(records):
            record = f"{writer}:{number}:".encode().ljust(length - 1, b"x") + b"\n"
            assert os.write(fd, record) == length
        os.close(fd)

    in_children([lambda w=w: append(w) for w in range(4)])
    assert is_spilled(mount, path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert {len(line) for line in lines} == {length}
    for writer in range(4):
        mine = [line for line in lines if line.startswith(b"%d:" % writer)]
        assert [int(line.split(b":")[1]) for line in mine] == list(range(records))


def test_many_files_spill_at_once(mount: Mount) -> None:

    def write(number: int) -> None:
        write_in_pieces(mount.mountpoint / str(number), pattern(4 * MIB, number), 128 * 1024)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(12)))
    for number in range(12):
        assert (mount.mountpoint / str(number)).read_bytes() == pattern(4 * MIB, number)
    assert_consistent(mount)


def test_unlinked_open_file_spills_and_leaves_nothing_when_closed(mount: Mount) -> None:
    path, data = mount.mountpoint / "file", pattern(24 * MIB)
    with open(path, "w+b", buffering=0) as file:
        path.unlink()
        write_all(file.fileno(), data)
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), len(data), 0) == data
        assert len(mount.objects) == 1
    assert_consistent(mount)
    wait_until(lambda: used_bytes(mount, "slow") == 0, "the room on the slow tier")
    assert used_bytes(mount, "fast") == 0


# -- room: where there is none, and where it comes back -----------------------------------------


def test_room_comes_back_when_files_are_deleted(mount: Mount) -> None:
    for number in range(8):
        write_in_pieces(mount.mountpoint / str(number), pattern(4 * MIB, number))
    taken = used_bytes(mount, "fast") + used_bytes(mount, "slow")
    assert taken == pytest.approx(32 * MIB, abs=MIB)
    for number in range(8):
        (mount.mountpoint / str(number)).unlink()
    wait_until(lambda: used_bytes(mount, "slow") == 0, "the room on the slow tier")
    assert used_bytes(mount, "fast") == 0
    assert [mount.device(tier)["files"] for tier in ("fast", "slow")] == [0, 0]
    assert_consistent(mount)


def test_room_is_counted_once_however_often_a_file_is_opened(mount: Mount) -> None:
    path = mount.mountpoint / "file"
    write_in_pieces(path, pattern(24 * MIB))
    before = used_bytes(mount, "slow")
    for _ in range(5):
        with open(path, "r+b") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    assert used_bytes(mount, "slow") == before == pytest.approx(24 * MIB, abs=MIB)
    mount.restart()
    path.read_bytes()
    assert used_bytes(mount, "slow") == pytest.approx(24 * MIB, abs=MIB)


def test_room_of_a_sparse_spilled_file_is_what_it_has_allocated(mount: Mount) -> None:
    fill_fast_tier(mount)
    sparse, dense = mount.mountpoint / "sparse", mount.mountpoint / "dense"
    write_in_pieces(dense, pattern(8 * MIB))
    with open(sparse, "w+b", buffering=0) as file:
        file.write(pattern(2 * MIB))
        os.ftruncate(file.fileno(), 32 * MIB)
        os.fsync(file.fileno())
    assert is_spilled(mount, sparse)
    sparse.unlink()
    wait_until(lambda: len(mount.objects) == 1, "the removal of the object")
    assert used_bytes(mount, "slow") == pytest.approx(8 * MIB, abs=MIB)


def test_two_full_tiers_are_enospc_and_it_goes_on_after_a_removal(mount: Mount) -> None:
    kept, filler = mount.mountpoint / "kept", mount.mountpoint / "filler"
    write_in_pieces(kept, pattern(8 * MIB, seed=1))
    length = fill(filler)
    assert 40 * MIB < length < SLOW_MIB * MIB
    assert kept.read_bytes() == pattern(8 * MIB, seed=1)
    assert filler.stat().st_size == length
    assert filler.read_bytes() == pattern(MIB) * (length // MIB)
    filler.unlink()
    again = mount.mountpoint / "again"
    write_in_pieces(again, pattern(32 * MIB, seed=2))
    assert again.read_bytes() == pattern(32 * MIB, seed=2)
    assert kept.read_bytes() == pattern(8 * MIB, seed=1)
    assert_consistent(mount)


def test_overwriting_goes_on_when_both_tiers_are_full(mount: Mount) -> None:
    path = mount.mountpoint / "file"
    length = fill(path)
    fill(mount.mountpoint / "rest")
    with open(path, "r+b", buffering=0) as file:
        for start in range(0, length, MIB):
            assert os.pwrite(file.fileno(), pattern(MIB, seed=5), start) == MIB
    assert path.read_bytes() == pattern(MIB, seed=5) * (length // MIB)


def test_file_with_two_links_is_enospc_on_a_full_fast_tier(mount: Mount) -> None:
    path, other = mount.mountpoint / "file", mount.mountpoint / "other"
    path.touch()
    os.link(path, other)
    length = fill(path)
    assert length == (FAST_MIB - 1) * MIB
    assert not is_spilled(mount, path)
    assert other.read_bytes() == pattern(MIB) * (length // MIB)
    other.unlink()
    write_in_pieces(path, pattern(4 * MIB, seed=1))
    assert is_spilled(mount, path)
    assert path.read_bytes() == pattern(MIB) * (length // MIB) + pattern(4 * MIB, seed=1)


def test_file_whose_other_link_the_mount_has_not_seen_keeps_it_when_it_grows(mount: Mount) -> None:
    path, other = mount.mountpoint / "file", mount.mountpoint / "other"
    path.write_bytes(pattern(MIB))
    os.link(path, other)
    mount.restart()
    with open(path, "ab", buffering=0) as file:
        path.unlink()
        with suppress(OSError):  # that it cannot move is no defect
            write_all(file.fileno(), pattern(24 * MIB, seed=1))
        length = os.fstat(file.fileno()).st_size
    expected = (pattern(MIB) + pattern(24 * MIB, seed=1))[:length]
    assert other.read_bytes() == expected
    mount.restart()
    assert other.read_bytes() == expected


def test_fallocate_beyond_the_room_of_the_fast_tier_spills(make_mount: MakeMount) -> None:
    mount = make_mount(*SMALL).start()
    path = mount.mountpoint / "file"
    with open(path, "w+b", buffering=0) as file, ExitStack() as stack:
        allocating = Background(lambda: fallocate(file.fileno(), 0, 0, 32 * MIB))
        stack.callback(lambda: allocating.running and mount.kill())
        allocating.join(10)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 32 * MIB
    assert is_spilled(mount, path)


def test_fallocate_beyond_the_room_of_all_tiers_is_enospc(make_mount: MakeMount) -> None:
    mount = make_mount(*SMALL).start()
    with open(mount.mountpoint / "file", "w+b", buffering=0) as file, ExitStack() as stack:
        length = 4 * SLOW_MIB * MIB
        allocating = Background(lambda: fallocate(file.fileno(), FALLOC_KEEP_SIZE, 0, length))
        stack.callback(lambda: allocating.running and mount.kill())
        with pytest.raises(OSError, match="No space left"):
            allocating.join(10)


def test_file_spills_to_the_next_device_when_one_cannot_take_it(tmp_path: Path) -> None:
    """The roomier one has no inode left; the file is large enough that its copy takes a while."""
    with (
        tmpfs(tmp_path / "fast", "256m") as fast,
        tmpfs(tmp_path / "first", "1g", "nr_inodes=20") as first,
        ExitStack() as stack,
    ):
        second, mountpoint = tmp_path / "second", tmp_path / "mnt"
        second.mkdir()
        mountpoint.mkdir()
        options = ("--fast-capacity", "128MiB", "--slow-capacity", "900MiB,512MiB")
        mount = Mount(fast, second, mountpoint, options, tmp_path / "pafkafs.log")
        mount.slow_list = f"{first},{second}"
        mount.start()
        stack.callback(mount.clean_up)
        with suppress(OSError):
            for number in range(20):
                (first / f"lost/{number}").touch()
        path = mountpoint / "file"
        write_in_pieces(path, pattern(140 * MIB))
        assert path.read_bytes() == pattern(140 * MIB)
        assert len(mount.objects) == 1
        path.unlink()
        (mountpoint / "later").write_bytes(b"later")
        assert mount.status()["state"] in ("healthy", "degraded")
        assert "Traceback" not in mount.log_text()


# -- inodes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewInodes:
    """A mount whose fast tier has room for some hundred inodes."""

    mount: Mount

    def exhaust(self) -> list[Path]:
        """Creates files until there is no inode left; those files."""
        made: list[Path] = []
        while True:
            path = self.mount.mountpoint / f"small-{len(made)}"
            try:
                path.touch()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return made
            made.append(path)


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[FewInodes]:
    with tmpfs(tmp_path / "fast", "64m", "nr_inodes=200") as fast:
        slow, mountpoint = tmp_path / "slow", tmp_path / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        mount = Mount(fast, slow, mountpoint, ROOMY, tmp_path / "pafkafs.log")
        yield FewInodes(mount.start())
        mount.clean_up()
        assert "Traceback" not in mount.log_text()


def test_lack_of_inodes_is_enospc_until_some_are_given_back(few_inodes: FewInodes) -> None:
    directory = few_inodes.mount.mountpoint
    made = few_inodes.exhaust()
    for make in (lambda: (directory / "d").mkdir(), lambda: (directory / "s").symlink_to("x")):
        with pytest.raises(OSError, match="No space left"):
            make()
    assert sorted(os.listdir(directory)) == sorted(path.name for path in made)
    for path in made[:10]:
        path.unlink()
    (directory / "d").mkdir()
    (directory / "d/file").write_bytes(pattern(MIB))
    assert (directory / "d/file").read_bytes() == pattern(MIB)


def test_file_spills_when_others_have_used_up_the_inodes(few_inodes: FewInodes) -> None:
    path = few_inodes.mount.mountpoint / "file"
    path.touch()
    few_inodes.exhaust()
    write_in_pieces(path, pattern(24 * MIB))
    assert is_spilled(few_inodes.mount, path)
    assert path.read_bytes() == pattern(24 * MIB)


# -- what happens to a file while it is being moved ---------------------------------------------


class Spilling:
    """A file in the middle of its move: the slow device, of ext4, stands still.

    What has no room is a store into a mapping: a write(2) would hold the file's inode, and
    keep renames out until it is done.
    """

    def __init__(self, mount: Mount, thaw: Callable[[], None]) -> None:
        self.mount = mount
        self.directory = mount.mountpoint / "orders-0"
        self.path = self.directory / "file"
        before = self.path.stat().st_size
        self.data = pattern(before) + pattern(2 * MIB, seed=7)
        self._thaw = thaw
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        os.ftruncate(self.file.fileno(), len(self.data))
        self._mapping = mmap.mmap(self.file.fileno(), len(self.data))
        self._mapping[before:] = self.data[before:]
        start_writeback(self.file.fileno())

    def finish(self) -> None:
        """Lets the device go on, and the move end; raises what became of the store."""
        self._thaw()
        self._mapping.close()  # not before: each close waits for what is on its way
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._thaw()
        self._mapping.close()
        self.file.close()

    def expect_content(self, path: Path) -> None:
        """All that was written is there, now and after a remount."""
        assert os.pread(self.file.fileno(), 64 * MIB, 0) == self.data
        assert os.fstat(self.file.fileno()).st_ino == path.stat().st_ino
        self.file.close()
        assert path.read_bytes() == self.data
        self.mount.restart()
        assert path.read_bytes() == self.data
        assert_consistent(self.mount)


@pytest.fixture(scope="module")
def on_ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    directory = tmp_path_factory.mktemp("ext4")
    mkfs = ("mkfs.ext4", "-q")
    with loop_filesystem(directory / "image", directory / "slow", "128M", mkfs) as slow:
        (slow / "lost+found").rmdir()
        with shared_mount(directory, *SMALL) as mount:
            yield mount


@pytest.fixture
def spilling(on_ext4: Mount) -> Iterator[Spilling]:
    with emptied_afterwards(on_ext4) as mount, ExitStack() as stack:
        (mount.mountpoint / "orders-0").mkdir()
        (mount.mountpoint / "orders-0/small").write_bytes(b"small")
        (mount.mountpoint / "orders-0/file").write_bytes(pattern((FAST_MIB - 1) * MIB - 4096))
        pid = mount.pid
        thaw = stack.enter_context(frozen(mount.slow))
        spilling = Spilling(mount, thaw)
        stack.callback(spilling.close)
        wait_until(lambda: is_stopped_by_a_freeze(pid), "the copy to begin")
        yield spilling


def test_file_is_renamed_while_it_spills(spilling: Spilling) -> None:
    renamed = spilling.directory / "renamed"
    spilling.path.rename(renamed)
    spilling.finish()
    assert is_spilled(spilling.mount, renamed)
    assert not spilling.path.exists()
    spilling.expect_content(renamed)


def test_its_directory_is_renamed_while_a_file_spills(spilling: Spilling) -> None:
    renamed = spilling.mount.mountpoint / "orders-0.1234-delete"
    spilling.directory.rename(renamed)
    spilling.finish()
    assert is_spilled(spilling.mount, renamed / "file")
    spilling.expect_content(renamed / "file")


def test_file_is_unlinked_while_it_spills(spilling: Spilling) -> None:
    spilling.path.unlink()
    spilling.finish()
    assert os.pread(spilling.file.fileno(), 64 * MIB, 0) == spilling.data
    assert not spilling.path.exists()
    spilling.file.close()
    assert_consistent(spilling.mount)


def test_file_is_replaced_by_another_while_it_spills(spilling: Spilling) -> None:
    other = spilling.directory / "other"
    other.touch()
    inode = other.stat().st_ino
    other.rename(spilling.path)
    spilling.finish()
    assert os.pread(spilling.file.fileno(), 64 * MIB, 0) == spilling.data
    assert (spilling.path.stat().st_ino, spilling.path.read_bytes()) == (inode, b"")
    spilling.file.close()
    assert_consistent(spilling.mount)


def test_file_gets_a_second_link_while_it_spills(spilling: Spilling) -> None:
    """The move, and the store, may fail then; both names stay those of one file."""
    other = spilling.directory / "other"
    os.link(spilling.path, other)
    with suppress(OSError):
        spilling.finish()
    os.pwrite(spilling.file.fileno(), b"after", 0)
    spilling.file.close()
    acked = b"after" + spilling.data[5 : -2 * MIB]
    for path in (spilling.path, other):
        assert path.read_bytes().startswith(acked), path
    spilling.mount.restart()
    for path in (spilling.path, other):
        assert path.read_bytes().startswith(acked), path
    assert spilling.path.stat().st_nlink == 2


def test_second_link_during_a_spill_is_not_called_a_fault_of_the_device(
    spilling: Spilling,
) -> None:
    os.link(spilling.path, spilling.directory / "other")
    with suppress(OSError):
        spilling.finish()
    assert spilling.mount.status()["problems"] == []


def test_room_is_counted_right_after_a_move_that_failed(spilling: Spilling) -> None:
    os.link(spilling.path, spilling.directory / "other")
    with suppress(OSError):
        spilling.finish()
    wait_until(lambda: not spilling.mount.objects, "the removal of the copy")
    assert free_bytes(spilling.mount) <= SLOW_MIB * MIB  # the fast tier is full


def test_file_is_truncated_while_it_spills(spilling: Spilling) -> None:
    truncating = Background(lambda: os.truncate(spilling.path, 1000))
    spilling.finish()
    truncating.join()
    assert spilling.path.read_bytes() == spilling.data[:1000]
    spilling.file.close()
    assert_consistent(spilling.mount)


def test_mode_and_times_are_changed_while_it_spills(spilling: Spilling) -> None:
    spilling.path.chmod(0o604)
    os.chown(spilling.path, 12345, 12346)
    spilling.finish()
    status = spilling.path.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o604, 12345, 12346)
    spilling.file.close()
    assert_consistent(spilling.mount)


def test_file_is_read_and_others_are_written_while_it_spills(spilling: Spilling) -> None:
    other = spilling.directory / "small"

    def read_and_write() -> None:
        assert os.pread(spilling.file.fileno(), 64 * MIB, 0) == spilling.data
        assert os.fstat(spilling.file.fileno()).st_size == len(spilling.data)
        other.write_bytes(b"SMALL")
        assert other.read_bytes() == b"SMALL"
        other.rename(spilling.directory / "renamed")
        assert sorted(os.listdir(spilling.directory)) == ["file", "renamed"]

    Background(read_and_write).join(5)
    spilling.finish()
    spilling.expect_content(spilling.path)


def test_new_empty_file_on_a_slow_device_that_stands_still_keeps_the_time_that_is_set(
    spilling: Spilling,
) -> None:
    """Its object is made later, with a later time."""
    segment = spilling.directory / "00000000000000000000.log"
    segment.touch()
    assert is_spilled(spilling.mount, segment)
    os.utime(segment, ns=(1, 1_000_000_000))
    spilling.finish()
    wait_until(lambda: len(spilling.mount.objects) == 2, "the object")
    segment.chmod(0o600)
    assert segment.stat().st_mtime_ns == 1_000_000_000


def test_file_whose_object_cannot_be_made_is_not_synced_for_ever(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    shutil.rmtree(mount.slow / "objects")
    (mount.mountpoint / "file").touch()
    wait_until(lambda: "fsync of file: " in mount.log_text(), "the fsync at the last close")
    for _ in range(20):
        mount.status()
    assert mount.log_text().count("fsync of file: ") == 1
