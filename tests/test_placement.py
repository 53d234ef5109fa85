"""Placement: which device a file starts on, and where it goes on without room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pafkafs.placement import HIGH_MARK, Mode, Room, place_new, place_spill

rooms = st.builds(
    Room,
    tier=st.integers(0, 2),
    used_bytes=st.integers(0, 2000),
    limit_bytes=st.integers(1, 1000),
    in_service=st.booleans(),
)
device_lists = st.lists(rooms, min_size=1, max_size=6).map(lambda found: [Room(0, 0, 1000), *found])
EMPTY, FULL = Room(0, 0, 100), Room(0, 100, 100)
SLOW_EMPTY, SLOW_FULL = Room(1, 0, 100), Room(1, 100, 100)


def test_new_files_start_fast_while_there_is_room() -> None:
    assert place_new(Mode.TIERED, [EMPTY, SLOW_EMPTY], bulk=True) == 0


def test_segments_start_slow_above_the_high_mark_and_small_files_do_not() -> None:
    nearly = Room(0, int(100 * HIGH_MARK), 100)
    assert place_new(Mode.TIERED, [nearly, SLOW_EMPTY], bulk=True) == 1
    assert place_new(Mode.TIERED, [nearly, SLOW_EMPTY], bulk=False) == 0


def test_all_files_start_slow_when_the_fast_tier_is_full() -> None:
    assert place_new(Mode.TIERED, [FULL, SLOW_EMPTY], bulk=False) == 1


def test_fast_mode_never_leaves_the_fast_tier() -> None:
    assert place_new(Mode.FAST, [FULL, SLOW_EMPTY], bulk=True) == 0
    assert place_spill(Mode.FAST, [FULL, SLOW_EMPTY], 0, 1) is None


def test_slow_mode_uses_the_fast_tier_only_when_the_slow_one_is_full() -> None:
    assert place_new(Mode.SLOW, [EMPTY, SLOW_EMPTY], bulk=True) == 1
    assert place_new(Mode.SLOW, [EMPTY, SLOW_FULL], bulk=True) == 0


def test_new_files_go_to_the_device_with_the_most_room() -> None:
    assert place_new(Mode.TIERED, [Room(0, 50, 100), Room(0, 10, 100)], bulk=True) == 1


def test_spill_goes_sideways_before_down_and_up_rather_than_nowhere() -> None:
    assert place_spill(Mode.TIERED, [FULL, EMPTY, SLOW_EMPTY], 0, 10) == 1
    assert place_spill(Mode.TIERED, [FULL, FULL, SLOW_EMPTY], 0, 10) == 2
    assert place_spill(Mode.TIERED, [EMPTY, SLOW_FULL], 1, 10) == 0


def test_device_that_does_not_answer_is_chosen_only_rather_than_enospc() -> None:
    hung = Room(1, 0, 1000, in_service=False)
    assert place_spill(Mode.TIERED, [FULL, hung, SLOW_EMPTY], 0, 10) == 2
    assert place_spill(Mode.TIERED, [EMPTY, hung, SLOW_FULL], 2, 10) == 0
    assert place_spill(Mode.TIERED, [FULL, hung, SLOW_FULL], 0, 10) == 1


@given(st.sampled_from(Mode), device_lists, st.booleans())
def test_place_new_always_names_a_device(mode: Mode, devices: list[Room], bulk: bool) -> None:
    assert 0 <= place_new(mode, devices, bulk=bulk) < len(devices)


@given(st.sampled_from([Mode.TIERED, Mode.SLOW]), device_lists, st.integers(1, 1000))
def test_spill_is_refused_only_when_no_device_has_room(
    mode: Mode, devices: list[Room], need: int
) -> None:
    chosen = place_spill(mode, devices, 0, need)
    fits = [i for i, d in enumerate(devices) if i and d.free_bytes >= need]
    assert (chosen in fits) if fits else (chosen is None)


@pytest.mark.parametrize("used", [0, 99, 100, 150])
def test_free_room_is_never_negative(used: int) -> None:
    assert Room(0, used, 100).free_bytes == max(0, 100 - used)
