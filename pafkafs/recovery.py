"""What a mount finds: usage, stubs, and what changed while nothing was mounted.

A Kafka that ran on tree/ itself may have appended to objects, truncated them, or removed stubs.
Objects win over their shadows; what lost its stub is garbage (see there).
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import trio

from pafkafs import _native, growing, layout
from pafkafs.device import Device, Home
from pafkafs.layout import Stub
from pafkafs.namespace import Namespace

log = logging.getLogger(__name__)

# Serving waits so long for objects to be compared with their shadows; the rest is compared
# afterwards, and at the first I/O of each.
COMPARE_BEFORE_SERVING_S = 2.0
_CHUNK = 256


@dataclass
class Scan:
    """The home tree as it was before serving began."""

    plain_bytes: int = 0
    plain_files: int = 0
    stubs: dict[str, Stub] = field(default_factory=dict)  # by object id
    copied: set[str] = field(default_factory=set)  # ids that several stubs have
    damaged: dict[int, bytes] = field(default_factory=dict)  # inodes of refused stubs: where
    refused: set[str] = field(default_factory=set)  # ids in the texts of the damaged stubs
    unreadable: str | None = None  # a directory that could not be read, and why
    no_shadow: dict[str, Stub] = field(default_factory=dict)


def scan_tree(
    home: Home,
    devices: Mapping[str, Device],
    paths: dict[str, tuple[bytes, ...]],
    sizes: growing.Recovery | None,
) -> Scan:
    """Reads the whole home tree; stubs of devices that moved are rewritten on the way, and files
    that were growing are cut to their size."""
    scan = Scan()
    moved: dict[int, bytes] = {}  # inode of a rewritten stub: where its new one is
    inodes: dict[str, int] = {}
    counted: set[int] = set()
    for path, status in _walk(home.tree_fd, partial(_note_unreadable, scan)):
        if stat.S_ISREG(status.st_mode):
            if sizes is not None and sizes.file_found(home.tree_fd, path, status.st_ino):
                status = os.stat(path, dir_fd=home.tree_fd, follow_symlinks=False)
            _count_plain(scan, status, counted)
        elif stat.S_ISLNK(status.st_mode):
            stub = _read_stub(scan, home, path, status.st_ino, paths)
            if stub is None:
                continue
            device = devices[stub.device_id]
            if inodes.setdefault(stub.object_id, status.st_ino) != status.st_ino:
                scan.copied.add(stub.object_id)
            scan.stubs[stub.object_id] = stub
            text = os.readlink(path, dir_fd=home.tree_fd)
            if text != layout.stub_text(device.path, stub):
                _rewrite(home, device, path, stub, status.st_ino, moved)
    _find_missing_shadows(scan, home)
    return scan


def _note_unreadable(scan: Scan, error: OSError) -> None:
    where = error.filename
    name = os.fsdecode(where) if isinstance(where, bytes | str) else "tree"
    log.error("cannot read %s: %s", name, error.strerror)
    scan.unreadable = f"{name} ({error.strerror})"


def _walk(
    tree_fd: int, on_error: Callable[[OSError], None]
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Path and status of everything below, directories left out, symlinks not followed."""
    walk = os.fwalk(b".", dir_fd=tree_fd, follow_symlinks=False, onerror=on_error)
    for directory, _, names, fd in walk:
        for name in names:
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield os.path.normpath(os.path.join(directory, name)), status


def _count_plain(scan: Scan, status: os.stat_result, counted: set[int]) -> None:
    if status.st_nlink > 1:
        if status.st_ino in counted:
            return
        counted.add(status.st_ino)
    scan.plain_files += 1
    scan.plain_bytes += status.st_blocks * 512


def _read_stub(
    scan: Scan, home: Home, path: bytes, inode: int, paths: dict[str, tuple[bytes, ...]]
) -> Stub | None:
    text = os.readlink(path, dir_fd=home.tree_fd)
    try:
        return layout.parse_stub(text, paths)
    except layout.DamagedStub as error:
        log.error("refused stub %s -> %s", os.fsdecode(path), error)
        scan.damaged[inode] = path
        scan.refused.add(layout.object_id_of(text))
        return None


def _rewrite(
    home: Home, device: Device, path: bytes, stub: Stub, inode: int, moved: dict[int, bytes]
) -> None:
    """The device is mounted elsewhere now.  Names of one stub stay names of one stub."""
    if inode in moved:
        os.link(
            moved[inode],
            stub.shadow,
            src_dir_fd=home.tree_fd,
            dst_dir_fd=home.tmp_fd,
            follow_symlinks=False,
        )
        _native.rename(home.tmp_fd, stub.shadow, home.tree_fd, path, 0)
        return
    layout.replace_with_stub(home.tmp_fd, home.tree_fd, path, device.path, stub)
    moved[inode] = path


def _find_missing_shadows(scan: Scan, home: Home) -> None:
    present = set(os.listdir(home.shadows_fd))
    scan.no_shadow = {i: stub for i, stub in scan.stubs.items() if i not in present}


@dataclass(frozen=True)
class Comparison:
    """An object as it was found; status is None when it is missing."""

    stub: Stub
    status: os.stat_result | None


def compare(device: Device, stubs: list[Stub]) -> list[Comparison]:
    """Looks at objects.  May block."""
    return [Comparison(stub, _object_status(device, stub)) for stub in stubs]


def _object_status(device: Device, stub: Stub) -> os.stat_result | None:
    try:
        fd = _native.open_beneath(
            device.objects_fd, stub.object, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except FileNotFoundError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _attributes_of(status: os.stat_result) -> tuple[int, ...]:
    """What a chmod or chown sets, as far as we may set it."""
    mode = stat.S_IMODE(status.st_mode)
    return (mode, status.st_uid, status.st_gid) if os.geteuid() == 0 else (mode,)


class Reconciler:
    """Brings shadows up to date with their objects after a mount."""

    def __init__(self, namespace: Namespace, home: Home, scan: Scan) -> None:
        self._namespace = namespace
        self._home = home
        self._scan = scan
        self.done: dict[str, trio.Event] = {}
        self.changed_nodes: list[int] = []

    async def run(self, device: Device) -> None:
        """Compares all objects of a device."""
        done = self.done.setdefault(device.id, trio.Event())
        mine = [stub for stub in self._scan.stubs.values() if stub.device_id == device.id]
        counted = 0
        for start in range(0, len(mine), _CHUNK):
            chunk = mine[start : start + _CHUNK]
            try:
                found = await device.run(partial(compare, device, chunk))
            except OSError as error:
                device.failed(f"cannot read objects/: {error.strerror}")
                return
            for comparison in found:
                counted += self._settle(device, comparison)
        device.native.add_used(counted if device.capacity_option >= 0 else 0)
        done.set()

    def _settle(self, device: Device, found: Comparison) -> int:
        """Applies one comparison, atomically for the trio thread; the object's bytes."""
        stub, status = found.stub, found.status
        opened = self._namespace.files.opened_objects
        if status is None:
            self._missing(device, stub)
            return 0
        if opened is not None and stub.object_id in opened:
            return status.st_blocks * 512  # its first I/O compares, or already did
        try:
            shadow = os.stat(stub.shadow, dir_fd=self._home.shadows_fd, follow_symlinks=False)
        except FileNotFoundError:
            if stub.object_id in self._scan.no_shadow:
                os.close(layout.create_shadow(self._home.shadows_fd, stub, status))
            return status.st_blocks * 512
        if _attributes_of(shadow) != _attributes_of(status):
            self._namespace.upkeep.attributes_changed(stub)  # a change that did not get there
        if shadow.st_size != status.st_size or status.st_mtime_ns > shadow.st_mtime_ns:
            self._update_shadow(stub, shadow, status)
        return status.st_blocks * 512

    def _update_shadow(self, stub: Stub, shadow: os.stat_result, status: os.stat_result) -> None:
        path = f"/proc/self/fd/{self._home.shadows_fd}/{stub.object_id}"
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        node = self._namespace.nodes.known(shadow.st_ino)
        if node is not None:
            self.changed_nodes.append(node.ino)
        log.info("%s was changed behind the mount", os.fsdecode(stub.object))

    def _missing(self, device: Device, stub: Stub) -> None:
        try:
            shadow = os.stat(stub.shadow, dir_fd=self._home.shadows_fd, follow_symlinks=False)
        except FileNotFoundError:
            shadow = None
        if shadow is None or shadow.st_size > 0:
            device.missing_objects.add(stub.object_id)
            log.error("the object %s is missing", os.fsdecode(stub.object))
