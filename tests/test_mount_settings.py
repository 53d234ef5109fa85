"""`pafkafs get`, `set` and `reload`: options that change while a mount serves."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import MakeMount
from faults import Action, Faults, Kind
from filetools import MIB, is_spilled
from harness import Mount, run_pafkafs, wait_until

from pafkafs import settings
from pafkafs.config import CHANGEABLE, KEYS, MountOptions, mount_options
from pafkafs.errors import UsageError

GIVEN = {"fast": "/pmem", "slow": "/hdd", "mountpoint": "/kafka-logs"}


def options(**given: str) -> MountOptions:
    return mount_options({}, {**GIVEN, **{k.replace("_", "-"): v for k, v in given.items()}})


# -- from the inside ----------------------------------------------------------------------------


def test_values_are_written_as_they_were_given_or_as_their_default() -> None:
    given = mount_options({"pin": ["a/*", "b/*"]}, {**GIVEN, "max-age": "7d", "threshold": "0.6"})
    shown = {key: settings.written(given, key) for key in KEYS}
    assert (shown["max-age"], shown["threshold"], shown["pin"]) == ("7d", "0.6", "a/*,b/*")
    assert (shown["low-watermark"], shown["cool-down"], shown["migrate-rate"]) == (
        "0.48",
        "1h",
        "0",
    )
    assert shown["min-age"] == "0s"
    assert shown["metrics"] == ""


def test_change_takes_over_what_it_names_and_nothing_else() -> None:
    before = options(threshold="0.6", max_age="7d")
    after = settings.changed(before, {"migrate-rate": "1MiB", "max-age": ""})
    assert (after.migrate_rate, after.limits.max_age_s) == (MIB, None)
    assert after.limits.threshold == 0.6
    assert settings.changes(before, after) == {"migrate-rate": ("0", "1MiB"), "max-age": ("7d", "")}


@pytest.mark.parametrize(
    "wanted",
    [
        {"threshold": "0.3", "low-watermark": "0.4"},
        {"threshold": "0.99"},
        {"max-age": "1h", "min-age": "2h"},
        {"migrate-threads": "9"},
        {"interval": "0s"},
        {"migrate-rate": "fast"},
        {"mode": "slow"},
        {"colour": "red"},
        {"threshold": 0.6},
    ],
)
def test_change_that_is_refused_at_mount_is_refused(wanted: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        settings.changed(options(), wanted)


def test_file_read_again_goes_behind_the_command_line_and_before_what_was_set() -> None:
    given = {**GIVEN, "migrate-threads": "2"}
    mounted = mount_options({"threshold": 0.5, "mode": "tiered"}, given)
    changed = settings.changed(mounted, {"threshold": "0.7", "migrate-threads": "3"})
    after, need_remount = settings.reread(
        changed, {"threshold": 0.6, "migrate-threads": 4, "mode": "slow"}
    )
    assert (after.limits.threshold, after.migrate_threads) == (0.6, 2)
    assert need_remount == ["mode"]
    assert settings.written(after, "mode") == "tiered"


# -- from the outside ---------------------------------------------------------------------------


def set_(mount: Mount, *changes: str) -> str:
    result = run_pafkafs("set", str(mount.mountpoint), *changes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def get(mount: Mount, option: str) -> str:
    result = run_pafkafs("get", str(mount.mountpoint), option)
    assert result.returncode == 0, result.stderr
    return result.stdout.removesuffix("\n")


def assert_refused(result: subprocess.CompletedProcess[str], status: int, word: str) -> None:
    assert result.returncode == status, result
    assert result.stderr.count("\n") == 1
    assert word in result.stderr


def old_segments(mount: Mount, count: int) -> list[Path]:
    """Sealed ones of 4 MiB, and an active one."""
    directory = mount.mountpoint / "topic-0"
    directory.mkdir()
    paths = [directory / f"{number:020}.log" for number in range(count)]
    (directory / f"{10**12:020}.log").touch()
    for path in paths:
        path.write_bytes(os.urandom(4 * MIB))
        os.utime(path, ns=(10**18, 10**18))
    return paths


def test_get_shows_all_options_and_json_has_a_version(make_mount: MakeMount) -> None:
    mount = make_mount("--max-age", "7d", "--pin", "a/*,b/*").start()
    text = run_pafkafs("get", str(mount.mountpoint)).stdout
    assert all(key in text for key in KEYS)
    document = json.loads(run_pafkafs("get", "--json", str(mount.mountpoint)).stdout)
    assert document["version"] == 1
    assert document["options"]["max-age"] == {"value": "7d", "given": True, "changeable": True}
    assert document["options"]["mode"] == {"value": "tiered", "given": False, "changeable": False}
    assert {k for k, o in document["options"].items() if o["changeable"]} == set(CHANGEABLE)
    assert get(mount, "pin") == "a/*,b/*"
    assert_refused(run_pafkafs("get", str(mount.mountpoint), "colour"), 2, "no option 'colour'")


def test_threshold_that_is_set_lets_segments_go_down_at_once(make_mount: MakeMount) -> None:
    # An interval, and a rest, that the test would not see the end of.
    mount = make_mount("--fast-capacity", "64MiB", "--interval", "1h").start()
    paths = old_segments(mount, 6)
    assert "threshold: '0.5' is now '0.2'" in set_(mount, "threshold=0.2")
    wait_until(lambda: is_spilled(mount, paths[0]), "the oldest to go down", 60)
    assert not is_spilled(mount, paths[-1])
    assert get(mount, "low-watermark") == "0.16"


def test_age_that_is_set_lets_segments_go_down_except_pinned_ones(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "1h").start()
    paths = old_segments(mount, 2)
    set_(mount, "max-age=1h", "pin=topic-0/*1.log")
    wait_until(lambda: is_spilled(mount, paths[0]), "the other one to go down", 60)
    assert not is_spilled(mount, paths[1])


def test_rate_that_is_set_hurries_a_move_that_waits(make_mount: MakeMount) -> None:
    mount = make_mount("--threshold", "-1", "--migrate-rate", "1KiB").start()
    (path,) = old_segments(mount, 1)
    run_pafkafs("migrate", "--to", "slow", str(path))
    wait_until(lambda: mount.status()["migration"]["running"], "the move to wait", 60)
    set_(mount, "migrate-rate=0")
    wait_until(lambda: is_spilled(mount, path), "it to arrive", 60)


def test_refused_set_changes_nothing_and_what_is_set_ends_with_the_mount(mount: Mount) -> None:
    where = str(mount.mountpoint)
    contradiction = run_pafkafs("set", where, "max-age=7d", "threshold=0.3", "low-watermark=0.4")
    assert_refused(contradiction, 2, "low-watermark 0.4 must be less than threshold 0.3")
    assert get(mount, "max-age") == ""
    assert_refused(run_pafkafs("set", where, "mode=slow"), 2, "unmount, and mount with it")
    assert_refused(run_pafkafs("set", where, "threshold"), 2, "write OPTION=VALUE")
    assert_refused(run_pafkafs("set", where, "pin=a", "pin=b"), 2, "given twice")
    assert_refused(run_pafkafs("set", where, "pin=" + "x" * 40_000), 2, "longer than")
    assert_refused(run_pafkafs("set", f"{where}/..", "pin=a"), 1, "no pafkafs daemon serves")
    set_(mount, "migrate-threads=3")
    assert get(mount, "migrate-threads") == "3"
    mount.restart()
    assert get(mount, "migrate-threads") == "1"


def test_reload_takes_over_what_may_change_and_names_what_may_not(
    make_mount: MakeMount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the daemon goes elsewhere, and the file is found all the same
    config = tmp_path / "pafkafs.toml"
    config.write_text("threshold = 0.6\nmigrate-threads = 2\n")
    mount = make_mount("--config", "pafkafs.toml", "--migrate-threads", "3").start()
    where = str(mount.mountpoint)
    set_(mount, "threshold=0.7", "migrate-rate=1MiB")
    config.write_text('threshold = 0.8\nmigrate-threads = 4\nmax-age = "7d"\n')
    assert run_pafkafs("reload", where).returncode == 0
    assert (get(mount, "threshold"), get(mount, "max-age")) == ("0.8", "7d")
    assert (get(mount, "migrate-threads"), get(mount, "migrate-rate")) == ("3", "0")

    config.write_text('threshold = 0.4\nmode = "slow"\n')
    assert_refused(run_pafkafs("reload", where), 1, "mode was left as it is")
    assert (get(mount, "threshold"), get(mount, "mode")) == ("0.4", "tiered")

    for text, word in (
        ("threshold = 0.3\nlow-watermark = 0.9", "must be less"),
        ("colour = 1", "unknown option 'colour'"),
        ("threshold = ", "not TOML"),
        ("#" * (2 * MIB), "larger than"),
    ):
        config.write_text(text)
        assert_refused(run_pafkafs("reload", where), 2, word)
    config.unlink()
    assert_refused(run_pafkafs("reload", where), 2, "cannot read")
    os.mkfifo(config)
    assert_refused(run_pafkafs("reload", where), 1, "does not answer")
    assert get(mount, "threshold") == "0.4"

    config.unlink()
    config.write_text("threshold = 0.9\n")
    os.kill(mount.pid, signal.SIGHUP)
    wait_until(lambda: get(mount, "threshold") == "0.9", "the reload", 60)
    assert "threshold changed by" in mount.log_text()
    config.write_text("threshold = 7\n")
    os.kill(mount.pid, signal.SIGHUP)
    wait_until(lambda: "nothing was reloaded" in mount.log_text(), "the refusal in the log", 60)
    assert mount.status()["state"] == "healthy"


def test_reload_of_a_file_that_lies_in_the_mount_by_now_does_not_hang(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text("threshold = 0.6\n")
    mount = make_mount("--config", str(config)).start()
    inside = mount.mountpoint / "pafkafs.toml"
    inside.write_text("threshold = 0.7\n")
    config.unlink()
    config.symlink_to(inside)
    assert run_pafkafs("reload", str(mount.mountpoint)).returncode == 0
    assert get(mount, "threshold") == "0.7"


def test_without_a_file_there_is_nothing_to_reload(mount: Mount) -> None:
    assert_refused(run_pafkafs("reload", str(mount.mountpoint)), 1, "nothing to reload")
    os.kill(mount.pid, signal.SIGHUP)
    wait_until(lambda: "nothing to reload" in mount.log_text(), "a line in the log", 60)
    assert mount.status()["state"] == "healthy"


def test_config_inside_the_mountpoint_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    config = mount.mountpoint / "pafkafs.toml"
    config.write_text("")
    assert_refused(mount.mount("--config", str(config)), 2, "is inside the mountpoint")


def test_options_that_change_touch_no_device(make_mount: MakeMount, tmp_path: Path) -> None:
    """So there is nothing that a crash could cut."""
    faults = Faults(tmp_path)
    config = tmp_path / "pafkafs.toml"
    config.write_text("threshold = 0.5\n")
    faults.arm(tmp_path, Action.COUNT, kinds=Kind.CHANGE | Kind.SYNC)
    with faults.daemon():
        mount = make_mount("--config", str(config)).start()
    wait_until(lambda: sum("syncfs" in call for call in faults.calls) == 2, "the first syncs")
    (mount.mountpoint / "file").touch()
    assert any("file" in call for call in faults.calls)
    faults.arm(tmp_path, Action.COUNT, kinds=Kind.CHANGE | Kind.SYNC)
    set_(mount, "threshold=0.6", "max-age=7d", "migrate-rate=1MiB", "pin=t-*/*")
    config.write_text("threshold = 0.7\n")
    assert run_pafkafs("reload", str(mount.mountpoint)).returncode == 0
    assert get(mount, "threshold") == "0.7"
    assert [call for call in faults.calls if not call.endswith(mount.log.name)] == []
