"""`pafkafs ls`: what is where, and why; rules for topics."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from filetools import is_spilled
from harness import Mount, run_pafkafs, wait_until

DAY_NS = 86_400 * 10**9
RULES = """
[[topics]]
name = "kept-off-*"
keep = "slow"

[[topics]]
name = ["short", "brief-*"]
max-age = "1h"

[[topics]]
name = "precious"
keep = "fast"
"""


def segment(mount: Mount, topic: str, offset: int, content: bytes = b"content") -> Path:
    directory = mount.mountpoint / f"{topic}-0"
    directory.mkdir(exist_ok=True)
    path = directory / f"{offset:020}.log"
    path.write_bytes(content)
    return path


def make_old(*paths: Path) -> None:
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))


def ls(*arguments: str | Path) -> list[dict[str, Any]]:
    result = run_pafkafs("ls", "--json", *map(str, arguments))
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["version"] == 1
    found: list[dict[str, Any]] = document["segments"]
    return found


@pytest.fixture
def still(make_mount: MakeMount) -> Mount:
    return make_mount("--threshold", "-1").start()


def names(found: list[dict[str, Any]]) -> list[str]:
    return [f"{Path(s['path']).parent}/{int(Path(s['path']).stem)}" for s in found]


def test_segments_are_shown_with_tier_state_and_reason(still: Mount) -> None:
    sealed, active = segment(still, "a", 0), segment(still, "a", 1, b"x" * 10_000)
    moved = segment(still, "b", 0)
    segment(still, "b", 1)
    (still.mountpoint / "a-0" / f"{0:020}.index").touch()
    assert run_pafkafs("migrate", "--wait", "--to", "slow", str(moved)).returncode == 0
    listed = ls(still.mountpoint)
    found = dict(zip(names(listed), listed, strict=True))
    assert list(found) == ["a-0/0", "a-0/1", "b-0/0", "b-0/1"]
    shown = {n: (s["tier"], s["state"], s["why"]) for n, s in found.items()}
    assert shown["a-0/0"] == ("fast", "sealed", "room")
    assert shown["a-0/1"] == ("fast", "active", "active")
    assert shown["b-0/0"] == ("slow", "sealed", "command")
    assert found["b-0/0"]["device"] == str(still.slow)
    assert found["a-0/1"]["size_bytes"] == active.stat().st_blocks * 512
    assert 0 <= found["a-0/0"]["age_s"] < 3600
    assert sealed.exists()


def test_paths_filters_and_orders_choose(still: Mount) -> None:
    small, large = segment(still, "a", 0), segment(still, "a", 1, b"x" * 100_000)
    segment(still, "a", 2)
    other = segment(still, "b", 0)
    make_old(large)
    assert names(ls(large)) == ["a-0/1"]
    assert names(ls(small.parent)) == ["a-0/0", "a-0/1", "a-0/2"]
    assert names(ls(small, other.parent, small)) == ["a-0/0", "b-0/0"]
    assert names(ls("--older", "1d", still.mountpoint)) == ["a-0/1"]
    assert names(ls("--larger", "50KiB", still.mountpoint)) == ["a-0/1"]
    assert names(ls("--state", "active", still.mountpoint)) == ["a-0/2", "b-0/0"]
    assert names(ls("--tier", "slow", still.mountpoint)) == []
    assert names(ls("--sort", "size", still.mountpoint))[0] == "a-0/1"
    assert names(ls("--sort", "age", "--reverse", still.mountpoint))[-1] == "a-0/1"
    text = run_pafkafs("ls", str(large)).stdout
    assert str(large) in text
    assert "fast" in text


def test_more_segments_than_a_page_has_are_all_shown_once(make_mount: MakeMount) -> None:
    mount = make_mount("--threshold", "-1").start()
    mount.stop()
    for partition in range(6):
        directory = mount.tree / f"topic-{partition}"
        directory.mkdir()
        for offset in range(900):
            (directory / f"{offset:020}.log").touch()
    mount.start()
    wait_until(lambda: mount.status()["all_known"], "all to be known")
    found = names(ls(mount.mountpoint))
    assert len(found) == len(set(found)) == 6 * 900


def test_path_outside_a_mount_is_refused_in_a_line(still: Mount, tmp_path: Path) -> None:
    result = run_pafkafs("ls", str(tmp_path))
    assert result.returncode == 1
    assert "not in a pafkafs mount" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run_pafkafs("ls", "--older", "soon").returncode == 2


def test_rules_for_topics_decide_where_segments_go(make_mount: MakeMount, tmp_path: Path) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text(RULES)
    mount = make_mount("--config", str(config), "--interval", "100ms").start()
    kept_off = segment(mount, "kept-off-a", 0)
    assert is_spilled(mount, kept_off)  # it starts there
    brief, other, precious = (segment(mount, t, 0) for t in ("brief-b", "other", "precious"))
    for topic in ("brief-b", "other", "precious"):
        segment(mount, topic, 1)
    make_old(brief, other, precious)
    wait_until(lambda: is_spilled(mount, brief), "the one that is too old to go down")
    assert not is_spilled(mount, other)
    assert not is_spilled(mount, precious)
    assert [s["why"] for s in ls(brief)] == ["age"]


def test_rules_that_are_reloaded_apply_to_what_is_there(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text("")
    mount = make_mount("--config", str(config), "--interval", "1h").start()
    path = segment(mount, "kept-off-a", 0)
    segment(mount, "kept-off-a", 1)
    assert not is_spilled(mount, path)
    config.write_text(RULES)
    assert run_pafkafs("reload", str(mount.mountpoint)).returncode == 0
    wait_until(lambda: is_spilled(mount, path), "it to go down")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[topics]]\nkeep = 'slow'", "without a name"),
        ("[[topics]]\nname = 'a'\nkeep = 'middle'", "choose one of fast, slow"),
        ("[[topics]]\nname = 'a'\nage = '1h'", "unknown option 'age'"),
        ("[[topics]]\nname = 'a'\nmax-age = '1h'\nmin-age = '2h'", "max-age must be more"),
        ("topics = 'a'", "topics are tables"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    make_mount: MakeMount, tmp_path: Path, text: str, complaint: str
) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text(text)
    result = make_mount("--config", str(config)).mount()
    assert result.returncode == 2
    assert complaint in result.stderr
