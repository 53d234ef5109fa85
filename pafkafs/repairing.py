"""Mends what an inspection found, one finding at a time, on devices that are not mounted.

**Invariant:** nothing is removed.  What has no name goes to lost/ by rename; a stub is replaced, by
one rename, only when what it is to lead to is durable.  So a repair can be cut anywhere, and the
next one goes on from what is there.
"""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack

from pafkafs import _native, growing, layout
from pafkafs.checking import Finding, Kind, Place
from pafkafs.config import WHOLE_FILESYSTEM
from pafkafs.copies import copy_into
from pafkafs.device import Device, device_kind, open_device
from pafkafs.deviceset import SetDevice
from pafkafs.layout import Stub

_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Repairs:
    """The repairs of one check."""

    def __init__(self, devices: Sequence[SetDevice]) -> None:
        self._devices = devices
        self._numbers = {device.member.device: n for n, device in enumerate(devices)}
        self._opened: Device | None = None  # the home device, when slots were needed
        self._sizes: growing.Recovery | None = None
        self._keep_slots = False
        self._acts = {
            Kind.STATE_DIRECTORY: self._state_directory,
            Kind.LEFTOVER: self._put_aside,
            Kind.OBJECT_WITHOUT_STUB: self._put_aside,
            Kind.SHADOW_WITHOUT_STUB: self._put_aside,
            Kind.SHADOW_MISSING: self._make_shadow,
            Kind.ATTRIBUTES_DIFFER: self._make_alike,
            Kind.OBJECT_ELSEWHERE: self._point_at,
            Kind.OBJECT_SHARED: self._copy_object,
            Kind.SLOT_OF_FILE: self._recover,
            Kind.SLOTS_WITHOUT_FILE: self._open_sizes,
            Kind.NONCE_WITHOUT_SLOT: self._remove_nonce,
        }

    def repair(self, finding: Finding) -> None:
        """Does what the finding's action says, durably.  Raises OSError when it cannot."""
        try:
            self._acts[finding.kind](finding)
        except OSError:
            # Its slot has the only length that is known of it.
            self._keep_slots = self._keep_slots or finding.kind is Kind.SLOT_OF_FILE
            raise

    def finish(self, *, slots_may_go: bool) -> None:
        """Frees the slots of growing files, when all files were met."""
        try:
            if self._sizes is not None and slots_may_go and not self._keep_slots:
                self._sizes.finish()
        finally:
            if self._opened is not None:
                self._opened.native.stop()
                os.close(self._opened.objects_fd)
                os.close(self._opened.lost_fd)
            self._sizes = self._opened = None

    # -- own directories ------------------------------------------------------------------------

    def _state_directory(self, finding: Finding) -> None:
        number, area = finding.where.device, finding.where.area
        with ExitStack() as stack:
            try:
                fd = self._open_area(stack, number, area)
            except FileNotFoundError:
                os.close(layout.open_state_directory(self._devices[number].fd, area))
                return
            os.fchmod(fd, layout.STATE_MODES[area])
            os.fsync(fd)

    def _put_aside(self, finding: Finding) -> None:
        where = finding.where
        with ExitStack() as stack:
            lost_fd = self._open_area(stack, where.device, layout.LOST)
            if where.area:
                top_fd = self._open_area(stack, where.device, where.area)
            else:
                top_fd = self._devices[where.device].fd
            layout.put_aside(top_fd, where.path, lost_fd, durably=True)
            if where.area == layout.OBJECTS:
                layout.remove_empty(top_fd, where.path.rpartition(b"/")[0])

    # -- shadows --------------------------------------------------------------------------------

    def _make_shadow(self, finding: Finding) -> None:
        stub = _stub_of(finding)
        with ExitStack() as stack:
            object_fd = self._open_object(stack, stub, os.O_RDONLY)
            self._shadow_like(stack, stub, os.fstat(object_fd))

    def _shadow_like(self, stack: ExitStack, stub: Stub, status: os.stat_result) -> None:
        shadows_fd = self._open_area(stack, 0, layout.SHADOWS)
        shadow_fd = layout.create_shadow(shadows_fd, stub, status)
        stack.callback(os.close, shadow_fd)
        layout.sync_all((shadow_fd, shadows_fd))

    def _make_alike(self, finding: Finding) -> None:
        stub = _stub_of(finding)
        with ExitStack() as stack:
            shadows_fd = self._open_area(stack, 0, layout.SHADOWS)
            shadow_fd = os.open(stub.shadow, _FILE, dir_fd=shadows_fd)
            stack.callback(os.close, shadow_fd)
            object_fd = self._open_object(stack, stub, os.O_RDONLY)
            shadow, object_ = os.fstat(shadow_fd), os.fstat(object_fd)
            right = shadow
            if layout.object_wins(shadow, object_):
                os.ftruncate(shadow_fd, object_.st_size)
                right = object_
            if os.geteuid() == 0:
                os.fchown(object_fd, shadow.st_uid, shadow.st_gid)
            os.fchmod(object_fd, stat.S_IMODE(shadow.st_mode))
            for fd in (object_fd, shadow_fd):
                os.utime(fd, ns=(right.st_atime_ns, right.st_mtime_ns))
                os.fsync(fd)

    # -- stubs ----------------------------------------------------------------------------------

    def _point_at(self, finding: Finding) -> None:
        """The object is right where it is; its name has to say so, and the stub."""
        old, found = _stub_of(finding), finding.found
        assert found is not None
        device = self._devices[found.device]
        path = self._rename_object(found, device.member.device)
        stub = Stub(device.member.device, old.object_id, path)
        with ExitStack() as stack:
            object_fd = self._open_object(stack, stub, os.O_RDONLY)
            shadows_fd = self._open_area(stack, 0, layout.SHADOWS)
            if not layout.exists(stub.shadow, shadows_fd):
                self._shadow_like(stack, stub, os.fstat(object_fd))
            self._replace(stack, finding.where, stub)

    def _rename_object(self, found: Place, device_id: str) -> bytes:
        """Its name has the id of its device."""
        path = layout.with_device(found.path, device_id)
        if path == found.path:
            return path
        directory, _, name = path.rpartition(b"/")
        with ExitStack() as stack:
            top_fd = self._open_area(stack, found.device, layout.OBJECTS)
            fd = _open_beneath(stack, top_fd, directory or b".", layout.DIRECTORY)
            if layout.exists(name, fd):
                raise FileExistsError(
                    errno.EEXIST, "another object has its name", os.fsdecode(path)
                )
            old = found.path.rpartition(b"/")[2]
            os.rename(old, name, src_dir_fd=fd, dst_dir_fd=fd)
            os.fsync(fd)
        return path

    def _copy_object(self, finding: Finding) -> None:
        """A new object for the second of two names."""
        old = _stub_of(finding)
        device = self._devices[self._numbers[old.device_id]]
        stub = layout.make_stub(old.device_id, device.path, finding.where.path)
        number = self._numbers[old.device_id]
        with ExitStack() as stack:
            source_fd = self._open_object(stack, old, os.O_RDONLY)
            status = os.fstat(source_fd)
            objects_fd = self._open_area(stack, number, layout.OBJECTS)
            _native.make_dirs(objects_fd, stub.object)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            copy_fd = _open_beneath(stack, objects_fd, stub.object, flags, 0o600)
            if copy_into(source_fd, copy_fd, status.st_size) < status.st_size:
                raise OSError(errno.EIO, "its object cannot be read to its end")
            layout.copy_attributes(status, copy_fd)
            os.fsync(copy_fd)
            layout.sync_object_directories(objects_fd, stub.object)
            self._shadow_like(stack, stub, status)
            self._replace(stack, finding.where, stub)

    def _replace(self, stack: ExitStack, where: Place, stub: Stub) -> None:
        """What the stub leads to, and the shadow, are durable."""
        device = self._devices[self._numbers[stub.device_id]]
        directory, _, name = where.path.rpartition(b"/")
        tree_fd = self._open_area(stack, 0, layout.TREE)
        tmp_fd = self._open_area(stack, 0, layout.TMP)
        parent_fd = _open_beneath(stack, tree_fd, directory or b".", layout.DIRECTORY)
        layout.replace_with_stub(tmp_fd, parent_fd, name, device.path, stub)
        os.fsync(parent_fd)

    # -- files that were growing ----------------------------------------------------------------

    def _recover(self, finding: Finding) -> None:
        self._open_sizes(finding)
        assert self._sizes is not None
        recovery = self._sizes
        directory, _, name = finding.where.path.rpartition(b"/")
        with ExitStack() as stack:
            tree_fd = self._open_area(stack, 0, layout.TREE)
            parent_fd = _open_beneath(stack, tree_fd, directory or b".", layout.DIRECTORY)
            status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
            failed = len(recovery.unrecovered)
            recovery.file_found(parent_fd, name, status.st_ino)
            if len(recovery.unrecovered) > failed:
                raise OSError(errno.EIO, recovery.unrecovered[-1])

    def _open_sizes(self, finding: Finding) -> None:
        if self._sizes is not None:
            return
        home = self._devices[0]
        kind = device_kind(home.fd, home.member.path)
        device = open_device(home, WHOLE_FILESYSTEM, power=False, kind=kind)
        self._opened = device
        growing.open_sizes(device)
        self._sizes = growing.Recovery(device)

    def _remove_nonce(self, finding: Finding) -> None:
        with ExitStack() as stack:
            tree_fd = self._open_area(stack, 0, layout.TREE)
            fd = _open_beneath(stack, tree_fd, finding.where.path, _FILE)
            os.removexattr(fd, _native.NONCE_ATTRIBUTE)
            os.fsync(fd)

    # -- opening --------------------------------------------------------------------------------

    def _open_area(self, stack: ExitStack, number: int, area: str) -> int:
        """Nothing is moved to, or taken from, a directory that somebody else put in its place."""
        fd = os.open(area, layout.DIRECTORY, dir_fd=self._devices[number].fd)
        stack.callback(os.close, fd)
        uid = os.fstat(fd).st_uid
        if area != layout.TREE and uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{area}/ belongs to uid {uid}")
        return fd

    def _open_object(self, stack: ExitStack, stub: Stub, flags: int) -> int:
        objects_fd = self._open_area(stack, self._numbers[stub.device_id], layout.OBJECTS)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return _open_beneath(stack, objects_fd, stub.object, flags)


def _open_beneath(stack: ExitStack, top_fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    fd = _native.open_beneath(top_fd, path, flags, mode)
    stack.callback(os.close, fd)
    return fd


def _stub_of(finding: Finding) -> Stub:
    assert finding.stub is not None
    return finding.stub
