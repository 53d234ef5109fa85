"""`pafkafs mount` and the mount helper, from the outside."""

import fcntl
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import MakeMount
from filetools import Background, opened
from harness import (
    MOUNT_PAFKAFS,
    PAFKAFS,
    Mount,
    is_dead_mount,
    is_mounted,
    let_others_search,
    mount_line,
    run_pafkafs,
    wait_until,
)

from pafkafs.commands.mount import Starter


def entries(*directories: Path) -> list[list[str]]:
    return [sorted(os.listdir(directory)) for directory in directories]


def assert_refused(mount: Mount, *words: str) -> None:
    """One line that says what is wrong, status not 0, and nothing changed."""
    before = entries(mount.fast, mount.slow, mount.mountpoint)
    result = mount.mount()
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert not is_mounted(mount.mountpoint)
    assert entries(mount.fast, mount.slow, mount.mountpoint) == before


def test_mount_returns_when_requests_are_served(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    (mount.mountpoint / "file").write_bytes(b"x")
    assert (mount.tree / "file").read_bytes() == b"x"


def test_mount_left_dead_by_sigkill_is_replaced(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    (mount.mountpoint / "file").write_bytes(b"survives")
    mount.kill()
    assert is_dead_mount(mount.mountpoint)
    mount.start()
    assert (mount.mountpoint / "file").read_bytes() == b"survives"


def test_failure_after_the_mount_is_ready_is_not_written_to_somebodys_file(
    tmp_path: Path,
) -> None:
    """The pipe to who started the daemon is closed by then; its number is the next one's."""
    reader, writer = os.pipe()
    starter = Starter(writer)
    starter.tell(b"ok")
    os.close(reader)
    data = tmp_path / "segment"
    data.write_bytes(b"records")
    with data.open("r+b", buffering=0) as file:
        os.dup2(file.fileno(), writer)
        starter.tell(b"unexpected error")
        os.close(writer)
    assert data.read_bytes() == b"records"


def test_second_daemon_on_the_same_devices_is_refused(make_mount: MakeMount) -> None:
    first = make_mount().start()
    second = make_mount(name="other")
    second.fast_list, second.slow_list = str(first.fast), str(first.slow)
    result = second.mount()
    assert result.returncode == 1
    assert "in use by another pafkafs" in result.stderr


def test_mount_waits_for_the_locks_of_a_daemon_that_is_about_to_be_gone(
    make_mount: MakeMount,
) -> None:
    mount = make_mount().start()
    mount.stop()
    with opened(mount.fast, os.O_RDONLY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        starting = Background(mount.start)
        wait_until(lambda: is_opened_by_a_child(mount.fast), "the mount to try")
        fcntl.flock(fd, fcntl.LOCK_UN)
        starting.join()
    assert os.path.ismount(mount.mountpoint)


def is_opened_by_a_child(path: Path) -> bool:
    for child in psutil.Process().children(recursive=True):
        for link in Path(f"/proc/{child.pid}/fd").glob("*"):
            with suppress(OSError):
                if os.readlink(link) == str(path):
                    return True
    return False


def test_second_mount_at_the_same_place_is_refused(make_mount: MakeMount) -> None:
    first = make_mount().start()
    second = make_mount(name="other")
    second.mountpoint = first.mountpoint
    result = second.mount()
    assert result.returncode == 1
    assert "already mounted" in result.stderr


def test_mountpoint_that_is_missing_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.mountpoint.rmdir()
    result = mount.mount()
    assert result.returncode == 1
    assert "create it" in result.stderr


def test_mountpoint_with_files_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    (mount.mountpoint / "file").touch()
    assert_refused(mount, "not empty")


def test_mountpoint_inside_a_device_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.mountpoint = mount.slow / "inside"
    mount.mountpoint.mkdir()
    assert_refused(mount, "inside the device")


def test_device_inside_the_mountpoint_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.slow = mount.mountpoint / "slow"
    mount.slow.mkdir()
    assert_refused(mount, "inside the mountpoint")


def test_device_inside_another_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.slow = mount.fast / "slow"
    mount.slow.mkdir()
    assert_refused(mount, "inside the device")


def test_same_directory_twice_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.slow = mount.fast
    assert_refused(mount, "same directory")


def test_missing_device_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.slow_list = str(mount.slow / "nothing")
    assert_refused(mount, "does not exist")


def test_device_that_is_a_file_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    mount.slow_list = str(mount.slow.with_name("file"))
    Path(mount.slow_list).touch()
    assert_refused(mount, "not a directory")


def test_device_with_foreign_files_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    (mount.fast / "meta.properties").touch()
    assert_refused(mount, "not empty", "pafkafs adopt")


def test_unwritable_device_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    subprocess.run(["mount", "--bind", mount.slow, mount.slow], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount.slow], check=True)
        assert_refused(mount, "cannot write", "Read-only")
    finally:
        subprocess.run(["umount", mount.slow], check=True)


def test_swapped_devices_are_refused(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    mount.stop()
    mount.fast_list, mount.slow_list = str(mount.slow), str(mount.fast)
    assert_refused(mount, "first fast device")


def test_slow_device_of_another_set_is_refused(make_mount: MakeMount) -> None:
    mount, other = make_mount().start(), make_mount(name="other").start()
    mount.stop()
    other.stop()
    mount.slow_list = str(other.slow)
    assert_refused(mount, "another set")


def test_new_fast_device_for_an_old_slow_one_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    mount.stop()
    mount.fast = make_mount(name="other").fast
    assert_refused(mount, "which is new")


def test_new_slow_device_for_an_old_fast_one_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    mount.stop()
    mount.slow = make_mount(name="other").slow
    assert_refused(mount, "mount that one there")


def test_device_left_out_is_refused(make_mount: MakeMount) -> None:
    mount, other = make_mount(), make_mount(name="other")
    mount.slow_list = f"{mount.slow},{other.slow}"
    mount.start()
    mount.stop()
    mount.slow_list = str(mount.slow)
    assert_refused(mount, "is missing")


def test_device_that_joins_later_is_used(make_mount: MakeMount) -> None:
    mount, other = make_mount("--mode", "slow").start(), make_mount(name="other")
    mount.stop()
    mount.slow_list = f"{mount.slow},{other.slow}"
    mount.start()
    assert mount.device("slow", 1)["path"] == str(other.slow)
    mount.restart()


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": 1}', b"[]", b"\xff\xfe", b"null"])
def test_corrupt_device_record_is_refused_and_kept(make_mount: MakeMount, text: bytes) -> None:
    mount = make_mount().start()
    mount.stop()
    (mount.slow / "pafkafs.json").write_bytes(text)
    assert_refused(mount, "pafkafs.json is damaged", "do not delete it")
    assert (mount.slow / "pafkafs.json").read_bytes() == text


def test_newer_format_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    mount.stop()
    record = json.loads((mount.fast / "pafkafs.json").read_text())
    record["format"] = 2
    (mount.fast / "pafkafs.json").write_text(json.dumps(record))
    assert_refused(mount, "newer pafkafs")


@pytest.mark.parametrize("name", ["tree", "objects", "shadows", "tmp", "lost"])
def test_planted_symlink_for_an_own_directory_is_refused(
    make_mount: MakeMount, tmp_path: Path, name: str
) -> None:
    mount = make_mount().start()
    mount.stop()
    victim = tmp_path / "victim"
    victim.mkdir()
    (mount.fast / name).rmdir()
    (mount.fast / name).symlink_to(victim)
    assert_refused(mount, "cannot use")
    assert entries(victim) == [[]]


def test_state_directory_of_another_user_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    mount.stop()
    os.chown(mount.fast / "shadows", 12345, 12345)
    assert_refused(mount, "belongs to uid 12345")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--fast-capacity", "lots"], "not a size"),
        (["--fast-capacity", "99999P"], "more than any device has"),
        (["--fast-capacity", "1GiB,2GiB"], "2 sizes for 1 devices"),
        (["--mode", "sideways"], "sideways"),
        (["--durability", "never"], "never"),
        (["--no-such-option"], "no-such-option"),
        (["--config", "/nonexistent.toml"], "cannot read"),
    ],
)
def test_bad_option_is_a_usage_error(make_mount: MakeMount, options: list[str], word: str) -> None:
    mount = make_mount()
    result = mount.mount(*options)
    assert result.returncode == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr


@pytest.mark.parametrize("mode", ["tiered", "slow"])
@pytest.mark.parametrize("log_dir", [".", "broker", "broker-1"])
def test_home_tree_with_a_running_broker_is_refused(
    make_mount: MakeMount, log_dir: str, mode: str
) -> None:
    """Not by mount alone: nobody else may read it while it changes, or change it, too."""
    mount = make_mount("--mode", mode).start()
    (mount.mountpoint / log_dir).mkdir(exist_ok=True)
    (mount.mountpoint / log_dir / ".lock").write_bytes(b"")
    (mount.mountpoint / "topic-0").mkdir()
    mount.stop()
    assert (mount.tree / log_dir / ".lock").is_symlink() == (mode == "slow")
    devices = [str(mount.fast), str(mount.slow)]
    with open(mount.tree / log_dir / ".lock", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert_refused(mount, f"a Kafka broker (pid {os.getpid()}) is using {mount.tree}")
        for command in (
            ["check", *devices],
            ["check", "--repair", *devices],
            ["rescue", "--fast", devices[0], "--slow", devices[1], str(mount.log) + "-target"],
        ):
            result = run_pafkafs(*command)
            assert result.returncode == 1
            assert result.stderr.count("\n") == 1
            assert "a Kafka broker" in result.stderr
    mount.start()


def test_missing_arguments_are_a_usage_error() -> None:
    result = run_pafkafs("mount", "/fast")
    assert result.returncode == 2
    assert "slow devices are missing" in result.stderr


def test_config_file_gives_options_that_the_command_line_overrides(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount()
    config = tmp_path / "pafkafs.toml"
    config.write_text(
        f'fast = "{mount.fast}"\nslow = ["{mount.slow}"]\nmountpoint = "{mount.mountpoint}"\n'
        'fast-capacity = "100MiB"\nmode = "slow"\ndurability = "power"\n'
    )
    result = run_pafkafs(
        "mount", "--config", str(config), "--mode", "fast", "--log-file", str(mount.log)
    )
    assert result.returncode == 0, result.stderr
    status = mount.status()
    assert (status["mode"], status["durability"]) == ("fast", "power")
    assert mount.device("fast")["capacity_bytes"] == 100 << 20


def test_unknown_name_in_the_config_file_is_a_usage_error(tmp_path: Path) -> None:
    config = tmp_path / "pafkafs.toml"
    config.write_text('mod = "fast"\n')
    result = run_pafkafs("mount", "--config", str(config))
    assert result.returncode == 2
    assert "unknown option 'mod'" in result.stderr


def test_mount_helper_takes_fstab_options(make_mount: MakeMount) -> None:
    mount = make_mount()
    options = "rw,nosuid,nodev,_netdev,x-systemd.automount,fast-capacity=100MiB,mode=fast"
    options += f",log-file={mount.log}"
    result = subprocess.run(
        [MOUNT_PAFKAFS, f"{mount.fast}:{mount.slow}", mount.mountpoint, "-o", options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert mount.status()["mode"] == "fast"
    assert mount.device("fast")["capacity_bytes"] == 100 << 20


def test_mount_helper_refuses_what_it_does_not_know(make_mount: MakeMount) -> None:
    mount = make_mount()
    for options in ("ro", "mode", "colour=red"):
        result = subprocess.run(
            [MOUNT_PAFKAFS, f"{mount.fast}:{mount.slow}", mount.mountpoint, "-o", options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert options in result.stderr


READ_ONLY_SYS = """
mount -o remount,bind,ro /sys || exit 3
{pafkafs} mount --log-file {log} {devices} {mountpoint} || exit 4
echo x > {mountpoint}/background || exit 4
{pafkafs} umount {mountpoint} || exit 5
{pafkafs} mount -f {devices} {mountpoint} &
until mountpoint -q {mountpoint}; do kill -0 $! || exit 6; sleep 0.02; done
echo x > {mountpoint}/foreground || exit 7
kill $! && wait $!
"""


def test_mount_works_where_sys_is_read_only(make_mount: MakeMount) -> None:
    mount = make_mount()
    script = READ_ONLY_SYS.format(
        pafkafs=PAFKAFS,
        log=mount.log,
        devices=f"{mount.fast} {mount.slow}",
        mountpoint=mount.mountpoint,
    )
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(mount.tree)) == ["background", "foreground"]


def test_mount_type_pafkafs_works_through_mount_8(make_mount: MakeMount) -> None:
    mount = make_mount()
    helper = Path("/sbin/mount.pafkafs")
    assert not helper.exists() or helper.is_symlink()
    helper.unlink(missing_ok=True)
    helper.symlink_to(MOUNT_PAFKAFS)
    try:
        subprocess.run(
            [
                "mount",
                "-t",
                "pafkafs",
                "-o",
                f"log-file={mount.log}",
                f"{mount.fast}:{mount.slow}",
                mount.mountpoint,
            ],
            check=True,
        )
        assert mount.status()["state"] == "healthy"
    finally:
        helper.unlink()


def test_root_mount_lets_other_users_in_and_is_nosuid_nodev(mount: Mount) -> None:
    line = mount_line(mount.mountpoint)
    assert line is not None
    for option in ("nosuid", "nodev", "allow_other", "default_permissions"):
        assert option in line
    kafka = mount.mountpoint / "kafka"
    kafka.mkdir()
    os.chown(kafka, 12345, 12345)
    command = f"echo x > {kafka}/file && cat {kafka}/file"
    let_others_search(mount.mountpoint)
    result = subprocess.run(
        ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "x\n", result.stderr
    assert (mount.tree / "kafka/file").stat().st_uid == 12345


def test_stubs_follow_a_device_that_is_mounted_elsewhere(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    (mount.mountpoint / "orders-3").mkdir()
    (mount.mountpoint / "orders-3/00000000000000000000.log").write_bytes(b"data")
    os.link(
        mount.mountpoint / "orders-3/00000000000000000000.log", mount.mountpoint / "second-name"
    )
    mount.stop()
    elsewhere = mount.slow.with_name("elsewhere")
    mount.slow.rename(elsewhere)
    mount.slow = elsewhere
    mount.start()
    assert (mount.mountpoint / "orders-3/00000000000000000000.log").read_bytes() == b"data"
    assert (mount.mountpoint / "second-name").stat().st_nlink == 2
    assert os.readlink(mount.tree / "second-name").startswith(str(elsewhere))
