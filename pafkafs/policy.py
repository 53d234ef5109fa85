"""Which segments move between the tiers, and why.  Pure: no I/O, no clock of its own.

It reads a view of all segments, ordered by age within each tier, only as far as it has to: with
nothing to do it costs a few comparisons, whatever the number of files.
"""

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import merge
from typing import Protocol

from pafkafs.placement import HIGH_MARK

# One look decides on so many moves at most; the next one goes on.
DECISIONS_MAX = 256


@dataclass(frozen=True)
class Limits:
    """The lines of each tier but the last, as shares of its capacity, and ages in seconds.

    threshold -1: never by usage; max_age_s None: never by age.
    """

    threshold: float = 0.5
    low_watermark: float = 0.4
    max_age_s: float | None = None
    min_age_s: float = 0.0
    cool_down_s: float = 3600.0
    read_wait_s: float = 60.0  # so long what is read heavily may stay instead of going down


class Keep(Enum):
    """Where the segments of a rule belong, whatever the room."""

    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True)
class Rule:
    """What holds for some topics instead of the limits; None: as the limits say."""

    topics: tuple[str, ...] = ()
    keep: Keep | None = None
    max_age_s: float | None = None
    min_age_s: float | None = None

    def leaves_at(self, limits: Limits) -> float:
        """The age in seconds from which its segments leave the fast tier in any case."""
        if self.keep is not None:
            return 0.0 if self.keep is Keep.SLOW else math.inf
        ages = [age for age in (self.max_age_s, limits.max_age_s) if age is not None]
        return ages[0] if ages else math.inf

    def stays_until(self, limits: Limits) -> float:
        """The age in seconds before which its segments stay."""
        if self.keep is Keep.SLOW:
            return 0.0
        return limits.min_age_s if self.min_age_s is None else self.min_age_s


@dataclass(frozen=True)
class Rules:
    """All rules: the first one is for what no other is for, the last one for pinned paths."""

    topics: tuple[Rule, ...] = ()
    pins: tuple[str, ...] = ()  # globs of paths below the mount that stay on the fast tier

    @property
    def all(self) -> tuple[Rule, ...]:
        """The rules in the order of their numbers."""
        return (Rule(), *self.topics, Rule(keep=Keep.FAST))

    def of_topic(self, topic: str) -> int:
        """The number of the rule of a topic: the first one with a glob that fits."""
        for number, rule in enumerate(self.topics, 1):
            if any(fnmatch.fnmatchcase(topic, glob) for glob in rule.topics):
                return number
        return 0

    def is_pinned(self, path: str) -> bool:
        """Whether a path below the mount stays on the fast tier."""
        return any(fnmatch.fnmatchcase(path, glob) for glob in self.pins)

    @property
    def kept_fast(self) -> list[int]:
        """The numbers of the rules whose segments stay on the fast tier."""
        return [number for number, rule in enumerate(self.all) if rule.keep is Keep.FAST]

    @property
    def pinned(self) -> int:
        """The number of the rule of pinned paths."""
        return len(self.topics) + 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment file as policy sees it; age is since its last write."""

    path: bytes
    tier: int
    bytes: int
    age_s: float
    moved_s: float = math.inf  # since it was last moved
    growth: float = 0.0  # of an active one: bytes per second


@dataclass(frozen=True, slots=True)
class Tier:
    """How full a tier is, in bytes; takes_bytes is how much may be moved to it now.

    draining: it was over the threshold, and has not come down to the low watermark since.
    """

    used_bytes: int
    capacity_bytes: int
    takes_bytes: int
    draining: bool = False

    def is_over(self, share: float) -> bool:
        """Whether more than this share of it is used."""
        return self.used_bytes > share * self.capacity_bytes


class View(Protocol):
    """All segments that may move, those of one tier and rule in order of age."""

    def oldest(self, tier: int, rule: int) -> Iterator[Segment]:
        """Sealed ones, the oldest first."""

    def newest(self, tier: int, rule: int) -> Iterator[Segment]:
        """Sealed ones, the newest first."""

    def active(self, tier: int) -> list[Segment]:
        """Those that Kafka appends to."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A segment that is to move to another tier, and why: age, topic, usage, full, room, pinned."""

    segment: Segment
    tier: int
    why: str

    @property
    def is_demotion(self) -> bool:
        """Whether it goes down."""
        return self.tier > self.segment.tier


def plan(limits: Limits, rules: Rules, tiers: Sequence[Tier], view: View) -> list[Decision]:
    """What is to move now, in this order: down, else up, never both at once."""
    for upper in range(len(tiers) - 1):
        found = _demotions(limits, rules, tiers, view, upper)
        if found:
            return found
    for upper in range(len(tiers) - 1):
        found = _promotions(limits, rules, tiers, view, upper)
        if found:
            return found
    return []


class _Moves:
    """Decisions about one pair of tiers, as far as the target takes them."""

    def __init__(self, tiers: Sequence[Tier], source: int, target: int) -> None:
        self.decisions: list[Decision] = []
        self.moved_bytes = 0
        self._target = target
        self._takes = tiers[target].takes_bytes
        self._paths: set[bytes] = set()

    def add(self, segment: Segment, why: str) -> bool:
        """False when there is no use in asking for more."""
        if segment.path in self._paths:
            return True
        if self.moved_bytes + segment.bytes > self._takes or len(self._paths) >= DECISIONS_MAX:
            return False
        self._paths.add(segment.path)
        self.decisions.append(Decision(segment, self._target, why))
        self.moved_bytes += segment.bytes
        return True


def _demotions(
    limits: Limits, rules: Rules, tiers: Sequence[Tier], view: View, upper: int
) -> list[Decision]:
    moves, tier = _Moves(tiers, upper, upper + 1), tiers[upper]

    def is_over(share: float) -> bool:
        return tier.used_bytes - moves.moved_bytes > share * tier.capacity_bytes

    drains = is_over(limits.threshold) or tier.draining  # before what goes by age has gone
    if upper == 0:
        _demote_by_age(limits, rules, view, moves)
    if limits.threshold < 0:
        return moves.decisions
    if drains:
        for segment in merge(
            *(_movable(limits, rules, view, upper, n) for n in range(len(rules.all))),
            key=lambda s: -s.age_s,
        ):
            if not is_over(limits.low_watermark) or not moves.add(segment, "usage"):
                break
    # Nothing sealed is left and the tier is nearly full: better now than in a writer's way.
    if is_over(HIGH_MARK):
        for segment in sorted(view.active(upper), key=lambda s: s.growth):
            if not is_over(HIGH_MARK) or not moves.add(segment, "full"):
                break
    return moves.decisions


def _demote_by_age(limits: Limits, rules: Rules, view: View, moves: _Moves) -> None:
    for number, rule in enumerate(rules.all):
        if rule.keep is Keep.FAST:
            continue
        why = "topic" if rule.keep is Keep.SLOW else "age"
        for segment in view.oldest(0, number):
            if segment.age_s < rule.leaves_at(limits) or not moves.add(segment, why):
                break


def _movable(limits: Limits, rules: Rules, view: View, tier: int, number: int) -> Iterator[Segment]:
    """The oldest first, as far as they are old enough to go."""
    rule = rules.all[number]
    if rule.keep is Keep.FAST:
        return
    for segment in view.oldest(tier, number):
        if segment.age_s < rule.stays_until(limits):
            return
        yield segment


def _promotions(
    limits: Limits, rules: Rules, tiers: Sequence[Tier], view: View, upper: int
) -> list[Decision]:
    """The newest first.  The first one that has to wait ends it: what is older must not take its
    room."""
    if limits.threshold < 0:
        return []
    moves, tier = _Moves(tiers, upper + 1, upper), tiers[upper]

    def fits(segment: Segment, share: float) -> bool:
        room = share * tier.capacity_bytes - tier.used_bytes - moves.moved_bytes
        return segment.bytes <= room

    for segment in view.newest(upper + 1, rules.pinned):
        if not fits(segment, limits.threshold) or not moves.add(segment, "pinned"):
            break
    numbers = [n for n, r in enumerate(rules.all[:-1]) if not (r.keep is Keep.SLOW and upper == 0)]
    newest = (_promotable(limits, rules, view, upper + 1, n) for n in numbers)
    for segment in merge(*newest, key=lambda s: s.age_s):
        waits = segment.moved_s < limits.cool_down_s
        if waits or not fits(segment, limits.low_watermark) or not moves.add(segment, "room"):
            break
    return moves.decisions


def _promotable(
    limits: Limits, rules: Rules, view: View, tier: int, number: int
) -> Iterator[Segment]:
    """The newest first; into the fast tier up to the age at which they leave it."""
    leaves_at = rules.all[number].leaves_at(limits) if tier == 1 else math.inf
    for segment in view.newest(tier, number):
        if segment.age_s > leaves_at:
            return
        yield segment
