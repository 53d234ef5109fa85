"""Taking over an existing log directory as the home tree of a new set, by renames alone.

It can be cut anywhere: what was moved is in tree/, the rest where it was, and the same command
goes on.
"""

import os
from pathlib import Path

from pafkafs import brokers, deviceset, layout
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
    try:
        tree.mkdir(exist_ok=True)
        _move_entries(source, tree, skip)
        _copy_directory_attributes(source, tree)
        for directory in (tree, device, source):
            _sync_directory(directory)
        os.unlink(device / layout.ADOPTING)
        _sync_directory(device)
    finally:
        for member in devices:
            os.close(member.fd)
    if source != device:
        source.rmdir()
        _sync_directory(source.parent)
    return len(os.listdir(tree))


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
    adopting = deviceset.Adoption(frozenset(adopted), _mark)
    return deviceset.assemble([[str(device)], slow], adopting=adopting)


def _mark(device_fd: int) -> None:
    """One that is there already is that of an adoption that was cut."""
    os.close(os.open(layout.ADOPTING, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=device_fd))
    os.fsync(device_fd)


def _move_entries(source: Path, tree: Path, skip: set[str]) -> None:
    for name in set(os.listdir(source)) - skip:
        os.rename(source / name, tree / name)


def _copy_directory_attributes(source: Path, tree: Path) -> None:
    """The log directory's own owner and mode are those of the mount's root."""
    status = source.stat()
    if os.geteuid() == 0:
        os.chown(tree, status.st_uid, status.st_gid)
    os.chmod(tree, status.st_mode & 0o7777)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
