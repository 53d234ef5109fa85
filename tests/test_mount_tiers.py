"""More than two tiers, and several devices in each."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filetools import MIB
from harness import Mount, run_pafkafs, tmpfs, wait_until


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Three tiers with room for 32 segments of 1 MiB on the first, and for 12 on the second."""
    with ExitStack() as stack:
        # Each on its own: what others write to a filesystem must not decide between two devices.
        names = ("fast", "middle0", "middle1", "slow0", "slow1")
        fast, *others = (stack.enter_context(tmpfs(tmp_path / name, "64m")) for name in names)
        middle, slow = others[:2], others[2:]
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        options = (
            *("--tier", ",".join(map(str, middle))),
            *("--fast-capacity", "32MiB", "--middle-capacity", "6MiB"),
            *("--interval", "100ms"),
        )
        mount = Mount(fast, slow[0], mountpoint, options, tmp_path / "pafkafs.log")
        mount.slow_list = ",".join(map(str, slow))
        try:
            yield mount.start()
        finally:
            mount.clean_up()
        assert "Traceback" not in mount.log_text(), mount.log_text()


def fill(mount: Mount, count: int) -> dict[Path, bytes]:
    """Segments of 1 MiB, the first one the oldest."""
    directory = mount.mountpoint / "topic-0"
    directory.mkdir(exist_ok=True)
    contents: dict[Path, bytes] = {}
    for offset in range(count):
        path = directory / f"{offset:020}.log"
        contents[path] = os.urandom(MIB)
        path.write_bytes(contents[path])
        os.utime(path, ns=(10**18, 10**18 + offset * 10**9))
    (directory / f"{count:020}.log").touch()
    return contents


def tiers_of(*paths: Path) -> list[str]:
    found = json.loads(run_pafkafs("ls", "--json", *map(str, paths)).stdout)["segments"]
    return [segment["tier"] for segment in found]


def files(mount: Mount) -> dict[str, list[int]]:
    return {t["name"]: [d["files"] for d in t["devices"]] for t in mount.status()["tiers"]}


def test_segments_go_down_from_tier_to_tier_the_oldest_furthest(mount: Mount) -> None:
    assert run_pafkafs("pause", str(mount.mountpoint)).returncode == 0
    contents = fill(mount, 28)  # as much as the fast tier takes
    assert run_pafkafs("resume", str(mount.mountpoint)).returncode == 0

    def settled() -> bool:
        status = mount.status()["migration"]
        return not status["planned"] and not status["running"]

    wait_until(settled, "nothing left to move", 60)
    order = ["slow", "middle", "fast"]
    by_age = tiers_of(*contents)
    assert by_age == sorted(by_age, key=order.index)
    there = files(mount)
    assert list(there) == ["fast", "middle", "slow"]
    assert all(count > 0 for tier in there.values() for count in tier), there
    assert all(path.read_bytes() == content for path, content in contents.items())
    mount.restart()
    assert files(mount) == there
    assert all(path.read_bytes() == content for path, content in contents.items())


def test_command_moves_to_any_tier_and_names_those_there_are(mount: Mount) -> None:
    mount.restart("--threshold", "-1")
    path, content = next(iter(fill(mount, 1).items()))
    for tier in ("slow", "middle", "fast", "middle", "slow", "fast"):
        result = run_pafkafs("migrate", "--wait", "--to", tier, str(path))
        assert result.returncode == 0, result.stderr
        assert tiers_of(path) == [tier]
        assert path.read_bytes() == content
    result = run_pafkafs("migrate", "--to", "lowest", str(path))
    assert result.returncode == 1
    assert "fast or middle or slow" in result.stderr


def test_number_of_tiers_stays_what_it_was_and_nothing_is_changed(mount: Mount) -> None:
    mount.stop()
    before = (mount.fast / "pafkafs.json").read_bytes()
    mount.options = mount.options[2:4]
    result = mount.mount()
    assert result.returncode == 1
    assert "has 3 tiers, and 2 were given" in result.stderr
    assert (mount.fast / "pafkafs.json").read_bytes() == before


def test_dead_mount_of_three_tiers_is_named_with_the_command_that_mounts_it(mount: Mount) -> None:
    mount.kill()
    (problem,) = mount.status()["problems"]
    assert f"--tier {mount.options[1]} {mount.fast} {mount.slow_list}" in problem["action"]


def test_failing_device_rests_and_the_other_one_takes_what_moves(mount: Mount) -> None:
    mount.restart("--threshold", "-1", "--max-age", "1h")
    broken, sound = (Path(path) for path in mount.options[1].split(","))
    shutil.rmtree(broken / "objects")
    contents = fill(mount, 8)
    objects = sound / "objects"

    def moved() -> int:
        return sum(1 for path in objects.rglob("*") if path.is_file())

    def is_resting() -> bool:
        return any(str(broken) in note for note in mount.status()["migration"]["notes"])

    wait_until(is_resting, "the device to be left alone")
    wait_until(lambda: moved() >= 4, "segments on the device that works", 60)
    assert all(path.read_bytes() == content for path, content in contents.items())
