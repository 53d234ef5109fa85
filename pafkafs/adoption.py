"""Taking over an existing log directory as the home tree of a new set, by renames alone.

It can be cut anywhere: what was moved is in tree/, the rest where it was, and the same command
goes on.

Root adopts what belongs to another user, who may write there meanwhile: all that is changed is
reached by descriptors, and no symlink of his is followed.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pafkafs import brokers, deviceset, layout, walking
from pafkafs.errors import PafkafsError

_OWN = {
    layout.TREE,
    layout.SHADOWS,
    layout.OBJECTS,
    layout.TMP,
    layout.LOST,
    layout.RECORD,
    layout.ADOPTING,
}
_NOT_KAFKA = {"lost+found"}


def adopt(log_dir: str, fast: str, slow: list[str]) -> int:
    """Moves log_dir's entries into fast/tree and forms the set; how many entries it has then."""
    source, device = Path(log_dir).resolve(), Path(fast).resolve()
    _check(source, device)
    tree = device / layout.TREE
    skip = _OWN | _NOT_KAFKA if source == device else set()
    _check_moves(source, tree, skip)
    # **Invariant:** while the mark is there, the device is not mounted.  It is durable before
    # anything else is changed, which is when nothing is left that could refuse the adoption; it
    # goes when all renames are durable.  The source, which the same command needs to go on, goes
    # last.
    devices = _form_set(device, slow, ignore=source if source.parent == device else None)
    device_fd = devices[0].fd
    try:
        with _opened(".", device_fd) if source == device else _opened(source) as source_fd:
            count = _move(source_fd, device_fd, skip)
        os.unlink(layout.ADOPTING, dir_fd=device_fd)
        os.fsync(device_fd)
    finally:
        for member in devices:
            os.close(member.fd)
    if source != device:
        source.rmdir()
        with _opened(source.parent) as parent_fd:
            os.fsync(parent_fd)
    return count


def _check_moves(source: Path, tree: Path, skip: set[str]) -> None:
    """Before anything is changed: each entry can be moved."""
    if not os.access(source, os.W_OK | os.X_OK):
        raise PafkafsError(
            f"{source} cannot be changed by this user: run adopt as its owner or root"
        )
    for name in set(os.listdir(source)) - skip:
        if os.path.lexists(tree / name):
            raise PafkafsError(f"{tree / name} exists already: nothing was changed")


def _check(source: Path, device: Path) -> None:
    if not source.is_dir():
        raise PafkafsError(f"{source} is not a directory")
    if not device.is_dir():
        raise PafkafsError(f"the fast device {device} is not a directory")
    if source.stat().st_dev != device.stat().st_dev:
        raise PafkafsError(
            f"{source} is not on the filesystem of {device}: adopting does not copy; "
            "mount first, then let Kafka move the replicas, or copy them with cp -a"
        )
    if source != device and device.is_relative_to(source):
        raise PafkafsError(f"the fast device {device} is inside {source}")
    if source.is_relative_to(device / layout.TREE):
        raise PafkafsError(f"{source} is in the home tree already")
    brokers.refuse_running(str(source))


def _form_set(device: Path, slow: list[str], ignore: Path | None) -> list[deviceset.SetDevice]:
    """As a first mount does; the entries to be adopted do not count as foreign.  The devices are
    locked as long as they are open."""
    adopted = {layout.ADOPTING} | ({ignore.name} if ignore is not None else set(os.listdir(device)))

    def mark(device_fd: int) -> None:
        _check_tree(device, device_fd)
        _mark(device, device_fd)

    adopting = deviceset.Adoption(frozenset(adopted), mark)
    return deviceset.assemble([[str(device)], slow], adopting=adopting)


def _check_tree(device: Path, device_fd: int) -> None:
    """What is in the place of the home tree, if anything, is a directory."""
    status = walking.status_of(device_fd, layout.TREE.encode())
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise PafkafsError(f"{device}/{layout.TREE} is a file or a symlink: nothing was changed")


def _mark(device: Path, device_fd: int) -> None:
    """A file that is there already is the mark of an adoption that was cut."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(layout.ADOPTING, flags, 0o600, dir_fd=device_fd))
    except FileExistsError:
        status = walking.status_of(device_fd, layout.ADOPTING.encode())
        if status is None or not stat.S_ISREG(status.st_mode):
            raise PafkafsError(
                f"{device}/{layout.ADOPTING} was not made by pafkafs, it is no file: remove it"
            ) from None
    os.fsync(device_fd)


def _move(source_fd: int, device_fd: int, skip: set[str]) -> int:
    """Into the tree, durably; how many entries that has then."""
    tree_fd = layout.open_state_directory(device_fd, layout.TREE)
    try:
        for name in set(os.listdir(source_fd)) - skip:
            os.rename(name, name, src_dir_fd=source_fd, dst_dir_fd=tree_fd)
        _copy_directory_attributes(source_fd, tree_fd)
        layout.sync_all((tree_fd, device_fd, source_fd))
        return len(os.listdir(tree_fd))
    finally:
        os.close(tree_fd)


def _copy_directory_attributes(source_fd: int, tree_fd: int) -> None:
    """The log directory's own owner and mode are those of the mount's root."""
    status = os.fstat(source_fd)
    if os.geteuid() == 0:
        os.fchown(tree_fd, status.st_uid, status.st_gid)
    os.fchmod(tree_fd, stat.S_IMODE(status.st_mode))


@contextmanager
def _opened(path: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    fd = os.open(path, layout.DIRECTORY, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)
