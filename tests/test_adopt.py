"""`pafkafs adopt`: an existing Kafka log directory becomes the home tree."""

import fcntl
import os
from pathlib import Path

import pytest
from conftest import MakeMount
from harness import Mount, run_pafkafs, tree_contents


def make_log_dir(path: Path) -> dict[str, tuple[str, bytes]]:
    (path / "orders-0").mkdir(parents=True)
    (path / "orders-0/00000000000000000000.log").write_bytes(b"records")
    (path / "meta.properties").write_bytes(b"version=1")
    (path / ".lock").touch()
    return tree_contents(path)


def adopt(log_dir: Path, mount: Mount) -> None:
    result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 0, result.stderr


def test_log_dir_beside_the_device_is_moved_without_copying(make_mount: MakeMount) -> None:
    mount = make_mount()
    log_dir = mount.fast.parent / "kafka-logs"
    before = make_log_dir(log_dir)
    os.chown(log_dir, 12345, 12345)
    inode = (log_dir / "orders-0/00000000000000000000.log").stat().st_ino
    adopt(log_dir, mount)
    mount.start()
    assert tree_contents(mount.mountpoint) == before
    assert (mount.tree / "orders-0/00000000000000000000.log").stat().st_ino == inode
    assert mount.mountpoint.stat().st_uid == 12345
    assert not log_dir.exists()


def test_log_dir_that_is_the_device_itself_is_adopted_in_place(make_mount: MakeMount) -> None:
    mount = make_mount()
    before = make_log_dir(mount.fast)
    adopt(mount.fast, mount)
    mount.start()
    assert tree_contents(mount.mountpoint) == before


def test_adoption_that_was_cut_goes_on(make_mount: MakeMount) -> None:
    mount = make_mount()
    log_dir = mount.fast / "kafka-logs"
    before = make_log_dir(log_dir)
    adopt(log_dir, mount)
    log_dir.mkdir()
    (mount.tree / "meta.properties").rename(log_dir / "meta.properties")  # as if not moved yet
    adopt(log_dir, mount)
    mount.start()
    assert tree_contents(mount.mountpoint) == before


def test_log_dir_of_a_running_broker_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    log_dir = mount.fast / "kafka-logs"
    before = make_log_dir(log_dir)
    with open(log_dir / ".lock", "r+b") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert "stop it first" in result.stderr
    assert tree_contents(log_dir) == before
    assert not (mount.fast / "pafkafs.json").exists()


def test_log_dir_on_another_filesystem_is_refused(make_mount: MakeMount, tmp_path: Path) -> None:
    mount = make_mount()
    log_dir = tmp_path / "elsewhere"
    before = make_log_dir(log_dir)
    result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert "does not copy" in result.stderr
    assert tree_contents(log_dir) == before


@pytest.mark.parametrize("argument", [0, 1])
def test_missing_directory_is_refused(make_mount: MakeMount, argument: int) -> None:
    mount = make_mount()
    arguments = [str(mount.fast), str(mount.fast), str(mount.slow)]
    arguments[argument] += "/nothing"
    result = run_pafkafs("adopt", *arguments)
    assert result.returncode == 1
    assert "nothing is not a directory" in result.stderr


def test_entry_that_is_in_the_tree_already_is_not_overwritten(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    (mount.mountpoint / "meta.properties").write_bytes(b"mine")
    mount.stop()
    log_dir = mount.fast / "kafka-logs"
    make_log_dir(log_dir)
    result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert "exists already" in result.stderr
    assert (mount.tree / "meta.properties").read_bytes() == b"mine"


def test_adoption_onto_a_set_in_use_is_refused_and_leaves_no_mark(make_mount: MakeMount) -> None:
    mount = make_mount().start()
    log_dir = mount.fast.parent / "kafka-logs"
    before = make_log_dir(log_dir)
    result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert "in use by another pafkafs" in result.stderr
    assert tree_contents(log_dir) == before
    mount.restart()


def test_adoption_with_a_slow_device_that_will_not_do_is_refused_and_changes_nothing(
    make_mount: MakeMount,
) -> None:
    mount = make_mount()
    log_dir = mount.fast.parent / "kafka-logs"
    before = make_log_dir(log_dir)
    (mount.slow / "somebody's").touch()
    result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert "not empty" in result.stderr
    assert (tree_contents(log_dir), os.listdir(mount.fast)) == (before, [])
    (mount.slow / "somebody's").unlink()
    mount.start()


def test_adoption_that_was_cut_stays_marked_when_it_is_refused(make_mount: MakeMount) -> None:
    mount = make_mount()
    log_dir = mount.fast.parent / "kafka-logs"
    make_log_dir(log_dir)
    (mount.fast / ".pafkafs-adopting").touch()
    (mount.slow / "somebody's").touch()
    for _ in range(2):
        result = run_pafkafs("adopt", str(log_dir), str(mount.fast), str(mount.slow))
        assert result.returncode == 1
        assert "half adopted" in mount.mount().stderr
    (mount.slow / "somebody's").unlink()
    adopt(log_dir, mount)
    mount.start()
