"""A slow device that stands still and goes on: what was asked meanwhile is not lost, and the
daemon ends when it is told to."""

import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from filetools import Background, frozen, is_stopped_by_a_freeze, opened
from harness import Mount, is_mounted, is_running, loop_filesystem, run_pafkafs, wait_until

from pafkafs import control

_EXT4_IOC_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
MKFS = ("mkfs.ext4", "-q", "-F")
PROMPT_S = 1.0  # for what must not wait for the device
# The daemon, that waits a second at its end for a device, not a minute.
IMPATIENT = """
import sys
from pafkafs import ending
from pafkafs.commands import main
ending.SYNC_PATIENCE_S = 1.0
main()
"""


class Machine:
    """A mount in the foreground on a fast and a slow ext4 of its own."""

    def __init__(self, base: Path, stack: ExitStack) -> None:
        mountpoint = base / "mnt"
        mountpoint.mkdir(parents=True)
        for name, size in (("fast", "64M"), ("slow", "64M")):
            stack.enter_context(loop_filesystem(base / f"{name}.img", base / name, size, MKFS))
        self.mount = Mount(base / "fast", base / "slow", mountpoint, ("--mode", "slow"))
        self.log = stack.enter_context((base / "log").open("w+"))
        self.daemon: subprocess.Popen[str] | None = None
        stack.callback(self.close)

    def start(self) -> None:
        mount = self.mount
        paths = map(str, (mount.fast, mount.slow, mount.mountpoint))
        self.daemon = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "mount", "-f", *mount.options, *paths],
            stderr=self.log,
        )
        wait_until(lambda: is_mounted(mount.mountpoint), "the mount")

    @property
    def pid(self) -> int:
        assert self.daemon is not None
        return self.daemon.pid

    def terminate(self) -> None:
        """Tells the daemon to stop; returns when it has ended, but for what the device holds."""
        os.kill(self.pid, signal.SIGTERM)
        wait_until(lambda: not is_running(self.pid), "the daemon's end")

    def exit_status(self) -> int:
        """Of the daemon, once nothing holds it."""
        assert self.daemon is not None
        status = self.daemon.wait(20)
        self.daemon = None
        return status

    def cut_power_of_the_fast_device(self) -> None:
        with opened(self.mount.fast, os.O_RDONLY) as fd:
            fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))

    def restore_power(self) -> None:
        path = self.mount.fast
        wait_until(lambda: os.system(f"umount {path} 2>/dev/null") == 0, "umount")
        assert os.system(f"mount -o loop {path}.img {path}") == 0

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(20)
        self.mount.clean_up()
        self.log.seek(0)
        assert "Traceback" not in self.log.read()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        machine = Machine(tmp_path / "machine", stack)
        machine.start()
        yield machine


def make_files(mount: Mount, *names: str) -> list[Path]:
    paths = [mount.mountpoint / name for name in names]
    for path in paths:
        path.write_bytes(path.name.encode())
        path.chmod(0o644)
    wait_until(lambda: all(is_idle(path) for path in mount.objects), "the fsync of each")
    assert len(mount.objects) == len(names)
    return paths


def is_idle(path: Path) -> bool:
    """Whether an object has what it is to have."""
    return path.stat().st_size > 0 and stat.S_IMODE(path.stat().st_mode) == 0o644


def modes(mount: Mount) -> list[int]:
    """Of all objects."""
    return [stat.S_IMODE(path.stat().st_mode) for path in mount.objects]


@contextmanager
def standing_still(
    machine: Machine, act: Callable[..., None], paths: list[Path], *arguments: object
) -> Iterator[Callable[[], None]]:
    """The slow device frozen, with an act on each of these files waiting in it."""
    with ExitStack() as stack:
        thaw = stack.enter_context(frozen(machine.mount.slow))
        waiting = [Background(lambda path=path: act(path, *arguments)) for path in paths]
        wait_until(lambda: is_stopped_by_a_freeze(machine.pid), "the device to hang")
        yield thaw
        thaw()
        for waiter in waiting:
            waiter.join()


def truncate(path: Path) -> None:
    with suppress(OSError):  # when the daemon ends
        os.truncate(path, 1)


def append(path: Path) -> None:
    with suppress(OSError), open(path, "ab", buffering=0) as stream:
        stream.write(b"more")


def remove_and_chmod(removed: list[Path], changed: list[Path]) -> None:
    """One by one: each for itself is work for the device, and none waits for it."""
    for number, path in enumerate(removed):
        began = time.monotonic()
        path.unlink()
        if number < len(changed):
            changed[number].chmod(0o600)
        assert time.monotonic() - began < PROMPT_S
        time.sleep(0.05)


def expect_removed_and_changed(mount: Mount) -> None:
    """Of 48 files 30 are gone, with all that was theirs, and 10 have their new mode."""
    wait_until(lambda: len(mount.objects) == 18, "the removal of the objects")
    wait_until(lambda: len(os.listdir(mount.fast / "shadows")) == 18, "that of the shadows")
    wait_until(lambda: modes(mount).count(0o600) == 10, "the modes")


NOT_SYNCED = 3  # what the hanging device holds, and it alone
NAMES = [str(number) for number in range(48)]
HUNG, REMOVED, CHANGED = slice(0, 8), slice(8, 38), slice(38, 48)


def test_files_removed_and_changed_while_the_device_hangs_are_so_when_it_goes_on(
    machine: Machine,
) -> None:
    mount = machine.mount
    paths = make_files(mount, *NAMES)
    with standing_still(machine, truncate, paths[HUNG]) as thaw:
        remove_and_chmod(paths[REMOVED], paths[CHANGED])
        thaw()
        expect_removed_and_changed(mount)
    machine.terminate()
    assert machine.exit_status() == 0


def test_object_gets_the_mode_that_was_set_while_an_earlier_one_was_on_its_way(
    machine: Machine,
) -> None:
    (path,) = make_files(machine.mount, "file")
    with standing_still(machine, Path.chmod, [path], 0o640):
        wait_until(lambda: stat.S_IMODE(path.stat().st_mode) == 0o640, "the earlier one")
        path.chmod(0o600)
    wait_until(lambda: modes(machine.mount) == [0o600], "the mode")


def test_files_removed_and_changed_before_sigterm_while_the_device_hangs_are_so_at_the_next_mount(
    machine: Machine,
) -> None:
    mount = machine.mount
    paths = make_files(mount, *NAMES)
    with standing_still(machine, truncate, paths[HUNG]) as thaw:
        remove_and_chmod(paths[REMOVED], paths[CHANGED])
        machine.terminate()
        thaw()
        assert machine.exit_status() == NOT_SYNCED
    assert modes(mount).count(0o600) < 10
    machine.start()
    expect_removed_and_changed(mount)


def test_sigterm_makes_the_fast_tier_durable_and_ends_the_daemon_though_a_device_hangs(
    machine: Machine,
) -> None:
    mount = machine.mount
    (slow,) = make_files(mount, "slow")
    machine.terminate()
    machine.exit_status()  # not 0 if the disk is busy for longer than it waits
    mount.options = ("--durability", "process")
    machine.start()
    (mount.mountpoint / "orders-0").mkdir()
    fast = mount.mountpoint / "orders-0/fast"
    fast.write_bytes(b"fast" * 10_000)
    with standing_still(machine, append, [slow]) as thaw:
        machine.terminate()
        machine.cut_power_of_the_fast_device()
        thaw()
        assert machine.exit_status() == NOT_SYNCED
    machine.restore_power()
    machine.start()
    assert fast.read_bytes() == b"fast" * 10_000


def test_umount_names_the_device_that_hangs(machine: Machine) -> None:
    mount = machine.mount
    (slow,) = make_files(mount, "slow")
    with standing_still(machine, append, [slow]) as thaw:
        result = run_pafkafs("umount", "--lazy", str(mount.mountpoint))
        thaw()
        assert machine.exit_status() == NOT_SYNCED
    assert result.returncode == 1
    assert f"{mount.slow} could not be synced" in result.stderr


def test_move_waits_for_a_write_that_the_device_holds_back(machine: Machine) -> None:
    mount = machine.mount
    directory = mount.mountpoint / "topic-0"
    directory.mkdir()
    path = directory / f"{0:020}.log"
    path.write_bytes(bytes(1 << 20))
    (directory / f"{1:020}.log").touch()  # the active one
    with opened(path, os.O_RDWR) as fd:
        os.fsync(fd)
        with frozen(mount.slow) as thaw:
            writer = Background(lambda: os.pwrite(fd, b"late", 100))
            wait_until(lambda: is_stopped_by_a_freeze(machine.pid), "the write to be stopped")
            where = str(mount.mountpoint)
            number = control.ask(where, "migrate", path=f"topic-0/{path.name}", to="fast")
            wait_until(lambda: is_copied(where), "the copy")
            for _ in range(100):  # more than a cut-over that does not wait would need
                assert control.ask(where, "job", job=number)["state"] == "running"
            thaw()
            writer.join()
        wait_until(lambda: control.ask(where, "job", job=number)["state"] == "done", "the move")
        assert os.pread(fd, 6, 99) == b"\0late\0"
    assert not (mount.tree / "topic-0" / path.name).is_symlink()


def is_copied(where: str) -> bool:
    """Whether all that there was is in the copy."""
    running = control.ask(where, "status")["migration"]["running"]
    return bool(running) and running[0]["copied_bytes"] >= running[0]["size_bytes"]
