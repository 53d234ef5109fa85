"""Contents and attributes of files through a mount, on the fast tier and spilled."""

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filetools import (
    FALLOC_COLLAPSE_RANGE,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    MIB,
    SMALL_FAST_BYTES,
    Child,
    Files,
    fallocate,
    in_children,
    is_spilled,
    opened,
    push_to_slow_tier,
    set_mtime_only,
    shared_mount,
)
from harness import GROWING, Mount, loop_filesystem, wait_until

PAGE = mmap.PAGESIZE
TEXT = bytes(range(256)) * 40  # 10,240 bytes: two pages and a half
PAST_NS = 1_234_567_890_123_456_789


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    capacity = f"{SMALL_FAST_BYTES // MIB}MiB"
    with shared_mount(tmp_path_factory.mktemp("files"), "--fast-capacity", capacity) as mount:
        yield mount


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with shared_mount(tmp_path_factory.mktemp("growing"), *GROWING) as mount:
        yield mount


@pytest.fixture(params=["fast", "spilled", "fast segment", "spilled segment", "growing segment"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    """Makes files on one tier, of a name that the page cache serves, of one whose writers bypass
    it, or that grow through a mapping; every test runs for all."""
    kind: str = request.param
    mount: Mount = request.getfixturevalue("growing" if "growing" in kind else "shared")
    directory = mount.mountpoint / tmp_path.name
    directory.mkdir()
    yield Files(mount, directory, spilled="spilled" in kind, segments="segment" in kind)
    for path in directory.iterdir():
        path.unlink()


def mapped(path: Path, length: int, **options: int) -> mmap.mmap:
    """A mapping whose descriptor is closed already, as Kafka's index mappings are."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), length, **options)


# -- creating and writing -----------------------------------------------------------------------


def test_new_file_is_empty_and_has_its_mode(files: Files) -> None:
    path = files.directory / "new"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o640))
    assert (path.stat().st_size, path.stat().st_mode & 0o7777) == (0, 0o640)


def test_exclusive_create_has_one_winner(files: Files) -> None:
    path = files.directory / "lock"

    def create() -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    assert sum(in_children([create] * 8)) == 1


def test_open_with_o_trunc_empties_the_file(files: Files) -> None:
    path = files.make(content=TEXT)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.read_bytes() == b""


def test_file_created_read_only_is_written_through_its_descriptor(files: Files) -> None:
    path = files.directory / "snapshot"
    with open(os.open(path, os.O_CREAT | os.O_RDWR, 0o400), "wb") as file:
        file.write(TEXT)
    assert path.read_bytes() == TEXT


def test_appends_of_several_processes_do_not_overlap(files: Files) -> None:
    path = files.make()
    writers, records, length = 4, 300, 1000

    def append(writer: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for number in range(records):
            record = f"{writer}:{number}:".encode().ljust(length - 1, b"x") + b"\n"
            assert os.write(fd, record) == length
        os.close(fd)

    in_children([lambda w=w: append(w) for w in range(writers)])
    lines = path.read_bytes().splitlines(keepends=True)
    assert {len(line) for line in lines} == {length}
    for writer in range(writers):
        mine = [line for line in lines if line.startswith(b"%d:" % writer)]
        assert [int(line.split(b":")[1]) for line in mine] == list(range(records))


def test_write_only_descriptor_changes_part_of_a_page(files: Files) -> None:
    path = files.make(content=TEXT)
    with opened(path, os.O_WRONLY) as fd:
        os.pwrite(fd, b"changed", 100)
    assert path.read_bytes() == TEXT[:100] + b"changed" + TEXT[107:]


def test_write_far_behind_the_end_leaves_a_hole(files: Files) -> None:
    path, far = files.make(content=b"begin"), 5 << 30
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"end", far)
        assert os.pread(file.fileno(), 8, far - 5) == bytes(5) + b"end"
        status = os.fstat(file.fileno())
    assert status.st_size == far + 3
    assert status.st_blocks * 512 < MIB


def test_write_of_a_user_clears_setuid_and_setgid(files: Files) -> None:
    def write_as_user(fd: int) -> None:
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        os.pwrite(fd, b"x", 0)

    def write_as_user_twice(fd: int) -> None:
        write_as_user(fd)
        os.pwrite(fd, b"x", 0)

    path = files.make(content=TEXT)
    new = path.with_name(f"{10**12:020}.log")  # which grows from the first, where files do
    for name, flags in ((path, os.O_RDWR), (new, os.O_RDWR | os.O_CREAT)):
        with opened(name, flags) as fd:
            os.fchmod(fd, 0o6777)
            in_children([lambda fd=fd: write_as_user(fd)])
            assert os.fstat(fd).st_mode & 0o7777 == 0o777
            in_children([lambda fd=fd: write_as_user_twice(fd)])
            os.fchmod(fd, 0o6777)  # after it was found to have neither
            in_children([lambda fd=fd: write_as_user(fd)])
            assert os.fstat(fd).st_mode & 0o7777 == 0o777


# -- sizes --------------------------------------------------------------------------------------


def test_truncated_bytes_are_zero_when_the_file_grows_again(files: Files) -> None:
    path = files.make(content=TEXT)
    os.truncate(path, 5000)
    assert path.read_bytes() == TEXT[:5000]
    os.truncate(path, len(TEXT))
    assert path.read_bytes() == TEXT[:5000] + bytes(len(TEXT) - 5000)


def test_truncated_bytes_are_zero_in_a_mapping_when_the_file_grows_again(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT)) as mapping:
        os.truncate(path, 5000)
        os.truncate(path, len(TEXT))
        assert mapping[:] == TEXT[:5000] + bytes(len(TEXT) - 5000)


def test_truncate_up_takes_no_room(files: Files) -> None:
    path = files.make()
    os.truncate(path, 10 * MIB)
    assert (path.stat().st_size, path.stat().st_blocks) == (10 * MIB, 0)


def test_truncate_is_seen_by_open_descriptors(files: Files) -> None:
    path = files.make(content=TEXT)
    with open(path, "rb", buffering=0) as reader:
        in_children([lambda: os.truncate(path, 10)])
        assert os.fstat(reader.fileno()).st_size == 10
        assert reader.read() == TEXT[:10]


def test_reads_at_the_end_are_short(files: Files) -> None:
    path = files.make(content=TEXT)
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 4096, len(TEXT) - 10) == TEXT[-10:]
        assert os.pread(fd, 4096, len(TEXT)) == b""
        assert os.pread(fd, 4096, len(TEXT) + MIB) == b""


# -- mappings -----------------------------------------------------------------------------------


def test_stores_into_a_shared_mapping_are_read(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT)) as mapping:
        mapping[4090:4100] = b"0123456789"
        assert path.read_bytes()[4090:4100] == b"0123456789"


def test_writes_are_seen_in_a_shared_mapping(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT)) as mapping, open(path, "r+b", buffering=0) as file:
        assert mapping[:4] == TEXT[:4]
        file.write(b"new!")
        assert mapping[:4] == b"new!"


def test_stores_after_close_and_munmap_reach_the_device(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT)) as mapping:
        mapping[:4] = b"last"
        mapping.flush()
    home = files.mount.tree / path.relative_to(files.mount.mountpoint)
    wait_until(lambda: home.stat().st_size == len(TEXT), "the last close")
    assert home.read_bytes() == b"last" + TEXT[4:]


def test_index_is_grown_mapped_closed_and_shrunk_as_kafka_does(files: Files) -> None:
    path = files.make()
    os.truncate(path, 10 * MIB)
    with mapped(path, 10 * MIB) as mapping:
        for entry in range(1000):
            mapping[entry * 8 : entry * 8 + 8] = entry.to_bytes(8, "big")
        mapping.flush()
        os.truncate(path, 8000)
        assert mapping[7992:8000] == (999).to_bytes(8, "big")
    assert path.read_bytes() == b"".join(entry.to_bytes(8, "big") for entry in range(1000))


def test_private_mapping_does_not_change_the_file(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT), flags=mmap.MAP_PRIVATE) as mapping:
        mapping[:7] = b"private"
        assert mapping[:7] == b"private"
    assert path.read_bytes() == TEXT


def test_mapping_goes_on_after_unlink(files: Files) -> None:
    path = files.make(content=TEXT)
    with mapped(path, len(TEXT)) as mapping:
        path.unlink()
        mapping[:4] = b"live"
        mapping.flush()
        assert mapping[:] == b"live" + TEXT[4:]


# -- the rest of the system calls on a descriptor ---------------------------------------------


def test_sendfile_sends_the_bytes(files: Files) -> None:
    path = files.make(content=TEXT * 20)
    with open(path, "rb") as source, open(files.directory / "copy", "w+b") as copy:
        sent = 0
        while count := os.sendfile(copy.fileno(), source.fileno(), sent, MIB):
            sent += count
        copy.seek(0)
        assert copy.read() == TEXT * 20


def test_sendfile_at_the_tail_sends_each_append_as_it_was_written(files: Files) -> None:
    path = files.make()
    batches = [os.urandom(length) for length in (5, 4091, 4096, 10_000, 1, 70_001, 4095)]
    with opened(path, os.O_RDWR) as fd, ExitStack() as stack:
        reader, writer = map(stack.enter_context, map(os.fdopen, os.pipe(), ("rb", "wb")))
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        position = 0
        for batch in batches:
            os.write(fd, batch)
            sent = 0
            while sent < len(batch):  # as Kafka does: fstat, then sendfile up to there
                left = os.fstat(fd).st_size - position
                count = os.sendfile(writer.fileno(), fd, position, left)
                assert count > 0
                position, sent = position + count, sent + count
            assert reader.read(len(batch)) == batch


def test_writes_of_a_segment_are_one_request_each(shared: Mount, tmp_path: Path) -> None:
    path = Files(shared, shared.mountpoint, spilled=False, segments=True).make(tmp_path.name)
    with opened(path, os.O_RDWR) as fd:
        before = shared.status()["requests"]
        for _ in range(100):
            os.write(fd, bytes(4321))
        requests = shared.status()["requests"] - before
    path.unlink()
    assert requests < 110  # through the page cache they would be more than 200


def test_fallocate_extends_with_zeros_and_allocates(files: Files) -> None:
    path = files.make(content=TEXT)
    with open(path, "r+b") as file:
        fallocate(file.fileno(), 0, 0, MIB)
        assert os.fstat(file.fileno()).st_blocks * 512 >= MIB
    assert path.read_bytes() == TEXT + bytes(MIB - len(TEXT))


def test_fallocate_keep_size_keeps_the_size(files: Files) -> None:
    path = files.make(content=TEXT)
    with open(path, "r+b") as file:
        fallocate(file.fileno(), FALLOC_KEEP_SIZE, 0, MIB)
        assert os.fstat(file.fileno()).st_blocks * 512 >= MIB
    assert path.read_bytes() == TEXT


def test_punched_hole_reads_as_zeros_and_gives_its_room_back(files: Files) -> None:
    path = files.make(content=b"x" * 64 * PAGE)
    with open(path, "r+b") as file:
        before = os.fstat(file.fileno()).st_blocks
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        fallocate(file.fileno(), mode, PAGE, 32 * PAGE)
        assert os.fstat(file.fileno()).st_blocks == before - 32 * PAGE // 512
    assert path.read_bytes() == b"x" * PAGE + bytes(32 * PAGE) + b"x" * 31 * PAGE


def test_fallocate_mode_that_is_not_supported_is_eopnotsupp(files: Files) -> None:
    path = files.make(content=b"x" * 2 * PAGE)
    with open(path, "r+b") as file, pytest.raises(OSError) as raised:  # noqa: PT011
        fallocate(file.fileno(), FALLOC_COLLAPSE_RANGE, 0, PAGE)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_seek_finds_data_and_holes(files: Files) -> None:
    path = files.make()
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * PAGE, 64 * PAGE)
        os.ftruncate(fd, 128 * PAGE)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 64 * PAGE
        assert os.lseek(fd, 64 * PAGE, os.SEEK_HOLE) == 65 * PAGE
        with pytest.raises(OSError) as raised:  # noqa: PT011
            os.lseek(fd, 65 * PAGE, os.SEEK_DATA)
    assert raised.value.errno == errno.ENXIO


@pytest.mark.parametrize("to_spilled", [False, True], ids=["to-fast", "to-spilled"])
def test_copy_file_range_copies_also_between_tiers(
    files: Files, to_spilled: bool, request: pytest.FixtureRequest
) -> None:
    if to_spilled and files.directory.is_relative_to(request.getfixturevalue("growing").mountpoint):
        pytest.skip("the mount where files grow has a roomy fast tier")
    source = files.make("source", TEXT)
    target = Files(files.mount, files.directory, spilled=to_spilled).make("target", b"target")
    with open(source, "rb") as read, open(target, "r+b") as write:
        count = os.copy_file_range(read.fileno(), write.fileno(), MIB, 100, 3)
        assert count == len(TEXT) - 100
        assert os.copy_file_range(read.fileno(), write.fileno(), MIB, len(TEXT)) == 0
    assert target.read_bytes() == b"tar" + TEXT[100:]


def test_fsync_through_a_read_only_descriptor_succeeds(files: Files) -> None:
    path = files.make(content=TEXT)
    path.chmod(0o400)
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.fdatasync(fd)


def test_fsync_of_a_directory_succeeds(files: Files) -> None:
    files.make(content=TEXT)
    with opened(files.directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def try_lock(path: Path) -> bool:
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_fcntl_lock_excludes_other_processes_until_its_holder_dies(files: Files) -> None:
    path = files.make()
    ready, wait = os.pipe(), os.pipe()

    def hold() -> None:
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(ready[1], b"!")
            os.read(wait[0], 1)

    holder = Child(hold)
    assert os.read(ready[0], 1) == b"!"
    assert not try_lock(path)
    holder.kill()
    assert try_lock(path)
    for fd in (*ready, *wait):
        os.close(fd)


# -- attributes ---------------------------------------------------------------------------------


def test_times_are_set_to_the_nanosecond(files: Files) -> None:
    path = files.make()
    os.utime(path, ns=(PAST_NS, PAST_NS + 1))
    status = path.stat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (PAST_NS, PAST_NS + 1)


def test_one_time_is_set_without_the_other(files: Files) -> None:
    path = files.make()
    os.utime(path, ns=(PAST_NS, PAST_NS))
    set_mtime_only(path, PAST_NS + 5)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (PAST_NS, PAST_NS + 5)


def test_times_are_set_to_now(files: Files) -> None:
    path = files.make()
    os.utime(path, ns=(PAST_NS, PAST_NS))
    os.utime(path)
    assert abs(path.stat().st_mtime - time.time()) < 5
    assert abs(path.stat().st_atime - time.time()) < 5


def test_times_that_were_set_stay_when_the_file_is_read_and_changed_in_mode(files: Files) -> None:
    path = files.make(content=TEXT)
    with opened(path, os.O_RDWR) as fd:
        os.fsync(fd)
    os.utime(path, ns=(PAST_NS, PAST_NS))
    assert path.read_bytes() == TEXT
    path.chmod(0o600)
    assert path.stat().st_mtime_ns == PAST_NS


@pytest.mark.parametrize(
    "change",
    [
        lambda fd: os.pwrite(fd, b"x", 0),
        lambda fd: os.pwrite(fd, b"x", len(TEXT)),
        lambda fd: os.ftruncate(fd, 3),
        lambda fd: os.ftruncate(fd, MIB),
        lambda fd: fallocate(fd, 0, 0, MIB),
        lambda fd: fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, PAGE),
    ],
    ids=["overwrite", "append", "truncate down", "truncate up", "fallocate", "punch"],
)
def test_mtime_and_ctime_move_when_the_content_changes(
    files: Files, change: Callable[[int], None]
) -> None:
    path = files.make(content=TEXT)
    os.utime(path, ns=(PAST_NS, PAST_NS))
    with open(path, "r+b") as file:
        before = os.fstat(file.fileno())
        change(file.fileno())
        after = os.fstat(file.fileno())
    assert abs(after.st_mtime - time.time()) < 5
    assert after.st_ctime_ns > before.st_ctime_ns
    assert path.stat().st_mtime_ns == after.st_mtime_ns


def test_mtime_moves_when_a_mapping_is_stored_to(files: Files) -> None:
    path = files.make(content=TEXT)
    os.utime(path, ns=(PAST_NS, PAST_NS))
    with mapped(path, len(TEXT)) as mapping:
        mapping[0] = 1
        mapping.flush()
    assert abs(path.stat().st_mtime - time.time()) < 5


def test_ctime_moves_at_chmod_and_mtime_does_not(files: Files) -> None:
    path = files.make()
    before = path.stat()
    path.chmod(0o600)
    assert path.stat().st_ctime_ns > before.st_ctime_ns
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_stat_fstat_and_listing_show_the_same_inode(files: Files) -> None:
    path = files.make(content=TEXT)
    with open(path, "rb") as file:
        opened = os.fstat(file.fileno())
    (entry,) = [e for e in os.scandir(files.directory) if e.name == path.name]
    assert opened == path.stat()
    assert entry.inode() == opened.st_ino


def test_two_files_have_two_inode_numbers(files: Files) -> None:
    numbers = {files.make(str(i)).stat().st_ino for i in range(5)}
    assert len(numbers) == 5


def test_inode_number_and_size_stay_when_the_file_spills(shared: Mount, tmp_path: Path) -> None:
    path = shared.mountpoint / tmp_path.name
    path.write_bytes(TEXT)
    with open(path, "r+b") as file:
        before = os.fstat(file.fileno()).st_ino
        push_to_slow_tier(path, SMALL_FAST_BYTES)
        assert is_spilled(shared, path)
        assert os.fstat(file.fileno()).st_ino == before
    assert path.stat().st_ino == before
    path.unlink()


def test_new_file_does_not_get_the_inode_number_of_a_spilled_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """It keeps its number while ext4, unlike tmpfs, gives that of its old inode away again."""
    directory = tmp_path_factory.mktemp("reuse")
    mkfs = ("mkfs.ext4", "-q", "-I", "256")
    with (
        loop_filesystem(directory / "image", directory / "fast", "32M", mkfs) as fast,
        ExitStack() as stack,
    ):
        (fast / "lost+found").rmdir()
        slow, mountpoint = directory / "slow", directory / "mnt"
        slow.mkdir()
        mountpoint.mkdir()
        mount = Mount(fast, slow, mountpoint, ("--fast-capacity", "4MiB"), directory / "log")
        stack.callback(mount.clean_up)
        mount.start()
        spilled = mountpoint / "spilled"
        spilled.touch()
        with open(spilled, "rb") as file:
            push_to_slow_tier(spilled, SMALL_FAST_BYTES)
            assert is_spilled(mount, spilled)
            new = [mountpoint / str(number) for number in range(50)]
            for path in new:
                path.write_bytes(path.name.encode())
            numbers = {path.stat().st_ino for path in (*new, spilled)}
            homes = {path.stat().st_ino for path in mount.tree.iterdir() if path != spilled}
            assert os.fstat(file.fileno()).st_ino in homes  # it was given away
            assert len(numbers) == 51
            assert os.fstat(file.fileno()).st_ino == spilled.stat().st_ino
            assert file.read() == b""
        assert [path.read_bytes() for path in new] == [path.name.encode() for path in new]


# -- removing -----------------------------------------------------------------------------------


def test_open_file_goes_on_after_unlink(files: Files) -> None:
    path = files.make(content=TEXT)
    with open(path, "r+b", buffering=0) as file:
        path.unlink()
        os.pwrite(file.fileno(), b"more", len(TEXT))
        os.ftruncate(file.fileno(), len(TEXT) + 2)
        os.fchmod(file.fileno(), 0o604)
        os.fsync(file.fileno())
        status = os.fstat(file.fileno())
        assert (status.st_nlink, status.st_size) == (0, len(TEXT) + 2)
        assert status.st_mode & 0o7777 == 0o604
        assert file.read() == TEXT + b"mo"
    assert not path.exists()


def test_unlinked_spilled_file_leaves_nothing_when_it_is_closed(
    shared: Mount, tmp_path: Path
) -> None:
    files = Files(shared, shared.mountpoint, spilled=True)
    path = files.make(tmp_path.name, TEXT)
    object_ = (shared.tree / path.name).readlink()
    shadow = shared.fast / "shadows" / object_.name.rpartition(".")[2]
    with open(path, "rb"):
        path.unlink()
        assert shadow.stat().st_size == object_.stat().st_size == len(TEXT)
    wait_until(lambda: not object_.exists() and not shadow.exists(), "the removal")


def test_file_made_after_an_unlink_is_another_one(files: Files) -> None:
    path = files.make(content=b"old")
    with open(path, "rb") as old:
        path.unlink()
        files.make(content=b"new")
        assert old.read() == b"old"
        assert path.read_bytes() == b"new"


def test_chmod_of_a_removed_file_that_a_path_descriptor_holds(files: Files) -> None:
    path = files.make(content=TEXT)
    with opened(path, os.O_PATH) as fd:
        path.unlink()
        os.chmod(f"/proc/self/fd/{fd}", 0o604)
        assert os.fstat(fd).st_mode & 0o7777 == 0o604


# -- room ---------------------------------------------------------------------------------------


def test_statfs_adds_the_tiers_up(shared: Mount) -> None:
    shown = os.statvfs(shared.mountpoint)
    tiers = [shared.device("fast"), shared.device("slow")]
    assert shown.f_blocks * shown.f_frsize == pytest.approx(
        sum(tier["capacity_bytes"] for tier in tiers), rel=0.001
    )
    free = sum(tier["capacity_bytes"] - tier["used_bytes"] for tier in tiers)
    # The disk below the slow tier is not ours alone, and some is kept for metadata.
    assert shown.f_bavail * shown.f_frsize == pytest.approx(free, rel=0.05)
    assert shown.f_namemax == 255


def test_statfs_shows_that_room_is_taken_and_given_back(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount("--fast-capacity", "16MiB", "--slow-capacity", "64MiB").start()
    path = mount.mountpoint / "file"

    def free_bytes() -> int:
        shown = os.statvfs(mount.mountpoint)
        return shown.f_bavail * shown.f_frsize

    before = free_bytes()
    path.write_bytes(bytes(8 * MIB))
    assert before - free_bytes() == 8 * MIB
    path.write_bytes(bytes(24 * MIB))
    assert is_spilled(mount, path)
    assert before - free_bytes() == pytest.approx(24 * MIB, abs=64 * 1024)
    path.unlink()
    wait_until(lambda: free_bytes() == before, "the room")
