"""A mount by a user who is not root, through fusermount3.

The user gets CAP_DAC_READ_SEARCH, so that it may read the Python of whoever runs the tests.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PAFKAFS, is_mounted, let_others_search, wait_until

USER = 65534  # nobody: fusermount3 wants a name
AS_USER = [
    "setpriv",
    f"--reuid={USER}",
    f"--regid={USER}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]


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

    def start(self, *options: str) -> None:
        paths = (str(self.fast), str(self.slow), str(self.mountpoint))
        result = self.run(PAFKAFS, "mount", *options, *paths)
        assert result.returncode == 0, result.stderr


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
