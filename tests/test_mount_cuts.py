"""A first mount and an adoption that were killed, at every step of theirs: both go on."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from conftest import MakeMount
from harness import Mount, tree_contents

from pafkafs import adoption, deviceset
from pafkafs.errors import PafkafsError

STEPS = ("rename", "fsync", "rmdir", "unlink")


def is_killed_at_step(number: int, act: Callable[[], object]) -> bool:
    """Runs act in a child that ends before its step of this number; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        steps = count(1)
        for name in STEPS:
            setattr(os, name, _ending_at(number, steps, getattr(os, name)))
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def _ending_at(number: int, steps: Iterator[int], call: Callable[..., None]) -> Callable[..., None]:
    def counted(*arguments: object, **keywords: object) -> None:
        if next(steps) == number:
            os._exit(1)
        call(*arguments, **keywords)

    return counted


def refuse_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does."""
    make = os.open

    def without(path: str, flags: int, *arguments: int, **keywords: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "EOPNOTSUPP")
        return make(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", without)


def directories(base: Path, *names: str) -> list[Path]:
    paths = [base / name for name in names]
    for path in paths:
        path.mkdir(parents=True)
    return paths


@pytest.mark.parametrize("unnamed_files", [True, False])
def test_first_mount_killed_at_any_step_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed_files: bool
) -> None:
    if not unnamed_files:
        refuse_unnamed_files(monkeypatch)
    for number in count(1):
        fast, *slow = directories(tmp_path / str(number), "fast", "slow0", "slow1")

        def form(fast: Path = fast, slow: list[Path] = slow) -> list[deviceset.SetDevice]:
            return deviceset.assemble([[str(fast)], list(map(str, slow))])

        was_killed = is_killed_at_step(number, form)
        for device in form():
            os.close(device.fd)
        record = json.loads((fast / "pafkafs.json").read_text())
        assert not record["forming"]
        ids = [json.loads((d / "pafkafs.json").read_text())["member"]["device"] for d in slow]
        assert [member["device"] for member in record["members"][1:]] == ids
        assert [os.listdir(device) for device in (fast, *slow)] == [["pafkafs.json"]] * 3
        if not was_killed:
            break
    assert number > 12


def assemble(fast: Path, *slow: Path) -> list[str]:
    """Forms a set, or goes on with it; the ids of its slow devices."""
    devices = deviceset.assemble([[str(fast)], list(map(str, slow))])
    for device in devices:
        os.close(device.fd)
    return [device.member.device for device in devices[1:]]


@pytest.mark.parametrize("joins", [False, True])
def test_mount_that_is_cut_lets_no_empty_directory_take_the_place_of_an_old_device(
    tmp_path: Path, joins: bool
) -> None:
    """The mount had the device elsewhere, and with joins a new one beside it; at the next one the
    old disk is not there, and its mountpoint is empty."""
    for number in count(1):
        base = tmp_path / str(number)
        fast, slow, new = directories(base, "fast", "slow", "new")
        known = assemble(fast, slow)
        elsewhere = slow.rename(base / "elsewhere")
        given = (elsewhere, new) if joins else (elsewhere,)
        was_killed = is_killed_at_step(number, partial(assemble, fast, *given))
        unplugged = elsewhere.rename(base / "unplugged")
        elsewhere.mkdir()
        with pytest.raises(PafkafsError, match=r"mount that one there|is missing"):
            assemble(fast, *given)
        assert os.listdir(elsewhere) == []
        elsewhere.rmdir()
        unplugged.rename(elsewhere)
        assert assemble(fast, *given)[:1] == known
        assert [json.loads((d / "pafkafs.json").read_text())["member"]["path"] for d in given] == [
            str(device) for device in given
        ]
        if not was_killed:
            break
    assert number > 6


def test_device_of_a_first_mount_that_was_cut_and_its_stand_in_are_told_apart(
    tmp_path: Path,
) -> None:
    """A disk got its record, and is not there when the next mount goes on with its mountpoint."""
    for number in count(1):
        base = tmp_path / str(number)
        fast, slow = directories(base, "fast", "slow")
        assert is_killed_at_step(number, partial(assemble, fast, slow))
        if (slow / "pafkafs.json").exists():
            break
    slow.rename(base / "unplugged")
    slow.mkdir()
    (stand_in,) = assemble(fast, slow)
    assert assemble(fast, slow) == [stand_in]
    slow.rename(base / "hidden")
    (base / "unplugged").rename(slow)
    with pytest.raises(PafkafsError, match=f"{stand_in}.* is missing"):
        assemble(fast, slow)


def fill(log_dir: Path) -> dict[str, tuple[str, bytes]]:
    """Makes a log directory; what is in it."""
    for topic in ("orders-0", "orders-1"):
        (log_dir / topic).mkdir(parents=True)
        (log_dir / topic / "00000000000000000000.log").write_bytes(topic.encode())
    (log_dir / "meta.properties").write_bytes(b"version=1")
    (log_dir / ".lock").touch()
    return tree_contents(log_dir)


def is_refused_as_half_adopted(mount: Mount) -> bool:
    """Whether a mount of these devices is."""
    try:
        devices = deviceset.assemble([[str(mount.fast)], [str(mount.slow)]])
    except PafkafsError as error:
        return "run the same pafkafs adopt command again" in str(error)
    for device in devices:
        os.close(device.fd)
    return False


def with_name(base: Mount, number: int) -> Mount:
    """Devices of their own for each number, on the same filesystems."""
    fast, slow = directories(base.fast.parent / str(number), "fast", "slow")
    return Mount(fast, slow, base.mountpoint, log=base.log)


@pytest.mark.parametrize("where", ["fast", "fast/kafka-logs", "kafka-logs"])
def test_adoption_killed_at_any_step_is_not_mounted_and_goes_on(
    make_mount: MakeMount, where: str
) -> None:
    base = make_mount()
    refused = 0
    for number in count(1):
        mount = with_name(base, number)
        log_dir = mount.fast.parent / where
        before = fill(log_dir)

        def adopt(log_dir: Path = log_dir, mount: Mount = mount) -> int:
            return adoption.adopt(str(log_dir), str(mount.fast), [str(mount.slow)])

        if not is_killed_at_step(number, adopt):
            break
        if is_refused_as_half_adopted(mount):
            refused += 1
            adopt()
            assert not is_refused_as_half_adopted(mount)
        elif not mount.tree.exists():
            adopt()  # it was killed before it did anything
        assert tree_contents(mount.tree) == before
    assert refused > 10


def test_mount_of_a_half_adopted_log_directory_names_adopt_and_changes_nothing(
    make_mount: MakeMount,
) -> None:
    base = make_mount()
    for number in count(1):
        mount = with_name(base, number)
        before = fill(mount.fast)

        def adopt(mount: Mount = mount) -> int:
            return adoption.adopt(str(mount.fast), str(mount.fast), [str(mount.slow)])

        assert is_killed_at_step(number, adopt)
        if mount.tree.exists() and os.listdir(mount.tree):
            break
    half = tree_contents(mount.fast)
    result = mount.mount()
    assert result.returncode == 1
    assert "pafkafs adopt" in result.stderr
    assert result.stderr.count("\n") == 1
    assert tree_contents(mount.fast) == half
    adopt()
    mount.start()
    assert tree_contents(mount.mountpoint) == before


def test_entry_in_both_places_is_refused_before_anything_is_changed(make_mount: MakeMount) -> None:
    mount = make_mount()
    log_dir = mount.fast.parent / "kafka-logs"
    fill(log_dir)
    (mount.tree / ".lock").mkdir(parents=True)
    before = tree_contents(mount.fast.parent)
    with pytest.raises(PafkafsError, match="exists already"):
        adoption.adopt(str(log_dir), str(mount.fast), [str(mount.slow)])
    assert tree_contents(mount.fast.parent) == before
    assert os.listdir(mount.slow) == []
