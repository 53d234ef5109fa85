"""Assembles a mount from its parts, and owns start and stop."""

import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyfuse3
import trio

from pafkafs import (
    _native,
    control,
    exporter,
    garbage,
    growing,
    metrics,
    mountpoint,
    opening,
    recovery,
    status,
)
from pafkafs.catalogue import Catalogue, Directory
from pafkafs.config import MountOptions
from pafkafs.copying import Pace
from pafkafs.device import Device
from pafkafs.ending import Ending, NotSynced
from pafkafs.errors import PafkafsError
from pafkafs.files import OpenFile, OpenFiles
from pafkafs.filesystem import Filesystem
from pafkafs.jobs import Jobs
from pafkafs.listing import Lister
from pafkafs.migration import MigrationOptions, Migrator
from pafkafs.moving import Mover
from pafkafs.namespace import Namespace
from pafkafs.nodes import NodeTable
from pafkafs.objects import ObjectUpkeep
from pafkafs.placement import Mode, place_new
from pafkafs.policy import Keep
from pafkafs.reporting import Reporter
from pafkafs.settings import Settings
from pafkafs.spilling import Spiller
from pafkafs.survey import Survey

log = logging.getLogger(__name__)

_USAGE_INTERVAL_S = 1.0
_KNOW_BEFORE_SERVING_S = 0.5
# Tasks of the session: as many as setattrs that a hung device may hold.
_SESSION_TASKS_MAX = 10_000

# Nothing there, or something that is not a file below objects/.
_NOT_THE_OBJECT = (errno.ENOENT, errno.EXDEV, errno.ELOOP)


class Mount:
    """A mount while it is served."""

    def __init__(self, options: MountOptions) -> None:
        opening.raise_limits()
        opening.protect_process()  # threads inherit it: before the first one
        self.options = options
        self._upkeep_scope = trio.CancelScope()
        mountpoint.check(options.mountpoint, options.devices)
        self._metrics_server, self._metrics_address = None, None
        if options.metrics is not None:
            self._metrics_server = exporter.listen(options.metrics)
            self._metrics_address = exporter.shown(self._metrics_server.getsockname())
        self._opened = opening.open_all(options)
        self.devices, self.home = self._opened.devices, self._opened.home
        self._by_id = {device.id: device for device in self.devices}
        self._nodes = NodeTable(self.home.tree_fd)
        tiers = [device.tier for device in self.devices]
        self._catalogue = Catalogue(tiers, options.rules, self._nodes.root.key, time.monotonic())
        paths, sizes = self._opened.paths, self._opened.sizes
        self._survey = Survey(self.home, self._by_id, paths, self._catalogue, sizes)

    # -- serving ------------------------------------------------------------------------------

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serves until it is unmounted or told to stop.  Raises PafkafsError before ready."""
        server, end = control.listen(self.options.mountpoint), control.End()
        fuse_fd = mountpoint.attach(self.options.source, self.options.mountpoint)
        try:
            async with trio.open_nursery() as nursery:
                self._build(nursery, fuse_fd)
                await self._survey_before_serving(nursery)
                nursery.start_soon(control.serve, server, self._commands(), end)
                nursery.start_soon(self._run_upkeep)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._handle_events, on_ready)
                nursery.start_soon(self._collect_garbage)
                nursery.start_soon(self._migrator.run)
                if self._pool is not None:
                    nursery.start_soon(self._pool.run)
                if self._metrics_server is not None:
                    page = exporter.Exporter(
                        self._metrics_server, self._reporter.figures, metrics.render
                    )
                    nursery.start_soon(page.run)
                for device in self.devices:
                    nursery.start_soon(self._sync_what_was_there, device)
                    nursery.start_soon(self._watch_usage, device)
                self._front.start()
                await self._serve_session()
                self._upkeep_scope.cancel()
                unsynced = await self._ending.finish()
                log.info("stopped %s", self.options.mountpoint)
                await end.tell(unsynced)
                if unsynced:
                    raise NotSynced(f"not synced at the end: {', '.join(unsynced)}")
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
        self._nursery = nursery
        self._follow_rules = trio.CancelScope()
        threads = max(2, min(4, os.cpu_count() or 2))
        self._front = _native.Front(fuse_fd, threads)
        self._upkeep = ObjectUpkeep(
            self.home,
            self._by_id,
            lambda stub: not self._survey.take_uncounted(stub.object_id),
        )
        self._files = OpenFiles(
            self._front, nursery, lambda file: self._namespace.file_closed(file)
        )
        pooled = self._opened.grows and self.options.mode is not Mode.SLOW
        self._pool = self._build_pool() if pooled else None
        self._namespace = Namespace(
            self.home,
            self._by_id,
            self._nodes,
            self._files,
            self._upkeep,
            self._catalogue,
            self._survey,
            self._place,
            pool=self._pool,
            learns_segment_size=self.options.segment_size is None,
            durable_names=self._opened.durability == "power",
        )
        pace = Pace(self.options.migrate_rate)
        self._mover = Mover(self._namespace, self.home, self._by_id, pace)
        self._migrator = Migrator(
            self._namespace,
            self.devices,
            self._mover,
            self.options.mode,
            _migration_options(self.options),
            self._prepared_bytes,
            self._survey.done.is_set,
        )
        self._jobs = Jobs(nursery, self._migrator, self.devices[-1].tier)
        self._settings = Settings(self.options, self._take_over)
        self._spiller = Spiller(
            self._namespace, self._mover, self._by_id, self.options.mode, self._pool
        )
        self._reconciler = recovery.Reconciler(
            self._namespace,
            self.home,
            self._survey,
            lambda ino: pyfuse3.invalidate_inode(ino, attr_only=True),
        )
        self._reporter = Reporter(
            lambda: self.options,
            self._opened,
            self._front,
            self._files,
            self._survey,
            self._mover,
            self._migrator,
            self._pool,
            self._metrics_address,
        )
        self._ending = Ending(
            self._front, self.devices, self._files, self._upkeep, self._mover, self._pool
        )
        operations = Filesystem(self._namespace, self.devices)
        pyfuse3.init(operations, f"/dev/fd/{self._front.session_fd}", set())

    def _prepared_bytes(self) -> int:
        """Allocated for what is yet to be written: given back when a writer needs it."""
        pooled = 0 if self._pool is None else self._pool.bytes
        return pooled + self._files.ahead_bytes(self.devices[0])

    def _build_pool(self) -> growing.Pool:
        return growing.Pool(
            self._front,
            self.devices[0],
            self.home.tree_fd,
            self.options.pool_ratio,
            self._nodes.new_ino,
        )

    def _place(self, directory: Directory, bulk: bool) -> Device:
        rules, rooms = self._migrator.options.rules, [device.room for device in self.devices]
        kept_off = rules.all[directory.rule or 0].keep is Keep.SLOW
        chosen = place_new(self.options.mode, rooms, bulk=bulk, kept_off_fast=bulk and kept_off)
        return self.devices[chosen]

    def _commands(self) -> control.Commands:
        async def show(_: Mapping[str, Any]) -> dict[str, object]:
            return status.as_dict(self._reporter.snapshot())

        lister = Lister(
            self._catalogue,
            self.devices,
            lambda: self._migrator.options.rules,
            lambda: {move.path for move in self._mover.running},
            self._migrator.look_at,
        )
        return {
            "status": show,
            **self._jobs.commands(),
            **lister.commands(),
            **self._settings.commands(),
        }

    def _take_over(self, options: MountOptions) -> None:
        """What may change while it is mounted."""
        if options.rules != self.options.rules:
            self._follow_rules.cancel()
            self._follow_rules = trio.CancelScope()
            following = self._catalogue.follow(options.rules)
            self._nursery.start_soon(self._reclassify, following, self._follow_rules)
        self.options = options
        self._migrator.options = _migration_options(options)
        self._mover.pace.change(options.migrate_rate)

    async def _reclassify(self, following: Iterator[None], scope: trio.CancelScope) -> None:
        """A catalogue of many directories does not hold others up."""
        with scope:
            for _ in following:
                await trio.lowlevel.checkpoint()
            self._migrator.look_soon()

    async def _survey_before_serving(self, nursery: trio.Nursery) -> None:
        """A tree of usual size is known, and its objects are compared, before it is served; a
        large one, and slow devices, do not hold it up."""
        nursery.start_soon(self._run_survey)
        for device in self.devices:
            nursery.start_soon(self._reconciler.run, device)
        with trio.move_on_after(_KNOW_BEFORE_SERVING_S):
            await self._survey.done.wait()
            for done in self._reconciler.done.values():
                await done.wait()

    async def _run_survey(self) -> None:
        await self._survey.run()
        if self._survey.unreadable is not None:
            return  # what was not seen may need an object that is to be removed, or its slot
        self._upkeep.stubs_are_known(self._survey.copied)
        if self._opened.sizes is not None:
            try:
                await self.devices[0].run(self._opened.sizes.finish)
            except OSError as error:
                self.devices[0].failed(f"cannot sync what was recovered: {error.strerror}")

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
            wanted = self._opened.grows and self._namespace.is_active_segment(file.node)
        except OSError as error:
            log.warning("%s: %s", os.fsdecode(file.node.path()), error.strerror)
            return
        room = file.device.room
        if wanted and room.free_bytes > min(growing.ROOM_TO_START, room.limit_bytes // 8):
            await growing.start(self._files, file)
            if not self._namespace.is_active_segment(file.node):
                await self._files.seal(file)  # a newer one was made meanwhile

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
        await self._survey.done.wait()
        if self._survey.unreadable is not None:
            return  # what was not seen must not be taken for garbage
        home = self.devices[0]
        try:
            await home.run(
                lambda: garbage.collect_shadows(
                    home, self.home, self._is_referenced, has_names=self._survey.files > 0
                )
            )
        except OSError as error:
            home.failed(f"cannot put shadows without a stub aside: {error.strerror}")
        async with trio.open_nursery() as nursery:
            for device in self.devices:
                nursery.start_soon(self._collect_garbage_on, device)
        self._files.opened_objects = None
        self._survey.ids.clear()

    async def _collect_garbage_on(self, device: Device) -> None:
        await self._reconciler.done[device.id].wait()
        try:
            report = await device.run(
                lambda: garbage.collect(
                    device, self._is_referenced, has_names=self._survey.files > 0
                )
            )
        except OSError as error:
            device.failed(f"cannot put objects without a stub aside: {error.strerror}")
            return
        device.suspicious_objects = report.unreferenced if report.suspicious else 0

    def _is_referenced(self, object_id: str) -> bool:
        made = self._files.opened_objects or ()
        return self._survey.is_referenced(object_id) or object_id in made

    # -- stopping -----------------------------------------------------------------------------

    async def _watch_signals(self) -> None:
        stops = signal.SIGTERM, signal.SIGINT
        with trio.open_signal_receiver(*stops, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    await self._reload()
                    continue
                log.info("stopping %s", self.options.mountpoint)
                await self._ending.unmount(self.options.mountpoint)

    async def _reload(self) -> None:
        try:
            answer = await self._settings.reload()
        except PafkafsError as error:
            log.error("nothing was reloaded: %s", error)
            return
        for key in answer["need_remount"]:
            log.warning("%s was left as it is: it needs a remount", key)
        log.info("reloaded %s", self.options.config)

    def _detach_if_left(self) -> None:
        """After a failure the mountpoint is not left dead."""
        where = self.options.mountpoint
        if mountpoint.find_mounted(where) is not None:
            mountpoint.detach(where, lazy=True)


def _migration_options(options: MountOptions) -> MigrationOptions:
    return MigrationOptions(
        options.limits, options.rules, options.interval_s, options.migrate_threads
    )


async def _seal_for_request(file: OpenFile) -> None:
    try:
        await file.seal()
        file.native.end_starving(0)
    except OSError as error:
        file.device.failed(f"cannot seal {os.fsdecode(file.node.path())}: {error.strerror}")
        file.native.end_starving(error.errno or errno.EIO)


def serve(options: MountOptions, on_ready: Callable[[], None]) -> None:
    """Mounts and serves until unmounted; on_ready is called once requests are answered."""
    try:
        mount = Mount(options)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PafkafsError(f"cannot open the devices: {reason}; check them: dmesg") from error
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
