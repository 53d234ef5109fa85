"""Many callers at once, callers that are killed, and a mount that is torn away under them."""

import mmap
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from conftest import MakeMount
from filetools import MIB, Child
from harness import Mount, is_mounted, is_running, wait_until

CALLERS = 1000
SENDING_S = 3.0
TAIL_BYTES = 100_000
SEGMENT_BYTES = 400 * MIB


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_thousand_callers_at_once_are_all_answered_and_nothing_leaks(mount: Mount) -> None:
    pid = mount.pid
    (mount.mountpoint / "first").write_bytes(b"x")
    before = descriptors(pid)
    together = threading.Barrier(CALLERS)
    failed: list[BaseException] = []

    def call(number: int) -> None:
        path = mount.mountpoint / str(number)
        data = number.to_bytes(4, "little") * 2048
        try:
            together.wait(60)
            with open(path, "w+b", buffering=0) as stream:
                stream.write(data)
                os.fsync(stream.fileno())
                assert os.fstat(stream.fileno()).st_size == len(data)
                assert os.pread(stream.fileno(), len(data), 0) == data
            path.rename(path.with_suffix(".renamed"))
            path.with_suffix(".renamed").unlink()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert os.listdir(mount.mountpoint) == ["first"]
    wait_until(lambda: descriptors(pid) <= before + 2, "the descriptors to be closed")
    wait_until(lambda: mount.device("fast")["used_bytes"] == 4096, "the room to come back")


def test_callers_killed_at_any_moment_leave_the_mount_at_work(mount: Mount) -> None:
    pid = mount.pid
    before = descriptors(pid)
    script = "cd {}; while :; do echo x >> $$; mv $$ $$.b; cat $$.b > $$; rm $$.b; ls > $$.l; done"
    for _ in range(20):
        callers = [
            subprocess.Popen(["sh", "-c", script.format(mount.mountpoint)], start_new_session=True)
            for _ in range(4)
        ]
        wait_until(lambda: os.listdir(mount.mountpoint), "some work")
        for caller in callers:
            os.killpg(caller.pid, 9)
            caller.wait()
        for name in os.listdir(mount.mountpoint):
            (mount.mountpoint / name).unlink()
    (mount.mountpoint / "after").write_bytes(b"fine")
    assert (mount.mountpoint / "after").read_bytes() == b"fine"
    wait_until(lambda: descriptors(pid) <= before + 4, "the descriptors to be closed")


def send_tail(path: Path, until: float, appended: Callable[[], int]) -> int:
    """Sends what was appended to a file, and looks at it; how much.

    As the broker does, never more than the appends that have returned: until then a stat may
    tell of bytes that the page cache does not have yet.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, open(path, "rb", buffering=0) as stream:
        position, total = 0, 0
        while time.monotonic() < until:
            count = min(appended() - position, TAIL_BYTES)
            if count == 0:
                continue
            sent = os.sendfile(theirs.fileno(), stream.fileno(), position, count)
            got = ours.recv(sent, socket.MSG_WAITALL)
            assert got == pattern(position, count), f"wrong bytes at {position}, {sent} sent"
            total += sent
            position = max(position + sent, appended() - TAIL_BYTES)
    return total


PERIOD = 65_521  # no power of 2: a page in the wrong place is seen
UNIT = random.Random(0).randbytes(PERIOD).replace(b"\0", b"\1")


def pattern(position: int, length: int) -> bytes:
    """What is at a position of the file; a zero byte is nowhere."""
    start = position % PERIOD
    return (UNIT * (2 + length // PERIOD))[start : start + length]


def test_tail_that_is_sent_while_a_segment_is_appended_to_never_has_a_wrong_byte(
    make_mount: MakeMount,
) -> None:
    mount = make_mount("--fast-capacity", "1GiB").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    path = directory / "00000000000000000000.log"
    sizes, length = random.Random(1), 0
    shared = mmap.mmap(-1, mmap.PAGESIZE)

    def appended() -> int:
        return int.from_bytes(shared[:8], "little")

    with shared, open(path, "xb", buffering=0) as stream:
        until = time.monotonic() + SENDING_S
        readers = [Child(lambda: send_tail(path, until, appended)) for _ in range(2)]
        while time.monotonic() < until and length < SEGMENT_BYTES:
            length += stream.write(pattern(length, sizes.randint(1, 70_000)))
            shared[:8] = length.to_bytes(8, "little")
        assert min(reader.result() for reader in readers) > 10 * MIB
    assert path.stat().st_size == length


def test_forced_unmount_ends_the_daemon_and_loses_nothing(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    pid = mount.pid
    path: Path = mount.mountpoint / "file"
    with open(path, "wb", buffering=0) as stream:
        stream.write(b"written")
        subprocess.run(["umount", "-f", "-l", str(mount.mountpoint)], check=True)
        wait_until(lambda: not is_running(pid), "the daemon's end")
    assert not is_mounted(mount.mountpoint)
    mount.start()
    assert path.read_bytes() == b"written"
