"""Stubs as text: what is made can be read, and nothing else is taken for one."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pafkafs.layout import (
    NAME_MAX,
    SYMLINK_MAX,
    DamagedStub,
    looks_like_stub,
    make_stub,
    parse_stub,
    stub_text,
)

DEVICE = "0a1b2c3d"
PATHS = {DEVICE: (b"/hdd", b"/old/hdd")}
names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)


@given(st.lists(names, min_size=1, max_size=12))
def test_stub_of_any_path_is_read_back_and_fits_every_limit(parts: list[bytes]) -> None:
    stub = make_stub(DEVICE, b"/hdd", b"/".join(parts))
    text = stub_text(b"/hdd", stub)
    assert parse_stub(text, PATHS) == stub
    assert len(text) <= SYMLINK_MAX
    assert all(len(part) <= NAME_MAX for part in stub.object.split(b"/"))


def test_object_has_the_readable_path_of_its_file() -> None:
    stub = make_stub(DEVICE, b"/hdd", b"orders-3/00000000000004200000.log")
    expected = f"orders-3/00000000000004200000.log~{DEVICE}.{stub.object_id}"
    assert os.fsdecode(stub.object) == expected


def test_two_stubs_of_a_path_have_different_objects() -> None:
    assert make_stub(DEVICE, b"/hdd", b"x").object != make_stub(DEVICE, b"/hdd", b"x").object


def test_stub_of_a_device_at_its_earlier_path_is_understood() -> None:
    stub = make_stub(DEVICE, b"/old/hdd", b"a/b")
    assert parse_stub(stub_text(b"/old/hdd", stub), PATHS) == stub


@given(st.binary(max_size=300).filter(lambda text: b"\0" not in text))
def test_ordinary_symlink_texts_are_no_stubs(text: bytes) -> None:
    if not looks_like_stub(text):
        assert parse_stub(text, PATHS) is None


@pytest.mark.parametrize(
    "text",
    [
        b"/hdd/objects/x~0a1b2c3e.0123456789abcdef",
        b"/etc/objects/x~0a1b2c3d.0123456789abcdef",
        b"/hdd/objects/../x~0a1b2c3d.0123456789abcdef",
        b"/hdd/objects//x~0a1b2c3d.0123456789abcdef",
        b"/hdd/objects/./x~0a1b2c3d.0123456789abcdef",
    ],
)
def test_stub_that_leads_elsewhere_is_damaged(text: bytes) -> None:
    with pytest.raises(DamagedStub):
        parse_stub(text, PATHS)
