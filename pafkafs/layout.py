"""What lies on a device: the names, and how a demoted file is written down.

    pafkafs.json   who the device is (see deviceset)
    tree/          first fast device only: the home tree, exactly what the mount shows
    shadows/       first fast device only: for each demoted file its size, mode, owner, times
    objects/       data of files that are not in tree/ itself
    tmp/           what is about to get its name by a rename
    lost/          what no name refers to any more, for a while

A demoted file is a **stub**, a symlink in the home tree to its **object**, and a **shadow**, an
empty sparse file named by the object's id.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pafkafs import _native

TREE = "tree"
SHADOWS = "shadows"
OBJECTS = "objects"
TMP = "tmp"
LOST = "lost"
RECORD = "pafkafs.json"
ADOPTING = ".pafkafs-adopting"  # while adoption is moving a log directory in

# objects/ and what is below it is searched by a Kafka that runs on tree/, never listed.
STATE_MODES = {SHADOWS: 0o700, OBJECTS: 0o711, TMP: 0o700, LOST: 0o700}

NAME_MAX = 255
SYMLINK_MAX = 1023  # the shortest limit, that of an ext4 with 1 KiB blocks
NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR)  # NFS, FUSE
_SUFFIX = re.compile(rb"~([0-9a-f]{8})\.([0-9a-f]{16})")
_SUFFIX_LEN = 1 + 8 + 1 + 16
_OBJECTS_PART = b"/objects/"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# For who only looks: not even access times change.  Owners may have that, and so may root.
LOOKING = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_NOATIME if not os.geteuid() else 0)


@dataclass(frozen=True, slots=True)
class Stub:
    """Where the data of a demoted file is: object is its path below the device's objects/."""

    device_id: str
    object_id: str
    object: bytes

    @property
    def shadow(self) -> bytes:
        """Name of the shadow in shadows/."""
        return self.object_id.encode()


class DamagedStub(Exception):
    """A symlink that says it is a stub, but does not lead to where a stub may."""


def new_object_id() -> str:
    """An id that no other object of any device has."""
    return secrets.token_hex(8)


def is_object_id(text: str) -> bool:
    """Whether a text can be the id of an object."""
    return len(text) == 16 and all(digit in "0123456789abcdef" for digit in text)


def make_stub(device_id: str, device_path: bytes, path: bytes) -> Stub:
    """A stub with a new id for the file at path, relative to the mount.

    The object's path is the file's, as far as names and symlinks of all filesystems allow: its
    directories are shortened from the left.
    """
    object_id = new_object_id()
    *directories, name = path.split(b"/")
    suffix = f"~{device_id}.{object_id}".encode()
    last = name[: NAME_MAX - _SUFFIX_LEN] + suffix
    room = SYMLINK_MAX - len(device_path) - len(_OBJECTS_PART) - len(last)
    while directories and len(b"/".join(directories)) + 1 > room:
        directories.pop(0)
    return Stub(device_id, object_id, b"/".join([*directories, last]))


def stub_text(device_path: bytes, stub: Stub) -> bytes:
    """The symlink's text."""
    return device_path + _OBJECTS_PART + stub.object


def looks_like_stub(text: bytes) -> bool:
    """Whether a symlink's text would be taken for a stub's."""
    return _OBJECTS_PART in text and _SUFFIX.fullmatch(text[-_SUFFIX_LEN:]) is not None


def object_id_of(text: bytes) -> str:
    """The object's id in a text that looks like a stub's."""
    return os.fsdecode(text[-16:])


def device_id_of(text: bytes) -> str:
    """The device's id in a text that looks like a stub's."""
    return os.fsdecode(text[-25:-17])


def split_object_name(path: bytes) -> tuple[bytes, str, str] | None:
    """(the file's path when it moved, device id, object id) of an object's path below objects/;
    None when it is not named like one."""
    suffix = _SUFFIX.fullmatch(path[-_SUFFIX_LEN:])
    if suffix is None or path[-_SUFFIX_LEN - 1 : -_SUFFIX_LEN] in (b"", b"/"):
        return None
    return path[:-_SUFFIX_LEN], suffix[1].decode(), suffix[2].decode()


def with_device(path: bytes, device_id: str) -> bytes:
    """An object's path with the id of another device in its name."""
    return path[: -_SUFFIX_LEN + 1] + device_id.encode() + path[-_SUFFIX_LEN + 9 :]


def parse_stub(text: bytes, device_paths: Mapping[str, tuple[bytes, ...]]) -> Stub | None:
    """The stub that a symlink's text is, or None for an ordinary symlink.

    device_paths has, for each device of the set, where it is now and where it was before.
    Raises DamagedStub for a text that only pretends.
    """
    if not looks_like_stub(text):
        return None
    suffix = _SUFFIX.fullmatch(text[-_SUFFIX_LEN:])
    assert suffix is not None
    device_id, object_id = suffix[1].decode(), suffix[2].decode()
    for path in device_paths.get(device_id, ()):
        if text.startswith(path + _OBJECTS_PART):
            relative = text[len(path) + len(_OBJECTS_PART) :]
            if all(part not in (b"", b".", b"..") for part in relative.split(b"/")):
                return Stub(device_id, object_id, relative)
    raise DamagedStub(os.fsdecode(text))


def reopen_directory(path_fd: int) -> int:
    """A descriptor that reads and syncs the directory of an O_PATH descriptor."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=path_fd)


def open_state_directory(device_fd: int, name: str, *, create: bool = True) -> int:
    """Opens one of the device's own directories, made if it is missing.

    A directory that somebody else could have planted, or is a symlink, is refused
    (NotADirectoryError, PermissionError).
    """
    made = create and _make_state_directory(device_fd, name)
    try:
        fd = os.open(name, DIRECTORY, dir_fd=device_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise NotADirectoryError(error.errno, f"{name} there is a file or a symlink") from error
    try:
        _refuse_planted(fd, name, made=made)
        if made:
            # By descriptor: since it was made, a symlink could have taken its name.
            os.fchmod(fd, _state_mode(name))
            os.fsync(device_fd)
    except OSError:
        os.close(fd)
        raise
    return fd


def _state_mode(name: str) -> int:
    return STATE_MODES.get(name, 0o755)


def _make_state_directory(device_fd: int, name: str) -> bool:
    try:
        os.mkdir(name, _state_mode(name), dir_fd=device_fd)
    except FileExistsError:
        return False
    return True


def _refuse_planted(fd: int, name: str, *, made: bool) -> None:
    """The home tree belongs to whom the mountpoint does, but for a new one."""
    status = os.fstat(fd)
    if name == TREE and not made:
        return
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{name}/ belongs to uid {status.st_uid} or anybody may write to it")


def open_unnamed(dir_fd: int) -> int:
    """A new file of a directory, without a name yet: a crash leaves nothing of it.  Filesystems
    that have no such files raise one of NO_UNNAMED."""
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)


def give_name(fd: int, dir_fd: int, name: bytes) -> None:
    """Its name for a file that has none; FileExistsError when it is taken."""
    os.link(f"/proc/self/fd/{fd}".encode(), name, dst_dir_fd=dir_fd, follow_symlinks=True)


def remove(name: bytes, dir_fd: int) -> None:
    """Whatever it is; of a directory, an empty one."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except IsADirectoryError:
        os.rmdir(name, dir_fd=dir_fd)


def remove_empty(top_fd: int, directory: bytes) -> None:
    """A directory below top, and those above it, as far as they are empty.  What cannot be removed
    is found at the next mount.  Whoever is about to make an object there makes them again."""
    while directory:
        above, _, name = directory.rpartition(b"/")
        try:
            fd = _native.open_beneath(
                top_fd, above or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            )
            try:
                os.rmdir(name, dir_fd=fd)
            finally:
                os.close(fd)
        except OSError:
            return
        directory = above


def exists(name: str | bytes, dir_fd: int) -> bool:
    """Whether a directory has an entry of this name, whatever it is."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def put_aside(top_fd: int, path: bytes, lost_fd: int, *, durably: bool) -> bytes:
    """Moves what has no name any more to lost/ of its device; its name there, which says where it
    was.  Nothing that is there is replaced: the device must be locked, or its names of
    one object only.
    """
    directory, _, name = path.rpartition(b"/")
    parent_fd = _native.open_beneath(top_fd, directory or b".", DIRECTORY)
    try:
        aside = _free_name(lost_fd, path.replace(b"/", b",")[-NAME_MAX + 4 :])
        _native.rename(parent_fd, name, lost_fd, aside, 0)
        if durably:
            os.fsync(lost_fd)
            os.fsync(parent_fd)
    finally:
        os.close(parent_fd)
    return aside


def _free_name(dir_fd: int, name: bytes) -> bytes:
    for tried in (name, *(name + b".%d" % number for number in range(1, 1000))):
        if not exists(tried, dir_fd):
            return tried
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def create_shadow(shadows_fd: int, stub: Stub, like: os.stat_result) -> int:
    """A new shadow with the size, mode, owner and times of like; its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(stub.shadow, flags, 0o600, dir_fd=shadows_fd)
    try:
        os.ftruncate(fd, like.st_size)
        copy_attributes(like, fd)
    except OSError:
        os.close(fd)
        os.unlink(stub.shadow, dir_fd=shadows_fd)
        raise
    return fd


def shadow_status(shadows_fd: int, stub: Stub) -> os.stat_result:
    """The attributes of a demoted file.  OSError ELOOP when something else is in the place of its
    shadow: only somebody else can have put it there."""
    status = os.stat(stub.shadow, dir_fd=shadows_fd, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ELOOP, f"shadows/{stub.object_id} is not a file")
    return status


def object_wins(shadow: os.stat_result, object_: os.stat_result) -> bool:
    """Whose size and times are right: those of an object that was changed behind the mount.  Mode
    and owner are always the shadow's: a change of them may not have reached the object."""
    # When the mount changed it for the last time: the mtime may have been set to less.
    changed_ns = max(shadow.st_mtime_ns, shadow.st_ctime_ns)
    return object_.st_size != shadow.st_size or object_.st_mtime_ns > changed_ns


def copy_attributes(source: os.stat_result, fd: int) -> None:
    """Owner, mode and, last, times of source for fd.  Without privilege the owner is ours."""
    if os.geteuid() == 0:
        os.fchown(fd, source.st_uid, source.st_gid)
    os.fchmod(fd, stat.S_IMODE(source.st_mode))
    os.utime(fd, ns=(source.st_atime_ns, source.st_mtime_ns))


def replace_with_stub(
    tmp_fd: int, parent_fd: int, name: bytes, device_path: bytes, stub: Stub
) -> None:
    """The commit point of a demotion: one rename(2) of the stub over the file.

    **Invariant:** the object, its directories and the shadow are durable before this is called.
    """
    os.symlink(stub_text(device_path, stub), stub.shadow, dir_fd=tmp_fd)
    try:
        _native.rename(tmp_fd, stub.shadow, parent_fd, name, 0)
    except OSError:
        os.unlink(stub.shadow, dir_fd=tmp_fd)
        raise


def replace_stub(tmp_fd: int, copy_name: bytes, parent_fd: int, name: bytes) -> None:
    """The commit point of a promotion: one rename(2) of the copy over the stub.

    **Invariant:** the copy is durable before this is called.
    """
    _native.rename(tmp_fd, copy_name, parent_fd, name, 0)


def sync_all(fds: Iterable[int]) -> None:
    """fsync of each, in this order.  May block."""
    for fd in fds:
        os.fsync(fd)


def sync_object_directories(objects_fd: int, object_path: bytes) -> None:
    """fsync of every directory from the object's up to objects/."""
    directory = object_path
    while b"/" in directory:
        directory = directory.rpartition(b"/")[0]
        fd = _native.open_beneath(
            objects_fd, directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        )
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.fsync(objects_fd)
