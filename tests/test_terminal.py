"""What operators see on a terminal: a live status, the progress of moves, completion, odd names."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import MIB, is_spilled
from harness import PAFKAFS, Mount, run_pafkafs, wait_until
from terminal import in_terminal

from pafkafs.units import printable


def segment(directory: Path, content: bytes = b"content") -> Path:
    """A sealed one."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{10**12:020}.log").touch()
    path = directory / f"{0:020}.log"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer [x]", "plain, größer [x]"),
        ("a\nb\x1b[2J", "a\\nb\\x1b[2J"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
    ],
)
def test_names_are_shown_as_one_harmless_line(text: str, shown: str) -> None:
    assert printable(text) == shown


# -- status --watch -----------------------------------------------------------------------------


def test_watch_shows_what_changes_and_ends_with_ctrl_c(mount: Mount) -> None:
    with in_terminal("status", "--watch", str(mount.mountpoint)) as terminal:
        terminal.see("0 B")
        (mount.mountpoint / "file").write_bytes(bytes(3 * MIB))
        terminal.see("3.0 MiB")
        terminal.interrupt()
        assert terminal.exit_status() == 0
        assert "Traceback" not in terminal.shown
        assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")  # cursor


def test_watch_ends_with_the_mount_and_says_so(mount: Mount) -> None:
    with in_terminal("status", "--watch", "0.2", str(mount.mountpoint)) as terminal:
        terminal.see("healthy")
        mount.stop()
        assert terminal.exit_status() == 1
        assert "any more" in terminal.shown
        assert "Traceback" not in terminal.shown


def test_watch_refuses_what_makes_no_sense(mount: Mount) -> None:
    where = str(mount.mountpoint)
    for arguments, word in (
        (["--watch", "--json"], "give one of them"),
        (["--watch"], "needs a terminal"),
    ):
        result = run_pafkafs("status", where, *arguments)
        assert result.returncode == 2
        assert word in result.stderr
    with in_terminal("status", where, "--watch", "0") as terminal:
        assert terminal.exit_status() == 2
        assert "no time for --watch" in terminal.shown


# -- migrate ------------------------------------------------------------------------------------


def test_progress_is_in_bytes_and_ctrl_c_leaves_the_moves_going(make_mount: MakeMount) -> None:
    mount = make_mount("--threshold", "-1", "--migrate-rate", "1MiB").start()
    path = segment(mount.mountpoint / "topic-0", os.urandom(64 * MIB))
    with in_terminal("migrate", "--wait", "--to", "slow", str(path)) as terminal:
        terminal.see("0 of 1 files")
        terminal.see("64.0 MiB")
        terminal.interrupt()
        assert terminal.exit_status() == 130
        assert "the moves go on" in terminal.shown
    assert mount.status()["migration"]["running"]
    run_pafkafs("set", str(mount.mountpoint), "migrate-rate=0")
    wait_until(lambda: is_spilled(mount, path), "it to arrive", 60)


def test_directory_means_its_sealed_segments(make_mount: MakeMount) -> None:
    mount = make_mount("--threshold", "-1").start()
    paths = [segment(mount.mountpoint / f"topic-{number}") for number in range(2)]
    (mount.mountpoint / "topic-0" / f"{0:020}.index").touch()
    result = run_pafkafs("migrate", "--wait", "--to", "slow", str(mount.mountpoint))
    assert result.returncode == 0, result.stderr
    assert all(is_spilled(mount, path) for path in paths)
    assert len(mount.objects) == 2


def test_paths_of_any_kind_are_understood_or_refused_in_one_line(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--threshold", "-1").start()
    names = ["-t-0", "a\nb-0", os.fsdecode(b"caf\xe9-0"), "[x] y-0", "x" * 100 + "-0"]
    paths = [segment(mount.mountpoint / name) for name in names]
    link = tmp_path / "link"
    link.symlink_to(mount.mountpoint)

    def migrate(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return run_pafkafs("migrate", "--wait", "--to", "slow", *arguments, cwd=cwd)

    assert migrate("--", "-t-0", cwd=mount.mountpoint).returncode == 0
    assert migrate(*map(str, paths[1:3])).returncode == 0
    assert migrate(str(link / names[3] / ".." / names[3])).returncode == 0
    deep = mount.mountpoint / "/".join(["ü" * 120] * 8) / "t-0"
    last = segment(deep)  # 6 times as long in JSON
    assert migrate(str(last)).returncode == 0
    assert all(is_spilled(mount, path) for path in [*paths[:4], last])
    for path, word in (
        (str(mount.mountpoint / ".." / "m.log"), "No such file"),
        (str(mount.log), "not in a pafkafs mount"),
        (str(mount.mountpoint.parent), "not in a pafkafs mount"),
        ("", "No such file"),
        ("no\nsuch", "No such file"),
        (os.fsdecode(b"caf\xe9"), "No such file"),
    ):
        result = migrate(path)
        assert result.returncode == 1
        assert word in result.stderr
        assert result.stderr.count("\n") == 1
    active = paths[1].with_name(f"{10**12:020}.log")
    refused = migrate(str(active))
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "active segment" in refused.stderr


# -- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_of_the_shell(shell: str) -> None:
    result = run_pafkafs("completion", shell)
    assert result.returncode == 0
    assert f"_PAFKAFS_COMPLETE={shell}_complete" in result.stdout


def completed(words: str) -> list[str]:
    """What bash would be offered for the last word."""
    environment = {
        "_PAFKAFS_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = run_pafkafs(env={**os.environ, **environment})
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_bash_completes_commands_mountpoints_and_options(mount: Mount) -> None:
    assert completed("pafkafs stat") == ["status"]
    where = str(mount.mountpoint)
    for command in ("status", "umount", "get", "set", "reload", "pause"):
        assert completed(f"pafkafs {command} {where[:-2]}") == [where]
    assert completed(f"pafkafs set {where} migrate-r") == ["migrate-rate="]
    assert completed(f"pafkafs get {where} fast") == ["fast", "fast-capacity"]


def test_bash_accepts_the_script(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(run_pafkafs("completion", "bash").stdout)
    check = f'source {script}; complete -p pafkafs; export PATH="{Path(PAFKAFS).parent}:$PATH"'
    result = subprocess.run(["bash", "-c", check], capture_output=True, text=True, check=True)
    assert "_pafkafs_completion" in result.stdout
