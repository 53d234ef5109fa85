"""A whole mount against a plain directory: whatever is done, in whatever order, comes to the same,
while segments move, over remounts, and when the daemon is killed."""

import errno
import fcntl
import itertools
import mmap
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
import pytest
from filetools import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    fallocate,
    renameat2,
    set_mtime_only,
    shared_mount,
)
from harness import GROWING, PLAIN, SLOWNESS, Mount, let_others_search, wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twins import PAST_NS, USER, Side, Twins, is_regular

from pafkafs import control

DEAD = "topic-0.0123456789abcdef0123456789abcdef-delete"
DIRECTORIES = ["topic-0", "topic-0", "topic-0", "topic-1", DEAD]
SEGMENTS = [f"{offset:020}.log" for offset in (0, 7, 10**12)]
NAMES = [*SEGMENTS, *SEGMENTS, f"{0:020}.index", f"{0:020}.log.deleted", "partition.metadata"]
RESERVED_TEXT = f"/x/objects/topic-0/a~{'0' * 8}.{'0' * 16}"
TEXTS = [SEGMENTS[0], f"../topic-1/{SEGMENTS[1]}", "x/" * 150, "..", RESERVED_TEXT]
# Why a move may fail.
REASONS = (
    "active segment",
    "only segments move",
    "several names",
    "being moved already",
    "No such file",
    "Not a directory",
    "a directory has no data",
    "it got a second link",
    "being deleted",
    "faster than it can be copied",
)

# A name, or a number: one of those that are there.
files = st.tuples(st.sampled_from(DIRECTORIES), st.sampled_from(NAMES)).map("/".join)
directories = st.sampled_from([*DIRECTORIES, "topic-1/sub"])
present = st.integers(0, 20)
paths = st.one_of(present, present, present, present, files, directories)
new_paths = st.one_of(files, files, files, present, directories)
to_open = st.one_of(paths, files)
slots = st.integers(0, 3)
map_slots = st.integers(0, 2)
offsets = st.one_of(
    st.sampled_from([0, 1, 4095, 4096, 65536, 100_000, 500_000]), st.integers(0, 200_000)
)
lengths = st.sampled_from([1, 100, 4096, 5000, 70_000, 300_000])
modes = st.sampled_from([0o644, 0o600, 0o400, 0o666, 0o4755, 0o2755, 0o1777, 0o000])
uids = st.sampled_from([*[0] * 7, USER])
seeds = st.integers(0, 255)
changes = st.tuples(offsets, seeds, st.one_of(lengths, lengths, st.just(0)))
owners = st.sampled_from([-1, 0, USER])
RENAME_FLAGS = (0, 0, RENAME_NOREPLACE)
accesses = st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY])
extra_flags = st.sampled_from(
    [
        *[os.O_CREAT] * 10,
        *[0] * 4,
        os.O_CREAT | os.O_EXCL,
        os.O_CREAT | os.O_TRUNC,
        os.O_CREAT | os.O_APPEND,
        os.O_APPEND,
        os.O_TRUNC,
        os.O_DIRECTORY,
        os.O_NOFOLLOW,
        os.O_CREAT | os.O_DSYNC,
    ]
)


def data(seed: int, length: int) -> bytes:
    return Random(seed).randbytes(length)


# -- acts that take several calls, or one that Python does otherwise ------------------------------


def changed(fd: int, at: int, seed: int, length: int) -> None:
    if length:
        os.pwrite(fd, data(seed, length), at)
    else:
        os.ftruncate(fd, at)


def sent(fd: int, at: int, length: int) -> bytes:
    """What sendfile sends, into a pipe with room for it."""
    reader, writer = os.pipe()
    try:
        done = os.sendfile(writer, fd, at, length)
        return os.read(reader, done) if done else b""
    finally:
        os.close(reader)
        os.close(writer)


def copied(source: int, target: int, at: int, to_at: int, length: int) -> int:
    """As often as it is short."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, at + done, to_at + done)
        if count == 0:
            break
        done += count
    return done


def stored(side: Side, map_slot: int, at: int, content: bytes, sync: bool) -> None:
    mapping, length = side.mapped(map_slot)
    part = content[: max(0, length - at)]
    if part:
        mapping[at : at + len(part)] = part
    if sync:
        mapping.flush()


def loaded(side: Side, map_slot: int) -> bytes:
    mapping, length = side.mapped(map_slot)
    return mapping[:length]


def made(path: Path, kind: str, mode: int) -> None:
    if kind == "directory":
        os.mkdir(path, 0o755)
    elif kind == "fifo":
        os.mkfifo(path, mode)
    else:
        os.mknod(path, mode)


def synced(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def listed(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def read_link(path: Path) -> str:
    return os.readlink(path)


def access(mode: int) -> Callable[[Path], bool]:
    return lambda path: os.access(path, mode, effective_ids=True)


def locking(how: int) -> Callable[[int], None]:
    return lambda fd: fcntl.flock(fd, how | fcntl.LOCK_NB)


LOOKS = [listed, synced, read_link, *map(access, range(8))]
LOCKS = (fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN)
SYNCS_AND_LOCKS = [os.fsync, os.fdatasync, *map(locking, LOCKS)]


# -- the model ------------------------------------------------------------------------------------


class Model(RuleBasedStateMachine):
    """One example: a directory of its own below the mount and below the plain one."""

    mounted: Mount  # by a subclass for each test
    plain: Path
    counts: Counter[str]
    numbers: Iterator[int]

    # -- beginning and end ------------------------------------------------------------------------

    @initialize(ends=st.sampled_from([0, 0, 0, 1]), length=lengths)
    def begin(self, ends: int, length: int) -> None:
        """Segments, two of which are open, and one mapped too."""
        self.ends = ends
        self.name = f"example-{next(self.numbers)}"
        roots = [base / self.name for base in (self.mounted.mountpoint, self.plain)]
        self.twins = Twins(*map(Side, roots), time.time_ns() - 10**9)
        self.jobs: list[int] = []
        self.times_stay = False
        for directory in sorted(set(DIRECTORIES)):
            self.both(lambda side, d=directory: os.makedirs(side.root / d))
        for directory, name in itertools.product(("topic-0", "topic-1"), SEGMENTS):
            path, content = f"{directory}/{name}", data(1, length)
            self.both(lambda side, p=path, c=content: (side.root / p).write_bytes(c))
        for slot, name in enumerate(SEGMENTS[:2]):
            path = f"topic-0/{name}"
            self.both(lambda side, n=slot, p=path: side.open(n, p, os.O_RDWR, 0))
        self.both(lambda side: side.map(0, 0))

    def both(self, act: Callable[[Side], Any], uid: int = 0) -> Any:
        self.counts["steps"] += 1
        return self.twins.both(act, uid)

    @invariant()
    def is_the_same(self) -> None:
        if hasattr(self, "twins"):
            self.twins.compare(times_stay=self.times_stay)
            self.times_stay = False

    def teardown(self) -> None:
        if not hasattr(self, "twins"):
            return
        try:
            self.twins.compare_contents()
        finally:
            self.twins.close_all()
            for side in (self.twins.plain, self.twins.mount):
                shutil.rmtree(side.root)

    def path(self, wanted: str | int) -> str:
        known = sorted(self.twins.statuses) or DIRECTORIES
        return wanted if isinstance(wanted, str) else known[wanted % len(known)]

    # -- handles ----------------------------------------------------------------------------------

    def slot(self, wanted: int) -> int:
        """One that is open."""
        known = sorted(self.twins.plain.handles)
        return known[wanted % len(known)]

    def has_handles(self) -> bool:
        return bool(self.twins.plain.handles)

    @rule(
        slot=slots,
        path=st.one_of(paths, files),
        access=accesses,
        flags=extra_flags,
        mode=modes,
        uid=uids,
    )
    def open(self, slot: int, path: str, access: int, flags: int, mode: int, uid: int) -> None:
        where = self.path(path)
        self.both(lambda side: side.open(slot, where, access | flags, mode), uid)

    @precondition(has_handles)
    @rule(slot=slots)
    def close(self, slot: int) -> None:
        fd = self.slot(slot)
        self.times_stay = True
        self.both(lambda side: side.close(fd))

    @precondition(has_handles)
    @rule(slot=slots, seed=seeds, length=lengths, uid=uids)
    def write(self, slot: int, seed: int, length: int, uid: int) -> None:
        """Where the handle is, or at the end."""
        fd, content = self.slot(slot), data(seed, length)
        self.both(lambda side: os.write(side.fd(fd), content), uid)

    @precondition(has_handles)
    @rule(slot=slots, at=offsets, seed=seeds, length=lengths)
    def pwrite(self, slot: int, at: int, seed: int, length: int) -> None:
        fd, content = self.slot(slot), data(seed, length)
        self.both(lambda side: os.pwrite(side.fd(fd), content, at))

    @precondition(has_handles)
    @rule(slot=slots, at=st.one_of(st.none(), offsets), length=lengths, send=st.booleans())
    def read(self, slot: int, at: int | None, length: int, send: bool) -> None:
        fd = self.slot(slot)
        self.times_stay = True
        if at is None:
            self.both(lambda side: os.read(side.fd(fd), length))
        elif send:
            self.both(lambda side: sent(side.fd(fd), at, min(length, 50_000)))
        else:
            self.both(lambda side: os.pread(side.fd(fd), length, at))

    @precondition(has_handles)
    @rule(slot=slots, to=slots, at=offsets, to_at=offsets, length=lengths)
    def copy_file_range(self, slot: int, to: int, at: int, to_at: int, length: int) -> None:
        source, target = self.slot(slot), self.slot(to)
        self.both(lambda side: copied(side.fd(source), side.fd(target), at, to_at, length))

    @precondition(has_handles)
    @rule(slot=slots, offset=st.one_of(offsets, st.integers(-5000, 0)), whence=st.integers(0, 2))
    def lseek(self, slot: int, offset: int, whence: int) -> None:
        """SEEK_SET, SEEK_CUR and SEEK_END."""
        fd = self.slot(slot)
        self.times_stay = True
        if is_regular(self.twins.plain.fd(fd)):
            self.both(lambda side: os.lseek(side.fd(fd), offset, whence))

    @precondition(has_handles)
    @rule(slot=slots, size=offsets, uid=uids)
    def ftruncate(self, slot: int, size: int, uid: int) -> None:
        fd = self.slot(slot)
        self.both(lambda side: os.ftruncate(side.fd(fd), size), uid)

    @precondition(has_handles)
    @rule(
        slot=slots,
        mode=st.sampled_from([0, FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE]),
        at=offsets,
        length=st.sampled_from([0, 1, 4096, 5000, 70_000, 300_000]),
    )
    def fallocate(self, slot: int, mode: int, at: int, length: int) -> None:
        fd = self.slot(slot)
        self.both(lambda side: fallocate(side.fd(fd), mode, at, length))

    @precondition(has_handles)
    @rule(slot=slots, act=st.sampled_from(SYNCS_AND_LOCKS))
    def sync_or_lock(self, slot: int, act: Callable[[int], None]) -> None:
        fd = self.slot(slot)
        self.times_stay = True
        self.both(lambda side: act(side.fd(fd)))

    # -- mappings ---------------------------------------------------------------------------------

    def map_slot(self, wanted: int) -> int:
        """One that is mapped."""
        known = sorted(self.twins.plain.maps)
        return known[wanted % len(known)]

    def has_maps(self) -> bool:
        return bool(self.twins.plain.maps)

    @precondition(has_handles)
    @rule(slot=slots, map_slot=map_slots, shared=st.booleans(), stores=st.booleans())
    def map(self, slot: int, map_slot: int, shared: bool, stores: bool) -> None:
        fd = self.slot(slot)
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if stores else 0)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.both(lambda side: side.map(map_slot, fd, flags=flags, prot=prot))

    @precondition(has_maps)
    @rule(slot=map_slots, at=offsets, seed=seeds, length=lengths, sync=st.booleans())
    def store(self, slot: int, at: int, seed: int, length: int, sync: bool) -> None:
        mapping = self.map_slot(slot)
        self.twins.note_store(mapping)
        self.both(lambda side: stored(side, mapping, at, data(seed, length), sync))

    @precondition(has_maps)
    @rule(slot=map_slots, unmap=st.booleans())
    def load(self, slot: int, unmap: bool) -> None:
        mapping = self.map_slot(slot)
        self.times_stay = True
        self.both(lambda side: loaded(side, mapping))
        if unmap:
            self.both(lambda side: side.unmap(mapping))

    # -- names ------------------------------------------------------------------------------------

    @rule(path=paths, size=offsets, uid=uids)
    def truncate(self, path: str | int, size: int, uid: int) -> None:
        where = self.path(path)
        self.both(lambda side: os.truncate(side.root / where, size), uid)

    @rule(path=new_paths, kind=st.sampled_from(["directory", "fifo", "file"]), mode=modes, uid=uids)
    def make(self, path: str | int, kind: str, mode: int, uid: int) -> None:
        where = self.path(path)
        self.both(lambda side: made(side.root / where, kind, mode), uid)

    @rule(old=paths, new=new_paths, uid=uids)
    def link(self, old: str | int, new: str | int, uid: int) -> None:
        name, link = self.path(old), self.path(new)
        self.both(lambda side: os.link(side.root / name, side.root / link), uid)

    @rule(path=new_paths, text=st.sampled_from(TEXTS))
    def symlink(self, path: str | int, text: str) -> None:
        where = self.path(path)

        def make(side: Side) -> None:
            os.symlink(text, side.root / where)
            if text == RESERVED_TEXT and side is self.twins.plain:
                os.unlink(side.root / where)
                raise PermissionError(errno.EPERM, "known to differ: the mount refuses it")

        self.both(make)

    @rule(old=paths, new=new_paths, flags=st.sampled_from(RENAME_FLAGS), uid=uids)
    def rename(self, old: str | int, new: str | int, flags: int, uid: int) -> None:
        name, to = self.path(old), self.path(new)
        self.both(lambda side: renameat2(side.root / name, side.root / to, flags), uid)

    @rule(old=present, new=present)
    def exchange(self, old: int, new: int) -> None:
        name, to = self.path(old), self.path(new)
        self.both(lambda side: renameat2(side.root / name, side.root / to, RENAME_EXCHANGE))

    @rule(path=paths, act=st.sampled_from([os.unlink, os.unlink, os.rmdir]), uid=uids)
    def remove(self, path: str | int, act: Callable[[Path], None], uid: int) -> None:
        where = self.path(path)
        self.both(lambda side: act(side.root / where), uid)

    @rule(path=paths, look=st.sampled_from(LOOKS))
    def look(self, path: str | int, look: Callable[[Path], Any]) -> None:
        where = self.path(path)
        self.times_stay = True
        self.both(lambda side: look(side.root / where), uid=USER)
        self.both(lambda side: look(side.root / where))

    @rule()
    def read_everything(self) -> None:
        self.times_stay = True
        self.twins.compare_contents()

    @rule(path=paths)
    def ask_for_what_there_is_not(self, path: str | int) -> None:
        """Known to differ: no extended attributes, and statvfs tells of all tiers."""
        where = self.twins.mount.root / self.path(path)
        if where.is_file() and not where.is_symlink():
            with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
                os.setxattr(where, "user.x", b"x")
        found = os.statvfs(self.twins.mount.root)
        assert 0 <= found.f_bavail <= found.f_bfree <= found.f_blocks
        assert 0 <= found.f_favail <= found.f_ffree <= found.f_files
        assert found.f_namemax == os.statvfs(self.twins.plain.root).f_namemax

    # -- attributes -------------------------------------------------------------------------------

    @rule(path=paths, owner=owners, group=owners, mode=modes, uid=uids)
    def chown_and_chmod(self, path: str | int, owner: int, group: int, mode: int, uid: int) -> None:
        where = self.path(path)
        self.times_stay = True
        self.both(lambda side: os.chown(side.root / where, owner, group), uid)
        self.both(lambda side: os.chmod(side.root / where, mode), uid)

    @rule(path=paths, mtime_ns=st.sampled_from(PAST_NS), only=st.booleans(), uid=uids)
    def utimens(self, path: str | int, mtime_ns: int, only: bool, uid: int) -> None:
        where = self.path(path)
        self.twins.settle_stores()
        if only:
            self.both(lambda side: set_mtime_only(side.root / where, mtime_ns), uid)
        else:
            self.both(lambda side: os.utime(side.root / where, ns=(0, mtime_ns)), uid)
        self.twins.note_times(where)

    @precondition(has_handles)
    @rule(slot=slots, mtime_ns=st.sampled_from(PAST_NS), mode=modes)
    def fchmod_and_futimens(self, slot: int, mtime_ns: int, mode: int) -> None:
        fd = self.slot(slot)
        self.twins.settle_stores()
        self.both(lambda side: os.fchmod(side.fd(fd), mode))
        self.both(lambda side: os.utime(side.fd(fd), ns=(mtime_ns, mtime_ns)))
        self.twins.stored.discard(os.fstat(self.twins.plain.fd(fd)).st_ino)

    # -- the daemon -------------------------------------------------------------------------------

    def ask(self, command: str, **arguments: Any) -> Any:
        return control.ask(str(self.mounted.mountpoint), command, **arguments)

    @rule(number=st.integers(0, 3))
    def move(self, number: int) -> None:
        """A segment that may, to the other tier, while what comes next is done."""
        known = self.sealed_segments()
        if known:
            path = known[number % len(known)]
            is_down = (self.mounted.tree / self.name / path).is_symlink()
            self.migrate(path, "fast" if is_down else "slow")

    @rule(number=st.integers(0, 3))
    def move_and_wait(self, number: int) -> None:
        self.move(number)
        self.wait_for_moves()

    @rule(number=st.integers(0, 3), changes=st.lists(changes, min_size=1, max_size=12))
    def change_while_it_moves(self, number: int, changes: list[tuple[int, int, int]]) -> None:
        """Writes and truncations, without a pause."""
        known = self.sealed_segments()
        if not known:
            return
        path = known[number % len(known)]
        self.both(lambda side: side.open(0, path, os.O_RDWR, 0))
        self.move(number)
        for change in changes:
            self.both(lambda side, c=change: changed(side.fd(0), *c))
        self.times_stay = False

    @rule(path=paths, tier=st.sampled_from(["slow", "fast"]))
    def move_anything(self, path: str | int, tier: str) -> None:
        self.migrate(self.path(path), tier)
        self.wait_for_moves()

    def sealed_segments(self) -> list[str]:
        """Those with a newer one beside them."""
        found: list[str] = []
        for directory in sorted(set(DIRECTORIES)):
            where = self.twins.plain.root / directory
            names = [name for name in SEGMENTS if os.path.isfile(where / name)]
            found.extend(f"{directory}/{name}" for name in names[:-1])
        return found

    def migrate(self, path: str, tier: str) -> None:
        self.times_stay = True
        self.jobs.append(self.ask("migrate", path=f"{self.name}/{path}", to=tier))

    def wait_for_moves(self) -> None:
        self.times_stay = True
        for job in self.jobs:
            told = wait_until(lambda j=job: self.ended(j), "a move to end")
            self.counts[told["state"]] += 1
            if told["state"] == "failed":
                assert any(reason in told["error"] for reason in REASONS), told
        self.jobs = []

    def ended(self, job: int) -> Any:
        told = self.ask("job", job=job)
        return told if told["state"] not in ("waiting", "running") else None

    def may_end(self) -> bool:
        return self.ends > 0

    @precondition(may_end)
    @rule()
    def remount(self) -> None:
        """Handles are closed before."""
        self.times_stay = True
        self.twins.settle_stores()
        self.twins.close_all()
        self.mounted.stop()
        self.twins.compare_cold(self.mounted.tree / self.name)
        self.start_again("remounts")

    @precondition(may_end)
    @rule()
    def kill(self) -> None:
        """Handles die with the daemon; what was acked does not."""
        self.times_stay = True
        self.twins.settle_stores()
        self.mounted.kill()
        self.twins.handles_are_dead()
        self.twins.close_all()
        self.start_again("kills")

    def start_again(self, why: str) -> None:
        self.ends -= 1
        self.jobs = []  # of the daemon before
        self.mounted.start()
        self.counts[why] += 1
        self.twins.compare_contents()


# -- the tests ------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "growing"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[type[Model]]:
    """Examples of one mount; the plain directory is on the same filesystem as its fast tier."""
    options = GROWING if request.param == "growing" else PLAIN
    let_others_search(tmp_path)
    with shared_mount(tmp_path, "--threshold", "-1", *options) as mount:
        (mount.fast / "plain").mkdir()
        members = {
            "mounted": mount,
            "plain": mount.fast / "plain",
            "counts": Counter[str](),
            "numbers": itertools.count(),
        }
        yield type("Examples", (Model,), members)


QUICK = settings(
    max_examples=70,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    # What the clock has made fail does not fail again in a shorter example.
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(600 * SLOWNESS)
def test_mount_does_what_a_plain_directory_does(model: type[Model]) -> None:
    run_state_machine_as_test(model, settings=QUICK)
    assert model.counts["done"] > 0


@pytest.mark.slow
@pytest.mark.timeout(7200 * SLOWNESS)
def test_mount_does_what_a_plain_directory_does_in_a_long_run(model: type[Model]) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    long = settings(QUICK, max_examples=500, stateful_step_count=100, derandomize=False)
    run_state_machine_as_test(hypothesis.seed(seed)(model), settings=long)
    print(dict(model.counts))
