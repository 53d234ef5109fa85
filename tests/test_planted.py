"""What another local user could plant on a device, or above a mountpoint, if it may write there,
is not followed."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import opened
from harness import GROWING, Mount, is_dead_mount, is_mounted, run_pafkafs, wait_until

from pafkafs import _native, layout, mountpoint
from pafkafs.errors import PafkafsError

SECRET = b"somebody else's file"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def untouched(victim: Path) -> bool:
    return victim.read_bytes() == SECRET and victim.stat().st_mode & 0o777 == 0o600


def demoted(mount: Mount) -> Path:
    """A file of a mount whose files start on the slow tier."""
    directory = mount.mountpoint / "topic-0"
    directory.mkdir()
    path = directory / f"{0:020}.log"
    path.write_bytes(b"record" * 100)
    return path


def try_everything(path: Path) -> bytes:
    """Changes a file in every way, as far as that goes; what could be read of it."""
    found = b""
    acts = (
        lambda: path.chmod(0o777),
        lambda: os.chown(path, 1234, 1234),
        lambda: os.utime(path, (1, 1)),
        lambda: os.truncate(path, 3),
    )
    for act in acts:
        with suppress(OSError):
            act()
    with suppress(OSError), opened(path, os.O_RDWR | os.O_APPEND) as fd:
        found = os.pread(fd, 1000, 0)
        os.write(fd, b"more")
        os.fsync(fd)
    with suppress(OSError):
        path.unlink()
    return found


@pytest.mark.parametrize("kind", ["shadow", "directory"])
def test_symlink_in_the_place_of_a_shadow_is_not_followed(
    make_mount: MakeMount, victim: Path, kind: str
) -> None:
    mount = make_mount("--mode", "slow").start()
    path = demoted(mount)
    mount.stop()
    (shadow,) = (mount.fast / "shadows").iterdir()
    shadow.unlink()
    shadow.symlink_to(victim)
    if kind == "shadow":
        mount.start()
        found = try_everything(path)
    else:
        shadows = mount.fast / "shadows"
        shadows.rename(mount.fast / "elsewhere")
        shadows.symlink_to(mount.fast / "elsewhere")
        result = mount.mount()
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        found = b""
    assert untouched(victim)
    assert SECRET not in found


def test_symlink_in_the_place_of_an_object_or_its_directory_is_not_followed(
    make_mount: MakeMount, victim: Path
) -> None:
    mount = make_mount("--mode", "slow").start()
    path = demoted(mount)
    mount.stop()
    (held,) = mount.objects
    held.unlink()
    held.symlink_to(victim)
    mount.start()
    assert SECRET not in try_everything(path)
    mount.stop()
    assert untouched(victim)
    directory = mount.slow / "objects" / "topic-0"
    elsewhere = victim.parent / "elsewhere"
    elsewhere.mkdir()
    if directory.exists():
        for entry in directory.iterdir():
            entry.unlink()
        directory.rmdir()
    directory.symlink_to(elsewhere)
    mount.start()
    with suppress(OSError):
        (path.parent / f"{1:020}.log").write_bytes(b"new")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["pafkafs.json", "sizes"])
def test_symlink_in_the_place_of_an_own_file_fails_the_mount_with_one_line(
    make_mount: MakeMount, victim: Path, name: str
) -> None:
    mount = make_mount(*GROWING).start()
    mount.stop()
    (mount.fast / name).unlink()
    (mount.fast / name).symlink_to(victim)
    result = mount.mount()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert name in result.stderr
    assert untouched(victim)


@pytest.mark.parametrize("name", ["tree", "shadows", "objects", "tmp", "lost"])
def test_symlink_in_the_place_of_an_own_directory_fails_the_mount_with_one_line(
    make_mount: MakeMount, tmp_path: Path, name: str
) -> None:
    mount = make_mount().start()
    mount.stop()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = mount.slow / name if name == "objects" else mount.fast / name
    own.rename(own.with_name("was"))
    own.symlink_to(elsewhere)
    result = mount.mount()
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{name} there is a file or a symlink" in result.stderr
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["tree", "objects"])
def test_symlink_that_takes_the_name_of_an_own_directory_as_it_is_made_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def mkdir(made: str, mode: int, *, dir_fd: int) -> None:
        really_mkdir(made, mode, dir_fd=dir_fd)
        os.rmdir(made, dir_fd=dir_fd)
        os.symlink(victim, made, dir_fd=dir_fd)

    device, victim = tmp_path / "device", tmp_path / "victim"
    for directory in (device, victim):
        directory.mkdir(mode=0o700)
    really_mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", mkdir)
    with opened(device, os.O_RDONLY) as fd, pytest.raises(NotADirectoryError):
        layout.open_state_directory(fd, name)
    assert victim.stat().st_mode & 0o777 == 0o700


def test_symlinks_among_what_is_to_be_removed_go_and_what_they_lead_to_stays(
    make_mount: MakeMount, victim: Path
) -> None:
    """In tmp/, which is emptied at mount; and as an object without a name, put aside to lost/."""
    mount = make_mount("--mode", "slow").start()
    demoted(mount)
    mount.stop()
    directory = victim.parent / "directory"
    directory.mkdir()
    (directory / "file").write_bytes(SECRET)
    for number, target in enumerate((victim, directory)):
        (mount.fast / "tmp" / f"planted{number}").symlink_to(target)
        (mount.slow / "objects" / f"planted{number}").symlink_to(target)
    mount.start()
    wait_until(lambda: list((mount.fast / "tmp").iterdir()) == [], "tmp/ to be emptied")
    lost = mount.slow / "lost"
    wait_until(lambda: len(list(lost.iterdir())) == 2, "them to be put aside")
    assert all(path.is_symlink() for path in lost.iterdir())
    mount.stop()
    assert untouched(victim)
    assert (directory / "file").read_bytes() == SECRET


def test_own_directories_are_closed_to_others(make_mount: MakeMount) -> None:
    mount = make_mount("--mode", "slow").start()
    demoted(mount)
    for device in (mount.fast, mount.slow):
        for directory in device.iterdir():
            if directory.is_dir() and directory.name not in ("tree", "objects"):
                assert directory.stat().st_mode & 0o077 == 0, directory
            assert directory.stat().st_mode & 0o022 == 0, directory


def planted_log_dir(mount: Mount) -> Path:
    """A log directory of another user that is the fast device, so that he may plant there."""
    (mount.fast / "meta.properties").write_bytes(b"version=1")
    os.chown(mount.fast, 12345, 12345)
    mount.fast.chmod(0o750)
    return mount.fast


def assert_adoption_is_refused(mount: Mount, word: str) -> None:
    before = sorted(os.listdir(mount.fast))
    result = run_pafkafs("adopt", str(mount.fast), str(mount.fast), str(mount.slow))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{mount.fast}/{word}" in result.stderr
    assert sorted(os.listdir(mount.fast)) == before
    assert os.listdir(mount.slow) == []


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_adoption_follows_no_symlink_in_the_place_of_the_home_tree(
    make_mount: MakeMount, victim: Path, kind: str
) -> None:
    mount = make_mount()
    fast = planted_log_dir(mount)
    elsewhere = fast.with_name("elsewhere")  # on the same filesystem: entries could go there
    elsewhere.mkdir(mode=0o700)
    (fast / "tree").symlink_to(elsewhere if kind == "directory" else victim)
    assert_adoption_is_refused(mount, "tree")
    status = elsewhere.stat()
    assert (status.st_uid, status.st_mode & 0o777, os.listdir(elsewhere)) == (0, 0o700, [])
    assert untouched(victim)


@pytest.mark.parametrize("kind", ["new", "victim", "directory"])
def test_adoption_takes_nothing_but_a_file_for_its_mark(
    make_mount: MakeMount, victim: Path, kind: str
) -> None:
    mount = make_mount()
    mark = planted_log_dir(mount) / ".pafkafs-adopting"
    new = victim.with_name("new")
    if kind == "directory":
        mark.mkdir()
    else:
        mark.symlink_to(victim if kind == "victim" else new)
    assert_adoption_is_refused(mount, ".pafkafs-adopting")
    assert not new.exists()
    assert untouched(victim)


def test_directory_that_is_replaced_while_it_is_made_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a symlink, between the call that makes it and those that set its mode and open it."""
    device, elsewhere = tmp_path / "device", tmp_path / "elsewhere"
    device.mkdir()
    elsewhere.mkdir(mode=0o700)
    make = os.mkdir

    def replaced(name: str, mode: int, *, dir_fd: int) -> None:
        make(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink(elsewhere, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", replaced)
    with opened(device, os.O_RDONLY) as fd, pytest.raises(NotADirectoryError):
        layout.open_state_directory(fd, "tree")
    assert elsewhere.stat().st_mode & 0o777 == 0o700


# -- mountpoints --------------------------------------------------------------------------------


@dataclass
class Swapped:
    """A mountpoint, and an empty directory of somebody else, which has the same name."""

    where: Path
    victim: Path
    above: bool

    def swap(self) -> None:
        """A symlink that leads to the victim, in the place of the mountpoint or of what is above
        it."""
        place, target = self.where, self.victim
        if self.above:
            place, target = place.parent, target.parent
        place.rename(place.with_name("was"))
        place.symlink_to(target)

    @property
    def was(self) -> Path:
        """Where the mountpoint itself is after that."""
        if self.above:
            return self.where.parent.with_name("was") / self.where.name
        return self.where.with_name("was")


@pytest.fixture(params=["mountpoint", "above"])
def swapped(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Swapped]:
    found = Swapped(tmp_path / "user/mnt", tmp_path / "root/mnt", request.param == "above")
    for directory in (found.where, found.victim):
        directory.mkdir(parents=True)
    yield found
    for path in (found.victim, found.was, found.where):
        while is_mounted(path):
            subprocess.run(["umount", "-l", str(path)], check=True)


def test_mountpoint_that_is_swapped_after_its_check_is_refused(swapped: Swapped) -> None:
    mountpoint.check(str(swapped.where), ())
    swapped.swap()
    with pytest.raises(PafkafsError, match=r"^cannot mount: "):
        os.close(mountpoint.attach("source", str(swapped.where)))
    assert not is_mounted(swapped.victim)
    assert not is_mounted(swapped.was)


def test_mountpoint_that_is_swapped_at_the_last_moment_is_mounted_where_it_was_checked(
    swapped: Swapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mount(*arguments: bytes) -> None:
        swapped.swap()
        really_mount(*arguments)

    really_mount = _native.mount
    monkeypatch.setattr(_native, "mount", mount)
    os.close(mountpoint.attach("source", str(swapped.where)))
    assert not is_mounted(swapped.victim)
    assert is_mounted(swapped.was)


def test_mountpoint_that_was_filled_after_its_check_is_refused(swapped: Swapped) -> None:
    mountpoint.check(str(swapped.where), ())
    (swapped.where / "file").touch()
    with pytest.raises(PafkafsError, match="not empty"):
        os.close(mountpoint.attach("source", str(swapped.where)))
    assert not is_mounted(swapped.where)


@pytest.mark.parametrize("swapped", ["above"], indirect=True)
def test_of_a_dead_mount_that_is_swapped_nothing_else_is_detached(
    swapped: Swapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dead(path: str) -> bool:
        found = really_is_dead(path)
        swapped.swap()
        return found

    for path in (swapped.where, swapped.victim):
        os.close(mountpoint.attach("source", str(path)))
        assert is_dead_mount(path)
    really_is_dead = mountpoint.is_dead
    monkeypatch.setattr(mountpoint, "is_dead", is_dead)
    with pytest.raises(PafkafsError, match=r"^cannot mount: "):
        os.close(mountpoint.attach("source", str(swapped.where)))
    assert is_mounted(swapped.victim)
