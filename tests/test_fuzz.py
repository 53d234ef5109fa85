"""Whatever is found on a device, in a configuration or on the control socket is read, or refused in
one line: never a traceback, and nothing is changed."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from harness import GROWING, Mount
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pafkafs import control, deviceset
from pafkafs.config import mount_options, read_config, with_values
from pafkafs.errors import PafkafsError, UsageError
from pafkafs.layout import DamagedStub, Stub, parse_stub

QUICK = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def with_one_changed(value: Any, draw: st.DrawFn) -> Any:
    """The same, with one part of it replaced, left out or doubled."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.booleans()):
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: with_one_changed(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        middle = [with_one_changed(value[index], draw)] * draw(st.integers(0, 2))
        return [*value[:index], *middle, *value[index + 1 :]]
    return draw(ANYTHING)


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """A JSON text that is damaged: in its bytes, or in what it says."""
    if draw(st.booleans()):
        return json.dumps(with_one_changed(json.loads(text), draw)).encode()
    at, count = draw(st.integers(0, len(text))), draw(st.integers(0, 20))
    return text[:at] + draw(st.binary(max_size=20)) + text[at + count :]


@pytest.fixture
def devices(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "fast", tmp_path / "slow"
    for path in paths:
        path.mkdir()
    close(deviceset.assemble([[str(path)] for path in paths]))
    return paths


def expect_one_line(error: PafkafsError) -> None:
    assert str(error)
    assert "\n" not in str(error)


def close(found: list[deviceset.SetDevice]) -> None:
    for device in found:
        os.close(device.fd)


def written(*devices: Path) -> list[bytes]:
    return [(device / "pafkafs.json").read_bytes() for device in devices]


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_record_of_a_device_is_refused_and_kept_or_understood(
    devices: tuple[Path, Path], which: int
) -> None:
    before = written(*devices)

    @QUICK
    @given(text=damaged(before[which]))
    def check(text: bytes) -> None:
        (devices[which] / "pafkafs.json").write_bytes(text)
        now = written(*devices)
        try:
            close(deviceset.assemble([[str(path)] for path in devices]))
        except PafkafsError as error:
            expect_one_line(error)
            assert written(*devices) == now
        finally:
            for device, content in zip(devices, before, strict=True):
                (device / "pafkafs.json").write_bytes(content)

    check()


PATHS = {"0a1b2c3d": (b"/slow", b"/mnt/old")}
GOOD = b"/slow/objects/topic-0/00000000000000000000.log~0a1b2c3d.0011223344556677"


@QUICK
@given(data=st.data())
def test_text_of_a_symlink_leads_below_the_objects_of_a_device_or_is_no_stub(
    data: st.DataObject,
) -> None:
    at, count = data.draw(st.integers(0, len(GOOD))), data.draw(st.integers(0, 30))
    between = data.draw(
        st.binary(max_size=30) | st.sampled_from([b"/..", b"/../..", b"//", b"/./", b"/objects/"])
    )
    text = GOOD[:at] + between + GOOD[at + count :]
    try:
        stub = parse_stub(text, PATHS)
    except DamagedStub:
        return
    assert stub is None or isinstance(stub, Stub)
    if stub is not None:
        assert text in [path + b"/objects/" + stub.object for path in PATHS[stub.device_id]]
        assert not {b"", b".", b".."} & set(stub.object.split(b"/"))


CONFIG = b"""fast = "/fast"
slow = ["/slow0", "/slow1"]
mountpoint = "/mnt"
threshold = "0.5"
max-age = "7d"
pin = ["payments-*/*"]
migrate-rate = "200MiB"
metrics = "127.0.0.1:9464"
[[topics]]
name = ["a", "b-*"]
keep = "fast"
"""


@QUICK
@given(data=st.data())
def test_damaged_configuration_is_understood_or_refused_in_one_line(
    tmp_path: Path, mounted_options: Any, data: st.DataObject
) -> None:
    at, count = data.draw(st.integers(0, len(CONFIG))), data.draw(st.integers(0, 40))
    between = data.draw(
        st.binary(max_size=20)
        | st.sampled_from([b"[[", b"]]", b"= 1e999", b"= []", b"{}", b'"', b"= -1", b"= true"])
    )
    path = tmp_path / "pafkafs.toml"
    path.write_bytes(CONFIG[:at] + between + CONFIG[at + count :])
    try:
        with_values(mounted_options, read_config(str(path)))
    except UsageError as error:
        expect_one_line(error)


@pytest.fixture
def mounted_options() -> Any:
    return mount_options({"fast": "/fast", "slow": "/slow", "mountpoint": "/mnt"}, {})


@pytest.fixture
def served(make_mount: MakeMount) -> Iterator[Mount]:
    mount = make_mount("--threshold", "-1").start()
    (mount.mountpoint / "topic-0").mkdir()
    yield mount
    assert mount.status()["pid"]


COMMANDS = ["status", "ls", "migrate", "job", "get", "set", "reload", "pause", "resume"]
OPTIONS = ["threshold", "pin", "topics", "interval"]


@QUICK
@example(request={"command": "migrate", "path": "topic-0", "to": "slow"})
@example(request={"command": "migrate", "path": 5, "to": "slow"})
@example(request={"command": "set", "values": {"threshold": 0.5}})
@example(request={"command": "ls", "paths": [["a"]]})
@given(
    request=st.fixed_dictionaries(
        {"command": st.sampled_from(COMMANDS) | ANYTHING},
        optional={
            "path": ANYTHING,
            "to": st.sampled_from(["fast", "slow"]) | ANYTHING,
            "paths": ANYTHING,
            "job": ANYTHING,
            "values": ANYTHING | st.dictionaries(st.sampled_from(OPTIONS), ANYTHING),
        },
    )
    | ANYTHING
)
def test_control_request_of_any_content_is_answered(served: Mount, request: Any) -> None:
    path = control.socket_path(str(served.mountpoint))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(json.dumps(request).encode() + b"\n")
        text = b""
        while not text.endswith(b"\n") and (more := client.recv(1 << 16)):
            text += more
    answer = json.loads(text)
    assert answer["ok"] or "internal" not in answer["error"], answer


def test_damaged_slots_are_reported_and_cut_no_file_but_their_own(make_mount: MakeMount) -> None:
    mount = make_mount(*GROWING, "--threshold", "-1").start()
    directory = mount.mountpoint / "topic-0"
    directory.mkdir()
    stranger = directory / "checkpoint"
    stranger.write_bytes(b"not a segment" * 1000)
    segment = directory / f"{0:020}.log"
    segment.write_bytes(b"record" * 1000)
    mount.stop()
    sizes = mount.fast / "sizes"
    good = sizes.read_bytes()

    @settings(QUICK, max_examples=8)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        slots = bytearray(good)
        for _ in range(data.draw(st.integers(1, 20))):
            at = data.draw(st.integers(0, 40 * 64))
            value = data.draw(
                st.binary(min_size=1, max_size=16)
                | st.just(stranger_ino.to_bytes(8, "little"))
                | st.just(bytes([255]) * 8)
            )
            slots[at : at + len(value)] = value
        sizes.write_bytes(slots[: len(good)])
        result = mount.mount()
        if result.returncode == 0:
            assert stranger.read_bytes() == b"not a segment" * 1000
            assert segment.read_bytes() == b"record" * 1000
            mount.stop()
        else:
            assert result.stderr.count("\n") == 1, result.stderr
        sizes.write_bytes(good)

    stranger_ino = (mount.tree / "topic-0/checkpoint").stat().st_ino
    check()
