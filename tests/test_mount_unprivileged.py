"""A mount by a user who is not root, through fusermount3.

The user gets CAP_DAC_READ_SEARCH, so that it may read the Python of whoever runs the tests.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PAFKAFS, is_mounted, let_others_search, run_pafkafs, wait_until

USER = 65534  # nobody: fusermount3 wants a name
AS_USER = [
    "setpriv",
    f"--reuid={USER}",
    f"--regid={USER}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]


# `pafkafs` without that capability, once what it needs is loaded.
WITHOUT_CAPABILITIES = """
import ctypes, logging.handlers
from pafkafs import daemon
from pafkafs.commands import main
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
main()
"""


class UserMount:
    def __init__(self, base: Path) -> None:
        self.fast, self.slow, self.mountpoint = base / "fast", base / "slow", base / "mnt"
        for directory in (base, self.fast, self.slow, self.mountpoint):
            directory.mkdir(exist_ok=True)
            os.chown(directory, USER, USER)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(base),
            "XDG_RUNTIME_DIR": str(base / "run"),
        }
        let_others_search(base)
        (base / "run").mkdir()
        os.chown(base / "run", USER, USER)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AS_USER, *command], env=self.environment, capture_output=True, text=True, check=False
        )

    def start(self, *options: str, command: tuple[str, ...] = (PAFKAFS,)) -> None:
        paths = (str(self.fast), str(self.slow), str(self.mountpoint))
        result = self.run(*command, "mount", *options, *paths)
        assert result.returncode == 0, result.stderr

    def status(self) -> dict[str, Any]:
        result = self.run(PAFKAFS, "status", "--json", str(self.mountpoint))
        status: dict[str, Any] = json.loads(result.stdout)["mounts"][0]
        return status


@pytest.fixture(autouse=True, scope="module")
def device_as_udev_makes_it() -> Iterator[None]:
    """/dev/fuse is for everybody on an ordinary system, not so in every container."""
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", mode & 0o777)


@pytest.fixture
def user_mount(tmp_path: Path) -> Iterator[UserMount]:
    mount = UserMount(tmp_path / "user")
    yield mount
    if is_mounted(mount.mountpoint):
        mount.run(PAFKAFS, "umount", "--lazy", str(mount.mountpoint))


def test_user_mounts_writes_and_unmounts(user_mount: UserMount) -> None:
    user_mount.start()
    script = "echo data > {0}/file && chmod 0400 {0}/file && sync {0}/file && cat {0}/file"
    result = user_mount.run("sh", "-c", script.format(user_mount.mountpoint))
    assert result.stdout == "data\n", result.stderr
    status = (user_mount.fast / "tree/file").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (USER, 0o400)
    assert user_mount.run(PAFKAFS, "umount", str(user_mount.mountpoint)).returncode == 0
    assert not is_mounted(user_mount.mountpoint)


def test_file_that_becomes_writable_again_can_be_written(user_mount: UserMount) -> None:
    user_mount.start()
    script = (
        "cd {0}; echo one > file; chmod 0400 file; exec 3< file; chmod 0600 file; "
        "echo two >> file; cat <&3"
    )
    result = user_mount.run("sh", "-c", script.format(user_mount.mountpoint))
    assert result.stdout == "one\ntwo\n", result.stderr


def test_new_directories_have_the_mode_and_the_group_that_they_would_have_elsewhere(
    user_mount: UserMount,
) -> None:
    user_mount.start()
    elsewhere = user_mount.fast.parent / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, USER, USER)
    script = "cd {0}; mkdir -m 0555 closed; mkdir shared; mkfifo fifo; ln -s nowhere link"
    for where in (user_mount.mountpoint, elsewhere):
        result = user_mount.run("sh", "-c", script.format(where))
        assert result.returncode == 0, result.stderr
    for where in (user_mount.fast / "tree" / "shared", elsewhere / "shared"):
        os.chown(where, USER, 100)
        os.chmod(where, 0o2777)
    script = "cd {0}/shared; mkdir below; mkfifo fifo; ln -s nowhere link; touch file"
    for where in (user_mount.mountpoint, elsewhere):
        result = user_mount.run("sh", "-c", script.format(where))
        assert result.returncode == 0, result.stderr
    assert attributes(user_mount.fast / "tree") == attributes(elsewhere)


def attributes(top: Path) -> dict[str, tuple[int, int, int]]:
    found = ((path, path.lstat()) for path in top.rglob("*"))
    return {str(p.relative_to(top)): (s.st_mode, s.st_uid, s.st_gid) for p, s in found}


def test_file_spills_without_privilege(user_mount: UserMount) -> None:
    user_mount.start("--fast-capacity", "8MiB")
    script = "head -c 20000000 /dev/urandom | tee {0}/file | sha1sum; sha1sum < {0}/file"
    result = user_mount.run("sh", "-c", script.format(user_mount.mountpoint))
    first, second = result.stdout.split("\n")[:2]
    assert first == second
    assert (user_mount.fast / "tree/file").is_symlink()


def test_status_tells_its_owner_and_not_others(user_mount: UserMount) -> None:
    user_mount.start()
    own = user_mount.run(PAFKAFS, "status", "--json", str(user_mount.mountpoint))
    assert json.loads(own.stdout)["mounts"][0]["state"] == "healthy"
    sockets = list(Path(user_mount.environment["XDG_RUNTIME_DIR"]).rglob("*.sock"))
    assert [path.stat().st_mode & 0o777 for path in sockets] == [0o600]


def test_killed_daemon_of_a_user_is_replaced(user_mount: UserMount) -> None:
    user_mount.start()
    status = user_mount.run(PAFKAFS, "status", "--json", str(user_mount.mountpoint))
    os.kill(json.loads(status.stdout)["mounts"][0]["pid"], 9)
    wait_until(lambda: user_mount.run("ls", str(user_mount.mountpoint)).returncode != 0, "death")
    user_mount.start()
    assert user_mount.run("ls", str(user_mount.mountpoint)).returncode == 0


def test_files_in_a_directory_that_cannot_be_read_are_not_taken_for_garbage(
    user_mount: UserMount,
) -> None:
    def kept() -> list[str]:
        found = [*(user_mount.slow / "objects").rglob("*"), *user_mount.fast.glob("shadows/*")]
        return sorted(path.name for path in found)

    user_mount.start("--mode", "slow")
    script = "cd {0}; mkdir closed; echo one > closed/one; echo two > two"
    assert user_mount.run("sh", "-c", script.format(user_mount.mountpoint)).returncode == 0
    assert user_mount.run(PAFKAFS, "umount", str(user_mount.mountpoint)).returncode == 0
    before = kept()
    (user_mount.fast / "tree/closed").chmod(0)
    user_mount.start(command=(sys.executable, "-c", WITHOUT_CAPABILITIES))
    (problem,) = user_mount.status()["problems"]
    assert "closed (Permission denied)" in problem["problem"]
    assert user_mount.run("cat", f"{user_mount.mountpoint}/two").stdout == "two\n"
    assert user_mount.run(PAFKAFS, "umount", str(user_mount.mountpoint)).returncode == 0
    assert kept() == before
    (user_mount.fast / "tree/closed").chmod(0o755)
    user_mount.start()
    assert user_mount.run("cat", f"{user_mount.mountpoint}/closed/one").stdout == "one\n"
    assert user_mount.status()["state"] == "healthy"


def test_set_of_a_user_is_healthy_for_root_and_repaired_by_the_user(
    user_mount: UserMount,
) -> None:
    devices = str(user_mount.fast), str(user_mount.slow)
    user_mount.start("--mode", "slow")
    assert user_mount.run("sh", "-c", f"echo kept > {user_mount.mountpoint}/file").returncode == 0
    mounted = run_pafkafs("check", *devices)
    assert (mounted.returncode, mounted.stderr) == (0, ""), mounted.stdout
    assert user_mount.run(PAFKAFS, "umount", str(user_mount.mountpoint)).returncode == 0
    assert run_pafkafs("check", *devices).stdout.rstrip().endswith("clean")
    (user_mount.slow / "lost").rmdir()
    repaired = user_mount.run(PAFKAFS, "check", "--repair", *devices)
    assert "1 problems, 1 repaired" in repaired.stdout
    user_mount.start()
    assert user_mount.run("cat", f"{user_mount.mountpoint}/file").stdout == "kept\n"


def test_who_has_no_control_socket_of_a_live_mount_is_told_so_and_unmounts_it_only_when_idle(
    user_mount: UserMount,
) -> None:
    where = str(user_mount.mountpoint)
    user_mount.start()
    (asked_by_root,) = json.loads(run_pafkafs("status", "--json", where).stdout)["mounts"]
    user_mount.environment["XDG_RUNTIME_DIR"] += "/elsewhere"
    for status in (asked_by_root, user_mount.status()):
        assert status["state"] == "unknown"
        assert "alive" in status["problems"][0]["problem"]
    script = f"exec 3> {where}/file; {PAFKAFS} umount {where}; code=$?; echo kept >&3; exit $code"
    refused = user_mount.run("sh", "-c", script)
    assert refused.returncode == 1, refused.stderr
    assert "stop what has files open there" in refused.stderr
    assert is_mounted(user_mount.mountpoint)
    idle = user_mount.run(PAFKAFS, "umount", where)
    assert idle.returncode == 0, idle.stderr
    assert not is_mounted(user_mount.mountpoint)
    assert (user_mount.fast / "tree/file").read_text() == "kept\n"


def test_runtime_directory_that_is_not_there_is_made(user_mount: UserMount) -> None:
    user_mount.environment["XDG_RUNTIME_DIR"] += "/not/there"
    user_mount.start()
    assert user_mount.status()["state"] == "healthy"


def test_adopting_a_log_directory_of_another_user_is_refused_in_one_line(
    user_mount: UserMount,
) -> None:
    log_dir = user_mount.fast.with_name("kafka-logs")
    log_dir.mkdir()
    (log_dir / "meta.properties").touch()
    devices = (str(user_mount.fast), str(user_mount.slow))
    result = user_mount.run(PAFKAFS, "adopt", str(log_dir), *devices)
    assert result.returncode == 1
    assert result.stderr.startswith("pafkafs: ")
    assert result.stderr.count("\n") == 1
    assert "owner or root" in result.stderr
    assert (os.listdir(user_mount.fast), os.listdir(log_dir)) == ([], ["meta.properties"])
