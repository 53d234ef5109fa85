"""The survey of a home tree that changes while it is read: afterwards all is known, and counted
once, whatever was done when."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pafkafs import _native, deviceset, kafka
from pafkafs.attributes import Changes
from pafkafs.catalogue import Catalogue
from pafkafs.device import Device, Home, open_device, open_home
from pafkafs.files import OpenFiles
from pafkafs.layout import make_stub, stub_text
from pafkafs.making import Caller
from pafkafs.namespace import RENAME_EXCHANGE, Namespace
from pafkafs.nodes import Node, NodeTable
from pafkafs.objects import ObjectUpkeep
from pafkafs.policy import Rules
from pafkafs.survey import Batch, Reading, Survey

DIRECTORIES = ["topic-0", "topic-1", "data", "data/topic-2"]
OFFSETS = range(4)
CAPACITY = 1 << 30

directories = st.sampled_from(DIRECTORIES)
offsets = st.sampled_from(OFFSETS)
operations = st.one_of(
    st.tuples(st.just("read")),
    st.tuples(st.just("apply")),
    st.tuples(st.just("create"), directories, offsets),
    st.tuples(st.just("unlink"), directories, offsets),
    st.tuples(st.just("cut"), directories, offsets),
    st.tuples(st.just("link"), directories, offsets, directories, offsets),
    st.tuples(st.just("rename"), directories, offsets, directories, offsets),
    st.tuples(st.just("exchange"), directories, offsets, directories, offsets),
    st.tuples(st.just("rename_directory"), directories, directories),
    st.tuples(st.just("make_directory"), directories),
    st.tuples(st.just("remove_directory"), directories),
)


@dataclass
class Mounted:
    """The parts of a mount that know names, without a kernel."""

    devices: dict[str, Device]
    home: Home
    namespace: Namespace
    survey: Survey

    def node(self, path: str) -> Node:
        node = self.namespace.nodes.root
        for name in path.split("/") if path else []:
            node = self.namespace.lookup(node, name.encode())
            node.lookups = 1
        return node

    def parent(self, path: str) -> tuple[Node, bytes]:
        upper, _, name = path.rpartition("/")
        return self.node(upper), name.encode()


@contextlib.contextmanager
def mounted(base: Path, nursery: trio.Nursery) -> Iterator[Mounted]:
    members = deviceset.assemble([[str(base / "fast")], [str(base / "slow")]])
    devices = {
        m.member.device: open_device(m, CAPACITY, power=False, kind="block") for m in members
    }
    home = open_home(next(iter(devices.values())))
    front = _native.Front(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC), 1)
    nodes = NodeTable(home.tree_fd)
    catalogue = Catalogue([0, 1], Rules(), nodes.root.key, 0.0)
    paths = {m.member.device: m.all_paths for m in members}
    survey = Survey(home, devices, paths, catalogue, None)
    upkeep = ObjectUpkeep(home, devices, lambda stub: True)
    files = OpenFiles(front, nursery, lambda file: namespace.file_closed(file))
    namespace = Namespace(
        home,
        devices,
        nodes,
        files,
        upkeep,
        catalogue,
        survey,
        lambda directory, bulk: next(iter(devices.values())),
        pool=None,
        learns_segment_size=True,
        durable_names=False,
    )
    try:
        yield Mounted(devices, home, namespace, survey)
    finally:
        for device in devices.values():
            device.native.stop()
        for device in devices.values():
            os.close(device.fd)


def segment(directory: str, offset: int) -> str:
    return f"{directory}/{kafka.segment_name(offset).decode()}"


def populate(base: Path) -> None:
    """Two thirds of the segments plain, of different sizes, one third demoted; a file of another
    kind beside them."""
    for name in ("fast", "slow"):
        (base / name).mkdir()
    members = deviceset.assemble([[str(base / "fast")], [str(base / "slow")]])
    for member in members:
        os.close(member.fd)
    tree, shadows, objects = (base / "fast/tree", base / "fast/shadows", base / "slow/objects")
    for made in (tree, shadows, objects):
        made.mkdir(mode=0o711)
    slow = members[1].member.device
    for directory in DIRECTORIES:
        (tree / directory).mkdir(parents=True, exist_ok=True)
        (tree / directory / "leader-epoch-checkpoint").write_bytes(b"x" * 5000)
        for offset in OFFSETS[:3]:
            path = segment(directory, offset)
            if offset < 2:
                (tree / path).write_bytes(b"x" * 4096 * (1 + offset))
                continue
            stub = make_stub(slow, os.fsencode(base / "slow"), path.encode())
            text = os.fsdecode(stub_text(os.fsencode(base / "slow"), stub))
            Path(text).parent.mkdir(parents=True, exist_ok=True)
            Path(text).write_bytes(b"x" * 4096)
            (shadows / stub.object_id).touch()
            os.truncate(shadows / stub.object_id, 4096)
            (tree / path).symlink_to(text)


class Interleaved:
    """The survey and the changes, one step after the other."""

    def __init__(self, mount: Mounted) -> None:
        self.mount = mount
        self.under_way: tuple[Batch, list[Reading]] | None = None

    async def step(self, kind: str, *arguments: str | int) -> None:
        with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
            await getattr(self, kind)(*arguments)

    async def read(self) -> None:
        """In a thread, while anything else happens."""
        if self.under_way is None and (batch := self.mount.survey.take_batch()):
            self.under_way = batch, self.mount.survey.read_batch(batch)

    async def apply(self) -> None:
        if self.under_way is not None:
            self.mount.survey.apply_batch(*self.under_way)
            self.under_way = None

    async def create(self, directory: str, offset: int) -> None:
        parent, name = self.mount.parent(segment(directory, offset))
        _, handle = await self.mount.namespace.create(parent, name, 0o644, Caller(0, 0))
        self.mount.namespace.files.release(handle)

    async def unlink(self, directory: str, offset: int) -> None:
        self.mount.node(segment(directory, offset))  # the kernel looks it up before
        self.mount.namespace.unlink(*self.mount.parent(segment(directory, offset)))

    async def cut(self, directory: str, offset: int) -> None:
        node = self.mount.node(segment(directory, offset))
        if node.stub is None:
            await self.mount.namespace.set_attributes(node, Changes(size=1))

    async def link(self, directory: str, offset: int, to: str, to_offset: int) -> None:
        node = self.mount.node(segment(directory, offset))
        if node.stub is None:
            await self.mount.namespace.link(node, *self.mount.parent(segment(to, to_offset)))

    async def rename(
        self, directory: str, offset: int, to: str, to_offset: int, flags: int = 0
    ) -> None:
        old = self.mount.parent(segment(directory, offset))
        await self.mount.namespace.rename(*old, *self.mount.parent(segment(to, to_offset)), flags)

    async def exchange(self, directory: str, offset: int, to: str, to_offset: int) -> None:
        await self.rename(directory, offset, to, to_offset, RENAME_EXCHANGE)

    async def rename_directory(self, directory: str, to: str) -> None:
        with contextlib.suppress(OSError):  # not empty, or into itself
            old = self.mount.parent(directory)
            await self.mount.namespace.rename(*old, *self.mount.parent(to), 0)

    async def make_directory(self, directory: str) -> None:
        await self.mount.namespace.mkdir(*self.mount.parent(directory), 0o755, Caller(0, 0))

    async def remove_directory(self, directory: str) -> None:
        with contextlib.suppress(OSError):  # not empty
            self.mount.namespace.rmdir(*self.mount.parent(directory))


def known(mount: Mounted) -> dict[str, tuple[int, bool]]:
    """What the catalogue has: device and whether it is the active one, by path."""
    return {
        os.fsdecode(entry.path): (entry.device, entry.is_active)
        for directory in mount.namespace.catalogue.directories_below(b"")
        for entry in directory.segments.values()
    }


def there(tree: Path) -> dict[str, tuple[int, bool]]:
    """The same, from the tree itself."""
    found: dict[str, tuple[int, bool]] = {}
    for directory in [tree, *(p for p in tree.rglob("*") if p.is_dir() and not p.is_symlink())]:
        offsets = {
            offset: path
            for path in directory.iterdir()
            if (offset := kafka.segment_base_offset(os.fsencode(path.name))) is not None
            and path.lstat().st_nlink == 1
        }
        for offset, path in offsets.items():
            active = offset == max(offsets)
            found[str(path.relative_to(tree))] = (int(path.is_symlink()), active)
    return found


def plain_bytes(tree: Path) -> tuple[int, int]:
    """Files and the bytes that they have allocated, those with several names once."""
    files = {p.lstat().st_ino: p.lstat() for p in tree.rglob("*") if p.is_file()}
    plain = [s for s in files.values() if stat.S_ISREG(s.st_mode)]
    return len(plain), sum(status.st_blocks * 512 for status in plain)


@settings(max_examples=150, deadline=None)
@given(st.lists(operations, max_size=25))
def test_all_is_known_and_counted_once_whatever_changes_meanwhile(
    steps: list[tuple[str | int, ...]],
) -> None:
    async def run(base: Path) -> None:
        async with trio.open_nursery() as nursery:
            with mounted(base, nursery) as mount:
                interleaved = Interleaved(mount)
                for kind, *arguments in steps:
                    assert isinstance(kind, str)
                    await interleaved.step(kind, *arguments)
                await interleaved.apply()
                await mount.survey.run()
                check(mount, base / "fast/tree")
            nursery.cancel_scope.cancel()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        populate(Path(base))
        trio.run(run, Path(base))


def check(mount: Mounted, tree: Path) -> None:
    home, slow = mount.devices.values()
    assert mount.survey.unreadable is None
    assert known(mount) == there(tree)
    assert (home.files, home.native.used_bytes) == plain_bytes(tree)
    assert slow.files == sum(1 for p in tree.rglob("*") if p.is_symlink())


def test_a_late_reading_of_a_directory_that_was_read_meanwhile_is_thrown_away(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            with mounted(tmp_path, nursery) as mount:
                root = mount.survey.take_batch()
                mount.survey.apply_batch(root, mount.survey.read_batch(root))
                batch = mount.survey.take_batch()
                readings = mount.survey.read_batch(batch)
                await Interleaved(mount).unlink("topic-0", 0)
                mount.survey.apply_batch(batch, readings)
                await mount.survey.run()
                check(mount, tmp_path / "fast/tree")

    populate(tmp_path)
    trio.run(run)


def test_copies_of_stubs_are_told_from_names_of_one_stub(tmp_path: Path) -> None:
    async def run() -> set[str]:
        async with trio.open_nursery() as nursery:
            with mounted(tmp_path, nursery) as mount:
                await mount.survey.run()
                return mount.survey.copied

    populate(tmp_path)
    tree = tmp_path / "fast/tree"
    linked, copied = (tree / segment(f"topic-{n}", 2) for n in (0, 1))
    os.link(linked, linked.with_name("other name"), follow_symlinks=False)
    copied.with_name("copy").symlink_to(copied.readlink())
    os.link(copied, copied.with_name("its name"), follow_symlinks=False)
    os.link(copied.with_name("copy"), copied.with_name("the copy's"), follow_symlinks=False)
    assert trio.run(run) == {copied.readlink().name.rpartition(".")[2]}


def test_directory_that_nobody_may_read_is_named_and_the_rest_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            with mounted(tmp_path, nursery) as mount:
                await mount.survey.run()
                assert mount.survey.unreadable == "topic-1 (Input/output error)"
                assert len(known(mount)) == 3 * (len(DIRECTORIES) - 1)

    def failing(self: Survey, path: bytes, ino: int) -> object:
        if path == b"topic-1":
            raise OSError(5, "Input/output error")
        return list_path(self, path, ino)

    populate(tmp_path)
    list_path = Survey._list_path
    monkeypatch.setattr(Survey, "_list_path", failing)
    trio.run(run)
