"""pafkafs doctor: what it finds, and that it changes nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness import run_pafkafs, tmpfs

from pafkafs.doctor import pmem_namespaces, read_properties


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
    config.write_text(f"log.dirs={places[2]}/a,{places[2]}/b\nlog.segment.bytes=1048576\n")
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
    raw, fsdax = pmem_namespaces(tmp_path)
    assert raw.mode == "raw"
    assert "ndctl create-namespace -f -e namespace0.0 -m fsdax" in raw.commands
    assert fsdax.mode == "fsdax"
    assert fsdax.commands.endswith(
        "mkfs.ext4 -b 4096 /dev/pmem1 && mount -o dax=always /dev/pmem1 /pmem"
    )
