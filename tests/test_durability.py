"""What a durability mode promises, after the death of the daemon and after a power cut."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import cut_off
from harness import wait_until
from machine import Machine

RECORD = 4096


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path / "machine", "ext4", ("--durability", "power"))
    yield machine
    machine.close()


def record(number: int) -> bytes:
    return number.to_bytes(8, "little") * (RECORD // 8)


class Appender(threading.Thread):
    """Appends records to new files in new directories until it fails; knows what was acked."""

    def __init__(self, root: Path, records_in_file: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.records_in_file = records_in_file
        self.acked: dict[str, int] = {}
        self.stop = False

    def run(self) -> None:
        try:
            for number in range(100_000):
                directory = self.root / f"topic-{number}"
                directory.mkdir()
                path = directory / "00000000000000000000.log"
                with open(path, "xb", buffering=0) as stream:
                    for index in range(self.records_in_file):
                        if self.stop:
                            return
                        stream.write(record(index))
                        self.acked[str(path.relative_to(self.root))] = index + 1
        except OSError:
            return

    def check(self, acked: dict[str, int] | None = None) -> int:
        """Every record is there that was acked, or had been acked when this was noted: while a
        filesystem is being shut down it may still tell success.  How many."""
        acked = self.acked if acked is None else acked
        for name, count in acked.items():
            data = (self.root / name).read_bytes()
            for index in range(count):
                assert data[index * RECORD : (index + 1) * RECORD] == record(index), (name, index)
        return sum(acked.values())


@pytest.mark.parametrize("records_in_file", [3, 200])
def test_power_mode_keeps_every_acked_byte_of_new_files_through_a_power_cut(
    machine: Machine, records_in_file: int
) -> None:
    machine.mount.start()
    appender = Appender(machine.mount.mountpoint, records_in_file)
    appender.start()
    wait_until(lambda: sum(appender.acked.values()) > 300, "some records")
    acked = dict(appender.acked)
    machine.cut_power()
    appender.join(10)
    machine.mount.start()
    assert appender.check(acked) > 300


def test_power_mode_keeps_every_acked_byte_of_spilled_files_through_a_power_cut(
    machine: Machine,
) -> None:
    machine.mount.start("--fast-capacity", "8MiB")
    appender = Appender(machine.mount.mountpoint, 500)
    appender.start()
    wait_until(lambda: sum(appender.acked.values()) > 3000, "some records", 60)
    acked = dict(appender.acked)
    machine.cut_power()
    appender.join(10)
    machine.mount.start()
    assert machine.mount.device("slow")["files"] > 0
    assert appender.check(acked) > 3000


def test_fsync_in_process_mode_holds_through_a_power_cut_on_either_tier(machine: Machine) -> None:
    machine.mount.start("--durability", "process", "--fast-capacity", "8MiB")
    root = machine.mount.mountpoint
    for name, size in (("small", 1 << 20), ("spilled", 12 << 20)):
        with open(root / name, "wb") as stream:
            stream.write(b"x" * size)
            stream.flush()
            os.fsync(stream.fileno())
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    machine.cut_power()
    machine.mount.start()
    assert (root / "small").read_bytes() == b"x" * (1 << 20)
    assert (root / "spilled").read_bytes() == b"x" * (12 << 20)


def test_process_mode_keeps_every_acked_byte_through_sigkill_of_the_daemon(
    make_mount: MakeMount,
) -> None:
    mount = make_mount("--fast-capacity", "8MiB").start()
    appender = Appender(mount.mountpoint, 500)
    appender.start()
    wait_until(lambda: sum(appender.acked.values()) > 5000, "some records", 60)
    mount.kill()
    appender.join(10)
    mount.start()
    assert mount.device("slow")["files"] > 0
    assert appender.check() > 5000


def test_umount_makes_durable_what_nobody_fsynced(machine: Machine) -> None:
    mount = machine.mount.start("--durability", "process", "--fast-capacity", "8MiB")
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    (directory / "plain").write_bytes(b"x" * (1 << 20))
    (directory / "demoted").write_bytes(b"x" * (12 << 20))
    (directory / "demoted").chmod(0o604)
    assert (mount.tree / "orders-0/demoted").is_symlink()
    with open(directory / "demoted", "ab", buffering=0) as stream:
        stream.write(b"more")
    mount.stop()
    machine.cut_power()
    mount.start()
    assert (directory / "plain").read_bytes() == b"x" * (1 << 20)
    assert (directory / "demoted").read_bytes() == b"x" * (12 << 20) + b"more"
    assert (directory / "demoted").stat().st_mode & 0o777 == 0o604


def test_fsync_covers_what_a_daemon_that_was_killed_had_acked(machine: Machine) -> None:
    mount = machine.mount.start("--durability", "process", "--mode", "slow")
    path = mount.mountpoint / "file"
    with cut_off(path) as stream:
        stream.write(b"durable")
        os.fsync(stream.fileno())
        stream.write(b", acked" * 10_000)
        mount.kill()
    mount.start("--durability", "process")
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    machine.cut_power("slow")
    mount.start()
    assert path.read_bytes() == b"durable" + b", acked" * 10_000


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_file_that_began_on_the_slow_tier_can_be_read_and_cut_after_a_power_cut(
    tmp_path: Path, kind: str
) -> None:
    """Nobody has fsynced it, and its length may be there, that another file's fsync took along,
    without its data; but then the file is short, and not broken."""
    machine = Machine(tmp_path / "machine", kind, ("--mode", "slow"))
    try:
        root = machine.mount.start().mountpoint
        paths = [root / f"{number:020}.log" for number in range(3)]
        with ExitStack() as stack:
            streams = [stack.enter_context(cut_off(path)) for path in paths]
            streams[0].write(record(1) * 50)
            streams[1].truncate(50 * RECORD)
            os.posix_fallocate(streams[2].fileno(), 0, 50 * RECORD)
            sync_shadows(machine)
            machine.cut_power()
        machine.mount.start()
        for path in paths:
            assert set(path.read_bytes()) <= {0, 1}
            with path.open("r+b", buffering=0) as stream:
                stream.truncate(RECORD)
                stream.write(b"again")
        assert machine.mount.status()["state"] == "healthy"
    finally:
        machine.close()


def sync_shadows(machine: Machine) -> None:
    """As the fsync of anything on the fast tier may, which commits all of its journal."""
    for shadow in (machine.mount.fast / "shadows").iterdir():
        with shadow.open("rb") as stream:
            os.fsync(stream.fileno())
