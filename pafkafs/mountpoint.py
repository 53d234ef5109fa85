"""Mountpoints: checking, attaching and detaching a FUSE mount, as root or by fusermount3."""

import errno
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass

from pafkafs import _native, layout
from pafkafs.errors import PafkafsError

FILESYSTEM_TYPE = "fuse.pafkafs"
_IO_BYTES_MAX = 1 << 20
# What a disk may do; the defaults of FUSE are timid.  Names below /sys/class/bdi/MAJ:MIN.
PAGE_CACHE = {"max_ratio": "100", "strict_limit": "0", "read_ahead_kb": "1024"}


@dataclass(frozen=True)
class Mounted:
    """A line of /proc/self/mountinfo that is ours; device is `major:minor`."""

    mountpoint: str
    source: str
    device: str


def all_mounted() -> list[Mounted]:
    """Every pafkafs mount of this mount namespace, dead ones included."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            kind, source, _ = after.split(" ", 2)
            if kind == FILESYSTEM_TYPE:
                fields = before.split(" ")
                found.append(Mounted(_unescape(fields[4]), _unescape(source), fields[2]))
    return found


def _unescape(text: str) -> str:
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, char)
    return text


def find_mounted(mountpoint: str) -> Mounted | None:
    """The topmost pafkafs mount at this real path.  Makes no system call on the path itself, so
    that the daemon may ask for its own."""
    return next((m for m in reversed(all_mounted()) if m.mountpoint == mountpoint), None)


def is_dead(mountpoint: str) -> bool:
    """Whether a FUSE mount is there whose daemon is gone."""
    try:
        os.statvfs(mountpoint)  # a stat may be answered from the kernel's cache for an hour
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def check(mountpoint: str, devices: tuple[str, ...]) -> None:
    """Refuses a mountpoint that cannot be mounted on; changes nothing.  Raises PafkafsError."""
    if is_dead(mountpoint):
        return
    if not os.path.isdir(mountpoint):
        raise PafkafsError(f"the mountpoint {mountpoint} is no directory: create it")
    for device in devices:
        device_real = os.path.realpath(device)
        if mountpoint == device_real or mountpoint.startswith(device_real.rstrip("/") + "/"):
            raise PafkafsError(f"the mountpoint {mountpoint} is inside the device {device}")
        if device_real.startswith(mountpoint.rstrip("/") + "/"):
            raise PafkafsError(f"the device {device} is inside the mountpoint {mountpoint}")
    if find_mounted(mountpoint) is not None:
        raise PafkafsError(f"pafkafs is already mounted at {mountpoint}; see pafkafs status")
    if os.listdir(mountpoint):
        raise PafkafsError(f"the mountpoint {mountpoint} is not empty: its files would be hidden")


def attach(source: str, mountpoint: str) -> int:
    """Mounts; the descriptor of the connection, for the native front."""
    dead = is_dead(mountpoint)
    if os.geteuid() == 0:
        if dead:
            _detach_dead_as_root(mountpoint)
        target_fd = _open_empty(mountpoint)
        try:
            return _attach_as_root(source, mountpoint, target_fd)
        finally:
            os.close(target_fd)
    if dead:
        detach(mountpoint, lazy=True)
    return _attach_by_fusermount(source, mountpoint)


def _open_unswapped(path: str) -> int:
    """A descriptor of the directory at a real path, and at no other one: who may write above it
    could have put a symlink in its way since the path was checked, and root must not follow."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise PafkafsError(f"cannot mount: {path}: {error.strerror}") from error
    found = os.readlink(f"/proc/self/fd/{fd}")
    if found != path:
        os.close(fd)
        raise PafkafsError(f"cannot mount: {path} was replaced meanwhile and leads to {found}")
    return fd


def _open_empty(mountpoint: str) -> int:
    fd = _open_unswapped(mountpoint)
    try:
        listed_fd = layout.reopen_directory(fd)
        try:
            full = bool(os.listdir(listed_fd))
        finally:
            os.close(listed_fd)
    except OSError as error:
        os.close(fd)
        raise PafkafsError(f"cannot mount on {mountpoint}: {error.strerror}") from error
    if full:
        os.close(fd)
        raise PafkafsError(f"the mountpoint {mountpoint} is not empty any more")
    return fd


def _detach_dead_as_root(mountpoint: str) -> None:
    """The last name is never followed; those before it are held by a descriptor."""
    directory, name = os.path.split(mountpoint)
    fd = _open_unswapped(directory)
    try:
        _native.umount(os.fsencode(f"/proc/self/fd/{fd}/{name}"), True)
    except OSError as error:
        raise PafkafsError(
            f"cannot detach the dead mount at {mountpoint}: {error.strerror}"
        ) from error
    finally:
        os.close(fd)


def _attach_as_root(source: str, mountpoint: str, target_fd: int) -> int:
    """Mounts on the directory of a descriptor; mountpoint is its path for messages."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PafkafsError(
            f"cannot open /dev/fuse: {error.strerror}; load the kernel module: modprobe fuse"
        ) from error
    options = (
        f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,"
        f"max_read={_IO_BYTES_MAX}"
    )
    try:
        _native.mount(
            os.fsencode(source),
            f"/proc/self/fd/{target_fd}".encode(),
            FILESYSTEM_TYPE.encode(),
            options.encode(),
        )
    except OSError as error:
        os.close(fd)
        raise PafkafsError(f"cannot mount on {mountpoint}: {error.strerror}") from error
    return fd


def _attach_by_fusermount(source: str, mountpoint: str) -> int:
    """fusermount3 mounts for us and passes the descriptor over a socket (_FUSE_COMMFD)."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise PafkafsError("fusermount3 is missing: install fuse3 (apt-get install fuse3)")
    fsname = source.replace("\\", "\\\\").replace(",", "\\,")
    options = (
        f"fsname={fsname},subtype=pafkafs,default_permissions,nosuid,nodev,max_read={_IO_BYTES_MAX}"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = subprocess.run(
            [helper, "-o", options, "--", mountpoint],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise PafkafsError(f"cannot mount on {mountpoint}: {result.stderr.strip()}")
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.set_inheritable(fds[0], False)
    return fds[0]


def detach(mountpoint: str, *, lazy: bool) -> None:
    """Unmounts; OSError (EBUSY while files are open, unless lazy)."""
    if os.geteuid() == 0:
        _native.umount(os.fsencode(mountpoint), lazy)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        busy = "busy" in result.stderr
        raise OSError(errno.EBUSY if busy else errno.EPERM, result.stderr.strip())


def tune_page_cache(mounted: Mounted) -> None:
    """Lets the mount dirty memory and read ahead as a disk may."""
    for name, value in PAGE_CACHE.items():
        path = f"/sys/class/bdi/{mounted.device}/{name}"
        try:
            with open(path, "w", encoding="ascii") as setting:
                setting.write(value)
        except OSError:
            continue  # not root, or a kernel without this setting: slower, not wrong
