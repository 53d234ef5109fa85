"""The background task that moves segments between the tiers: asks policy, runs moves.

What policy needs is in the catalogue: a look with nothing to do costs a few comparisons.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import trio

from pafkafs.catalogue import CatalogueView, Entry
from pafkafs.copying import SourceError
from pafkafs.device import Device
from pafkafs.moving import Mover
from pafkafs.namespace import Namespace
from pafkafs.nodes import Node
from pafkafs.placement import HIGH_MARK, Mode
from pafkafs.policy import Decision, Limits, Rules, Segment, Tier, plan
from pafkafs.reading import ReadersFirst

log = logging.getLogger(__name__)

# A plan is made anew after so long: what it was made for may have changed.
_PLAN_S = 30.0
# A device to which a move failed is left alone: so long at first, and at most.
_REST_MIN_S = 5.0
_REST_MAX_S = 300.0
# A file that did not move; one that cannot be read, for the maximum.
_FILE_REST_S = 30.0


@dataclass(frozen=True)
class MigrationOptions:
    """How the task works, beside the lines of policy."""

    limits: Limits
    rules: Rules
    interval_s: float
    threads: int


@dataclass
class Rest:
    """Of a device that failed: until when nothing is moved to it, longer each time."""

    until_s: float = 0.0
    next_s: float = _REST_MIN_S
    why: str = ""

    def begin(self, now_s: float, why: str) -> None:
        if now_s < self.until_s:
            return
        self.until_s, self.why = now_s + self.next_s, why
        self.next_s = min(2 * self.next_s, _REST_MAX_S)


@dataclass(frozen=True)
class Outlook:
    """What the task would do now."""

    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """All that would move."""
        return sum(decision.segment.bytes for decision in self.decisions)


class Migrator:
    """Keeps each tier but the last between its lines."""

    def __init__(
        self,
        namespace: Namespace,
        devices: Sequence[Device],
        mover: Mover,
        mode: Mode,
        options: MigrationOptions,
        prepared_bytes: Callable[[], int],
        all_known: Callable[[], bool],
    ) -> None:
        """prepared_bytes is what the fast tier holds for data that is not written yet: it is not
        used room for policy.  all_known: the home tree was read."""
        self._all_known = all_known
        self._namespace = namespace
        self._catalogue = namespace.catalogue
        self._devices = list(devices)
        self._tiers = [device.tier for device in devices]
        self._mover = mover
        self._mode = mode
        self._prepared_bytes = prepared_bytes
        self._options = options
        self._wanted = trio.Event()
        self.paused = False
        self.last_error: str | None = None
        self._rests: dict[str, Rest] = {}  # by device
        self._draining: set[int] = set()  # tiers on their way to the low watermark
        self._readers = ReadersFirst()

    @property
    def options(self) -> MigrationOptions:
        """Replaced as a whole; then the next look is at once."""
        return self._options

    @options.setter
    def options(self, options: MigrationOptions) -> None:
        self._options = options
        self.look_soon()

    def look_soon(self) -> None:
        """And not only after the interval."""
        self._wanted.set()

    # -- the task -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks every interval; never returns."""
        while True:
            with trio.move_on_after(self.options.interval_s):
                await self._wanted.wait()
            self._wanted = trio.Event()
            if self.paused or self._mode is not Mode.TIERED:
                continue
            try:
                await self._carry_out(self.outlook().decisions)
            except Exception:  # a bug, but no reason to end the mount
                log.exception("a cycle of migration failed")
                self.last_error = "internal error; see the log"

    def outlook(self) -> Outlook:
        """What there is to do now.  Valid until the next await."""
        now_s, options = time.monotonic(), self.options
        if self._mode is not Mode.TIERED or not self._catalogue.settled:
            return Outlook()
        self._catalogue.release(now_s)
        tiers = [self._noted(number) for number in range(self._tiers[-1] + 1)]
        view = CatalogueView(self._catalogue, self._tiers, time.time_ns(), now_s, self._active)
        decisions = plan(options.limits, options.rules, tiers, view)
        nothing_goes = not decisions and not self._readers.waiting(now_s)
        if nothing_goes and all(tier.takes_bytes > 0 for tier in tiers[1:]):
            self._draining.clear()  # what is left cannot go down
        if not self._all_known():
            # Room that is not counted yet is not free.
            decisions = [decision for decision in decisions if decision.is_demotion]
        return Outlook(tuple(decisions), tuple(self._notes(tiers, decisions)))

    def tier(self, number: int) -> Tier:
        """How full a tier is."""
        devices = [device for device in self._devices if device.tier == number]
        used = sum(max(0, device.native.used_bytes) for device in devices)
        return Tier(
            used_bytes=used - (self._prepared_bytes() if number == 0 else 0),
            capacity_bytes=sum(device.capacity_bytes for device in devices),
            takes_bytes=sum(device.room.free_bytes for device in devices if self._takes(device)),
        )

    def _noted(self, number: int) -> Tier:
        """A plan may end before the low watermark is reached: the next one goes on."""
        limits, tier = self.options.limits, self.tier(number)
        if limits.threshold >= 0 and tier.is_over(limits.threshold):
            self._draining.add(number)
        elif limits.threshold < 0 or not tier.is_over(limits.low_watermark):
            self._draining.discard(number)
        return replace(tier, draining=number in self._draining)

    def _takes(self, device: Device) -> bool:
        rest = self._rests.get(device.id)
        return device.room.in_service and (rest is None or rest.until_s <= time.monotonic())

    def _notes(self, tiers: Sequence[Tier], decisions: Sequence[Decision]) -> list[str]:
        """What keeps it from what the lines ask for."""
        limits, found = self.options.limits, []
        now_s = time.monotonic()
        for device in self._devices:
            rest = self._rests.get(device.id)
            if rest is not None and rest.until_s > now_s:
                where = os.fsdecode(device.path)
                wait = max(1, round(rest.until_s - now_s))
                found.append(f"nothing moves to {where} for {wait} s: {rest.why}")
        fast = tiers[0]
        kept = sum(self._catalogue.sealed_bytes(0, n) for n in self.options.rules.kept_fast)
        if limits.threshold >= 0 and kept > limits.threshold * fast.capacity_bytes:
            found.append(
                'segments that stay (--pin, keep = "fast") alone take more than the threshold'
            )
        if waiting := self._readers.waiting(now_s):
            found.append(
                f"segments that stay while they are read heavily: {waiting} "
                f"(read-wait, for {limits.read_wait_s:g} s at most)"
            )
        if limits.threshold >= 0 and fast.is_over(limits.threshold) and not decisions:
            found.append("over the threshold, and nothing that may go down")
        return found

    def _active(self, tier: int) -> list[Segment]:
        found = map(self.look_at, self._catalogue.active_entries(tier))
        return [segment for segment in found if segment is not None]

    def look_at(self, entry: Entry) -> Segment | None:
        """An active segment as it is now: what the catalogue has is from when it was made."""
        node = self._node_of(entry)
        if node is None:
            return None
        attributes = self._namespace.attributes(node)
        self._namespace.nodes.drop_if_unused(node)
        now_ns, size = time.time_ns(), attributes.blocks * 512
        made_s = max(1.0, (now_ns - entry.mtime_ns) / 1e9)
        age_s = max(0.0, (now_ns - attributes.status.st_mtime_ns) / 1e9)
        tier = self._tiers[entry.device]
        return Segment(entry.path, tier, size, age_s, growth=size / made_s)

    def _node_of(self, entry: Entry) -> Node | None:
        try:
            return self._find(entry.path)
        except OSError:
            return None

    async def _carry_out(self, decisions: Sequence[Decision]) -> None:
        """Runs the moves, some at once."""
        left, options = deque(decisions), self.options
        until_s = time.monotonic() + _PLAN_S

        async def work() -> None:
            while left and not self.paused and time.monotonic() < until_s:
                if self.options is not options:
                    break
                decision = left.popleft()
                if not self._is_still_right(decision):
                    left.clear()
                    break
                if self._waits_for_readers(decision):
                    continue
                await self._try(decision)
                if not any(self._takes(d) for d in self._devices if d.tier == decision.tier):
                    left.clear()

        async with trio.open_nursery() as nursery:
            for _ in range(min(self.options.threads, len(left))):
                nursery.start_soon(work)

    def _is_still_right(self, decision: Decision) -> bool:
        """What others have written since the plan was made may change it."""
        limits, target = self.options.limits, self.tier(decision.tier)
        if not decision.is_demotion:
            share = limits.threshold if decision.why == "pinned" else limits.low_watermark
            return target.used_bytes + decision.segment.bytes <= share * target.capacity_bytes
        until = {"usage": limits.low_watermark, "full": HIGH_MARK}.get(decision.why)
        return until is None or self.tier(decision.segment.tier).is_over(until)

    def _waits_for_readers(self, decision: Decision) -> bool:
        """Leaves a segment that is read heavily where it is, unless its room is needed now."""
        if not decision.is_demotion or self.tier(decision.segment.tier).is_over(HIGH_MARK):
            return False
        try:
            node = self._find(decision.segment.path)
        except OSError:
            return False
        file, entry = node.file, self._namespace.entry(node)
        self._namespace.nodes.drop_if_unused(node)
        if file is None or entry is None:
            return False
        now_s, limit_s = time.monotonic(), self.options.limits.read_wait_s
        wait_s = self._readers.wait_s(entry, file.native.read_bytes_per_s, now_s, limit_s)
        if wait_s > 0:
            self._catalogue.hold(entry, now_s + wait_s)
        return wait_s > 0

    async def _try(self, decision: Decision) -> None:
        path = decision.segment.path
        try:
            await self.move(path, decision.tier, decision.why)
            self.last_error = None
        except FileNotFoundError:
            return  # removed or renamed since the look
        except OSError as error:
            if error.errno == errno.ECANCELED:
                return  # the mount ends
            self.last_error = f"cannot move {os.fsdecode(path)}: {error.strerror}"
            log.warning("%s", self.last_error)
            self._leave_alone(path, error)

    def _leave_alone(self, path: bytes, error: OSError) -> None:
        """The file, so that others have their turn."""
        try:
            node = self._find(path)
        except OSError:
            return
        entry = self._namespace.entry(node)
        if entry is not None:
            rest_s = _REST_MAX_S if isinstance(error, SourceError) else _FILE_REST_S
            self._catalogue.hold(entry, time.monotonic() + rest_s)
        self._namespace.nodes.drop_if_unused(node)

    # -- one move -----------------------------------------------------------------------------

    async def move(self, path: bytes, tier: int, why: str) -> bool:
        """Moves the file at a path below the mount to a tier; False when it is there already.
        Raises OSError."""
        node = self._find(path)
        try:
            return await self._move_node(node, tier, why)
        finally:
            self._namespace.nodes.drop_if_unused(node)

    async def _move_node(self, node: Node, tier: int, why: str) -> bool:
        if node.is_directory:
            raise IsADirectoryError(errno.EISDIR, "a directory has no data to move")
        self._check_movable(node, tier)
        file = self._namespace.opened(node)
        async with self._namespace.files.used(file):
            if file.device.tier == tier:
                return False
            if not file.device.room.in_service:
                raise SourceError(errno.ETIMEDOUT, "the device that it is on does not answer")
            need = self._namespace.attributes(node).blocks * 512
            target = self._choose(tier, need)
            try:
                await self._mover.move(file, target, why)
            except OSError as error:
                self._note_failure(target, error)
                raise
            self._rests.pop(target.id, None)
        return True

    def _note_failure(self, target: Device, error: OSError) -> None:
        """The device rests, when it was the device, and not the file or the end of the mount."""
        of_the_file = (errno.EBUSY, errno.EMLINK, errno.ECANCELED)
        if isinstance(error, SourceError) or error.errno in of_the_file:
            return
        rest = self._rests.setdefault(target.id, Rest())
        rest.begin(time.monotonic(), error.strerror or str(error))

    def _check_movable(self, node: Node, tier: int) -> None:
        entry = self._namespace.entry(node)
        if node.refused:
            raise OSError(errno.EPERM, "its stub does not lead to a device of this set")
        if self._namespace.attributes(node).nlink > 1:
            raise OSError(errno.EMLINK, "a file with several names does not move")
        if entry is None or entry.directory.rule is None:
            raise OSError(errno.EPERM, "only segments move")
        source = self.tier(self._tiers[entry.device])
        if entry.is_active and not (tier > 0 and source.is_over(HIGH_MARK)):
            raise OSError(errno.EBUSY, "the active segment stays where it is")

    def _find(self, path: bytes) -> Node:
        """The node of a path.  Until it is used, nothing keeps it: no await comes between."""
        node = self._namespace.nodes.root
        for name in path.split(b"/"):
            node = self._namespace.lookup(node, name)
        return node

    def _choose(self, tier: int, need: int) -> Device:
        fits = [d for d in self._devices if d.tier == tier and d.room.free_bytes >= need]
        if not fits:
            raise OSError(errno.ENOSPC, "no room on the other tier")
        return min(fits, key=lambda d: (not self._takes(d), -d.room.free_bytes, d.files))
