"""Assembles a mount from its parts, and owns start and stop."""

import errno
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyfuse3
import trio

from pafkafs import _native, control, deviceset, garbage, growing, mountpoint, recovery, status
from pafkafs.config import MountOptions
from pafkafs.copying import Pace
from pafkafs.device import Device, Home, device_kind, open_device, open_home
from pafkafs.errors import PafkafsError
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.filesystem import Filesystem
from pafkafs.jobs import Jobs
from pafkafs.migration import MigrationOptions, Migrator
from pafkafs.moving import Mover
from pafkafs.namespace import Namespace
from pafkafs.objects import ObjectUpkeep
from pafkafs.policy import place_new
from pafkafs.spilling import Spiller

log = logging.getLogger(__name__)

_DEVICE_PATIENCE_S = 10.0
_USAGE_INTERVAL_S = 1.0
_SYNC_PATIENCE_S = 60.0
# Tasks of the session: as many as setattrs that a hung device may hold.
_SESSION_TASKS_MAX = 10_000

_OOM_SCORE = -900

# Nothing there, or something that is not a file below objects/.
_NOT_THE_OBJECT = (errno.ENOENT, errno.EXDEV, errno.ELOOP)

T = TypeVar("T")


class Mount:
    """A mount while it is served."""

    def __init__(self, options: MountOptions) -> None:
        _raise_limits()
        _protect_process()  # threads inherit it: before the first one
        self.options = options
        self._started = time.monotonic()
        self._upkeep_scope = trio.CancelScope()
        mountpoint.check(options.mountpoint, options.fast + options.slow)
        self.devices, self.home, paths, self.durability = _within_patience(
            lambda: _open_devices(options)
        )
        self._by_id = {device.id: device for device in self.devices}
        home = self.devices[0]
        self._grows = options.pmem == "on" or (options.pmem == "auto" and home.kind == "dax")
        if options.pmem == "on" and self.durability == "power" and home.kind != "dax":
            raise PafkafsError(
                f"{os.fsdecode(home.path)} is not on DAX: --pmem on is for tests there, and cannot "
                "be had with --durability power"
            )
        home.native.segment_bytes = options.segment_size or 0
        self._sizes = _open_sizes(home) if self._grows or growing.was_used(home) else None
        self._scan = recovery.scan_tree(self.home, self._by_id, paths, self._sizes)
        if self._sizes is not None and self._scan.unreadable is None:
            self._sizes.finish()
        self._old_shadows = os.listdir(self.home.shadows_fd)
        _count(self.devices, self._scan)

    # -- status -------------------------------------------------------------------------------

    def snapshot(self) -> status.MountStatus:
        """The mount as it is now."""
        problems = [p for device in self.devices for p in status.device_problems(device)]
        problems += self._own_problems()
        return status.MountStatus(
            mountpoint=self.options.mountpoint,
            state=status.DEGRADED if problems else status.HEALTHY,
            durability=self.durability,
            mode=self.options.mode.value,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 1),
            open_files=len(self._files),
            requests=self._front.answered + self._front.forwarded,
            pool=self._pool_status(),
            migration=self._migration_status(),
            tiers=status.tier_statuses(self.devices),
            problems=tuple(problems),
            notes=tuple(notes(self.devices, self.durability, grows=self._grows)),
        )

    def _migration_status(self) -> status.MigrationStatus:
        now, totals, planned = trio.current_time(), self._mover.totals, self._migrator.plan
        return status.MigrationStatus(
            paused=self._migrator.paused,
            running=tuple(
                status.MoveStatus(
                    move.path,
                    move.source,
                    move.target,
                    move.size_bytes,
                    move.copied_bytes,
                    round(now - move.started, 1),
                )
                for move in self._mover.running
            ),
            planned=len(planned),
            why=planned[0].why if planned else None,
            files=totals.files,
            bytes=totals.bytes,
            failed=totals.failed,
            cut_over_max_s=round(totals.cut_over_max_s, 4),
            last_error=self._migrator.last_error,
        )

    def _pool_status(self) -> status.PoolStatus | None:
        if self._pool is None:
            return None
        segment_bytes = self.devices[0].native.segment_bytes
        return status.PoolStatus(
            self._pool.files, self._pool.bytes, segment_bytes, growing.persist_method()
        )

    def _own_problems(self) -> list[status.Problem]:
        found = []
        damaged = self._namespace.damaged
        if damaged:
            example = os.fsdecode(min(damaged.values()))
            found.append(
                status.Problem(
                    f"{len(damaged)} stubs do not lead to a device of this set, and opening them "
                    f"fails with EIO, such as {example}",
                    "unmount and restore the symlinks in tree/, or remove the files: rm",
                )
            )
        if self._scan.unreadable is not None:
            found.append(
                status.Problem(
                    f"the home tree cannot be read at {self._scan.unreadable}",
                    "check the filesystem of the first fast device: dmesg, fsck",
                )
            )
        if self._sizes is not None and self._sizes.refused:
            found.append(
                status.Problem(
                    f"{len(self._sizes.refused)} files were shorter than what was written to them "
                    f"when they were recovered, such as {self._sizes.refused[0]}",
                    "check the filesystem of the first fast device: dmesg, fsck",
                )
            )
        if self._scan.copied:
            found.append(
                status.Problem(
                    f"{len(self._scan.copied)} objects have several stubs: copied by hand?",
                    "copy demoted files with cp -L",
                )
            )
        if self._mover.degraded is not None:
            found.append(status.Problem(self._mover.degraded, "check the fast device: dmesg"))
        return found

    # -- serving ------------------------------------------------------------------------------

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serves until it is unmounted or told to stop.  Raises PafkafsError before ready."""
        server = control.listen(self.options.mountpoint)
        fuse_fd = mountpoint.attach(self.options.source, self.options.mountpoint)
        try:
            async with trio.open_nursery() as nursery:
                self._build(nursery, fuse_fd)
                await self._reconcile_before_serving(nursery)
                nursery.start_soon(control.serve, server, self._commands())
                nursery.start_soon(self._run_upkeep)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._handle_events, on_ready)
                nursery.start_soon(self._collect_garbage)
                nursery.start_soon(self._migrator.run)
                for device in self.devices:
                    nursery.start_soon(self._sync_what_was_there, device)
                    nursery.start_soon(self._watch_usage, device)
                self._front.start()
                await self._serve_session()
                self._upkeep_scope.cancel()
                await self._finish()
                nursery.cancel_scope.cancel()
        finally:
            control.socket_path(self.options.mountpoint).unlink(missing_ok=True)
            self._detach_if_left()

    async def _run_upkeep(self) -> None:
        with self._upkeep_scope:
            await self._upkeep.run()

    async def _serve_session(self) -> None:
        """Until the kernel ends the connection, which libfuse takes for an I/O error."""
        try:
            await pyfuse3.main(max_tasks=_SESSION_TASKS_MAX)
        except* OSError:
            if not self._front.ended:
                raise

    def _build(self, nursery: trio.Nursery, fuse_fd: int) -> None:
        threads = max(2, min(4, os.cpu_count() or 2))
        self._front = _native.Front(fuse_fd, threads)
        self._upkeep = ObjectUpkeep(self.home, self._by_id)
        self._upkeep.kept |= self._scan.copied
        self._files = OpenFiles(
            self._front, nursery, lambda file: self._namespace.file_closed(file)
        )
        self._pool: growing.Pool | None = None
        self._namespace = Namespace(
            self.home,
            self._by_id,
            self._files,
            self._upkeep,
            self._place,
            durable_names=self.durability == "power",
        )
        self._namespace.damaged.update(self._scan.damaged)
        if self._grows:
            self._build_pool(nursery)
        pace = Pace(self.options.migrate_rate)
        self._mover = Mover(self._namespace, self.home, self._by_id, pace)
        self._migrator = Migrator(
            self._namespace,
            self.home,
            self.devices,
            self._mover,
            self.options.mode,
            MigrationOptions(
                self.options.limits,
                self.options.interval_s,
                self.options.migrate_threads,
                self.options.pin,
            ),
        )
        if self._pool is not None:
            self._migrator.pool_bytes = lambda: self._pool.bytes if self._pool is not None else 0
        self._jobs = Jobs(nursery, self._migrator)
        self._spiller = Spiller(self._namespace, self._mover, self._by_id, self.options.mode)
        self._spiller.pool = self._pool
        self._reconciler = recovery.Reconciler(self._namespace, self.home, self._scan)
        operations = Filesystem(self._namespace, self.devices)
        pyfuse3.init(operations, f"/dev/fd/{self._front.session_fd}", set())

    def _build_pool(self, nursery: trio.Nursery) -> None:
        self._pool = growing.Pool(
            self._front,
            self.devices[0],
            self.home.tree_fd,
            self.options.pool_ratio,
            self._namespace.nodes.new_ino,
        )
        self._namespace.pool = self._pool
        self._namespace.segment_size_given = self.options.segment_size is not None
        nursery.start_soon(self._pool.run)

    def _place(self, bulk: bool) -> Device:
        rooms = [device.room for device in self.devices]
        return self.devices[place_new(self.options.mode, rooms, bulk=bulk)]

    def _commands(self) -> control.Commands:
        async def show(_: Mapping[str, Any]) -> dict[str, object]:
            return status.as_dict(self.snapshot())

        return {"status": show, **self._jobs.commands()}

    async def _reconcile_before_serving(self, nursery: trio.Nursery) -> None:
        for device in self.devices:
            self._reconciler.done[device.id] = trio.Event()
            nursery.start_soon(self._reconciler.run, device)
        with trio.move_on_after(recovery.COMPARE_BEFORE_SERVING_S):
            for done in self._reconciler.done.values():
                await done.wait()

    async def _handle_events(self, on_ready: Callable[[], None]) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._front.event_fd)
            for kind, ino, value in self._front.take_events():
                if kind == _native.EVENT_READY:
                    self._became_ready(on_ready)
                elif kind != _native.EVENT_ENDED:  # the session sees the end by itself
                    self._file_event(kind, ino, value)

    def _became_ready(self, on_ready: Callable[[], None]) -> None:
        mounted = mountpoint.find_mounted(self.options.mountpoint)
        if mounted is not None:
            mountpoint.tune_page_cache(mounted)
        on_ready()
        log.info("serving %s", self.options.mountpoint)

    def _file_event(self, kind: int, ino: int, value: int) -> None:
        node = self._namespace.nodes.find(ino)
        if node is None or node.file is None:
            return
        file = node.file
        if kind == _native.EVENT_NO_ROOM:
            self._files.start_soon(self._spiller.make_room, file)
        elif kind == _native.EVENT_SEAL:
            self._files.start_soon(_seal_for_request, file)
        elif kind == _native.EVENT_WRITTEN:
            self._files.start_soon(self._grow_if_active, file)
        elif kind == _native.EVENT_QUIET and file.quiet is not None:
            file.quiet.set()
        elif kind == _native.EVENT_RECONCILED:
            pyfuse3.invalidate_inode(ino, attr_only=True)
        elif kind == _native.EVENT_OBJECT_ERROR and node.stub is not None:
            if value in _NOT_THE_OBJECT:
                file.device.missing_objects.add(node.stub.object_id)
            file.device.failed(
                f"cannot open the data of {os.fsdecode(node.path())}: {os.strerror(value)}"
            )
        elif kind == _native.EVENT_IO_ERROR:
            file.device.failed(f"{os.fsdecode(node.path())}: {os.strerror(value)}")

    async def _grow_if_active(self, file: OpenFile) -> None:
        """A segment that is written to after a restart grows on in persistent memory."""
        try:
            wanted = self._grows and self._namespace.is_active_segment(file.node)
        except OSError as error:
            log.warning("%s: %s", os.fsdecode(file.node.path()), error.strerror)
            return
        room = file.device.room
        if wanted and room.free_bytes > min(growing.ROOM_TO_START, room.limit_bytes // 8):
            await growing.start(self._files, file)

    async def _watch_usage(self, device: Device) -> None:
        while True:
            await trio.sleep(_USAGE_INTERVAL_S)
            try:
                await device.run(device.refresh_usage)
            except OSError as error:
                device.failed(f"statvfs: {error.strerror}")

    async def _sync_what_was_there(self, device: Device) -> None:
        """What an earlier daemon acked, or a Kafka on tree/ wrote, may be in the page cache of
        the device still: an fsync has to reach it until this is done."""
        try:
            await trio.to_thread.run_sync(_native.syncfs, device.fd, abandon_on_cancel=True)
        except OSError as error:
            device.failed(f"cannot sync what was written before the mount: {error.strerror}")
        else:
            device.synced = True

    async def _collect_garbage(self) -> None:
        """Once, after all objects were compared; what is made meanwhile is no candidate."""
        if self._scan.unreadable is not None:
            return  # what was not seen must not be taken for garbage
        try:
            garbage.collect_shadows(
                self.devices[0], self.home, self._referenced(), self._old_shadows
            )
        except OSError as error:
            self.devices[0].failed(f"cannot put shadows without a stub aside: {error.strerror}")
        async with trio.open_nursery() as nursery:
            for device in self.devices:
                nursery.start_soon(self._collect_garbage_on, device)
        self._files.opened_objects = None

    async def _collect_garbage_on(self, device: Device) -> None:
        await self._reconciler.done[device.id].wait()
        for ino in self._reconciler.changed_nodes:
            pyfuse3.invalidate_inode(ino, attr_only=True)
        self._reconciler.changed_nodes.clear()
        try:
            report = await device.run(lambda: garbage.collect(device, self._referenced))
        except OSError as error:
            device.failed(f"cannot put objects without a stub aside: {error.strerror}")
            return
        device.suspicious_objects = report.unreferenced if report.suspicious else 0

    def _referenced(self) -> set[str]:
        return set(self._scan.stubs) | self._scan.refused | (self._files.opened_objects or set())

    # -- stopping -----------------------------------------------------------------------------

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("stopping %s", self.options.mountpoint)
                await self._unmount()

    async def _unmount(self) -> None:
        """Detaches, also when busy: then open files are cut off, after everything is synced."""
        where = self.options.mountpoint
        with trio.move_on_after(_SYNC_PATIENCE_S):
            # Stores into mappings are still in the kernel.  A process of its own, because a
            # call into our own mount may wait for us.
            await trio.run_process(
                ["sync", "-f", where], check=False, capture_stdout=True, capture_stderr=True
            )
        try:
            await trio.to_thread.run_sync(lambda: mountpoint.detach(where, lazy=False))
        except OSError as error:
            log.warning("%s is busy (%s): open files are cut off", where, error.strerror)
            with suppress(OSError):  # detached already, by umount -l
                await trio.to_thread.run_sync(lambda: mountpoint.detach(where, lazy=True))
            await trio.to_thread.run_sync(self._front.stop)

    async def _finish(self) -> None:
        """After the last request: all that was written is made durable."""
        with trio.CancelScope(shield=True):
            if self._pool is not None:
                self._pool.drain()
            await self._upkeep.flush(_SYNC_PATIENCE_S / 2)
            # The home device last: its names lead to what the others have.
            async with trio.open_nursery() as nursery:
                for device in self.devices[1:]:
                    nursery.start_soon(self._sync_device, device)
            await self._sync_device(self.devices[0])
            self._front.stop()
            for device in self.devices:
                if device.native.stop() > 0:
                    log.error("%s hangs and is left behind", os.fsdecode(device.path))
        log.info("stopped %s", self.options.mountpoint)

    async def _sync_device(self, device: Device) -> None:
        """Everything on it, open or not.  A device that hangs uses up its own patience only."""
        done = False
        with trio.move_on_after(_SYNC_PATIENCE_S / 2):
            for file in self._files.all():
                if file.device is device:
                    await self._sync_file(file)
            try:
                await device.run(lambda: _native.syncfs(device.fd))
                done = True
            except OSError as error:
                device.failed(f"sync at unmount: {error.strerror}")
        if not done:
            log.error("%s was not synced at unmount", os.fsdecode(device.path))

    async def _sync_file(self, file: OpenFile) -> None:
        try:
            await file.seal()
            await file.sync()
        except OSError as error:
            file.device.failed(f"fsync at unmount: {error.strerror}")

    def _detach_if_left(self) -> None:
        """After a failure the mountpoint is not left dead."""
        where = self.options.mountpoint
        if mountpoint.find_mounted(where) is not None:
            mountpoint.detach(where, lazy=True)


async def _seal_for_request(file: OpenFile) -> None:
    try:
        await file.seal()
        file.native.end_starving(0)
    except OSError as error:
        file.device.failed(f"cannot seal {os.fsdecode(file.node.path())}: {error.strerror}")
        file.native.end_starving(error.errno or errno.EIO)


def notes(devices: list[Device], durability: str, *, grows: bool) -> list[str]:
    """What the operator should know, though nothing is wrong."""
    found = []
    if devices[0].kind == "memory":
        found.append("the fast tier is in memory: a power loss takes its data and all names")
    if durability == "power" and devices[0].kind != "dax":
        found.append("durability power without DAX: each write is synchronous, and slow")
    if grows and devices[0].kind != "dax":
        found.append("--pmem on without DAX is for tests and measurements")
    return found


def serve(options: MountOptions, on_ready: Callable[[], None]) -> None:
    """Mounts and serves until unmounted; on_ready is called once requests are answered."""
    mount = Mount(options)
    try:
        trio.run(mount.run, on_ready)
    except* PafkafsError as group:
        raise first_of(group) from None


def first_of(group: BaseExceptionGroup[PafkafsError]) -> PafkafsError:
    """One error of a group, for its message."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PafkafsError)
    return error


def _open_devices(
    options: MountOptions,
) -> tuple[list[Device], Home, dict[str, tuple[bytes, ...]], str]:
    members = deviceset.assemble(options.fast, options.slow)
    kinds = [device_kind(member.fd, member.member.path) for member in members]
    durability = options.durability or ("power" if kinds[0] == "dax" else "process")
    capacities = options.fast_capacity + options.slow_capacity
    devices = [
        open_device(member, capacity, power=durability == "power", kind=kind)
        for member, capacity, kind in zip(members, capacities, kinds, strict=True)
    ]
    paths = {member.member.device: member.all_paths for member in members}
    return devices, open_home(devices[0]), paths, durability


def _within_patience(act: Callable[[], T]) -> T:
    """Runs what may hang in a device in a thread that can be left behind."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DEVICE_PATIENCE_S)
    if errors:
        raise errors[0]
    if not results:
        raise PafkafsError(
            f"a device has not answered for {_DEVICE_PATIENCE_S:.0f} s: check it with dmesg"
        )
    return results[0]


def _open_sizes(device: Device) -> growing.Recovery:
    """What was growing in persistent memory when the last mount ended."""
    try:
        growing.open_sizes(device)
    except OSError as error:
        raise PafkafsError(
            f"cannot use {os.fsdecode(device.path)}/sizes: {error.strerror}"
        ) from error
    _native.catch_media_errors()
    return growing.Recovery(device)


def _count(devices: list[Device], scan: recovery.Scan) -> None:
    home = devices[0]
    home.files = scan.plain_files
    if home.capacity_option >= 0:
        home.native.add_used(scan.plain_bytes)
    for device in devices:
        device.files += sum(1 for stub in scan.stubs.values() if stub.device_id == device.id)


def _raise_limits() -> None:
    """As many descriptors as we may have: two for each open file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, int(Path("/proc/sys/fs/nr_open").read_text()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (PermissionError, ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _protect_process() -> None:
    """Kafka dies with its file system: let the OOM killer take something else first, and let
    reclaim not wait for us.  Both take privilege; without it they are left."""
    try:
        _native.set_io_flusher()
    except OSError as error:
        log.info("reclaim of memory may wait for this process: %s", error.strerror)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    except OSError as error:
        log.info("not protected from the OOM killer: %s", error.strerror)
