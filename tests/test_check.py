"""`pafkafs check`: each kind of damage, planted on devices that a real mount has left."""

import json
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from faults import Action, Faults
from filetools import MIB, Background
from harness import GROWING, PAFKAFS, Mount, fast_memory, run_pafkafs, tree_contents, wait_until

from pafkafs import control

STILL = ("--threshold", "-1")
FOREIGN_ID = "0123456789abcdef"


@dataclass
class Set:
    """A fast and two slow devices with demoted segments on both of them, unmounted."""

    mount: Mount
    slow: list[Path]
    contents: dict[str, tuple[str, bytes]]

    @property
    def stubs(self) -> list[Path]:
        return sorted(path for path in self.mount.tree.rglob("*") if path.is_symlink())

    def check(self, *options: str) -> tuple[int, dict[str, Any]]:
        result = run_pafkafs("check", "--json", *options, *self.devices)
        assert result.stderr == ""
        return result.returncode, json.loads(result.stdout)

    @property
    def devices(self) -> tuple[str, str]:
        return str(self.mount.fast), ",".join(map(str, self.slow))

    def kinds(self, *options: str) -> list[str]:
        return sorted(found["kind"] for found in self.check(*options)[1]["findings"])

    def shown(self) -> dict[str, tuple[str, bytes]]:
        """What a mount serves."""
        self.mount.start()
        found = tree_contents(self.mount.mountpoint)
        self.mount.stop()
        return found

    def listing(self) -> dict[str, tuple[int, ...]]:
        """All that is on the devices, as stat has it."""
        found = {}
        for top in (self.mount.fast, *self.slow):
            for path in (top, *top.rglob("*")):
                s = path.lstat()
                times = (s.st_mtime_ns, s.st_ctime_ns)
                # Reading a symlink sets its access time, and nothing can be done about it.
                atime = 0 if path.is_symlink() else s.st_atime_ns
                found[str(path)] = (s.st_mode, s.st_uid, s.st_ino, s.st_size, *times, atime)
        return found


def write_segments(mount: Mount, topic: str, count: int) -> list[Path]:
    directory = mount.mountpoint / topic
    directory.mkdir()
    (directory / "00000000000000000000.index").write_bytes(os.urandom(100))
    paths = [directory / f"{offset * 1000:020}.log" for offset in range(count)]
    for path in paths:
        path.write_bytes(os.urandom(MIB // 8 + random.randrange(1000)))
    return paths


def migrate(mount: Mount, tier: str, *paths: Path) -> None:
    result = run_pafkafs("migrate", "--wait", "--to", tier, *map(str, paths))
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Set, Path]]:
    """Made once, with a copy to start each test from."""
    top = tmp_path_factory.mktemp("check")
    with fast_memory(top / "memory", "256m") as memory:
        fast, slow = memory / "fast", [top / "slow0", top / "slow1"]
        mountpoint, copy = top / "mnt" / "kafka-logs", top / "copy"
        for directory in (fast, *slow, mountpoint, copy):
            directory.mkdir(parents=True)
        mount = Mount(fast, slow[0], mountpoint, STILL, top / "pafkafs.log")
        mount.slow_list = ",".join(map(str, slow))
        try:
            mount.start()
            for topic in ("orders-0", "orders-1"):
                migrate(mount, "slow", *write_segments(mount, topic, 5)[:4])
            contents = tree_contents(mountpoint)
            mount.stop()
            for device in (fast, *slow):
                subprocess.run(["cp", "-a", str(device), str(copy)], check=True)
            yield Set(mount, slow, contents), copy
        finally:
            mount.clean_up()


def restore(made: Set, copy: Path) -> Set:
    """The set as it was made."""
    for device in (made.mount.fast, *made.slow):
        for entry in device.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        subprocess.run(["cp", "-a", f"{copy / device.name}/.", str(device)], check=True)
    return Set(made.mount, made.slow, dict(made.contents))


@pytest.fixture
def found(pristine: tuple[Set, Path]) -> Iterator[Set]:
    made, copy = pristine
    try:
        yield restore(made, copy)
    finally:
        made.mount.clean_up()
        assert "Traceback" not in made.mount.log_text(), made.mount.log_text()


def test_clean_set_is_clean_and_nothing_at_all_is_changed(found: Set) -> None:
    assert len(found.stubs) == 8
    before = found.listing()
    status, report = found.check("--deep")
    assert (status, report["findings"], report["mounted"]) == (0, [], False)
    assert report["totals"]["files"] == 12
    assert report["totals"]["objects"] == 8
    assert report["totals"]["bytes"] == sum(len(data) for _, data in found.contents.values())
    assert found.listing() == before
    assert found.check("--repair")[0] == 0
    assert found.listing() == before


# -- damage that can be mended ----------------------------------------------------------------


def object_of(stub: Path) -> Path:
    return stub.readlink()


def shadow_of(found: Set, stub: Path) -> Path:
    return found.mount.fast / "shadows" / object_of(stub).name[-16:]


def remove_shadow(found: Set) -> None:
    shadow_of(found, found.stubs[0]).unlink()


def plant_shadow(found: Set) -> None:
    (found.mount.fast / "shadows" / FOREIGN_ID).touch()


def plant_object(found: Set) -> None:
    name = object_of(found.stubs[0]).name[:-16] + FOREIGN_ID
    (found.slow[1] / "objects" / "gone-7").mkdir()
    (found.slow[1] / "objects" / "gone-7" / name).write_bytes(b"records")


def move_object(found: Set) -> None:
    object_ = object_of(found.stubs[0])
    (object_.parent.parent / "elsewhere").mkdir(mode=0o711)
    object_.rename(object_.parent.parent / "elsewhere" / object_.name)


def move_object_to_another_device(found: Set) -> None:
    stub = found.stubs[0]
    object_ = object_of(stub)
    other = next(device for device in found.slow if not object_.is_relative_to(device))
    (other / "objects/orders-0").mkdir(exist_ok=True, mode=0o711)
    shutil.move(object_, other / "objects/orders-0" / object_.name)


def lose_object_and_shadow_places(found: Set) -> None:
    move_object(found)
    shadow_of(found, found.stubs[0]).unlink()


def point_stub_outside(found: Set) -> None:
    stub = found.stubs[0]
    text = str(stub.readlink())
    stub.unlink()
    stub.symlink_to(text.replace(str(found.mount.fast.parent.parent), "/nowhere"))


def share_object(found: Set) -> None:
    stub = found.stubs[0]
    (stub.parent / "00000000000000009999.log").symlink_to(stub.readlink())
    found.contents["orders-0/00000000000000009999.log"] = found.contents[
        str(stub.relative_to(found.mount.tree))
    ]


def append_to_object(found: Set) -> None:
    stub = found.stubs[0]
    with stub.open("ab") as file:
        file.write(b"more")
    name = str(stub.relative_to(found.mount.tree))
    found.contents[name] = ("file", found.contents[name][1] + b"more")


def change_mode(found: Set) -> None:
    object_of(found.stubs[0]).chmod(0o600)


def change_owner(found: Set) -> None:
    os.chown(object_of(found.stubs[0]), 1234, 1234)


def change_mtime(found: Set) -> None:
    os.utime(object_of(found.stubs[0]), ns=(10**18, 10**18))


def open_state_directory(found: Set) -> None:
    (found.slow[1] / "objects").chmod(0o777)


def remove_state_directory(found: Set) -> None:
    (found.slow[0] / "lost").rmdir()


def leave_stub_in_tmp(found: Set) -> None:
    (found.mount.fast / "tmp" / FOREIGN_ID).symlink_to("/x/objects/y")


def leave_record(found: Set) -> None:
    (found.slow[0] / ".pafkafs.json.0123abcd").write_text("half")


MENDABLE: dict[Callable[[Set], None], str] = {
    remove_shadow: "shadow-missing",
    plant_shadow: "shadow-without-stub",
    plant_object: "object-without-stub",
    move_object: "object-elsewhere",
    move_object_to_another_device: "object-elsewhere",
    lose_object_and_shadow_places: "object-elsewhere",
    share_object: "object-shared",
    append_to_object: "attributes-differ",
    change_mode: "attributes-differ",
    change_owner: "attributes-differ",
    change_mtime: "attributes-differ",
    open_state_directory: "state-directory",
    remove_state_directory: "state-directory",
    leave_stub_in_tmp: "leftover",
    leave_record: "leftover",
}


@pytest.mark.parametrize("damage", MENDABLE, ids=lambda damage: damage.__name__)
def test_damage_is_seen_alone_mended_and_gone(found: Set, damage: Callable[[Set], None]) -> None:
    damage(found)
    before = found.listing()
    status, report = found.check()
    assert [each["kind"] for each in report["findings"]] == [MENDABLE[damage]]
    assert status == 1
    assert report["findings"][0]["repair"]
    assert found.listing() == before
    status, report = found.check("--repair")
    assert (status, report["totals"]["repaired"], report["totals"]["left"]) == (0, 1, 0)
    assert found.kinds() == []
    assert found.shown() == found.contents


def test_metadata_of_the_object_follow_the_shadow_and_its_size_and_times_are_right(
    found: Set,
) -> None:
    object_ = object_of(found.stubs[0])
    shadow_of(found, found.stubs[0]).chmod(0o604)
    append_to_object(found)
    os.utime(object_, ns=(10**18, 10**18 + 5))
    assert found.check("--repair")[0] == 0
    for path in (object_, shadow_of(found, found.stubs[0])):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o604, 10**18 + 5)
        assert status.st_size == len(found.contents["orders-0/00000000000000000000.log"][1])


def test_garbage_goes_to_lost_with_a_name_that_says_where_it_was(found: Set) -> None:
    plant_object(found)
    assert found.check("--repair")[0] == 0
    (aside,) = (found.slow[1] / "lost").iterdir()
    assert aside.name.startswith("gone-7,00000000000000000000.log~")
    assert aside.read_bytes() == b"records"


def test_removed_stub_leaves_an_object_and_a_shadow_and_none_is_deleted(found: Set) -> None:
    stub = found.stubs[0]
    content = stub.read_bytes()
    stub.unlink()
    assert found.kinds() == ["object-without-stub", "shadow-without-stub"]
    assert found.check("--repair")[0] == 0
    lost = [path for device in found.slow for path in (device / "lost").iterdir()]
    assert [path.read_bytes() for path in lost] == [content]
    assert len(list((found.mount.fast / "lost").iterdir())) == 1


def test_names_in_lost_are_never_replaced(found: Set) -> None:
    plant_object(found)
    planted = next((found.slow[1] / "objects/gone-7").iterdir())
    (found.slow[1] / "lost" / f"gone-7,{planted.name}").write_bytes(b"older")
    assert found.check("--repair")[0] == 0
    kept = sorted(path.read_bytes() for path in (found.slow[1] / "lost").iterdir())
    assert kept == [b"older", b"records"]


def damage_all(found: Set) -> None:
    """A bit of all that can be mended."""
    remove_shadow(found)
    object_of(found.stubs[1]).chmod(0o600)
    object_ = object_of(found.stubs[2])
    object_.rename(object_.parent.parent / object_.name)
    for damage in (plant_shadow, plant_object, open_state_directory, leave_stub_in_tmp):
        damage(found)
    share_object(found)
    stub = found.stubs[-1]
    object_ = object_of(stub)
    other = next(device for device in found.slow if not object_.is_relative_to(device))
    (other / "objects/orders-1").mkdir(exist_ok=True, mode=0o711)
    shutil.move(object_, other / "objects/orders-1" / object_.name)


def test_all_damage_at_once_is_mended_in_one_run(found: Set) -> None:
    damage_all(found)
    assert found.check("--repair")[0] == 0
    assert found.check()[0] == 0
    assert found.shown() == found.contents


@pytest.mark.parametrize("sample", [6, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_repair_that_was_killed_at_any_call_is_finished_by_the_next_one(
    pristine: tuple[Set, Path], tmp_path: Path, sample: int
) -> None:
    made, copy = pristine
    faults = Faults(tmp_path)

    def repair_and_die(which: int) -> int:
        with faults.daemon():
            faults.arm(made.mount.fast.parents[1], Action.DIE if which else Action.COUNT, which)
            run_pafkafs("check", "--repair", *made.devices)
            return faults.disarm()

    damage_all(restore(made, copy))
    count = repair_and_die(0)
    assert count > 100
    for which in sorted(random.Random(count).sample(range(1, count + 1), min(sample, count))):
        found = restore(made, copy)
        damage_all(found)
        repair_and_die(which)
        assert faults.hit is not None
        assert found.check("--repair")[0] == 0, faults.hit
        assert found.kinds() == [], faults.hit
        assert tree_contents(made.mount.tree) == found.contents, faults.hit
        (aside,) = (found.slow[1] / "lost").glob("gone-7,*")
        assert aside.read_bytes() == b"records"


# -- damage that cannot -------------------------------------------------------------------------


def test_missing_object_is_told_and_its_stub_is_left(found: Set) -> None:
    object_of(found.stubs[0]).unlink()
    for options in ((), ("--repair",), ()):
        before = found.listing()
        status, report = found.check(*options)
        (finding,) = report["findings"]
        assert status == 1
        assert finding["kind"] == "object-missing"
        assert "rescue" in finding["advice"]
        assert finding["repair"] is None
        assert found.listing() == before


def test_stub_that_leads_outside_is_told_and_not_followed(found: Set, tmp_path: Path) -> None:
    stub = found.stubs[0]
    secret = tmp_path / "secret" / "objects"
    secret.mkdir(parents=True)
    (secret / stub.readlink().name).write_bytes(b"secret")
    object_of(stub).unlink()
    text = secret / stub.readlink().name
    stub.unlink()
    stub.symlink_to(text)
    before = found.listing()
    assert found.kinds() == ["stub-refused"]
    assert found.check("--repair")[0] == 1
    assert found.listing() == before
    assert (secret / text.name).read_bytes() == b"secret"


def test_refused_stub_is_pointed_at_its_object_when_that_is_there(found: Set) -> None:
    point_stub_outside(found)
    assert found.kinds() == ["object-elsewhere"]
    assert found.check("--repair")[0] == 0
    assert found.check()[0] == 0
    assert found.shown() == found.contents


def test_symlinks_that_were_planted_are_not_followed(found: Set, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    object_ = object_of(found.stubs[0])
    object_.rename(outside / object_.name)
    object_.symlink_to(outside / object_.name)
    (found.slow[1] / "objects" / "planted").symlink_to(outside)
    (found.mount.fast / "notes.txt").write_text("mine")
    before = found.listing()
    inside = (outside / object_.name).stat()
    expected = ["not-a-file", "unknown-entry", "unknown-entry", "unknown-entry"]
    assert found.kinds() == expected
    assert found.kinds("--repair", "--deep") == expected
    assert found.listing() == before
    assert (outside / object_.name).stat().st_atime_ns == inside.st_atime_ns


@pytest.mark.parametrize("area", ["shadows", "tmp", "objects", "lost"])
def test_directory_of_somebody_else_in_the_place_of_an_own_one_is_told_and_left(
    found: Set, area: str
) -> None:
    device = found.mount.fast if area in ("shadows", "tmp") else found.slow[1]
    os.chown(device / area, 1234, 1234)
    before = found.listing()
    for options in ((), ("--repair",)):
        status, report = found.check(*options)
        (finding,) = report["findings"]
        assert (status, finding["kind"], finding["repair"]) == (1, "state-directory", None)
        assert finding["what"] == "belongs to uid 1234, not 0"
        assert "move it away" in finding["advice"]
        assert found.listing() == before


def test_nothing_is_moved_to_a_directory_of_somebody_else(found: Set) -> None:
    plant_object(found)
    os.chown(found.slow[1] / "lost", 1234, 1234)
    before = found.listing()
    assert found.kinds("--repair") == ["object-without-stub", "state-directory"]
    assert found.listing() == before


def test_set_of_a_user_is_looked_at_by_root_and_repaired_by_that_user(found: Set) -> None:
    for top in (found.mount.fast, *found.slow):
        for path in (top, *top.rglob("*")):
            os.chown(path, 1234, 1235, follow_symlinks=False)
    status, report = found.check()
    assert (status, report["findings"]) == (0, [])
    remove_state_directory(found)
    before = found.listing()
    result = run_pafkafs("check", "--repair", *found.devices)
    assert result.returncode == 1
    assert result.stderr.endswith("is of a set of uid 1234: only that user may --repair it\n")
    assert found.listing() == before


def test_missing_home_tree_is_no_problem_that_a_repair_mends(found: Set) -> None:
    shutil.rmtree(found.mount.tree)
    for _ in range(2):
        status, report = found.check("--repair")
        assert status == 1
        assert any("pafkafs rescue" in str(each["advice"]) for each in report["findings"])
        assert not found.mount.tree.exists()
    assert all(not list((device / "lost").iterdir()) for device in (found.mount.fast, *found.slow))


def test_empty_home_tree_makes_no_object_garbage(found: Set) -> None:
    shutil.rmtree(found.mount.tree)
    found.mount.tree.mkdir()
    before = found.listing()
    status, report = found.check("--repair")
    assert status == 1
    assert {each["repair"] for each in report["findings"]} == {None}
    assert found.listing() == before


def test_of_several_objects_with_one_id_the_whole_one_is_taken_and_none_is_garbage(
    found: Set,
) -> None:
    object_ = object_of(found.stubs[0])
    whole = object_.parent.parent / "a" / object_.name
    cut = object_.parent.parent / "0" / object_.name
    for other in (whole, cut):
        other.parent.mkdir()
    shutil.copy2(object_, whole)
    object_.rename(cut)
    os.truncate(cut, 7)
    found.check("--repair")
    assert found.stubs[0].readlink() == whole
    assert cut.exists()
    assert found.shown() == found.contents


def test_repair_with_a_device_at_another_path_is_refused(found: Set, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(found.slow[1], elsewhere, symlinks=True)
    devices = str(found.mount.fast), f"{found.slow[0]},{elsewhere}"
    result = run_pafkafs("check", "--repair", *devices)
    assert result.returncode == 1
    assert "--repair needs the devices where they were" in result.stderr


def test_too_many_without_a_stub_are_left_where_they_are(found: Set) -> None:
    for number in range(65):
        name = f"00000000000000000000.log~00000000.{number:016x}"
        (found.slow[0] / "objects" / name).touch()
        (found.mount.fast / "shadows" / f"{number:016x}").touch()
    before = found.listing()
    status, report = found.check("--repair")
    assert status == 1
    assert {each["kind"]: each["repair"] for each in report["findings"]} == {
        "object-without-stub": None,
        "shadow-without-stub": None,
    }
    assert len(report["findings"]) == 130
    assert found.listing() == before


def test_bytes_that_cannot_be_read_are_found_by_reading_all(found: Set, tmp_path: Path) -> None:
    object_ = object_of(found.stubs[0])
    inject = "inject=preadv,preadv2:error=EIO:when=1..3"  # of the whole step, then of two blocks
    tracer = ["strace", "-f", "-o", str(tmp_path / "trace"), "-P", str(object_), "-e", inject]
    command = [*tracer, PAFKAFS, "check", "--deep", *found.devices]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    first, last = result.stdout.splitlines()
    assert first.startswith(f"{object_}: 8.0 KiB from byte 0 on cannot be read: Input/output error")
    assert last.endswith("1 problems, 0 repaired, 1 left")
    assert result.returncode == 1


def test_reading_all_leaves_nothing_in_the_page_cache(found: Set) -> None:
    object_ = object_of(found.stubs[0])
    subprocess.run(["sync", "-f", str(object_)], check=True)
    with object_.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(object_):
        pytest.fail("the slow device keeps pages, as tmpfs does: give the tests a disk")
    assert found.check("--deep")[0] == 0
    assert cached_bytes(object_) == 0
    object_.read_bytes()
    assert cached_bytes(object_) > 0


def cached_bytes(path: Path) -> int:
    result = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


# -- growing files ------------------------------------------------------------------------------


@pytest.fixture
def killed(make_mount: MakeMount) -> Set:
    """A mount that was killed while two segments were growing."""
    mount = make_mount(*STILL, *GROWING).start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    wait_until(lambda: mount.status()["pool"]["files"] > 2, "the pool")
    files = [(directory / f"{n:020}.log").open("wb", buffering=0) for n in range(2)]
    for number, file in enumerate(files):
        file.write(b"%d" % number * 5000)
    mount.kill()
    for file in files:
        with suppress(OSError):
            file.close()
    contents = {
        "orders-0": ("directory", b""),
        f"orders-0/{0:020}.log": ("file", b"0" * 5000),
        f"orders-0/{1:020}.log": ("file", b"1" * 5000),
    }
    run_pafkafs("umount", "--lazy", str(mount.mountpoint))
    return Set(mount, [mount.slow], contents)


def test_files_that_were_growing_are_told_and_brought_to_their_sizes(killed: Set) -> None:
    before = killed.listing()
    kinds = killed.kinds()
    assert "slot-of-file" in kinds
    assert set(kinds) <= {"slot-of-file", "slots-without-file"}
    assert killed.listing() == before
    assert killed.check("--repair")[0] == 0
    assert tree_contents(killed.mount.tree) == killed.contents
    assert killed.kinds() == []
    assert killed.shown() == killed.contents


def test_file_of_a_copied_device_keeps_its_nonce_and_is_told_its_length(killed: Set) -> None:
    path = next(p for p in killed.mount.tree.rglob("*.log") if is_growing(p))
    nonce = os.getxattr(path, "user.pafkafs.nonce")
    other = path.with_name("copy")
    shutil.copyfile(path, other)
    path.unlink()  # the copy has another inode number
    os.setxattr(other, "user.pafkafs.nonce", nonce)
    other.rename(path)
    slots = (killed.mount.fast / "sizes").read_bytes()
    status, told = killed.check("--repair")
    assert status == 1
    assert "the device was copied while it grew" in str(told["findings"])
    assert (killed.mount.fast / "sizes").read_bytes() == slots
    assert os.getxattr(path, "user.pafkafs.nonce") == nonce


def is_growing(path: Path) -> bool:
    return path.is_file() and "user.pafkafs.nonce" in os.listxattr(path)


def test_file_with_a_nonce_of_no_slot_loses_it(killed: Set) -> None:
    assert killed.check("--repair")[0] == 0
    path = killed.mount.tree / f"orders-0/{0:020}.log"
    os.setxattr(path, "user.pafkafs.nonce", bytes(7) + b"\1")
    assert killed.kinds() == ["nonce-without-slot"]
    assert killed.check("--repair")[0] == 0
    assert os.listxattr(path) == []
    assert killed.shown() == killed.contents


# -- usage and mounts -----------------------------------------------------------------------------


def test_text_says_what_is_wrong_what_repair_does_and_a_summary(found: Set) -> None:
    remove_shadow(found)
    result = run_pafkafs("check", *found.devices)
    first, last = result.stdout.splitlines()
    assert first == (f"{found.stubs[0]}: its shadow is missing; --repair makes it from the object")
    assert last.endswith("1 problems, 0 repaired, 1 left")
    assert result.returncode == 1


def test_devices_of_no_set_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    result = run_pafkafs("check", str(tmp_path / "fast"), str(tmp_path / "slow"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "was mounted" in result.stderr
    assert list((tmp_path / "fast").iterdir()) == []
    assert run_pafkafs("check", str(tmp_path / "fast")).returncode == 2


def test_repair_is_refused_while_it_is_mounted(found: Set) -> None:
    found.mount.start()
    remove_shadow(found)
    result = run_pafkafs("check", "--repair", *found.devices)
    assert result.returncode == 1
    assert "in use" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not shadow_of(found, found.stubs[0]).exists()


def test_damage_under_a_mount_is_seen_and_left(found: Set) -> None:
    found.mount.start()
    object_of(found.stubs[0]).unlink()
    status, report = found.check()
    assert (status, report["mounted"]) == (1, True)
    assert [each["kind"] for each in report["findings"]] == ["object-missing"]


def test_objects_without_a_stub_from_before_a_mount_are_seen_under_it(found: Set) -> None:
    for number in range(70):
        name = f"00000000000000000000.log~00000000.{number:016x}"
        (found.slow[0] / "objects" / name).touch()
    make_older(found.slow[0] / "objects")
    found.mount.start()
    assert found.kinds() == ["object-without-stub"] * 70


def make_older(directory: Path) -> None:
    """A check lets alone what was changed in the last seconds before a mount."""
    deadline = directory.stat().st_ctime + 3
    wait_until(lambda: time.time() > deadline, "the objects to be old", 30)


def test_removed_file_that_is_still_open_has_no_garbage(found: Set) -> None:
    make_older(found.mount.fast)
    found.mount.start()
    path = found.mount.mountpoint / f"orders-0/{0:020}.log"
    with path.open("rb", buffering=0) as file:
        file.read(1)
        path.unlink()
        status, report = found.check()
        assert (status, report["findings"], report["notes"]) == (0, [], [])
        assert (report["totals"]["files"], report["totals"]["objects"]) == (11, 8)
        file.seek(0)
        assert file.read() == found.contents[f"orders-0/{0:020}.log"][1]


def test_what_was_made_since_the_mount_may_be_waiting_for_its_removal(found: Set) -> None:
    found.mount.start()
    plant_object(found)
    plant_shadow(found)
    assert found.kinds() == []
    found.mount.stop()
    assert found.kinds() == ["object-without-stub", "shadow-without-stub"]


def test_copy_that_takes_its_time_and_stands_still_is_no_garbage(make_mount: MakeMount) -> None:
    mount = make_mount(*STILL, "--migrate-rate", "64KiB").start()
    path = write_segments(mount, "orders-0", 2)[0]
    path.write_bytes(bytes(24 * MIB))
    relative = str(path.relative_to(mount.mountpoint))
    job = control.ask(str(mount.mountpoint), "migrate", path=relative, to="slow")
    wait_until(lambda: mount.objects, "the copy to begin")  # its first piece waits for minutes
    status, report = Set(mount, [mount.slow], {}).check()
    assert control.ask(str(mount.mountpoint), "job", job=job)["state"] == "running"
    assert report["totals"]["objects"] == 1
    assert (status, report["findings"], report["notes"]) == (0, [], [])


@pytest.mark.parametrize("options", [(), GROWING], ids=["plain", "growing"])
def test_check_beside_a_storm_of_moves_reports_nothing(
    make_mount: MakeMount, options: tuple[str, ...]
) -> None:
    mount = make_mount(*STILL, "--migrate-threads", "4", *options).start()
    paths = [path for n in range(3) for path in write_segments(mount, f"storm-{n}", 12)[:-1]]
    migrate(mount, "slow", *paths[::2])
    mount.restart()
    ending, choose = threading.Event(), random.Random(5)

    def storm() -> None:
        while not ending.wait(0.002):
            path, tier = choose.choice(paths), choose.choice(["fast", "slow"])
            relative = str(path.relative_to(mount.mountpoint))
            control.ask(str(mount.mountpoint), "migrate", path=relative, to=tier)
            with choose.choice(paths).open("r+b", buffering=0) as file:
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            choose.choice(paths).chmod(choose.choice([0o600, 0o644]))

    checked = Set(mount, [mount.slow], {})
    background = Background(storm)
    try:
        before = mount.status()["migration"]["files"]
        for _ in range(4):
            status, report = checked.check()
            assert (status, report["findings"], report["notes"]) == (0, [], [])
            assert report["totals"]["files"] >= len(paths)
        assert mount.status()["migration"]["files"] > before + 10
    finally:
        ending.set()
        background.join()
    mount.stop()
    assert checked.kinds() == []
