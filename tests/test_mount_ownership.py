"""Modes and owners: what a user may do, and what becomes of the bits, as on ext4.

Each sequence of steps runs on a plain directory of ext4 and through a mount, on the fast tier
and spilled, and must come to the same.
"""

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from filetools import (
    MIB,
    SMALL_FAST_BYTES,
    Child,
    is_spilled,
    push_to_slow_tier,
    shared_mount,
)
from harness import Mount, loop_filesystem, wait_until

SHARED_GROUP = 20_000


@dataclass(frozen=True)
class User:
    uid: int
    groups: tuple[int, ...]
    umask: int = 0o022

    def become(self) -> None:
        """For this process, for good."""
        os.umask(self.umask)
        os.setgroups(self.groups)
        os.setresgid(self.groups[0], self.groups[0], self.groups[0])
        os.setresuid(self.uid, self.uid, self.uid)


ROOT = User(0, (0,))
ALICE = User(12345, (12345, SHARED_GROUP))
BOB = User(12346, (12346,))
CAROL = User(12347, (12347, SHARED_GROUP), umask=0o077)


@dataclass(frozen=True)
class Step:
    """What a user does in the current directory; makes is the file that it creates."""

    user: User
    act: Callable[[], object]
    makes: str = ""


# -- what is done -------------------------------------------------------------------------------


def make(user: User, name: str, mode: int = 0o666) -> Step:
    return Step(user, lambda: os.close(os.open(name, os.O_CREAT | os.O_EXCL, mode)), makes=name)


def mkdir(user: User, name: str, mode: int = 0o777) -> Step:
    return Step(user, lambda: os.mkdir(name, mode))


def mkfifo(user: User, name: str) -> Step:
    return Step(user, lambda: os.mkfifo(name, 0o666))


def symlink(user: User, name: str) -> Step:
    return Step(user, lambda: os.symlink("target", name))


def chmod(user: User, name: str, mode: int) -> Step:
    return Step(user, lambda: os.chmod(name, mode))


def chown(user: User, name: str, uid: int, gid: int) -> Step:
    return Step(user, lambda: os.chown(name, uid, gid, follow_symlinks=False))


def write(user: User, name: str) -> Step:
    def act() -> None:
        with open(name, "r+b", buffering=0) as file:
            file.write(b"written")

    return Step(user, act)


def truncate(user: User, name: str, size: int = 3) -> Step:
    return Step(user, lambda: os.truncate(name, size))


def read(user: User, name: str) -> Step:
    return Step(user, lambda: Path(name).read_bytes())


def unlink(user: User, name: str) -> Step:
    return Step(user, lambda: os.unlink(name))


def rmdir(user: User, name: str) -> Step:
    return Step(user, lambda: os.rmdir(name))


def rename(user: User, old: str, new: str) -> Step:
    return Step(user, lambda: os.rename(old, new))


def link(user: User, old: str, new: str) -> Step:
    return Step(user, lambda: os.link(old, new))


def list_directory(user: User, name: str) -> Step:
    return Step(user, lambda: sorted(os.listdir(name)))


def set_times(user: User, name: str) -> Step:
    return Step(user, lambda: os.utime(name, ns=(1, 2)))


def touch(user: User, name: str) -> Step:
    return Step(user, lambda: os.utime(name))


def allowed(user: User, name: str) -> Step:
    kinds = (os.R_OK, os.W_OK, os.X_OK)
    return Step(user, lambda: [os.access(name, kind) for kind in kinds])


# -- sequences ----------------------------------------------------------------------------------

SEQUENCES: dict[str, list[Step]] = {
    "a new file belongs to its maker, less the umask": [
        mkdir(ROOT, "d", 0o755),
        chmod(ROOT, "d", 0o777),
        make(ALICE, "d/alice"),
        make(CAROL, "d/carol", 0o777),
        make(ROOT, "d/root", 0o600),
        mkdir(ALICE, "d/directory"),
        mkfifo(BOB, "d/fifo"),
        symlink(BOB, "d/link"),
    ],
    "others are kept out by the mode": [
        make(ROOT, "f"),
        chown(ROOT, "f", ALICE.uid, ALICE.groups[0]),
        chmod(ROOT, "f", 0o640),
        read(ALICE, "f"),
        write(ALICE, "f"),
        read(BOB, "f"),
        write(BOB, "f"),
        truncate(BOB, "f"),
        allowed(BOB, "f"),
        allowed(ALICE, "f"),
        chmod(ROOT, "f", 0o604),
        read(BOB, "f"),
        allowed(BOB, "f"),
        chmod(ROOT, "f", 0o000),
        read(ALICE, "f"),
        read(ROOT, "f"),
    ],
    "a group may what its mode lets it": [
        make(ROOT, "f"),
        chown(ROOT, "f", ROOT.uid, SHARED_GROUP),
        chmod(ROOT, "f", 0o060),
        write(ALICE, "f"),
        read(CAROL, "f"),
        read(BOB, "f"),
    ],
    "only the owner changes mode, owner and times": [
        make(ROOT, "f"),
        chown(ROOT, "f", ALICE.uid, ALICE.groups[0]),
        chmod(ROOT, "f", 0o666),
        chmod(BOB, "f", 0o777),
        chown(BOB, "f", BOB.uid, -1),
        set_times(BOB, "f"),
        touch(BOB, "f"),
        chmod(ALICE, "f", 0o600),
        touch(BOB, "f"),
        set_times(ALICE, "f"),
        chown(ALICE, "f", BOB.uid, -1),
        chown(ALICE, "f", -1, SHARED_GROUP),
        chown(ALICE, "f", -1, BOB.groups[0]),
    ],
    "a sticky directory keeps files from other users": [
        mkdir(ROOT, "d"),
        chmod(ROOT, "d", 0o1777),
        make(ALICE, "d/f"),
        mkdir(ALICE, "d/sub"),
        make(BOB, "d/own"),
        unlink(BOB, "d/f"),
        rename(BOB, "d/f", "d/g"),
        rename(BOB, "d/own", "d/f"),
        rmdir(BOB, "d/sub"),
        unlink(ALICE, "d/f"),
        rmdir(ROOT, "d/sub"),
        chmod(ROOT, "d", 0o777),
        unlink(ALICE, "d/own"),
    ],
    "a directory without write permission keeps its names": [
        mkdir(ROOT, "d", 0o755),
        make(ROOT, "d/f"),
        make(ALICE, "d/g"),
        mkdir(ALICE, "d/sub"),
        symlink(ALICE, "d/link"),
        unlink(ALICE, "d/f"),
        rename(ALICE, "d/f", "d/g"),
        link(ALICE, "d/f", "d/g"),
        list_directory(ALICE, "d"),
        chmod(ROOT, "d", 0o711),
        list_directory(ALICE, "d"),
        read(ALICE, "d/f"),
        chmod(ROOT, "d", 0o744),
        list_directory(ALICE, "d"),
        read(ALICE, "d/f"),
    ],
    "a directory with setgid gives its group to what is made in it": [
        mkdir(ROOT, "d"),
        chown(ROOT, "d", ROOT.uid, SHARED_GROUP),
        chmod(ROOT, "d", 0o2777),
        make(ALICE, "d/f"),
        make(BOB, "d/executable", 0o2777),
        make(ALICE, "d/member", 0o2775),
        mkdir(BOB, "d/sub"),
        mkdir(CAROL, "d/private"),
        make(BOB, "d/sub/f"),
        mkdir(BOB, "d/sub/sub"),
        mkfifo(BOB, "d/fifo"),
        symlink(BOB, "d/link"),
        mkdir(BOB, "d/sub/plain"),
        chmod(BOB, "d/sub/plain", 0o755),
        mkdir(BOB, "d/sub/plain/below"),
    ],
    "setgid is lost at a chmod by one who is not of the group": [
        make(ROOT, "f"),
        chown(ROOT, "f", BOB.uid, SHARED_GROUP),
        chmod(BOB, "f", 0o2755),
        chmod(ROOT, "f", 0o2755),
        chown(ROOT, "f", ALICE.uid, SHARED_GROUP),
        chmod(ALICE, "f", 0o2755),
    ],
    "a write clears setuid and setgid": [
        make(ROOT, "f"),
        chown(ROOT, "f", ALICE.uid, BOB.groups[0]),
        chmod(ROOT, "f", 0o6777),
        write(BOB, "f"),
        chmod(ROOT, "f", 0o6777),
        write(ALICE, "f"),
        chmod(ROOT, "f", 0o6777),
        write(ROOT, "f"),
    ],
    "a write clears setuid also without the right to execute": [
        make(ROOT, "f"),
        chmod(ROOT, "f", 0o4666),
        write(ALICE, "f"),
    ],
    "a truncation clears setuid and setgid": [
        make(ROOT, "f"),
        chmod(ROOT, "f", 0o6777),
        truncate(ALICE, "f"),
        chmod(ROOT, "f", 0o6777),
        truncate(ALICE, "f", 0),
        chmod(ROOT, "f", 0o6777),
        truncate(ROOT, "f", 100),
    ],
    "a chown clears setuid and setgid, also that of root": [
        make(ROOT, "f"),
        chmod(ROOT, "f", 0o6755),
        chown(ROOT, "f", ALICE.uid, ALICE.groups[0]),
        chmod(ALICE, "f", 0o6755),
        chown(ALICE, "f", -1, SHARED_GROUP),
        chmod(ROOT, "f", 0o6755),
        chown(ROOT, "f", -1, -1),
        mkdir(ROOT, "d"),
        chmod(ROOT, "d", 0o6755),
        chown(ROOT, "d", ALICE.uid, -1),
    ],
    "all bits of the mode are set and shown": [
        make(ROOT, "f"),
        *(chmod(ROOT, "f", mode) for mode in (0o7777, 0o0, 0o1644, 0o4000, 0o2000, 0o644)),
        mkdir(ROOT, "d"),
        *(chmod(ROOT, "d", mode) for mode in (0o7777, 0o0, 0o1700, 0o755)),
    ],
    "owner and group are set one by one, also of a symlink and a fifo": [
        make(ROOT, "f"),
        chown(ROOT, "f", ALICE.uid, -1),
        chown(ROOT, "f", -1, BOB.groups[0]),
        symlink(ROOT, "link"),
        chown(ROOT, "link", ALICE.uid, BOB.groups[0]),
        mkfifo(ROOT, "fifo"),
        chown(ROOT, "fifo", ALICE.uid, BOB.groups[0]),
        chmod(ALICE, "fifo", 0o620),
    ],
    "a rename and a link keep mode and owner": [
        mkdir(ROOT, "d"),
        chmod(ROOT, "d", 0o777),
        make(ALICE, "d/f"),
        chmod(ALICE, "d/f", 0o640),
        rename(BOB, "d/f", "d/g"),
        link(ALICE, "d/g", "d/h"),
        chmod(ALICE, "d/h", 0o600),
        unlink(BOB, "d/g"),
    ],
    "a file cannot be made where there is no permission, nor over another": [
        make(ROOT, "f"),
        make(ALICE, "g"),
        make(ROOT, "f"),
        mkdir(ROOT, "f"),
        rmdir(ROOT, "f"),
        unlink(ROOT, "missing"),
        chmod(ROOT, "missing", 0o600),
    ],
}


# -- running them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of a step: its error or value, and what every name is afterwards."""

    result: object
    tree: dict[str, tuple[str, int, int, int]]


def run(directory: Path, steps: list[Step], made: Callable[[Path], None]) -> list[Outcome]:
    """The outcomes of all steps; made is called with each new file."""
    directory.chmod(0o755)
    outcomes = []
    for step in steps:
        result = Child(lambda s=step: attempt(directory, s)).result()
        if step.makes and result is None:
            made(directory / step.makes)
        outcomes.append(Outcome(result, attributes_below(directory)))
    return outcomes


def attempt(directory: Path, step: Step) -> object:
    os.chdir(directory)  # while we may search what is above it
    step.user.become()
    try:
        return step.act()
    except OSError as error:
        return os.strerror(error.errno or 0)


def attributes_below(directory: Path) -> dict[str, tuple[str, int, int, int]]:
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        name = str(path.relative_to(directory))
        kept = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_nlink)
        # Not every filesystem counts the subdirectories of a directory as links.
        found[name] = (*kept[:3], 0) if path.is_dir() else kept
    return found


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("plain")
    image, mkfs = directory / "image", ("mkfs.ext4", "-q")
    with loop_filesystem(image, directory / "ext4", "16M", mkfs) as path:
        subprocess.run(["mount", "-o", "remount,nosuid,nodev", str(path)], check=True)
        yield path


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    capacity = f"{SMALL_FAST_BYTES // MIB}MiB"
    with shared_mount(tmp_path_factory.mktemp("ownership"), "--fast-capacity", capacity) as mount:
        yield mount


@pytest.mark.parametrize("tier", ["fast", "spilled"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_modes_and_owners_are_as_on_ext4(
    mount: Mount, ext4: Path, tmp_path: Path, sequence: str, tier: str
) -> None:
    plain, mounted = ext4 / tmp_path.name, mount.mountpoint / tmp_path.name
    plain.mkdir()
    mounted.mkdir()

    def spill(path: Path) -> None:
        mode = path.stat().st_mode
        push_to_slow_tier(path, SMALL_FAST_BYTES)
        path.chmod(mode)  # which the writes may have changed
        assert is_spilled(mount, path)

    expected = run(plain, SEQUENCES[sequence], lambda path: None)
    outcomes = run(mounted, SEQUENCES[sequence], spill if tier == "spilled" else lambda path: None)
    for step, (outcome, wanted) in enumerate(zip(outcomes, expected, strict=True)):
        assert outcome == wanted, f"step {step + 1}"
    home = mount.tree / tmp_path.name
    stubs = [path for path in home.rglob("*") if path.is_symlink() and path.exists()]
    for stub in stubs:
        shown = mounted / stub.relative_to(home)
        wait_until(lambda d=stub, s=shown: alike(d, s), f"the object of {shown} to follow it", 5)


def alike(data: Path, shown: Path) -> bool:
    """Whether an object has the mode and owner that the mount shows."""
    keys = ("st_mode", "st_uid", "st_gid", "st_size")
    return all(getattr(data.stat(), key) == getattr(shown.stat(), key) for key in keys)


def test_a_user_without_privilege_runs_no_setuid_program(mount: Mount) -> None:
    path = mount.mountpoint / "id"
    path.write_bytes(Path("/usr/bin/id").read_bytes())
    path.chmod(0o4755)

    def effective_uid() -> bytes:
        os.chdir(mount.mountpoint)
        ALICE.become()
        return subprocess.run(["./id", "-u"], capture_output=True, check=True).stdout

    assert Child(effective_uid).result() == b"%d\n" % ALICE.uid
    with suppress(FileNotFoundError):
        path.unlink()
