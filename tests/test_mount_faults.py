"""Devices that hang, fail, disappear or are full, and state that was tampered with.

The slow device that hangs or disappears is itself a pafkafs mount: stopped, its daemon answers
nothing; killed, every system call on it fails.
"""

import errno
import itertools
import os
import resource
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MakeMount
from harness import PAFKAFS, Mount, is_mounted, is_running, tree_contents, wait_until

NORMAL_S = 1.0  # generous for a loaded machine, and far from a hang
DATA = bytes(range(256)) * 256


class Slow:
    """A mount on a slow device that can be stopped and killed."""

    def __init__(self, mount: Mount, device: Mount) -> None:
        self.mount = mount
        self.device = device
        self.pid = device.pid

    def hang(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def recover(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def path(self, name: str) -> Path:
        return self.mount.mountpoint / name


@pytest.fixture
def slow(make_mount: MakeMount) -> Iterator[Slow]:
    """A mount where cold/ has 140 files on a slow device that can hang, none of them cached."""
    device = make_mount(name="device").start()
    mount = make_mount("--mode", "slow")
    mount.slow_list = str(device.mountpoint)
    mount.start()
    (mount.mountpoint / "cold").mkdir()
    for number in range(140):
        (mount.mountpoint / f"cold/{number}").write_bytes(DATA)
    mount.restart("--mode", "tiered")
    slow = Slow(mount, device)
    yield slow
    if is_running(slow.pid):
        slow.recover()
    mount.clean_up()


def in_time(act: Callable[[], object]) -> float:
    """Runs act in a thread; its seconds, or a failure when it is far from normal."""
    done = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)
        done.set()

    began = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    assert done.wait(NORMAL_S * 10), "it hangs"
    if failed:
        raise failed[0]
    return time.monotonic() - began


class Readers:
    """Processes that each read a cold file."""

    def __init__(self, slow: Slow, count: int) -> None:
        self.processes = [
            subprocess.Popen(["cat", slow.path(f"cold/{number}")], stdout=subprocess.PIPE)
            for number in range(count)
        ]

    def finish(self) -> list[bytes]:
        return [process.communicate(timeout=60)[0] for process in self.processes]


def test_hung_slow_device_delays_only_reads_of_its_own_data(slow: Slow) -> None:
    fast = slow.path("fast")
    fast.write_bytes(b"x")
    slow.hang()
    readers = Readers(slow, 120)
    wait_until(lambda: slow.mount.device("slow") and _waiting(readers) == 120, "the readers")

    def everything_else() -> None:
        for number in range(120, 140):
            os.stat(slow.path(f"cold/{number}"))
        assert len(os.listdir(slow.path("cold"))) == 140
        os.close(os.open(slow.path("cold/121"), os.O_RDWR))
        os.rename(slow.path("cold/122"), slow.path("cold/renamed"))
        os.unlink(slow.path("cold/123"))
        os.chmod(slow.path("cold/124"), 0o400)
        with open(fast, "ab", buffering=0) as stream:
            for _ in range(100):
                stream.write(DATA)
                os.fstat(stream.fileno())
            os.fsync(stream.fileno())
        assert fast.read_bytes()[1:] == DATA * 100
        slow.path("new").write_bytes(b"new")
        slow.path("directory").mkdir()
        os.statvfs(slow.mount.mountpoint)

    assert in_time(everything_else) < NORMAL_S
    assert in_time(slow.mount.status) < NORMAL_S
    slow.recover()
    assert readers.finish() == [DATA] * 120
    assert slow.path("cold/renamed").read_bytes() == DATA


def _waiting(readers: Readers) -> int:
    """How many of the readers are blocked in a read."""
    return sum(
        Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split()[0] in "DS"
        and os.readlink(f"/proc/{p.pid}/exe").endswith("cat")
        for p in readers.processes
    )


def test_status_says_that_a_device_hangs_and_that_it_recovered(slow: Slow) -> None:
    slow.hang()
    readers = Readers(slow, 1)
    problem = wait_until(lambda: slow.mount.status()["problems"], "the problem", 20)[0]
    assert "has not answered" in problem["problem"]
    assert problem["action"].startswith("check the device")
    slow.recover()
    assert readers.finish() == [DATA]
    wait_until(lambda: slow.mount.status()["state"] == "healthy", "recovery")


def test_reader_of_a_hung_device_can_be_killed(slow: Slow) -> None:
    slow.hang()
    readers = Readers(slow, 30)
    wait_until(lambda: _waiting(readers) == 30, "the readers")
    for process in readers.processes:
        process.kill()
    began = time.monotonic()
    readers.finish()
    assert time.monotonic() - began < 5


def test_device_that_disappears_fails_reads_of_its_data_and_nothing_else(slow: Slow) -> None:
    os.kill(slow.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r".") as caught:
        slow.path("cold/1").read_bytes()
    assert caught.value.errno in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)
    assert slow.path("cold/1").stat().st_size == len(DATA)
    os.rename(slow.path("cold/2"), slow.path("cold/renamed"))
    slow.path("fast").write_bytes(b"fine")
    assert slow.path("fast").read_bytes() == b"fine"
    status = slow.mount.status()
    assert status["state"] == "degraded"
    assert str(slow.device.mountpoint) in status["problems"][0]["problem"]


def test_mount_on_a_hung_slow_device_fails_with_a_clear_error(make_mount: MakeMount) -> None:
    device = make_mount(name="device").start()
    mount = make_mount()
    mount.slow_list = str(device.mountpoint)
    mount.start()
    mount.stop()
    pid = device.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        result = mount.mount()
        assert result.returncode == 1
        assert "has not answered" in result.stderr
        assert not is_mounted(mount.mountpoint)
    finally:
        os.kill(pid, signal.SIGCONT)


def make_slow_file(make_mount: MakeMount) -> tuple[Mount, Path]:
    mount = make_mount("--mode", "slow").start()
    path = mount.mountpoint / "file"
    path.write_bytes(DATA)
    mount.stop()
    return mount, path


def test_missing_object_is_eio_on_its_data_and_a_line_in_status(make_mount: MakeMount) -> None:
    mount, path = make_slow_file(make_mount)
    mount.objects[0].unlink()
    mount.start()
    assert path.stat().st_size == len(DATA)
    with pytest.raises(OSError, match=r".") as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    status = mount.status()
    assert status["state"] == "degraded"
    assert "1 objects are missing" in status["problems"][0]["problem"]
    path.unlink()
    mount.restart()
    assert mount.status()["state"] == "healthy"


@pytest.mark.parametrize(
    "text",
    [
        "/etc/objects/passwd~{device}.{object}",
        "{slow}/objects/../../etc/passwd~{device}.{object}",
        "{slow}/objects/file~00000000.{object}",
    ],
)
def test_stub_edited_to_point_elsewhere_is_refused(make_mount: MakeMount, text: str) -> None:
    mount, path = make_slow_file(make_mount)
    stub = mount.tree / "file"
    device, _, object_id = os.readlink(stub).rpartition("~")[2].partition(".")
    stub.unlink()
    stub.symlink_to(text.format(slow=mount.slow, device=device, object=object_id))
    (mount.tree / "other").write_bytes(b"other")
    mount.start()
    with pytest.raises(OSError, match=r".") as caught:
        path.read_bytes()
    assert caught.value.errno == errno.EIO
    assert (mount.mountpoint / "other").read_bytes() == b"other"
    assert "other" in os.listdir(mount.mountpoint)
    assert "do not lead to a device" in mount.status()["problems"][0]["problem"]


def spoil(stub: Path) -> None:
    """What `sed` over all symlinks may come to."""
    text = os.readlink(stub)
    stub.unlink()
    stub.symlink_to("/elsewhere" + text)


def wait_for_the_collection_of_garbage(mount: Mount) -> None:
    """For what make_garbage made to be put aside."""
    wait_until(lambda: len(list(mount.slow.glob("lost/garbage~*"))) == 1, "the garbage of objects")
    wait_until(lambda: (mount.fast / "lost" / GARBAGE_ID).exists(), "the garbage of shadows")


GARBAGE_ID = "0123456789abcdef"


def make_garbage(mount: Mount) -> None:
    """An object and a shadow without a stub: when they are gone, others would be, too."""
    (mount.slow / f"objects/garbage~01234567.{GARBAGE_ID}").touch()
    (mount.fast / "shadows" / GARBAGE_ID).touch()


def test_file_with_a_refused_stub_is_listed_and_empty_and_can_be_renamed_and_removed(
    make_mount: MakeMount,
) -> None:
    mount = make_mount("--mode", "slow").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    for name in ("a", "b", "c"):
        (directory / name).write_bytes(DATA)
    mount.stop()
    for name in ("a", "b"):
        spoil(mount.tree / "orders-0" / name)
    mount.start()
    assert sorted(os.listdir(directory)) == ["a", "b", "c"]
    assert all(entry.is_file(follow_symlinks=False) for entry in os.scandir(directory))
    status = (directory / "a").lstat()
    assert (stat.S_ISREG(status.st_mode), status.st_size) == (True, 0)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match=r".") as caught:
            os.close(os.open(directory / "a", flags))
        assert caught.value.errno == errno.EIO
    problem = mount.status()["problems"][0]["problem"]
    assert problem.startswith("2 stubs do not lead")
    assert "orders-0/a" in problem
    (directory / "a").rename(directory / "renamed")
    directory = directory.rename(mount.mountpoint / "orders-0.0123-delete")
    assert sorted(os.listdir(directory)) == ["b", "c", "renamed"]
    for name in ("b", "c", "renamed"):
        (directory / name).unlink()
    assert mount.status()["problems"] == []
    directory.rmdir()
    assert os.listdir(mount.tree) == []
    (mount.mountpoint / "another").touch()
    mount.restart()
    assert mount.status()["state"] == "healthy"


def test_refused_stub_that_is_restored_leads_to_the_data_again(make_mount: MakeMount) -> None:
    mount, path = make_slow_file(make_mount)
    stub = mount.tree / "file"
    text = os.readlink(stub)
    spoil(stub)
    make_garbage(mount)
    mount.start()
    wait_for_the_collection_of_garbage(mount)
    mount.stop()
    stub.unlink()
    stub.symlink_to(text)
    mount.start()
    assert path.read_bytes() == DATA
    assert mount.status()["state"] == "healthy"


def test_missing_object_of_a_name_that_is_no_text_is_logged_escaped(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    path = os.fsencode(mount.mountpoint) + b"/caf\xe9"
    with open(path, "xb") as stream:
        stream.write(DATA)
    mount.stop()
    mount.objects[0].unlink()
    paths = map(str, (mount.fast, mount.slow, mount.mountpoint))
    with subprocess.Popen(
        [PAFKAFS, "mount", "-f", *paths], stderr=subprocess.PIPE, text=True
    ) as daemon:
        wait_until(lambda: is_mounted(mount.mountpoint), "the mount")
        with pytest.raises(OSError, match=r"."), open(path, "rb") as stream:
            stream.read()
        daemon.terminate()
        _, log = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, log
    assert "caf\\udce9~" in log
    assert "Traceback" not in log
    assert "Logging error" not in log


def test_symlink_planted_among_the_objects_is_not_followed(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, path = make_slow_file(make_mount)
    victim = tmp_path / "victim"
    victim.write_bytes(b"secret" * 10_000)
    target = mount.objects[0]
    target.unlink()
    target.symlink_to(victim)
    mount.start()
    with pytest.raises(OSError, match=r"."):
        path.read_bytes()
    with pytest.raises(OSError, match=r"."), open(path, "r+b", buffering=0) as stream:
        stream.write(b"x")
    assert victim.read_bytes() == b"secret" * 10_000


def test_descriptor_limit_gives_emfile_and_passes(mount: Mount) -> None:
    pid = mount.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    limit = used + 40
    subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={limit}:{limit}"], check=True)
    with ExitStack() as opened:
        streams = []

        def open_many() -> None:
            for number in range(100):
                path = mount.mountpoint / f"file{number}"
                streams.append(opened.enter_context(open(path, "wb", buffering=0)))

        with pytest.raises(OSError, match="Too many open files"):
            open_many()
        assert 10 < len(streams) < 60
        for stream in streams:
            stream.write(b"still writable")
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < limit - 10, "the descriptors")
    (mount.mountpoint / "after").write_bytes(b"x")
    assert mount.status()["state"] == "healthy"


def has_open(pid: int, directory: Path) -> bool:
    links = [Path(f"/proc/{pid}/fd", number) for number in os.listdir(f"/proc/{pid}/fd")]
    return any(str(directory) in os.readlink(link) for link in links if link.is_symlink())


def test_removal_for_which_no_descriptor_is_left_leaves_the_name(make_mount: MakeMount) -> None:
    """It needs one for the fsync of the directory, and has it before."""
    mount = make_mount("--mode", "slow").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    removed, replaced, other = paths = [directory / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode())
    pid = mount.pid
    wait_until(lambda: not has_open(pid, mount.slow / "objects/orders-0"), "the last closes")
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in itertools.count() if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            removed.unlink()
        with pytest.raises(OSError, match="Too many open files"):
            other.rename(replaced)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]
    removed.unlink()
    other.rename(replaced)
    wait_until(lambda: len(mount.objects) == 1, "the removal of the objects")


def test_contents_are_the_same_through_the_mount_and_without_it(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "16MiB").start()
    for number in range(40):
        directory = mount.mountpoint / f"orders-{number % 4}"
        directory.mkdir(exist_ok=True)
        (directory / f"{number:020d}.log").write_bytes(os.urandom(1 << 20))
    shown = tree_contents(mount.mountpoint)
    assert mount.device("slow")["files"] > 0
    mount.stop()
    assert tree_contents(mount.tree) == shown


@pytest.mark.parametrize("change", ["append", "truncate", "remove"])
def test_what_was_done_to_the_tree_itself_is_seen_by_the_next_mount(
    make_mount: MakeMount, change: str
) -> None:
    mount, path = make_slow_file(make_mount)
    direct = mount.tree / "file"
    if change == "append":
        with open(direct, "ab") as stream:
            stream.write(b"more")
    elif change == "truncate":
        os.truncate(direct, 100)
    else:
        direct.unlink()
        direct.with_name("another").touch()
    mount.start()
    if change == "remove":
        assert not path.exists()
        wait_until(lambda: not mount.objects, "the object to be put aside")
        assert not list((mount.fast / "shadows").iterdir())
        assert mount.status()["state"] == "healthy"
    else:
        expected = DATA + b"more" if change == "append" else DATA[:100]
        assert path.stat().st_size == len(expected)
        assert path.read_bytes() == expected


def test_many_objects_without_stubs_are_left_alone_and_reported(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    for number in range(100):
        (mount.mountpoint / str(number)).write_bytes(b"x")
    mount.stop()
    for number in range(80):
        (mount.tree / str(number)).unlink()
    mount.start()
    wait_until(lambda: mount.status()["problems"], "the report")
    assert "80 objects" in mount.status()["problems"][0]["problem"]
    assert len(mount.objects) == 100


def test_objects_of_a_home_tree_that_is_empty_are_left_alone_and_reported(
    make_mount: MakeMount,
) -> None:
    """As fsck, or a restore that went wrong, leaves it."""
    mount = make_mount("--mode", "slow").start()
    for number in range(20):
        (mount.mountpoint / str(number)).write_bytes(b"x")
    mount.stop()
    mount.tree.rename(mount.fast / "tree.was")
    result = mount.mount()
    assert result.returncode == 1
    assert "has lost its tree/, with the names of 20 files" in result.stderr
    mount.tree.mkdir()
    mount.start()
    wait_until(lambda: mount.status()["problems"], "the report")
    assert "20 objects" in mount.status()["problems"][0]["problem"]
    assert len(mount.objects) == len(list((mount.fast / "shadows").iterdir())) == 20
    mount.stop()
    mount.tree.rmdir()
    (mount.fast / "tree.was").rename(mount.tree)
    mount.start()
    assert (mount.mountpoint / "19").read_bytes() == b"x"
    assert mount.status()["problems"] == []


def test_what_was_put_aside_is_told(make_mount: MakeMount) -> None:
    mount, _ = make_slow_file(make_mount)
    (mount.tree / "file").unlink()
    (mount.tree / "another").touch()
    mount.start()
    wait_until(lambda: "1 files without a name" in str(mount.status()["notes"]), "the note")


def test_garbage_that_cannot_be_put_aside_is_reported_and_the_mount_serves(
    make_mount: MakeMount,
) -> None:
    mount, path = make_slow_file(make_mount)
    (mount.tree / "file").unlink()
    (mount.tree / "another").touch()
    stuck = str(mount.objects[0])
    subprocess.run(["mount", "--bind", stuck, stuck], check=True)  # renaming it is EBUSY
    try:
        mount.start()
        problem = wait_until(lambda: mount.status()["problems"], "the report")[0]["problem"]
        assert "aside" in problem
        path.write_bytes(DATA)
        assert path.read_bytes() == DATA
        mount.stop()
    finally:
        subprocess.run(["umount", stuck], check=True)
