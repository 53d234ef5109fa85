"""Names through a mount: renames, links, special files, any bytes, large directories."""

import errno
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import (
    MIB,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    SMALL_FAST_BYTES,
    Background,
    Child,
    Files,
    is_spilled,
    opened,
    renameat2,
    shared_mount,
)
from harness import Mount, wait_until

TEXT = bytes(range(256)) * 40
COARSE_CLOCK = 5  # of the kernel's own timestamps


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    capacity = f"{SMALL_FAST_BYTES // MIB}MiB"
    with shared_mount(tmp_path_factory.mktemp("names"), "--fast-capacity", capacity) as mount:
        yield mount


@pytest.fixture(params=["fast", "spilled"])
def files(shared: Mount, request: pytest.FixtureRequest, directory: Path) -> Files:
    """Makes files on one tier; every test with it runs for both."""
    return Files(shared, directory, spilled=request.param == "spilled")


@pytest.fixture
def directory(shared: Mount, tmp_path: Path) -> Path:
    """A new directory of the mount."""
    path = shared.mountpoint / tmp_path.name
    path.mkdir()
    return path


# -- rename -------------------------------------------------------------------------------------


def test_rename_replaces_a_file(files: Files) -> None:
    old, new = files.make("old", TEXT), files.make("new", b"replaced")
    with open(new, "rb") as replaced:
        inode = old.stat().st_ino
        old.rename(new)
        assert new.stat().st_ino == inode
        assert new.read_bytes() == TEXT
        assert replaced.read() == b"replaced"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert os.listdir(files.directory) == ["new"]


def test_checkpoint_is_replaced_by_rename_while_it_is_read(files: Files) -> None:
    """Kafka writes X.tmp, renames it over X and fsyncs the directory."""
    path = files.make("checkpoint", b"0")
    for number in range(1, 20):
        with open(path, "rb") as reader:
            temporary = files.make("checkpoint.tmp", b"%d" % number)
            temporary.rename(path)
            assert reader.read() == b"%d" % (number - 1)
    assert path.read_bytes() == b"19"


def test_rename_noreplace_moves_to_a_free_name(files: Files) -> None:
    old, new = files.make("old", TEXT), files.directory / "new"
    renameat2(old, new, RENAME_NOREPLACE)
    assert new.read_bytes() == TEXT
    assert not old.exists()


def test_rename_noreplace_refuses_a_taken_name(files: Files) -> None:
    old, new = files.make("old", b"old"), files.make("new", b"new")
    with pytest.raises(FileExistsError):
        renameat2(old, new, RENAME_NOREPLACE)
    assert (old.read_bytes(), new.read_bytes()) == (b"old", b"new")


def test_rename_exchange_swaps_two_files(files: Files) -> None:
    first = files.make("first", b"first")
    second = Files(files.mount, files.directory, spilled=False).make("second", b"second")
    inodes = first.stat().st_ino, second.stat().st_ino
    renameat2(first, second, RENAME_EXCHANGE)
    assert (first.read_bytes(), second.read_bytes()) == (b"second", b"first")
    assert (second.stat().st_ino, first.stat().st_ino) == inodes
    first.write_bytes(b"written later")
    assert second.read_bytes() == b"first"


def test_rename_exchange_swaps_a_file_and_a_directory(files: Files) -> None:
    path, other = files.make("file", TEXT), files.directory / "directory"
    other.mkdir()
    (other / "inside").write_bytes(b"inside")
    renameat2(path, other, RENAME_EXCHANGE)
    assert other.read_bytes() == TEXT
    assert (path / "inside").read_bytes() == b"inside"


def test_rename_exchange_with_nothing_is_enoent(files: Files) -> None:
    path = files.make("file", TEXT)
    with pytest.raises(FileNotFoundError):
        renameat2(path, files.directory / "missing", RENAME_EXCHANGE)
    assert path.read_bytes() == TEXT


def test_rename_to_another_name_of_the_same_file_does_nothing(files: Files) -> None:
    path, other = files.make("file", TEXT), files.directory / "other"
    os.link(path, other)
    path.rename(other)
    assert sorted(os.listdir(files.directory)) == ["file", "other"]
    assert path.stat().st_nlink == 2


def test_directory_is_renamed_with_open_and_mapped_files_inside(files: Files) -> None:
    """As Kafka renames a partition's directory before it deletes it."""
    old, new = files.directory / "orders-0", files.directory / "orders-0.abc-delete"
    old.mkdir()
    path = Files(files.mount, old, files.spilled).make("segment", TEXT)
    with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), len(TEXT)) as mapping:
        old.rename(new)
        mapping[:6] = b"mapped"
        mapping.flush()
        os.pwrite(file.fileno(), b"written", len(TEXT))
        os.fsync(file.fileno())
        assert (new / "segment").read_bytes() == b"mapped" + TEXT[6:] + b"written"
        (new / "segment").rename(new / "segment.deleted")
        (new / "segment.deleted").unlink()
        new.rmdir()
        mapping[:5] = b"still"
        mapping.flush()
        assert os.pread(file.fileno(), 5, 0) == b"still"
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3


def test_directory_is_renamed_over_an_empty_one(directory: Path) -> None:
    (directory / "old").mkdir()
    (directory / "old/file").write_bytes(TEXT)
    (directory / "new").mkdir()
    (directory / "old").rename(directory / "new")
    assert (directory / "new/file").read_bytes() == TEXT
    assert os.listdir(directory) == ["new"]


def test_directory_is_not_renamed_over_one_with_files(directory: Path) -> None:
    for name in ("old", "new"):
        (directory / name).mkdir()
        (directory / name / "file").write_bytes(name.encode())
    with pytest.raises(OSError, match="not empty"):
        (directory / "old").rename(directory / "new")
    assert (directory / "new/file").read_bytes() == b"new"


def test_directory_is_not_renamed_into_itself(directory: Path) -> None:
    (directory / "a/b").mkdir(parents=True)
    with pytest.raises(OSError, match="Invalid argument"):
        (directory / "a").rename(directory / "a/b/a")


def test_file_moves_to_another_directory_and_dotdot_follows_a_directory(files: Files) -> None:
    for name in ("one", "two"):
        (files.directory / name).mkdir()
    path = Files(files.mount, files.directory / "one", files.spilled).make("file", TEXT)
    path.rename(files.directory / "two/file")
    (files.directory / "one").rename(files.directory / "two/one")
    assert (files.directory / "two/one/../file").read_bytes() == TEXT
    assert os.stat(files.directory / "two/one/..").st_ino == (files.directory / "two").stat().st_ino


# -- removing -----------------------------------------------------------------------------------


def test_rmdir_refuses_a_directory_with_files(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(OSError, match="not empty"):
        directory.rmdir()


def test_removed_directory_is_used_through_its_descriptor(directory: Path) -> None:
    path = directory / "removed"
    path.mkdir()
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        path.rmdir()
        assert os.fstat(fd).st_nlink == 0
        with pytest.raises(FileNotFoundError):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        os.fchmod(fd, 0o701)
        assert os.fstat(fd).st_mode & 0o7777 == 0o701
    assert not path.exists()


def test_directory_made_again_under_the_same_name_is_another(directory: Path) -> None:
    path = directory / "again"
    path.mkdir()
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        path.rmdir()
        path.mkdir()
        (path / "file").write_bytes(TEXT)
        assert os.fstat(fd).st_ino != path.stat().st_ino
        assert (path / "file").read_bytes() == TEXT


def test_files_of_a_directory_are_removed_while_it_is_listed(directory: Path) -> None:
    for number in range(3000):
        (directory / str(number)).touch()
    for entry in os.scandir(directory):
        os.unlink(entry.path)
    assert os.listdir(directory) == []


def test_removed_directories_cost_the_daemon_no_descriptors(shared: Mount, directory: Path) -> None:
    descriptors = Path(f"/proc/{shared.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(300):
        (directory / "gone").mkdir()
        (directory / "gone").rmdir()
    wait_until(lambda: len(list(descriptors.iterdir())) < before + 50, "closed descriptors")


# -- hard links ---------------------------------------------------------------------------------


def test_hard_link_is_the_same_file(files: Files) -> None:
    path, other = files.make("file", TEXT), files.directory / "other"
    os.link(path, other)
    assert path.stat() == other.stat()
    assert path.stat().st_nlink == 2
    with open(other, "ab") as file:
        file.write(b"more")
    assert path.read_bytes() == TEXT + b"more"


def test_file_stays_until_its_last_link_is_removed(files: Files) -> None:
    path, other = files.make("file", TEXT), files.directory / "other"
    with open(path, "rb") as file:
        os.link(path, other)
        assert os.fstat(file.fileno()).st_nlink == 2
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 1
        assert file.read() == TEXT
    assert other.read_bytes() == TEXT
    assert other.stat().st_nlink == 1


@pytest.mark.parametrize("opened_meanwhile", [False, True])
def test_rename_link_and_unlink_of_another_link_change_the_ctime(
    files: Files, opened_meanwhile: bool
) -> None:
    path = files.make("file", TEXT)
    link, renamed = files.directory / "link", files.directory / "renamed"

    def ctime_changes(act: Callable[[], object]) -> bool:
        before = path.stat()
        wait_until(lambda: time.clock_gettime_ns(COARSE_CLOCK) > before.st_ctime_ns, "a tick")
        act()
        after = (path if path.exists() else renamed).stat()
        assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
        return after.st_ctime_ns > before.st_ctime_ns

    with opened(path, os.O_RDONLY) if opened_meanwhile else nullcontext():
        assert ctime_changes(lambda: os.link(path, link))
        assert ctime_changes(link.unlink)
        assert ctime_changes(lambda: path.rename(renamed))


def test_links_are_counted_also_when_one_was_never_looked_at(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    path, other = mount.mountpoint / "file", mount.mountpoint / "other"
    path.write_bytes(TEXT)
    os.link(path, other)
    mount.restart()
    with open(path, "rb") as file:
        path.unlink()
        assert os.fstat(file.fileno()).st_nlink == 1
    assert other.read_bytes() == TEXT


def test_attributes_of_a_file_whose_known_name_is_gone_while_another_exists(
    make_mount: MakeMount,
) -> None:
    mount = make_mount().start()
    path, other = mount.mountpoint / "file", mount.mountpoint / "other"
    path.write_bytes(TEXT)
    os.link(path, other)
    mount.restart()
    with opened(path, os.O_PATH) as fd:
        path.unlink()
        assert os.fstat(fd).st_size == len(TEXT)
        os.chmod(f"/proc/self/fd/{fd}", 0o604)
    assert other.stat().st_mode & 0o7777 == 0o604


def test_links_survive_a_remount(files: Files) -> None:
    path, other = files.make("file", TEXT), files.directory / "other"
    os.link(path, other)
    files.mount.restart()
    assert path.stat().st_ino == other.stat().st_ino
    with open(path, "r+b") as file:
        file.write(b"new")
    assert other.read_bytes() == b"new" + TEXT[3:]


# -- symlinks and special files -----------------------------------------------------------------


def test_symlink_is_followed_and_read(directory: Path) -> None:
    (directory / "file").write_bytes(TEXT)
    link = directory / "link"
    link.symlink_to("file")
    assert os.readlink(link) == "file"
    assert link.read_bytes() == TEXT
    assert link.lstat().st_size == 4
    link.rename(directory / "renamed")
    assert (directory / "renamed").read_bytes() == TEXT


def test_symlink_may_dangle_and_be_long(directory: Path) -> None:
    text = "/missing/" + "x/" * 1000
    os.symlink(text, directory / "link")
    assert os.readlink(directory / "link") == text
    with pytest.raises(FileNotFoundError):
        (directory / "link").stat()


def test_symlink_that_looks_like_a_stub_is_refused(files: Files) -> None:
    path = files.make("file", TEXT)
    stub = Files(files.mount, files.directory, spilled=True).make("spilled", b"secret")
    text = os.readlink(files.mount.tree / stub.relative_to(files.mount.mountpoint))
    with pytest.raises(PermissionError) as raised:
        os.symlink(text, files.directory / "planted")
    assert raised.value.errno == errno.EPERM
    assert not os.path.lexists(files.directory / "planted")
    assert path.read_bytes() == TEXT


def test_own_and_times_of_a_symlink_are_its_own(directory: Path) -> None:
    (directory / "file").touch()
    link = directory / "link"
    link.symlink_to("file")
    os.utime(link, ns=(5, 7), follow_symlinks=False)
    os.chown(link, 12345, 12346, follow_symlinks=False)
    status = link.lstat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (5, 7)
    assert (status.st_uid, status.st_gid) == (12345, 12346)
    assert link.stat().st_uid == 0


def test_fifo_carries_bytes_between_processes(directory: Path) -> None:
    path = directory / "fifo"
    os.mkfifo(path, 0o620)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert path.stat().st_mode & 0o7777 == 0o600  # less the umask
    child = Child(lambda: path.write_bytes(TEXT))
    assert path.read_bytes() == TEXT
    child.result()


def test_unix_socket_is_bound_and_connected_to(directory: Path) -> None:
    # The path of a socket may have 108 bytes: it is bound relative to its directory.
    before = os.getcwd()
    os.chdir(directory)
    try:
        with closing(socket.socket(socket.AF_UNIX)) as server:
            server.bind("socket")
            server.listen()
            assert stat.S_ISSOCK((directory / "socket").stat().st_mode)
            with closing(socket.socket(socket.AF_UNIX)) as client:
                client.connect("socket")
                client.sendall(b"hello")
                with closing(server.accept()[0]) as accepted:
                    assert accepted.recv(5) == b"hello"
    finally:
        os.chdir(before)


def test_open_fifo_goes_on_after_unlink(directory: Path) -> None:
    path = directory / "fifo"
    os.mkfifo(path)
    with opened(path, os.O_RDWR) as fd:
        path.unlink()
        os.write(fd, b"x")
        assert os.read(fd, 1) == b"x"
        os.fchmod(fd, 0o604)
        assert os.fstat(fd).st_mode & 0o7777 == 0o604
        assert os.fstat(fd).st_nlink == 0


def test_device_node_is_made_but_not_usable(directory: Path) -> None:
    path = directory / "null"
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert path.stat().st_rdev == os.makedev(1, 3)
    with pytest.raises(PermissionError):
        path.read_bytes()


# -- names --------------------------------------------------------------------------------------

ODD_NAMES = [
    b"\xff\xfe\x80",
    b"new\nline",
    b" ",
    b"-rf",
    b"a\\b'\"$(x)",
    b"x" * 255,
    b"\xc3" * 255,
    "日本".encode() * 42,
    b"...",
    b"~0123abcd.0123456789abcdef",
    b"tree",
    b"objects",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name[:12]))
def test_name_of_any_bytes_works(files: Files, name: bytes) -> None:
    parent = os.path.join(os.fsencode(files.directory), name)
    os.mkdir(parent)
    path = Path(os.fsdecode(os.path.join(parent, name)))
    Files(files.mount, path.parent, files.spilled).make(path.name, TEXT)
    assert os.listdir(parent) == [name]
    assert path.read_bytes() == TEXT
    moved = os.path.join(os.fsencode(files.directory), b"moved")
    os.rename(path, moved)
    os.rmdir(parent)
    assert Path(os.fsdecode(moved)).read_bytes() == TEXT


def test_names_of_spilled_files_of_any_bytes_survive_a_remount(shared: Mount) -> None:
    files = Files(shared, shared.mountpoint, spilled=True)
    names = [os.fsdecode(name) for name in ODD_NAMES]
    for name in names:
        files.make(name, name.encode(errors="surrogateescape"))
    shared.restart()
    for name in names:
        path = shared.mountpoint / name
        assert path.read_bytes() == name.encode(errors="surrogateescape")
        assert is_spilled(shared, path)
        path.unlink()


@pytest.mark.parametrize("length", [256, 1024, 4000])
def test_longer_name_is_enametoolong(directory: Path, length: int) -> None:
    path = directory / ("x" * length)
    for act in (path.touch, path.mkdir, path.stat, lambda: os.symlink("x", path)):
        with pytest.raises(OSError, match="File name too long"):
            act()


def test_spilled_file_deep_down_works(shared: Mount, directory: Path) -> None:
    """The path is longer than a symlink may be."""
    deep = directory
    for level in range(12):
        deep = deep / f"{level:0>200}"
        deep.mkdir()
    path = Files(shared, deep, spilled=True).make("file", TEXT)
    assert path.read_bytes() == TEXT
    shared.restart()
    assert path.read_bytes() == TEXT


# -- listing ------------------------------------------------------------------------------------

MANY = 100_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of 100,000 files, made where the home tree is."""
    with shared_mount(tmp_path_factory.mktemp("large")) as mount:
        mount.stop()
        home = mount.tree / "large"
        home.mkdir()
        for number in range(MANY):
            os.mknod(home / f"stays-{number}", 0o600)
        mount.start()
        yield mount.mountpoint / "large"


def test_large_directory_is_listed_while_it_changes(large: Path) -> None:
    stop = False

    def change() -> None:
        number = 0
        while not stop:
            path = large / f"comes-{number}"
            path.touch()
            path.rename(large / f"goes-{number}")
            (large / f"goes-{number}").unlink()
            number += 1
        assert number > 10

    changing = Background(change)
    try:
        listed = [entry.name for entry in os.scandir(large)]
    finally:
        stop = True
        changing.join()
    staying = [name for name in listed if name.startswith("stays-")]
    assert len(staying) == MANY
    assert len(set(listed)) == len(listed)


def test_two_listings_at_once_do_not_disturb_each_other(large: Path) -> None:
    first, second = os.scandir(large), os.scandir(large)
    names: tuple[set[str], set[str]] = set(), set()
    for _ in range(5000):
        names[0].add(next(first).name)
    for _ in range(3000):
        names[1].add(next(second).name)
    names[0].update(entry.name for entry in first)
    names[1].update(entry.name for entry in second)
    assert names[0] == names[1]
    assert len(names[0]) == MANY


def test_listing_shows_what_was_made_after_it_was_rewound(directory: Path) -> None:
    (directory / "early").touch()
    with opened(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.listdir(fd) == ["early"]
        (directory / "late").touch()
        (directory / "early").unlink()
        assert os.listdir(fd) == ["late"]  # rewinds


def test_listing_tells_the_type_of_a_spilled_file(files: Files) -> None:
    files.make("file", TEXT)
    (entry,) = os.scandir(files.directory)
    assert entry.is_file(follow_symlinks=False)
    assert not entry.is_symlink()
