"""The catalogue against a model that keeps no order: whatever happens, the orders are right."""

import math
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pafkafs import kafka
from pafkafs.catalogue import Catalogue, CatalogueView, Place
from pafkafs.policy import Keep, Rule, Rules

TIERS = (0, 1, 1)
RULES = Rules((Rule(("kept-off",), keep=Keep.SLOW),), ("pinned-*/*",))
OTHER_RULES = Rules((), ("topic-0/*",))
ROOT_INO = 1
NAMES = ["topic-0", "kept-off-3", "pinned-1", "__cluster_metadata-0", "no partition"]
DEAD = "topic-0.0123456789abcdef0123456789abcdef-delete"

inos = st.integers(2, 5)
offsets = st.integers(0, 4)
places = st.builds(Place, st.integers(0, 2), st.integers(0, 100), st.integers(0, 3))


@dataclass
class Known:
    """A segment of the model."""

    place: Place
    held_until: float = 0.0


class CatalogueModel(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.catalogue = Catalogue(TIERS, RULES, ROOT_INO, 0.0)
        self.rules = RULES
        self.names: dict[int, str] = {}
        self.segments: dict[tuple[int, int], Known] = {}
        self.now = 0.0

    @rule(ino=inos, name=st.sampled_from([*NAMES, DEAD]))
    def directory_is_at(self, ino: int, name: str) -> None:
        self.catalogue.directory(ino, self.catalogue.root, name.encode())
        self.names[ino] = name

    @rule(ino=inos)
    def directory_goes(self, ino: int) -> None:
        self.catalogue.directory_gone(ino)
        self.names.pop(ino, None)
        self.segments = {key: s for key, s in self.segments.items() if key[0] != ino}

    @rule(ino=inos, offset=offsets, place=places)
    def put(self, ino: int, offset: int, place: Place) -> None:
        if ino not in self.names:
            return
        active = self.active(ino)
        directory = self.catalogue.find(ino)
        assert directory is not None
        sealed = self.catalogue.put(directory, kafka.segment_name(offset), place)
        assert (sealed is not None) == (active is not None and offset > active)
        assert sealed is None or sealed.base_offset == active
        self.segments.setdefault((ino, offset), Known(place)).place = place

    @rule(ino=inos, offset=offsets)
    def remove(self, ino: int, offset: int) -> None:
        gone = self.catalogue.remove(ino, kafka.segment_name(offset))
        assert (gone is not None) == ((ino, offset) in self.segments)
        self.segments.pop((ino, offset), None)

    @rule(ino=inos, offset=offsets, place=places)
    def survey_finds(self, ino: int, offset: int, place: Place) -> None:
        if ino not in self.names:
            return
        directory = self.catalogue.find(ino)
        assert directory is not None
        self.catalogue.found(directory, [(kafka.segment_name(offset), place)])
        self.segments.setdefault((ino, offset), Known(place))

    @rule(ino=inos, offset=offsets, seconds=st.integers(1, 3))
    def hold(self, ino: int, offset: int, seconds: int) -> None:
        entry = self.catalogue.entry(ino, kafka.segment_name(offset))
        if entry is not None:
            self.catalogue.hold(entry, self.now + seconds)
            self.segments[ino, offset].held_until = self.now + seconds

    @rule()
    def time_passes(self) -> None:
        self.now += 1
        self.catalogue.release(self.now)
        for known in self.segments.values():
            if known.held_until <= self.now:
                known.held_until = 0.0

    @rule(rules=st.sampled_from([RULES, OTHER_RULES]))
    def other_rules(self, rules: Rules) -> None:
        for _ in self.catalogue.follow(rules):
            pass
        self.rules = rules

    def active(self, ino: int) -> int | None:
        return max((offset for i, offset in self.segments if i == ino), default=None)

    def rule_of(self, ino: int, offset: int) -> int | None:
        name = self.names[ino]
        path = f"{name}/{offset:020}.log"
        partition = kafka.parse_directory(name)
        if name in ("__cluster_metadata-0", DEAD):
            return None
        if self.rules.is_pinned(path):
            return self.rules.pinned
        return 0 if partition is None else self.rules.of_topic(partition.topic)

    @invariant()
    def orders_have_what_may_move_in_order_of_age(self) -> None:
        if not hasattr(self, "catalogue"):
            return
        expected: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for (ino, offset), known in self.segments.items():
            rule = self.rule_of(ino, offset)
            if rule is None or known.held_until or offset == self.active(ino):
                continue
            path = f"{self.names[ino]}/{offset:020}.log"
            place = known.place
            expected.setdefault((TIERS[place.device], rule), []).append(
                (path, place.bytes, place.mtime_ns)
            )
        for tier in (0, 1):
            for number in range(4):
                entries = self.catalogue.sealed(tier, number)
                found = [(e.path.decode(), e.bytes, e.mtime_ns) for e in entries]
                assert sorted(found) == sorted(expected.get((tier, number), []))
                assert [e.mtime_ns for e in entries] == sorted(e.mtime_ns for e in entries)
                assert self.catalogue.sealed_bytes(tier, number) == sum(e.bytes for e in entries)


TestCatalogue = CatalogueModel.TestCase
TestCatalogue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_many_segments_of_one_time_are_each_found() -> None:
    catalogue = Catalogue(TIERS, Rules(), ROOT_INO, 0.0)
    directory = catalogue.directory(2, catalogue.root, b"topic-0")
    place = Place(0, 10, 5)
    for offset in range(1000):
        catalogue.put(directory, kafka.segment_name(offset), place)
    for offset in range(0, 999, 2):
        catalogue.remove(2, kafka.segment_name(offset))
    left = [entry.base_offset for entry in catalogue.sealed(0, 0)]
    assert left == [*range(1, 999, 2)]


def test_what_was_on_a_lower_tier_at_the_mount_counts_as_moved_then() -> None:
    catalogue = Catalogue(TIERS, Rules(), ROOT_INO, mounted_s=100.0)
    directory = catalogue.directory(2, catalogue.root, b"topic-0")
    catalogue.found(directory, [(kafka.segment_name(n), Place(n % 2, 1, 1)) for n in range(3)])
    view = CatalogueView(catalogue, TIERS, 10**9, 130.0, lambda tier: [])
    assert [s.moved_s for s in view.oldest(1, 0)] == [30.0]
    assert [s.moved_s for s in view.oldest(0, 0)] == [math.inf]


def test_active_segment_that_is_held_is_left_alone_until_then() -> None:
    catalogue = Catalogue(TIERS, Rules(), ROOT_INO, 0.0)
    directory = catalogue.directory(2, catalogue.root, b"topic-0")
    catalogue.put(directory, kafka.segment_name(7), Place(0, 1, 1))
    entry = catalogue.entry(2, kafka.segment_name(7))
    assert entry is not None
    assert list(catalogue.active_entries(0)) == [entry]
    catalogue.hold(entry, 5.0)
    assert list(catalogue.active_entries(0)) == []
    catalogue.release(5.0)
    assert list(catalogue.active_entries(0)) == [entry]


def test_paths_follow_the_renames_of_directories_above() -> None:
    catalogue = Catalogue(TIERS, Rules(), ROOT_INO, 0.0)
    upper = catalogue.directory(2, catalogue.root, b"data")
    lower = catalogue.directory(3, upper, b"topic-0")
    catalogue.put(lower, kafka.segment_name(7), Place(0, 1, 1))
    catalogue.directory(2, catalogue.root, b"other")
    entry = catalogue.entry(3, kafka.segment_name(7))
    assert entry is not None
    assert entry.path == b"other/topic-0/" + kafka.segment_name(7)
    assert catalogue.directories_below(b"other") == [lower]
    assert catalogue.directories_below(b"other/topic-0") == [lower]
    assert catalogue.directories_below(b"") == [lower]
    assert catalogue.directories_below(b"oth") == catalogue.directories_below(b"data") == []
