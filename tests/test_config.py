"""Sizes, options and the configuration file, as pure functions."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pafkafs.commands.mount_helper import parse_options
from pafkafs.config import mount_options, read_config
from pafkafs.errors import UsageError
from pafkafs.placement import Mode
from pafkafs.units import format_duration, format_size, parse_size

GIVEN = {"fast": "/pmem0,/pmem1", "slow": "/hdd", "mountpoint": "/kafka-logs"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("8GiB", 8 << 30),
        ("8g", 8 << 30),
        ("1.5 MiB", 3 << 19),
        ("1GB", 10**9),
        ("2TiB", 2 << 40),
        ("512B", 512),
    ],
)
def test_size_is_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-5", "8 apples", "1e9", "0x10", "8GiBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_size_for_people_is_close_to_the_size(count: int) -> None:
    assert parse_size(format_size(count)) == pytest.approx(count, rel=0.06)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (90000, "1 d 1 h")],
)
def test_duration_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_defaults() -> None:
    options = mount_options({}, GIVEN)
    assert options.tiers[0] == ("/pmem0", "/pmem1")
    assert options.capacity[:2] == (-1, -1)
    assert options.mode is Mode.TIERED
    assert options.durability is None
    assert options.source == "/pmem0,/pmem1:/hdd"


def test_short_list_of_capacities_repeats_its_last() -> None:
    options = mount_options({}, {**GIVEN, "fast": "/a,/b,/c", "fast-capacity": "1GiB,2GiB"})
    assert options.capacity[:3] == (1 << 30, 2 << 30, 2 << 30)


def test_command_line_goes_before_the_file() -> None:
    options = mount_options({"mode": "slow", "durability": "power"}, {**GIVEN, "mode": "fast"})
    assert (options.mode, options.durability) == (Mode.FAST, "power")


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "best"},
        {"durability": 3},
        {"fast": ""},
        {"slow": "/a,,/b"},
        {"fast": ["/a:b"]},
        {"mountpoint": 7},
        {"fast-capacity": "-2"},
        {"fast-capacity": "1,2,3"},
    ],
)
def test_bad_value_is_a_usage_error(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        mount_options({}, {**GIVEN, **change})


@pytest.mark.parametrize("text", ["a = ", "= 3", "\x00"])
def test_file_that_is_not_toml_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pafkafs.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="not TOML"):
        read_config(str(path))


def test_mount_options_of_fstab() -> None:
    text = "rw,_netdev,x-systemd.requires=/pmem,fast-capacity=1GiB:2GiB,mode=slow"
    assert parse_options(text) == {"fast-capacity": "1GiB,2GiB", "mode": "slow"}


@pytest.mark.parametrize("text", ["ro", "mode=", "sync", "fast=/x"])
def test_unknown_mount_option_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unknown mount option"):
        parse_options(text)
