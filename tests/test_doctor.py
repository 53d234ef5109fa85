"""pafkafs doctor: what it finds, and that it changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from harness import PAFKAFS, Mount, run_pafkafs, tmpfs

from pafkafs import pmemhost
from pafkafs.doctor import _pmem, page_cache, read_properties
from pafkafs.mountpoint import Mounted


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    found = tmp_path / "fast", tmp_path / "slow", tmp_path / "mnt"
    for path in found:
        path.mkdir()
    return found


def examine(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    result = run_pafkafs("doctor", "--json", *map(str, arguments))
    return result.returncode, json.loads(result.stdout)["findings"]


def about(findings: list[dict[str, Any]], text: str) -> dict[str, Any]:
    (found,) = [finding for finding in findings if text in finding["what"]]
    return found


def test_host_that_can_mount_has_no_problem_and_nothing_is_changed(
    places: tuple[Path, Path, Path],
) -> None:
    status, findings = examine(*places)
    assert status == 0
    assert {finding["level"] for finding in findings} <= {"ok", "warning"}
    assert [os.listdir(path) for path in places] == [[], [], []]


def test_missing_device_is_a_problem_with_the_command_that_helps(
    places: tuple[Path, Path, Path],
) -> None:
    fast, slow, mountpoint = places
    slow.rmdir()
    status, findings = examine(fast, slow, mountpoint)
    assert status == 1
    assert about(findings, "is no directory")["action"] == f"mkdir -p {slow}"


def test_used_mountpoint_is_a_problem(places: tuple[Path, Path, Path]) -> None:
    (places[2] / "file").touch()
    status, findings = examine(*places)
    assert status == 1
    assert about(findings, "is not empty")["level"] == "problem"


def test_small_pages_of_a_tmpfs_are_noticed(places: tuple[Path, Path, Path]) -> None:
    with tmpfs(places[0], "16m"):
        _, findings = examine(*places)
        assert "huge=within_size" in about(findings, "small pages")["action"]
    with tmpfs(places[0], "16m", "huge=within_size"):
        _, findings = examine(*places)
        assert not any("small pages" in finding["what"] for finding in findings)


def test_tiers_on_one_filesystem_are_noticed(places: tuple[Path, Path, Path]) -> None:
    _, findings = examine(*places)
    assert "--fast-capacity" in about(findings, "on one filesystem")["action"]


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("log.dirs=/elsewhere", "not below"),
        ("log.preallocate = true", "log.preallocate"),
        ("log.segment.bytes=one", "no number"),
        (f"log.segment.bytes={1 << 40}", "less than 16 segments"),
        ("log.flush.interval.messages=1", "log.flush.interval.messages=1"),
        ("log.flush.interval.ms=1000", "log.flush.interval.ms=1000"),
    ],
)
def test_settings_of_kafka_that_matter_are_named(
    places: tuple[Path, Path, Path], tmp_path: Path, line: str, finding: str
) -> None:
    config = tmp_path / "server.properties"
    config.write_text(f"# a comment\n{line}\n")
    _, findings = examine(*places, "--kafka-config", config)
    assert about(findings, finding)["action"]


def test_good_kafka_settings_are_not_named(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "server.properties"
    never = "log.flush.interval.messages=9223372036854775807"
    config.write_text(f"log.dirs={places[2]}/a,{places[2]}/b\nlog.segment.bytes=1048576\n{never}\n")
    _, with_config = examine(*places, "--kafka-config", config)
    _, without = examine(*places)
    assert with_config == without


def test_properties_are_read_as_java_does(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text("a=1\n  b = two words \n#c=3\n!d=4\nnothing\n")
    assert read_properties(str(path)) == {"a": "1", "b": "two words"}


def make_namespace(devices: Path, name: str, mode: str, size: int, block: str | None) -> None:
    path = devices / name
    path.mkdir()
    (path / "mode").write_text(f"{mode}\n")
    (path / "size").write_text(f"{size}\n")
    if block is not None:
        (path / "block" / block).mkdir(parents=True)


def test_persistent_memory_without_fsdax_comes_with_its_commands(tmp_path: Path) -> None:
    make_namespace(tmp_path, "namespace0.0", "raw", 1 << 34, "pmem0")
    make_namespace(tmp_path, "namespace1.0", "memory", 1 << 34, "pmem1")
    make_namespace(tmp_path, "namespace2.0", "raw", 0, None)
    raw, fsdax = pmemhost.namespaces(tmp_path)
    assert raw.mode == "raw"
    assert "ndctl create-namespace -f -e namespace0.0 -m fsdax" in raw.commands
    assert fsdax.mode == "fsdax"
    assert fsdax.commands.endswith(
        "mkfs.ext4 -b 4096 /dev/pmem1 && mount -o dax=always /dev/pmem1 /pmem"
    )


def test_persistent_memory_that_is_not_used_is_named_with_its_commands(tmp_path: Path) -> None:
    make_namespace(tmp_path, "namespace0.0", "memory", 1 << 34, "pmem7")
    region = tmp_path / "region1"
    region.mkdir()
    (region / "available_size").write_text(f"{1 << 35}\n")
    (tmp_path / "region0").mkdir()
    (tmp_path / "region0" / "available_size").write_text("0\n")
    regions = list(pmemhost.free_regions(tmp_path))
    namespace, free = _pmem(str(tmp_path), list(pmemhost.namespaces(tmp_path)), regions)
    assert "16 GiB" in namespace.what
    assert "mount -o dax=always /dev/pmem7" in namespace.action
    assert "region1, 32 GiB" in free.what
    assert "ndctl create-namespace -r region1 -m fsdax" in free.action


# -- the page cache of a mount --------------------------------------------------------------------


def examine_mounted(mount: Mount, *, read_only_sys: bool = False) -> dict[str, Any]:
    """What doctor says of the page cache of a running mount."""
    remount = "mount -o remount,bind,ro /sys && " if read_only_sys else ""
    script = f'{remount} exec "$0" doctor --json "$@"'
    places = map(str, (mount.fast, mount.slow, mount.mountpoint))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, PAFKAFS, *places],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return about(json.loads(done.stdout)["findings"], "the page cache of")


def settings_of(mount: Mount) -> Path:
    number = os.stat(mount.mountpoint).st_dev
    return Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}")


def test_running_mount_is_no_problem_and_its_page_cache_is_tuned(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    assert examine_mounted(mount)["level"] == "ok"


def test_page_cache_that_is_not_tuned_comes_with_the_commands_that_tune_it(
    make_mount: MakeMount,
) -> None:
    mount = make_mount().start()
    setting = settings_of(mount) / "read_ahead_kb"
    setting.write_text("128")
    found = examine_mounted(mount)
    assert (found["level"], "read_ahead_kb is 128" in found["what"]) == ("warning", True)
    subprocess.run(["sh", "-ec", found["action"]], check=True)
    assert examine_mounted(mount)["level"] == "ok"


def test_page_cache_that_cannot_be_tuned_here_is_left_to_root_of_the_host(
    make_mount: MakeMount,
) -> None:
    mount = make_mount().start()
    (settings_of(mount) / "max_ratio").write_text("1")
    action = examine_mounted(mount, read_only_sys=True)["action"]
    assert action.startswith("/sys is read-only here; as root of the host: echo 100 >")


def test_settings_that_a_kernel_does_not_have_are_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "0:99").mkdir()
    (tmp_path / "0:99" / "max_ratio").write_text("100\n")
    (found,) = page_cache(Mounted("/mnt", "/a:/b", "0:99"), tmp_path)
    assert found.level == "ok"


def test_native_module_that_cannot_be_loaded_is_one_line() -> None:
    program = (
        "import sys; sys.modules['pafkafs._native'] = None; "
        "from pafkafs.commands import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pafkafs: its native module cannot be loaded:")
    assert len(done.stderr.splitlines()) == 1
