"""What a campaign of faults needs: a scene of devices and a daemon that starts in 25 ms, and a
model of what must be there whatever happens at whichever system call.

The model knows what each name is. A step is one system call through the mount with what it makes
of the names: until it is acked there may be what was before or what comes after, then only that.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemons import Daemons
from faults import Faults
from harness import Mount, is_dead_mount, is_mounted, wait_until

from pafkafs import control
from pafkafs.errors import PafkafsError

if TYPE_CHECKING:
    from operations import Operation

PATIENCE_S = 20.0
KAFKA = 1000  # the broker is not root
_OWN_NAMES = {"pafkafs.json", "tree", "shadows", "objects", "tmp", "sizes", "lost"}
_STATE = Path("devices")
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """This thread's system calls on files are those of a user."""
    _libc.setfsgid(uid)
    _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


# -- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a name is; content is the text of a symlink. mtime_ns is None unless it was set."""

    kind: str
    content: bytes = b""
    mode: int = 0o640
    owner: int = KAFKA
    mtime_ns: int | None = None

    def __repr__(self) -> str:
        content = f"{len(self.content)} bytes {self.content[:8]!r}"
        return f"<{self.kind} {content} {self.mode:o} of {self.owner} {self.mtime_ns}>"


State = Mapping[str, Entry]
DIRECTORY = Entry("directory", mode=0o750)


@dataclass
class Model:
    """What must be there: one of the states in `allowed`; of `torn`, any bytes between theirs."""

    state: State = field(default_factory=dict)
    in_flight: State | None = None
    torn: str | None = None

    def step(
        self, act: Callable[[], Any], changes: Mapping[str, Entry | None], *, torn: str | None
    ) -> None:
        """Runs a call that makes these changes, as Kafka; None removes a name."""
        after = {name: e for name, e in {**self.state, **changes}.items() if e is not None}
        self.in_flight, self.torn = after, torn
        with as_user(KAFKA):
            act()
        self.state, self.in_flight, self.torn = after, None, None

    def settle(self, found: State, *, again: bool = False) -> None:
        """What is there, from now on; again: a mount decides once more about what is in flight."""
        allowed = [self.state] if self.in_flight is None else [self.state, self.in_flight]
        if self.in_flight is not None and self.torn is not None and self.torn in found:
            size = len(found[self.torn].content)
            entry = self.in_flight[self.torn]
            if len(self.state[self.torn].content) < size:
                allowed.append({**self.in_flight, self.torn: _cut(entry, size)})
        for state in allowed:
            if not differences(state, found):
                if not again:
                    self.state, self.in_flight, self.torn = state, None, None
                return
        raise AssertionError("; or: ".join(differences(state, found) for state in allowed))


def _cut(entry: Entry, size: int) -> Entry:
    return replace(entry, content=entry.content[:size])


def differences(expected: State, found: State) -> str:
    """What is not as it must be; empty when all is."""
    told = []
    for name in sorted(expected.keys() | found.keys()):
        one, other = expected.get(name), found.get(name)
        if one is not None and other is not None and one.mtime_ns is None:
            other = replace(other, mtime_ns=None)
        if one != other:
            told.append(f"{name} is {other}, not {one}")
    return ", ".join(told)


def read_state(root: Path) -> dict[str, Entry]:
    """All names below root as they are."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            found[str(path.relative_to(root))] = _entry(path)
    return found


def _entry(path: Path) -> Entry:
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        kind, content = "directory", b""
    elif stat.S_ISLNK(status.st_mode):
        kind, content = "symlink", os.fsencode(path.readlink())
    else:
        kind, content = "file", path.read_bytes()
    mode = stat.S_IMODE(status.st_mode)
    return Entry(kind, content, mode, status.st_uid, status.st_mtime_ns)


# -- the scene ----------------------------------------------------------------------------------


class Scene:
    """Devices below one root, whatever a set needs of them, and a mount."""

    def __init__(self, directory: Path, faults: Faults, daemons: Daemons) -> None:
        self.root = directory / _STATE
        self.faults = faults
        self._daemons = daemons
        self._directory = directory
        self.fast, self.slow = self.root / "memory" / "fast", self.root / "disk" / "slow"
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        self.mount = Mount(self.fast, self.slow, mountpoint, (), directory / "pafkafs.log")
        self.mount.command = daemons.run
        self.model = Model()
        self.held: list[int] = []  # descriptors
        self._stack = ExitStack()
        self.result: subprocess.CompletedProcess[str] | None = None  # of a command
        self._prepared = Model()
        self.job: dict[str, Any] = {}  # the last move

    # -- its life --

    def start(self, *more: str) -> None:
        """Mounts, and waits until what a mount does by itself is done."""
        self.mount.start(*more)

    def stop(self) -> None:
        """Unmounts cleanly."""
        self.mount.stop()

    def kill(self) -> None:
        """Ends the daemon, if there is one, and the mount."""
        self.faults.disarm()
        with suppress(OSError):  # of a mount that is dead
            self.release()
        if is_mounted(self.mount.mountpoint):
            with suppress(PafkafsError, ProcessLookupError):  # it is dying already
                os.kill(self.status()["pid"], 9)
            self.wait(lambda: is_dead_mount(self.mount.mountpoint), "the daemon's death")
            subprocess.run(["umount", "-l", str(self.mount.mountpoint)], check=True)
        self.wait(lambda: all(map(_is_unlocked, self.devices())), "the end of the daemon")

    def is_dead(self) -> bool:
        """Whether a mount is left without a daemon."""
        return is_dead_mount(self.mount.mountpoint)

    def is_mounted(self) -> bool:
        """Whether a daemon serves."""
        return os.path.ismount(self.mount.mountpoint)

    def status(self) -> dict[str, Any]:
        """Without starting a program for it."""
        found: dict[str, Any] = control.ask(str(self.mount.mountpoint), "status")
        return found

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Until it is true."""
        wait_until(condition, what, PATIENCE_S, poll_s=0.002)

    # -- the devices --

    def empty(self) -> None:
        """New devices, and nothing known of them."""
        self.kill()
        _clear(self.root)
        self.fast.mkdir()
        self.slow.mkdir()
        self.mount.log.write_text("")
        self.mount.options, self.mount.fast_list, self.mount.slow_list = (), "", ""
        self.model = Model()

    def prepare(self, operation: "Operation") -> None:
        """Makes the devices that each run of an operation begins with."""
        self.empty()
        self.mount.options = operation.options
        self.start()
        os.chown(self.mount.mountpoint, KAFKA, KAFKA)
        operation.prepare(self)
        if is_mounted(self.mount.mountpoint):
            self.stop()
        template = self._directory / "template"
        shutil.rmtree(template, ignore_errors=True)
        template.mkdir()
        _copy(self.root, template)
        self._prepared = replace(self.model)

    def restore(self, operation: "Operation") -> None:
        """The devices as `prepare` made them; nothing is mounted."""
        self.empty()
        _copy(self._directory / "template", self.root)
        self.model = replace(self._prepared)
        self.mount.options = operation.options

    # -- steps: one call through the mount each --

    def path(self, name: str) -> Path:
        """Of a name of the model, through the mount."""
        return self.mount.mountpoint / name

    def make(self, name: str, content: bytes = b"", mode: int = 0o640) -> None:
        """Creates a file, writes it with one call, syncs and closes it."""
        with self.created(name, mode) as fd:
            if content:
                self.append(name, content, fd)
                self.sync(fd)

    @contextmanager
    def created(self, name: str, mode: int = 0o640) -> Iterator[int]:
        """A new file, open."""
        fds: list[int] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.model.step(
            lambda: fds.append(os.open(self.path(name), flags, mode)),
            {name: Entry("file", mode=mode)},
            torn=None,
        )
        try:
            yield fds[0]
        finally:
            os.close(fds[0])

    @contextmanager
    def opened(self, name: str, flags: int = os.O_RDWR) -> Iterator[int]:
        """A file that is there, open."""
        with as_user(KAFKA):
            fd = os.open(self.path(name), flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def append(self, name: str, data: bytes, fd: int) -> None:
        """One write at the end."""
        self.write(name, len(self.model.state[name].content), data, fd)

    def write(self, name: str, offset: int, data: bytes, fd: int) -> None:
        """One write; what is behind the end counts as torn when it comes in part."""
        entry = self.model.state[name]
        content = bytearray(entry.content)
        content[offset : offset + len(data)] = data
        appends = offset == len(entry.content)

        def act() -> None:
            done = os.pwrite(fd, data, offset)
            assert done == len(data), f"only {done} of {len(data)} bytes were written"

        after = replace(entry, content=bytes(content), mtime_ns=None)
        self.model.step(act, {name: after}, torn=name if appends else None)

    def sync(self, fd: int) -> None:
        """fsync: changes nothing."""
        self.model.step(lambda: os.fsync(fd), {}, torn=None)

    def truncate(self, name: str, size: int) -> None:
        """By its path."""
        entry = self.model.state[name]
        content = entry.content[:size].ljust(size, b"\0")
        self.model.step(
            lambda: os.truncate(self.path(name), size),
            {name: replace(entry, content=content, mtime_ns=None)},
            torn=None,
        )

    def mkdir(self, name: str) -> None:
        self.model.step(lambda: self.path(name).mkdir(0o750), {name: DIRECTORY}, torn=None)

    def remove(self, name: str) -> None:
        """unlink or rmdir."""
        directory = self.model.state[name].kind == "directory"
        act = self.path(name).rmdir if directory else self.path(name).unlink
        self.model.step(act, {name: None}, torn=None)

    def rename(self, old: str, new: str) -> None:
        """A file, or a directory with all in it."""
        moved = {n: e for n, e in self.model.state.items() if n == old or n.startswith(old + "/")}
        changes: dict[str, Entry | None] = dict.fromkeys(moved)
        changes |= {new + name[len(old) :]: entry for name, entry in moved.items()}
        self.model.step(lambda: os.rename(self.path(old), self.path(new)), changes, torn=None)

    def hold(self, opened: AbstractContextManager[int]) -> None:
        """Keeps a file open until `release`."""
        self.held.append(self._stack.enter_context(opened))

    def release(self) -> None:
        """Closes what is held."""
        self.held.clear()
        self._stack.close()

    # -- moves --

    def begin_move(self, name: str, tier: str) -> int:
        """The number of a job that moves a file."""
        number: int = control.ask(str(self.mount.mountpoint), "migrate", path=name, to=tier)
        return number

    def move(self, name: str, tier: str) -> None:
        """Until it has arrived."""
        number = self.begin_move(name, tier)

        def ended() -> bool:
            self.job = control.ask(str(self.mount.mountpoint), "job", job=number)
            return self.job["state"] in ("done", "there", "failed")

        self.wait(ended, "the move to end")
        if self.job["state"] == "failed":
            raise OSError(errno.EIO, self.job["error"])

    def is_demoted(self, name: str) -> bool:
        return (self.fast / "tree" / name).is_symlink()

    # -- what must hold --

    def check(self, *, again: bool = False) -> None:
        """Each name is what it must be, through the mount."""
        self.model.settle(read_state(self.mount.mountpoint), again=again)

    def check_soon(self) -> None:
        """The same, of a mount that met a fault: it may compare an object with its shadow at the
        first I/O only, and decide once more about what is in flight at the next mount."""
        found: list[str] = []

        def holds() -> bool:
            try:
                self.check(again=True)
            except AssertionError as error:
                found.append(str(error))
                return False
            return True

        try:
            self.wait(holds, "the names")
        except AssertionError:
            raise AssertionError(found[-1]) from None

    def check_tree(self) -> None:
        """It is so without the mount, too: none of them grows, and no fault was met last."""
        tree = self.fast / "tree"
        for name, entry in self.model.state.items():
            # The object of an empty file is made when somebody writes to it.
            if entry.kind == "file" and (entry.content or (tree / name).exists()):
                assert (tree / name).read_bytes() == entry.content, f"tree/{name} is another one"
        assert {str(p.relative_to(tree)) for p in _below(tree)} == self.model.state.keys()

    def probe(self) -> None:
        """The mount goes on."""
        os.chown(self.mount.mountpoint, KAFKA, KAFKA)
        probe = self.path("probe")
        with as_user(KAFKA):
            probe.write_bytes(b"goes on")
            assert probe.read_bytes() == b"goes on"
            probe.unlink()

    def expect_no_traceback(self) -> None:
        """No fault may be unexpected."""
        before, _, trace = self.mount.log_text().partition("Traceback")
        assert not trace, f"{before.splitlines()[-1]} Traceback{trace}"

    def litter(self) -> list[str]:
        """What no name refers to, and objects that do not look like their files."""
        found = []
        stubs = [p.readlink() for p in _below(self.fast / "tree") if p.is_symlink()]
        stubs = [stub for stub in stubs if "objects" in stub.parts]
        ids = {stub.name.rpartition(".")[2] for stub in stubs}
        for device in self.devices():
            objects = list(_below(device / "objects"))
            found += [str(p) for p in objects if p.is_file() and p not in stubs]
            found += [str(p) for p in objects if p.is_dir() and not any(p.iterdir())]
            found += [str(device / n) for n in os.listdir(device) if n not in _OWN_NAMES]
        found += [f"shadow {s}" for s in os.listdir(self.fast / "shadows") if s not in ids]
        found += [f"tmp {s}" for s in os.listdir(self.fast / "tmp")]
        for stub in stubs:
            shadow = self.fast / "shadows" / stub.name.rpartition(".")[2]
            if stub.exists() and _attributes(stub) != _attributes(shadow):
                found.append(f"{stub} is {_attributes(stub)}, not {_attributes(shadow)}")
        return found

    def is_tidy(self) -> bool:
        try:
            return not self.litter()
        except FileNotFoundError:
            return False  # it changes while it is looked at

    def devices(self) -> list[Path]:
        """All that have a record."""
        return [record.parent for record in self.root.rglob("pafkafs.json")]

    def expect_tidy(self) -> None:
        try:
            self.wait(self.is_tidy, "nothing left over")
        except AssertionError as error:
            raise AssertionError(f"left over: {self.litter()}") from error


def _below(root: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(root):
        yield from (Path(directory, name) for name in (*names, *files))


def _attributes(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_size, status.st_mode, status.st_uid, status.st_gid)


def _is_unlocked(device: Path) -> bool:
    fd = os.open(device, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", f"{source}/.", str(target)], check=True)


def _clear(root: Path) -> None:
    """All but the filesystems that are mounted below."""
    for filesystem in root.iterdir():
        for path in filesystem.iterdir():
            shutil.rmtree(path)
