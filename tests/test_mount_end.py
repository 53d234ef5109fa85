"""How a mount ends: `pafkafs umount` and signals, from the outside."""

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MakeMount
from faults import Action, Faults, Kind
from filetools import Background, cut_off
from harness import PAFKAFS, Mount, is_mounted, is_running, run_pafkafs, wait_until

from pafkafs import control
from pafkafs.commands.umount import unmount


@contextmanager
def foreground(mount: Mount) -> Iterator[subprocess.Popen[str]]:
    """`pafkafs mount -f`, ended after the test in whatever state that left it."""
    paths = map(str, (mount.fast, mount.slow, mount.mountpoint))
    command = [PAFKAFS, "mount", "-f", *mount.options, *paths]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            wait_until(lambda: is_mounted(mount.mountpoint), "the mount")
            yield daemon
        finally:
            if daemon.poll() is None:
                daemon.kill()


def test_foreground_serves_until_sigterm_and_exits_0(make_mount: MakeMount) -> None:
    mount = make_mount()
    with foreground(mount) as daemon:
        (mount.mountpoint / "file").write_bytes(b"x")
        daemon.terminate()
        _, errors = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, errors
    assert "is mounted" in errors
    assert not is_mounted(mount.mountpoint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_syncs_and_unmounts_also_when_busy(
    make_mount: MakeMount, number: signal.Signals
) -> None:
    mount = make_mount().start()
    with cut_off(mount.mountpoint / "file") as stream:
        stream.write(b"kept")
        pid = mount.pid
        os.kill(pid, number)
        wait_until(lambda: not is_running(pid), "the daemon's end")
        assert not is_mounted(mount.mountpoint)
        with pytest.raises(OSError, match=r"."):
            stream.write(b"cut off")
    assert (mount.tree / "file").read_bytes() == b"kept"


def test_stores_into_a_mapping_survive_sigterm(make_mount: MakeMount) -> None:
    import mmap

    mount = make_mount().start()
    with cut_off(mount.mountpoint / "file") as stream:
        stream.truncate(8192)
        with mmap.mmap(stream.fileno(), 8192) as mapped:
            mapped[5000:5004] = b"here"
            pid = mount.pid
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_running(pid), "the daemon's end")
    assert (mount.tree / "file").read_bytes()[5000:5004] == b"here"


def test_sigterm_after_a_lazy_umount_by_somebody_else_ends_the_daemon(
    make_mount: MakeMount,
) -> None:
    mount = make_mount()
    path = mount.mountpoint / "file"
    with foreground(mount) as daemon, open(path, "wb", buffering=0) as stream:
        stream.write(b"kept")
        subprocess.run(["umount", "-l", mount.mountpoint], check=True)
        daemon.terminate()
        _, errors = daemon.communicate(timeout=30)
    assert daemon.returncode == 0, errors
    assert "Traceback" not in errors
    assert (mount.tree / "file").read_bytes() == b"kept"


def test_umount_is_refused_while_a_file_is_open(mount: Mount) -> None:
    with open(mount.mountpoint / "file", "wb"):
        result = run_pafkafs("umount", str(mount.mountpoint))
        assert result.returncode == 1
        assert "fuser" in result.stderr
    mount.stop()


def test_umount_returns_when_the_daemon_has_ended(mount: Mount) -> None:
    pid = mount.pid
    mount.stop()
    assert not is_running(pid)


def test_umount_of_nothing_is_an_error(tmp_path: Path) -> None:
    result = run_pafkafs("umount", str(tmp_path))
    assert result.returncode == 1
    assert "no pafkafs is mounted" in result.stderr


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    faults = Faults(tmp_path)
    with faults.daemon():
        yield faults


def mounted(mount: Mount, faults: Faults) -> Mount:
    """Started, and nothing on the slow device is synced by itself any more."""
    faults.arm(mount.slow, Action.COUNT, kinds=Kind.SYNC)
    mount.start()
    wait_until(lambda: any("syncfs" in call for call in faults.calls), "the sync after a mount")
    return mount


def close_a_file(mount: Mount, faults: Faults, action: Action) -> None:
    """It was written to; what nobody fsyncs is synced in the background after its last close, and
    that is hit."""
    with (mount.mountpoint / f"{0:020}.log").open("wb", buffering=0) as stream:
        stream.write(b"record")
        faults.arm(mount.slow, action, 1, errno.EIO, Kind.SYNC)


@pytest.mark.parametrize("kind", ["fsync", "syncfs"])
def test_umount_names_the_device_that_could_not_be_synced_and_exits_1(
    make_mount: MakeMount, faults: Faults, kind: str
) -> None:
    """Of a file on it that is open still, or of all of it."""
    mount = mounted(make_mount("--mode", "slow"), faults)
    with cut_off(mount.mountpoint / f"{0:020}.log") as stream:
        stream.write(b"record")
        faults.arm(mount.slow, Action.FAIL, 1 if kind == "fsync" else 2, errno.EIO, Kind.SYNC)
        result = run_pafkafs("umount", "--lazy", str(mount.mountpoint))
    assert faults.hit is not None
    assert faults.hit.startswith(kind)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert str(mount.slow) in result.stderr
    assert str(mount.fast) not in result.stderr
    assert not is_mounted(mount.mountpoint)


def test_umount_waits_for_a_file_that_is_closed_while_it_is_synced(
    make_mount: MakeMount, faults: Faults
) -> None:
    mount = mounted(make_mount("--mode", "slow"), faults)
    close_a_file(mount, faults, Action.HANG)
    wait_until(lambda: faults.hit, "the fsync in the background")
    ending = Background(lambda: mount.stop())
    wait_until(lambda: "the devices are synced" in mount.log_text(), "the end of requests")
    faults.disarm()
    ending.join()
    assert f"{mount.slow} was not synced" not in mount.log_text()


def test_removed_file_and_one_without_its_object_do_not_count_as_unsynced(
    make_mount: MakeMount, faults: Faults
) -> None:
    mount = mounted(make_mount("--mode", "slow"), faults)
    gone, missing = (mount.mountpoint / f"{number:020}.log" for number in range(2))
    missing.write_bytes(b"record")
    mount.stop()
    (object_,) = mount.objects
    object_.unlink()
    mounted(mount, faults)
    os.utime(missing, (1, 1))
    with cut_off(gone) as stream:
        stream.write(b"record")
        gone.unlink()
        faults.arm(mount.slow, Action.FAIL, 1, errno.EIO, Kind.SYNC)
        result = run_pafkafs("umount", "--lazy", str(mount.mountpoint))
    assert faults.hit is None or faults.hit.startswith("syncfs")
    assert (result.returncode == 0) == (faults.hit is None), result.stderr


def test_mount_whose_daemon_does_not_know_who_waits_for_its_end_is_unmounted(
    make_mount: MakeMount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an earlier version."""
    mount = make_mount().start()
    pid = mount.pid
    monkeypatch.setattr(control, "AWAIT_END", "what comes later")
    unmount(str(mount.mountpoint), lazy=False)
    assert not is_running(pid)


def test_umount_names_the_device_of_a_closed_file_whose_fsync_failed(
    make_mount: MakeMount, faults: Faults
) -> None:
    mount = mounted(make_mount("--mode", "slow"), faults)
    close_a_file(mount, faults, Action.FAIL)
    wait_until(lambda: mount.device("slow")["errors"] > 0, "the error in status")
    result = run_pafkafs("umount", str(mount.mountpoint))
    assert result.returncode == 1
    assert str(mount.slow) in result.stderr


def test_umount_says_that_the_daemon_died_before_all_was_synced(
    make_mount: MakeMount, faults: Faults
) -> None:
    mount = mounted(make_mount("--mode", "slow"), faults)
    with cut_off(mount.mountpoint / f"{0:020}.log") as stream:
        stream.write(b"record")
        faults.arm(mount.slow, Action.DIE, 1, kinds=Kind.SYNC)
        result = run_pafkafs("umount", "--lazy", str(mount.mountpoint))
    assert faults.hit is not None
    assert result.returncode == 1
    assert "has not told that all is synced" in result.stderr


def test_foreground_exits_3_when_a_device_could_not_be_synced(
    make_mount: MakeMount, faults: Faults
) -> None:
    mount = make_mount("--mode", "slow")
    faults.arm(mount.slow, Action.COUNT, kinds=Kind.SYNC)
    with foreground(mount) as daemon:
        (mount.mountpoint / f"{0:020}.log").write_bytes(b"record")
        wait_until(lambda: any("syncfs" in c for c in faults.calls), "the sync after a mount")
        faults.arm(mount.slow, Action.FAIL, 1, errno.EIO, Kind.SYNC)
        daemon.terminate()
        _, errors = daemon.communicate(timeout=30)
    assert daemon.returncode == 3
    assert f"pafkafs: not synced at the end: {mount.slow}" in errors


def test_umounts_that_are_refused_leave_nobody_waiting_in_the_daemon(mount: Mount) -> None:
    """It has room for 16 who wait."""
    with open(mount.mountpoint / "file", "wb"):
        for _ in range(20):
            assert "fuser" in run_pafkafs("umount", str(mount.mountpoint)).stderr
    mount.stop()
