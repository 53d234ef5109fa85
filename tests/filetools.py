"""What tests of files through a mount share: one mount for many tests, files on either tier,
work in other processes, and system calls that Python has no function for."""

import ctypes
import fcntl
import os
import pickle
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness import SLOWNESS, Mount, fast_memory

MIB = 1 << 20

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_COLLAPSE_RANGE = 8
UTIME_OMIT = (1 << 30) - 2

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


# -- mounts -------------------------------------------------------------------------------------

SMALL_FAST_BYTES = 4 * MIB


@contextmanager
def shared_mount(directory: Path, *options: str) -> Iterator[Mount]:
    """A mount for all tests of a module, each of which works in a directory of its own."""
    with fast_memory(directory / "memory", "256m") as fast:
        slow, mountpoint = directory / "slow", directory / "mnt" / "kafka-logs"
        slow.mkdir(exist_ok=True)
        mountpoint.mkdir(parents=True)
        mount = Mount(fast, slow, mountpoint, options, directory / "pafkafs.log")
        try:
            yield mount.start()
        finally:
            mount.clean_up()
        assert "Traceback" not in mount.log_text(), mount.log_text()


def is_spilled(mount: Mount, path: Path) -> bool:
    """Whether the data of a file of the mount is on the slow tier, by its home tree."""
    return (mount.tree / path.relative_to(mount.mountpoint)).is_symlink()


def push_to_slow_tier(path: Path, fast_bytes: int) -> None:
    """Makes a file outgrow the fast tier; it ends empty, and stays where it went."""
    with open(path, "r+b", buffering=0) as file:
        for _ in range(fast_bytes // MIB + 1):
            file.write(bytes(MIB))
        file.truncate(0)


@dataclass(frozen=True)
class Files:
    """Makes files whose data is on one tier, in a directory of a mount."""

    mount: Mount
    directory: Path
    spilled: bool
    segments: bool = False

    def make(self, name: str = "file", content: bytes = b"") -> Path:
        """A new file with this content, named as a segment file if they shall be segments."""
        path = self.directory / (f"{zlib.crc32(name.encode()):020}.log" if self.segments else name)
        path.touch()
        if self.spilled:
            push_to_slow_tier(path, SMALL_FAST_BYTES)
        with open(path, "r+b", buffering=0) as file:
            write_all(file.fileno(), content)
        assert is_spilled(self.mount, path) == self.spilled
        return path


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor, closed also when the test fails: else the mount stays busy."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def cut_off(path: Path) -> Iterator[BinaryIO]:
    """A new file that is still open when its mount ends: closing it fails then, or does not."""
    stream = open(path, "w+b", buffering=0)  # noqa: SIM115 - its close may fail
    try:
        yield stream
    finally:
        with suppress(OSError):
            stream.close()


# -- system calls -------------------------------------------------------------------------------


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """rename with RENAME_NOREPLACE or RENAME_EXCHANGE."""
    old_name, new_name = os.fsencode(old), os.fsencode(new)
    _checked(_libc.renameat2(_AT_FDCWD, old_name, _AT_FDCWD, new_name, ctypes.c_uint(flags)))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), without glibc's emulation."""
    _checked(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def start_writeback(fd: int) -> None:
    """Sends what was stored into mappings on its way.  Unlike write and msync it does not hold
    the inode meanwhile, so the file can be renamed, linked and unlinked."""
    write_only = 2  # SYNC_FILE_RANGE_WRITE
    _checked(_libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), write_only))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def set_mtime_only(path: Path, mtime_ns: int) -> None:
    """utimensat with UTIME_OMIT for the access time."""
    omit, mtime = _Timespec(0, UTIME_OMIT), _Timespec(*divmod(mtime_ns, 1_000_000_000))
    _checked(_libc.utimensat(_AT_FDCWD, os.fsencode(path), (_Timespec * 2)(omit, mtime), 0))


def write_all(fd: int, data: bytes) -> None:
    """Writes everything at the descriptor's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# -- other processes and threads ----------------------------------------------------------------


class Child:
    """A function that runs in a process of its own, from the call on."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_report(act, writer)
        os.close(writer)

    def result(self) -> Any:
        """What the function returned; raises what it raised."""
        with open(self._pipe, "rb") as pipe:
            report = pipe.read()
        os.waitpid(self.pid, 0)
        assert report, "the child was killed"
        outcome, value = pickle.loads(report)
        if outcome == "raised":
            raise value
        return value

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._pipe)
        os.waitpid(self.pid, 0)


def _run_and_report(act: Callable[[], Any], writer: int) -> None:
    """Never returns: what pytest does at exit is the parent's alone."""
    try:
        report = pickle.dumps(("returned", act()))
    except BaseException as error:
        report = pickle.dumps(("raised", error))
    write_all(writer, report)
    os._exit(0)


def in_children(acts: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs functions at once in a process each; their results."""
    children = [Child(act) for act in acts]
    return [child.result() for child in children]


class Background:
    """A function in a thread, whose error is not lost."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float = 30.0) -> None:
        """Waits for its end; raises what it raised."""
        self._thread.join(timeout_s * SLOWNESS)
        assert not self.running, f"still running after {timeout_s * SLOWNESS:g} s"
        if self._error is not None:
            raise self._error


# -- a slow device that stands still ------------------------------------------------------------


_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


@contextmanager
def frozen(filesystem: Path) -> Iterator[Callable[[], None]]:
    """All changes of a filesystem wait, from here to the call of what this yields, or the end.

    No program may be run meanwhile: a new process closes the descriptors that it inherits, and
    each close of a file waits for what was stored into its mappings.
    """
    is_frozen = True

    def thaw() -> None:
        nonlocal is_frozen
        if is_frozen:
            fcntl.ioctl(fd, _FITHAW, 0)
        is_frozen = False

    with opened(filesystem, os.O_RDONLY | os.O_DIRECTORY) as fd:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield thaw
        finally:
            thaw()


def is_stopped_by_a_freeze(pid: int) -> bool:
    """Whether a thread of the daemon is stopped by the frozen filesystem."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        if state == "D" and "percpu" in (task / "wchan").read_text():  # for the thaw
            return True
    return False
