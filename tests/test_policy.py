"""Policy: which segments move, in a few cases, as properties, and over days of load."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pafkafs.placement import HIGH_MARK
from pafkafs.policy import Decision, Keep, Limits, Rule, Rules, Segment, Tier, plan

HOUR, DAY = 3600.0, 86400.0
ROOM = 10**9


class Segments:
    """A view of given segments; rule_of tells which rule each one is for."""

    def __init__(
        self, sealed: list[Segment], active: tuple[Segment, ...] = (), rules: Rules | None = None
    ) -> None:
        self._sealed = sealed
        self._active = active
        self._rules = rules or Rules()

    def _rule_of(self, segment: Segment) -> int:
        if self._rules.is_pinned(segment.path.decode()):
            return self._rules.pinned
        return self._rules.of_topic(segment.path.partition(b"-")[0].decode())

    def oldest(self, tier: int, rule: int) -> Iterator[Segment]:
        found = [s for s in self._sealed if s.tier == tier and self._rule_of(s) == rule]
        return iter(sorted(found, key=lambda s: -s.age_s))

    def newest(self, tier: int, rule: int) -> Iterator[Segment]:
        return reversed(list(self.oldest(tier, rule)))

    def active(self, tier: int) -> list[Segment]:
        return [s for s in self._active if s.tier == tier]


def seg(name: str, age_s: float, tier: int = 0, size: int = 10, **more: float) -> Segment:
    return Segment(name.encode(), tier, size, age_s, **more)


def two_tiers(used: int, capacity: int = 100, takes: int = ROOM) -> list[Tier]:
    return [Tier(used, capacity, ROOM), Tier(0, ROOM, takes)]


def moves(
    sealed: list[Segment],
    used: int,
    *,
    limits: Limits | None = None,
    rules: Rules | None = None,
    active: tuple[Segment, ...] = (),
    takes: int = ROOM,
) -> list[tuple[str, int, str]]:
    rules = rules or Rules()
    view = Segments(sealed, active, rules)
    found = plan(limits or Limits(), rules, two_tiers(used, takes=takes), view)
    return [(d.segment.path.decode(), d.tier, d.why) for d in found]


def test_nothing_moves_between_the_lines() -> None:
    assert moves([seg("a-0", 5), seg("b-0", 9, tier=1)], used=45) == []


def test_over_the_threshold_the_oldest_go_down_to_the_low_watermark() -> None:
    sealed = [seg("young-0", 1), seg("old-0", 9), seg("middle-0", 5)]
    assert moves(sealed, used=60) == [("old-0", 1, "usage"), ("middle-0", 1, "usage")]


def test_drain_that_was_interrupted_goes_on_to_the_low_watermark() -> None:
    sealed = [seg("old-0", 9), seg("young-0", 1)]
    tiers = [Tier(49, 100, ROOM, draining=True), Tier(0, ROOM, ROOM)]
    found = plan(Limits(), Rules(), tiers, Segments(sealed))
    assert [d.segment.path for d in found] == [b"old-0"]
    assert plan(Limits(), Rules(), two_tiers(49), Segments(sealed)) == []


def test_threshold_of_minus_one_moves_nothing_by_usage() -> None:
    never = Limits(threshold=-1.0)
    assert moves([seg("a-0", 9), seg("b-0", 9, tier=1)], used=99, limits=never) == []


def test_what_is_older_than_max_age_goes_down_though_there_is_room() -> None:
    limits = Limits(max_age_s=HOUR)
    sealed = [seg("a-0", HOUR + 1), seg("b-0", HOUR - 1)]
    assert moves(sealed, used=45, limits=limits) == [("a-0", 1, "age")]


def test_what_is_younger_than_min_age_stays_over_the_threshold() -> None:
    limits = Limits(min_age_s=60)
    assert moves([seg("a-0", 59), seg("b-0", 61)], 60, limits=limits) == [("b-0", 1, "usage")]


def test_nearly_full_with_nothing_sealed_the_slowest_growing_active_segments_go() -> None:
    active = (seg("fast-0", 9, growth=100), seg("slow-0", 1, growth=1))
    assert moves([], used=97, active=active) == [("slow-0", 1, "full")]
    assert moves([], used=int(100 * HIGH_MARK), active=active) == []


def test_newest_come_up_while_there_is_room_below_the_low_watermark() -> None:
    below = [seg("a-0", 1, tier=1), seg("b-0", 2, tier=1), seg("c-0", 3, tier=1)]
    assert moves(below, used=15) == [("a-0", 0, "room"), ("b-0", 0, "room")]


def test_nothing_older_takes_the_place_of_what_has_to_cool_down() -> None:
    below = [seg("a-0", 1, tier=1, moved_s=HOUR / 2), seg("b-0", 2, tier=1)]
    assert moves(below, used=15) == []


def test_what_went_down_by_age_does_not_come_up() -> None:
    limits = Limits(max_age_s=HOUR)
    assert moves([seg("a-0", 2 * HOUR, tier=1)], used=0, limits=limits) == []


def test_slow_tier_is_not_asked_for_more_than_it_takes() -> None:
    sealed = [seg("a-0", 9), seg("b-0", 8), seg("c-0", 7)]
    assert moves(sealed, used=90, takes=15) == [("a-0", 1, "usage")]
    assert moves(sealed, used=90, takes=0) == []


def test_pinned_paths_stay_and_come_back_below_the_threshold() -> None:
    rules = Rules(pins=("keep-*",))
    sealed = [seg("keep-0", 9), seg("b-0", 5)]
    assert moves(sealed, used=60, rules=rules) == [("b-0", 1, "usage")]
    assert moves([seg("keep-0", 9, tier=1)], used=39, rules=rules) == [("keep-0", 0, "pinned")]
    assert moves([seg("keep-0", 9, tier=1)], used=41, rules=rules) == []


def test_rules_of_topics_go_before_the_limits() -> None:
    rules = Rules(
        topics=(
            Rule(("slow*",), keep=Keep.SLOW),
            Rule(("short*",), max_age_s=10.0),
            Rule(("keep*",), keep=Keep.FAST),
        )
    )
    sealed = [seg("slow-0", 1), seg("short-0", 11), seg("keep-0", 99), seg("other-0", 12)]
    expected = [("slow-0", 1, "topic"), ("short-0", 1, "age")]
    assert moves(sealed, used=45, rules=rules) == expected
    assert moves([seg("slow-0", 1, tier=1)], used=0, rules=rules) == []


def test_segments_of_a_kept_topic_come_back_whatever_their_age() -> None:
    rules = Rules(topics=(Rule(("keep*",), keep=Keep.FAST),))
    limits = Limits(max_age_s=HOUR)
    spilled = [seg("keep-0", DAY, tier=1)]
    assert moves(spilled, used=0, limits=limits, rules=rules) == [("keep-0", 0, "room")]


def test_what_is_pinned_leaves_no_tier_by_usage() -> None:
    tiers = [Tier(45, 100, 0), Tier(90, 100, ROOM), Tier(0, ROOM, ROOM)]
    view = Segments([seg("keep-0", 9, tier=1)], rules=Rules(pins=("keep-*",)))
    assert plan(Limits(), Rules(pins=("keep-*",)), tiers, view) == []


def test_three_tiers_hand_on_from_one_to_the_next() -> None:
    tiers = [Tier(45, 100, ROOM), Tier(60, 100, 50), Tier(0, ROOM, ROOM)]
    view = Segments([seg("a-0", 9), seg("b-0", 99, tier=1), seg("c-0", 50, tier=1)])
    found = plan(Limits(), Rules(), tiers, view)
    assert [(d.segment.path, d.tier) for d in found] == [(b"b-0", 2), (b"c-0", 2)]


# -- properties ---------------------------------------------------------------------------------

segments = st.builds(
    Segment,
    path=st.uuids().map(lambda u: u.hex.encode()),
    tier=st.integers(0, 1),
    bytes=st.integers(0, 60),
    age_s=st.floats(0, 10 * DAY),
    moved_s=st.floats(0, DAY),
)
segment_lists = st.lists(segments, max_size=30, unique_by=lambda s: s.path)
all_limits = st.builds(
    lambda low, more, max_age, min_age: Limits(low + more, low, max_age, min_age),
    low=st.floats(0, 0.4),
    more=st.floats(0.01, 0.5),
    max_age=st.none() | st.floats(HOUR, DAY),
    min_age=st.floats(0, HOUR / 2),
)


def planned(sealed: list[Segment], others: int, limits: Limits) -> tuple[list[Decision], int]:
    used = others + sum(s.bytes for s in sealed if s.tier == 0)
    return plan(limits, Rules(), two_tiers(used, 1000), Segments(sealed)), used


@given(segment_lists, st.integers(0, 1000), all_limits)
def test_moves_go_one_way_and_name_each_segment_once(
    sealed: list[Segment], others: int, limits: Limits
) -> None:
    decisions, _ = planned(sealed, others, limits)
    assert len({d.is_demotion for d in decisions}) <= 1
    assert len({d.segment.path for d in decisions}) == len(decisions)
    assert all(abs(d.tier - d.segment.tier) == 1 for d in decisions)


@given(segment_lists, st.integers(0, 1000), all_limits)
def test_after_a_plan_is_carried_out_nothing_is_planned_in_the_other_direction(
    sealed: list[Segment], others: int, limits: Limits
) -> None:
    decisions, _ = planned(sealed, others, limits)
    if not decisions:
        return
    targets = {d.segment.path: d.tier for d in decisions}
    after = [
        replace(s, tier=targets[s.path], moved_s=0.0) if s.path in targets else s for s in sealed
    ]
    again, _ = planned(after, others, limits)
    assert not {d.segment.path for d in again} & set(targets)


@given(segment_lists, st.integers(0, 1000), all_limits)
def test_room_is_never_filled_beyond_the_low_watermark_by_promotions(
    sealed: list[Segment], others: int, limits: Limits
) -> None:
    decisions, used = planned(sealed, others, limits)
    up = sum(d.segment.bytes for d in decisions if not d.is_demotion)
    assert up == 0 or used + up <= limits.low_watermark * 1000


@given(segment_lists, st.integers(0, 1000), all_limits)
def test_over_the_threshold_all_that_may_go_goes_until_the_low_watermark(
    sealed: list[Segment], others: int, limits: Limits
) -> None:
    decisions, used = planned(sealed, others, limits)
    if used <= limits.threshold * 1000:
        return
    down = {d.segment.path for d in decisions if d.is_demotion}
    left = [s for s in sealed if s.tier == 0 and s.path not in down and s.age_s >= limits.min_age_s]
    used_after = used - sum(d.segment.bytes for d in decisions)
    assert used_after <= limits.low_watermark * 1000 or not left


# -- days of load -------------------------------------------------------------------------------


class Simulation:
    """A producer on a clock of its own; what is planned is carried out at once."""

    def __init__(self, capacity: int, limits: Limits) -> None:
        self.capacity = capacity
        self.limits = limits
        self.now = 0.0
        self.made: dict[bytes, float] = {}
        self.tiers: dict[bytes, int] = {}
        self.moved: dict[bytes, float] = {}
        self.down: Counter[bytes] = Counter()
        self.up: Counter[bytes] = Counter()

    def roll(self) -> None:
        path = f"topic-{len(self.made):06}".encode()
        self.made[path], self.tiers[path] = self.now, 0

    def retain(self, count: int) -> None:
        for path in list(self.tiers)[:-count]:
            del self.tiers[path]

    def used(self) -> int:
        return sum(1 for tier in self.tiers.values() if tier == 0)

    def look(self) -> None:
        sealed = [
            Segment(
                path,
                tier,
                1,
                self.now - self.made[path],
                self.now - self.moved.get(path, -float("inf")),
            )
            for path, tier in list(self.tiers.items())[:-1]
        ]
        tiers = two_tiers(self.used(), self.capacity)
        for decision in plan(self.limits, Rules(), tiers, Segments(sealed)):
            path = decision.segment.path
            self.tiers[path], self.moved[path] = decision.tier, self.now
            (self.down if decision.is_demotion else self.up)[path] += 1


def test_days_of_a_producer_at_ten_times_the_fast_tier_move_each_segment_down_once() -> None:
    simulation = Simulation(capacity=40, limits=Limits())
    for minute in range(3 * 24 * 60):
        simulation.now = minute * 60.0
        if minute % 4 == 0:
            simulation.roll()
            simulation.retain(400)
        simulation.look()
        assert simulation.used() <= 0.5 * 40 + 1
    assert set(simulation.down.values()) == {1}
    assert not simulation.up


def test_segments_come_up_only_after_usage_fell_and_go_down_again_only_for_new_ones() -> None:
    simulation = Simulation(capacity=40, limits=Limits())
    for minute in range(24 * 60):
        simulation.now = minute * 60.0
        if minute < 12 * 60 and minute % 4 == 0:
            simulation.roll()
        if minute == 18 * 60:  # a topic is deleted: what is on the fast tier goes
            for path in [p for p, tier in simulation.tiers.items() if tier == 0]:
                del simulation.tiers[path]
        before = sum(simulation.up.values())
        simulation.look()
        if minute != 18 * 60:
            assert sum(simulation.up.values()) == before
    assert sum(simulation.up.values()) == 16  # up to the low watermark
    assert set(simulation.up.values()) == {1}
