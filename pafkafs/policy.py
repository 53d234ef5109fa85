"""Which device a file belongs on.  Pure: it reads a frozen snapshot and returns a decision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# Above this share of the room on a fast device new segments start on the slow tier, so that
# those that are being written have room to grow where they are.
HIGH_MARK = 0.95


class Mode(Enum):
    """Which tiers new data may use."""

    TIERED = "tiered"
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True)
class Room:
    """A device as placement sees it, in bytes."""

    tier: int
    used_bytes: int
    limit_bytes: int
    in_service: bool = True

    @property
    def free_bytes(self) -> int:
        """What may still be written there."""
        return max(0, self.limit_bytes - self.used_bytes)


def place_new(mode: Mode, devices: Sequence[Room], *, bulk: bool) -> int:
    """The index of the device where a new file starts.

    bulk tells a segment from the small files that, in tiered mode, may use the fast tier to
    its last byte.
    """
    tiers = sorted({device.tier for device in devices})
    if mode is Mode.SLOW:
        tiers = tiers[1:] + tiers[:1]
    elif mode is Mode.FAST:
        tiers = tiers[:1]
    mark = HIGH_MARK if bulk and mode is Mode.TIERED else 1.0
    for tier in tiers:
        best = _roomiest(devices, tier)
        if best is not None and devices[best].used_bytes < mark * devices[best].limit_bytes:
            return best
    # Full everywhere: its first write will find out, with the error that fits.
    first = _roomiest(devices, tiers[0])
    return 0 if first is None else first


def place_spill(mode: Mode, devices: Sequence[Room], source: int, need_bytes: int) -> int | None:
    """The device that a file without room on device source goes on on; None when there is none.

    need_bytes is the file with what waits to be written to it.
    """
    if mode is Mode.FAST:
        return None
    fits = [
        index
        for index, device in enumerate(devices)
        if index != source and device.free_bytes >= need_bytes
    ]
    # One that does not answer is still better than ENOSPC: a writer can wait for it.  Sideways
    # or down before up.
    above = devices[source].tier

    def cost(i: int) -> tuple[bool, bool, int, int]:
        device = devices[i]
        return (not device.in_service, device.tier < above, device.tier, -device.free_bytes)

    return min(fits, key=cost, default=None)


def _roomiest(devices: Sequence[Room], tier: int) -> int | None:
    fits = [i for i, device in enumerate(devices) if device.tier == tier and device.in_service]
    return max(fits, key=lambda i: devices[i].free_bytes, default=None)


# -- migration ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the operator asked for.  Shares are of the capacity of the fast tier, ages in seconds.

    threshold -1: never by usage; max_age None: never by age.
    """

    threshold: float = 0.5
    low_watermark: float = 0.4
    max_age_s: float | None = None
    min_age_s: float = 0.0
    cool_down_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment file as policy sees it; age is since its last write."""

    path: bytes
    tier: int
    bytes: int
    age_s: float
    active: bool = False
    pinned: bool = False
    moved_s: float = math.inf  # since it was last moved


@dataclass(frozen=True, slots=True)
class Decision:
    """A file to be moved, and why."""

    segment: Segment
    to_fast: bool
    why: str


def plan(limits: Limits, used: int, capacity: int, segments: Sequence[Segment]) -> list[Decision]:
    """What is to be moved now, in this order: down, else up, never both at once."""
    return _demotions(limits, used, capacity, segments) or _promotions(
        limits, used, capacity, segments
    )


def _demotions(
    limits: Limits, used: int, capacity: int, segments: Sequence[Segment]
) -> list[Decision]:
    there = [s for s in segments if s.tier == 0 and not s.pinned]
    oldest_first = sorted(there, key=lambda s: (-s.age_s, s.path))
    sealed = [s for s in oldest_first if not s.active and s.age_s >= limits.min_age_s]
    found: list[Decision] = []
    for segment in sealed:
        if limits.max_age_s is not None and segment.age_s > limits.max_age_s:
            found.append(Decision(segment, to_fast=False, why="age"))
            used -= segment.bytes
    if limits.threshold < 0:
        return found
    over = used > limits.threshold * capacity
    for segment in sealed[len(found) :] if over else []:
        if used <= limits.low_watermark * capacity:
            break
        found.append(Decision(segment, to_fast=False, why="usage"))
        used -= segment.bytes
    # Nothing sealed is left and the tier is nearly full: better now than in a writer's way.
    for segment in oldest_first:
        if used <= HIGH_MARK * capacity:
            break
        if segment.active:
            found.append(Decision(segment, to_fast=False, why="full"))
            used -= segment.bytes
    return found


def _promotions(
    limits: Limits, used: int, capacity: int, segments: Sequence[Segment]
) -> list[Decision]:
    if limits.threshold < 0:
        return []
    found: list[Decision] = []
    for segment in sorted(segments, key=lambda s: (s.age_s, s.path)):
        too_old = limits.max_age_s is not None and segment.age_s > limits.max_age_s
        if segment.tier == 0 or segment.active or too_old:
            continue
        if segment.moved_s < limits.cool_down_s:
            continue
        if used + segment.bytes > limits.low_watermark * capacity:
            break
        found.append(Decision(segment, to_fast=True, why="room"))
        used += segment.bytes
    return found
