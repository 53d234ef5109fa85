"""The background task that moves segments between the tiers: asks policy, runs moves.

The home tree is looked through only when there is something to decide: the fast tier is over its
threshold, a segment has come of age, or there is room to bring some back.
"""

import errno
import fnmatch
import logging
import math
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from pafkafs import kafka, layout
from pafkafs.device import Device, Home
from pafkafs.moving import Mover
from pafkafs.namespace import Namespace
from pafkafs.nodes import Node
from pafkafs.policy import HIGH_MARK, Decision, Limits, Mode, Segment, plan

log = logging.getLogger(__name__)

# After a look that found nothing to do, or failed moves: grows up to the maximum.
_REST_MIN_S = 5.0
_REGULAR = stat.S_IFREG >> 12
# A plan is made anew after so long: what it was made for may have changed.
_PLAN_S = 30.0
_REST_MAX_S = 300.0


@dataclass(frozen=True)
class MigrationOptions:
    """How the task works, beside the lines of policy."""

    limits: Limits
    interval_s: float
    threads: int
    pinned: tuple[str, ...] = ()  # globs of paths below the mount that stay on the fast tier


class Migrator:
    """Keeps the fast tier between its lines."""

    def __init__(
        self,
        namespace: Namespace,
        home: Home,
        devices: Sequence[Device],
        mover: Mover,
        mode: Mode,
        options: MigrationOptions,
    ) -> None:
        self._namespace = namespace
        self._home = home
        self._devices = list(devices)
        self._mover = mover
        self._mode = mode
        self.options = options
        self.paused = False
        self.plan: tuple[Decision, ...] = ()  # what is left of the last one
        self.last_error: str | None = None
        self._moved_at: dict[str, float] = {}  # by object id: monotonic
        self._mounted_at = time.monotonic()
        self._next_age_look = 0.0
        self._rest_until = 0.0
        self._rest_s = _REST_MIN_S
        self._seen_used = -1

    # -- the task -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks every interval; never returns."""
        while True:
            await trio.sleep(self.options.interval_s)
            if self.paused or self._mode is not Mode.TIERED or not self._is_due():
                continue
            try:
                await self.cycle()
            except Exception:  # a bug, but no reason to end the mount
                log.exception("a cycle of migration failed")
                self.last_error = "internal error; see the log"
                self._rest()

    def usage(self) -> tuple[int, int]:
        """Bytes used, and there to be used, on the fast tier."""
        fast = [device for device in self._devices if not device.slow]
        return (
            sum(max(0, device.native.used_bytes) for device in fast) - self.pool_bytes(),
            sum(device.capacity_bytes for device in fast),
        )

    pool_bytes: Callable[[], int] = staticmethod(lambda: 0)  # prepared, and not in use

    def _is_due(self) -> bool:
        limits, (used, capacity) = self.options.limits, self.usage()
        now = time.monotonic()
        if limits.max_age_s is not None and now >= max(self._next_age_look, self._rest_until):
            return True
        if limits.threshold < 0 or capacity == 0:
            return False
        changed = abs(used - self._seen_used) > capacity // 100
        if now < self._rest_until and not changed:
            return False
        down = used > limits.threshold * capacity
        up = used < limits.low_watermark * capacity and any(
            d.slow and d.files for d in self._devices
        )
        return down or up

    async def cycle(self) -> None:
        """One look and the moves that follow from it."""
        used, capacity = self.usage()
        self._seen_used = used
        try:
            segments = await trio.to_thread.run_sync(self._look)
        except OSError as error:
            self.last_error = f"cannot look through the home tree: {error.strerror}"
            log.error("%s", self.last_error)
            self._rest()
            return
        self._note_next_age(segments)
        decisions = plan(self.options.limits, used, capacity, segments)
        if not decisions:
            self._rest()
            return
        if await self._carry_out(decisions):
            self._rest_s, self._rest_until = _REST_MIN_S, 0.0
        else:
            self._rest()

    def _rest(self) -> None:
        self._rest_until = time.monotonic() + self._rest_s
        self._rest_s = min(2 * self._rest_s, _REST_MAX_S)

    def _note_next_age(self, segments: Sequence[Segment]) -> None:
        limits = self.options.limits
        if limits.max_age_s is not None:
            ages = [s.age_s for s in segments if s.tier == 0 and not s.pinned]
            wait = max(self.options.interval_s, limits.max_age_s - max(ages, default=0.0))
            self._next_age_look = time.monotonic() + wait

    async def _carry_out(self, decisions: Sequence[Decision]) -> bool:
        """Runs the moves, some at once; whether any succeeded."""
        left = deque(decisions)
        moved, until = 0, time.monotonic() + _PLAN_S

        async def work() -> None:
            nonlocal moved
            while left and not self.paused and time.monotonic() < until:
                decision = left.popleft()
                if decision.to_fast and not self._has_room_for(decision):
                    left.clear()
                    break
                self.plan = tuple(left)
                moved += await self._try(decision)

        async with trio.open_nursery() as nursery:
            for _ in range(min(self.options.threads, len(left))):
                nursery.start_soon(work)
        self.plan = ()
        return moved > 0

    def _has_room_for(self, decision: Decision) -> bool:
        used, capacity = self.usage()
        return used + decision.segment.bytes <= self.options.limits.low_watermark * capacity

    async def _try(self, decision: Decision) -> bool:
        path = decision.segment.path
        try:
            await self.move(path, to_fast=decision.to_fast)
            self.last_error = None
            return True
        except FileNotFoundError:
            return False  # removed or renamed since the look
        except OSError as error:
            self.last_error = f"cannot move {os.fsdecode(path)}: {error.strerror}"
            log.warning("%s", self.last_error)
            return False

    # -- one move -----------------------------------------------------------------------------

    async def move(self, path: bytes, *, to_fast: bool) -> bool:
        """Moves the file at a path below the mount; False when it is there already.  Raises
        OSError."""
        node = self._find(path)
        try:
            return await self._move_node(node, to_fast)
        finally:
            self._namespace.nodes.drop_if_unused(node)

    async def _move_node(self, node: Node, to_fast: bool) -> bool:
        if node.is_directory:
            raise IsADirectoryError(errno.EISDIR, "a directory has no data to move")
        self._check_movable(node, to_fast)
        file = self._namespace.opened(node)
        async with self._namespace.files.used(file):
            if file.device.slow is not to_fast:
                return False
            target = self._choose(
                file.device, to_fast, self._namespace.attributes(node).blocks * 512
            )
            await self._mover.move(file, target)
            if node.stub is not None:
                self._moved_at[node.stub.object_id] = time.monotonic()
        return True

    def _check_movable(self, node: Node, to_fast: bool) -> None:
        parent, name = node.names[0]
        directory = parent.names[0][1] if parent.names else b""
        if not kafka.may_migrate(os.fsdecode(directory), os.fsdecode(name)):
            raise OSError(errno.EPERM, "only segments move")
        if node.refused or self._namespace.attributes(node).status.st_mode >> 12 != _REGULAR:
            raise OSError(errno.EPERM, "only segments move")
        emergency = not to_fast and self._emergency()
        if self._namespace.is_active_segment(node) and not emergency:
            raise OSError(errno.EBUSY, "the active segment stays where it is")

    def _emergency(self) -> bool:
        used, capacity = self.usage()
        return used > HIGH_MARK * capacity

    def _find(self, path: bytes) -> Node:
        """The node of a path.  Until it is used, nothing keeps it: no await comes between."""
        node = self._namespace.nodes.root
        for name in path.split(b"/"):
            node = self._namespace.lookup(node, name)
        return node

    def _choose(self, source: Device, to_fast: bool, need: int) -> Device:
        fits = [
            device
            for device in self._devices
            if device.slow is not to_fast and device.room.free_bytes >= need
        ]
        if not fits:
            raise OSError(errno.ENOSPC, "no room on the other tier")
        return min(fits, key=lambda d: (not d.room.in_service, -d.room.free_bytes))

    # -- looking ------------------------------------------------------------------------------

    def _look(self) -> list[Segment]:
        """All segments of the home tree.  Long for a large one: runs in a thread."""
        now_ns, now = time.time_ns(), time.monotonic()
        tiers = {device.id: device.tier for device in self._devices}
        paths = {device.id: (device.path,) for device in self._devices}
        found: list[Segment] = []
        for directory, _, names, fd in os.fwalk(b".", dir_fd=self._home.tree_fd):
            partition = os.fsdecode(os.path.basename(directory))
            texts = [os.fsdecode(name) for name in names]
            active = kafka.active_base_offset(texts)
            for text, name in zip(texts, names, strict=True):
                if not kafka.may_migrate(partition, text):
                    continue
                path = os.path.normpath(os.path.join(directory, name))
                offset = kafka.parse_file(text).base_offset
                segment = self._segment(fd, name, path, tiers, paths, offset == active, now_ns, now)
                if segment is not None:
                    found.append(segment)
        return found

    def _segment(
        self,
        dir_fd: int,
        name: bytes,
        path: bytes,
        tiers: Mapping[str, int],
        paths: Mapping[str, tuple[bytes, ...]],
        active: bool,
        now_ns: int,
        now: float,
    ) -> Segment | None:
        tier, moved_s = 0, math.inf
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if status.st_nlink > 1:
                return None
            size = status.st_blocks * 512
            if stat.S_ISLNK(status.st_mode):
                stub = layout.parse_stub(os.readlink(name, dir_fd=dir_fd), paths)
                if stub is None:
                    return None
                tier = tiers[stub.device_id]
                status = os.stat(stub.shadow, dir_fd=self._home.shadows_fd, follow_symlinks=False)
                size = status.st_size
                moved_s = now - self._moved_at.get(stub.object_id, self._mounted_at)
        except (FileNotFoundError, layout.DamagedStub):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        text = os.fsdecode(path)
        pinned = any(fnmatch.fnmatchcase(text, glob) for glob in self.options.pinned)
        age_s = max(0.0, (now_ns - status.st_mtime_ns) / 1e9)
        return Segment(path, tier, size, age_s, active, pinned, moved_s)
