"""`pafkafs rescue`: a log directory from what is left, and a true report of what is not."""

import json
import os
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeMount
from harness import GROWING, PAFKAFS, Mount, run_pafkafs, tree_contents, wait_until
from hypothesis import given
from hypothesis import strategies as st

from pafkafs import batches, rescuing
from pafkafs.batches import Extent
from pafkafs.rescuing import Rescue
from pafkafs.salvage import Candidate, Gap, Segment, best, gaps, name_of

STILL = ("--threshold", "-1")
REPORTS = {"pafkafs-rescue.json", "pafkafs-rescue.txt"}


def batch(base: int, records: int, payload: bytes = b"x" * 100, magic: int = 2) -> bytes:
    rest = struct.pack(">ibIhi", 0, magic, 0, 0, records - 1) + bytes(34) + payload
    return struct.pack(">qi", base, len(rest)) + rest


def segment_bytes(base: int, upto: int, step: int = 10) -> bytes:
    return b"".join(batch(at, min(step, upto - at)) for at in range(base, upto, step))


# -- batches ------------------------------------------------------------------------------------


def extent_of(data: bytes, base: int = 0) -> Extent:
    return batches.walk(lambda at: data[at : at + 27], len(data), base)


def test_extent_is_all_of_a_whole_segment() -> None:
    data = segment_bytes(100, 135)
    assert extent_of(data, 100) == Extent(len(data), 135)
    assert extent_of(b"") == Extent(0, None)


def test_messages_of_older_versions_are_counted_by_their_last_offset() -> None:
    data = b"".join(
        struct.pack(">qiIbb", at, 40, 0, magic, 0) + bytes(34) for at, magic in ((3, 0), (7, 1))
    )
    assert extent_of(data, 0) == Extent(len(data), 8)


@given(cut=st.integers(1, 400), junk=st.binary(max_size=200))
def test_torn_end_never_counts(cut: int, junk: bytes) -> None:
    whole = segment_bytes(0, 50)
    found = extent_of(whole + segment_bytes(50, 60)[: cut % 160])
    assert found == Extent(len(whole), 50)
    assert extent_of(whole + bytes(len(junk))) == Extent(len(whole), 50)


@pytest.mark.parametrize(
    "bad",
    [
        batch(40, 10),  # an offset that was there already
        batch(50, 10, magic=3),
        batch(50, 0),
        struct.pack(">qi", 50, -1) + bytes(60),
        struct.pack(">qi", 50, 1 << 30) + batch(50, 10)[12:],
    ],
)
def test_what_is_no_batch_ends_the_segment(bad: bytes) -> None:
    whole = segment_bytes(0, 50)
    assert extent_of(whole + bad + segment_bytes(60, 70)) == Extent(len(whole), 50)


@given(st.binary(max_size=2000))
def test_any_bytes_have_an_extent_within_them(data: bytes) -> None:
    assert 0 <= extent_of(data).whole_bytes <= len(data)


# -- names, choices, gaps -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "rank"),
    [
        ("orders-3/00000000000000000007.log", "orders-3/00000000000000000007.log", 0),
        ("sub/orders-3/00000000000000000007.log", "sub/orders-3/00000000000000000007.log", 0),
        ("orders-3/00000000000000000007.log.cleaned", "orders-3/00000000000000000007.log", 1),
        ("orders-3/00000000000000000007.log.swap", "orders-3/00000000000000000007.log", 1),
        ("orders-3.0a1b-future/00000000000000000007.log", "orders-3/00000000000000000007.log", 2),
        ("orders-3.0a1b-delete/00000000000000000007.log", None, 0),
        ("orders-3.0a1b-stray/00000000000000000007.log", None, 0),
        ("orders-3/00000000000000000007.log.deleted", None, 0),
        ("00000000000000000007.log", None, 0),
        ("orders-3/..", None, 0),
        ("orders-3/.swap", None, 0),
        ("recovery-point-offset-checkpoint", "recovery-point-offset-checkpoint", 0),
    ],
)
def test_name_of_an_object_is_what_kafka_would_call_it_now(
    path: str, name: str | None, rank: int
) -> None:
    found = name_of(path.encode())
    assert found.path == (None if name is None else name.encode())
    assert found.rank == rank
    assert bool(found.note) == (name is None or rank > 0)


def test_best_object_has_batches_its_right_name_is_long_and_then_new() -> None:
    empty = Candidate(0, 0, 100, 9, Extent(0, None))
    short = Candidate(1, 0, 100, 8, Extent(100, 5))
    cleaned = Candidate(2, 1, 200, 9, Extent(200, 50))
    long = Candidate(3, 0, 200, 1, Extent(200, 10))
    newer = Candidate(4, 0, 200, 2, Extent(200, 10))
    order = [empty, cleaned, short, long, newer]
    for count in range(1, len(order) + 1):
        assert best(reversed(order[:count])) is order[count - 1]


@pytest.mark.parametrize(
    ("segments", "lost", "names_known", "expected"),
    [
        ([(0, 10), (10, 20)], [], True, []),
        ([(0, 10), (15, 20)], [], True, []),  # compaction
        ([(0, 10), (20, 30)], [10], True, [(10, 20)]),
        ([(10, 20)], [0], True, [(0, 10)]),
        ([(0, 10)], [10, 20], True, [(10, None)]),
        ([], [5], True, [(5, None)]),
        ([(0, 8, True), (10, 20)], [], True, [(8, 10)]),
        ([(0, 8, True)], [], True, [(8, None)]),
        ([(0, 10), (20, 30)], [], False, [(10, 20), (30, None)]),
        ([(10, 20)], [], False, [(0, 10), (20, None)]),
    ],
)
def test_gaps_are_what_neighbouring_segments_tell(
    segments: list[tuple[Any, ...]],
    lost: list[int],
    names_known: bool,
    expected: list[tuple[int, int | None]],
) -> None:
    found = gaps([Segment(*each) for each in segments], lost, names_known=names_known)
    assert [(gap.start, gap.end) for gap in found] == expected


def test_gap_says_why() -> None:
    found = gaps([Segment(0, 10), Segment(20, 30)], [10], names_known=True)
    assert found == [Gap(10, 20, "the object is lost")]


# -- devices ------------------------------------------------------------------------------------


def write_topic(mount: Mount, name: str, bases: list[int]) -> list[Path]:
    """Segments that reach to the next one's base offset; the last one has 5 records."""
    directory = mount.mountpoint / name
    directory.mkdir()
    paths = []
    for base, end in zip(bases, [*bases[1:], bases[-1] + 5], strict=True):
        path = directory / f"{base:020}.log"
        path.write_bytes(segment_bytes(base, end))
        path.chmod(0o640)
        os.chown(path, 1234, 1234)
        os.utime(path, ns=(10**18, 10**18 + base))
        paths.append(path)
    return paths


def migrate(tier: str, *paths: Path) -> None:
    result = run_pafkafs("migrate", "--wait", "--to", tier, *map(str, paths))
    assert result.returncode == 0, result.stderr


@pytest.fixture
def mount(make_mount: MakeMount) -> Mount:
    """Stopped; of topic orders-0 the segments at 0, 100, 200 are on the slow tier."""
    mount = make_mount(*STILL).start()
    paths = write_topic(mount, "orders-0", [0, 100, 200, 300])
    (mount.mountpoint / "meta.properties").write_text("version=1\n")
    migrate("slow", *paths[:3])
    mount.stop()
    return mount


def rescue(target: Path, *arguments: str, status: int = 1) -> dict[str, Any]:
    result = run_pafkafs("rescue", "--json", *arguments, str(target))
    assert result.returncode == status, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    assert json.loads((target / "pafkafs-rescue.json").read_text()) == report
    return report


def rescued(target: Path) -> dict[str, tuple[str, bytes]]:
    return {name: what for name, what in tree_contents(target).items() if name not in REPORTS}


def listing(*tops: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for top in tops:
        for path in (top, *top.rglob("*")):
            s = path.lstat()
            found[str(path)] = (s.st_mode, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    return found


def test_all_devices_give_all_files_with_their_attributes(mount: Mount, tmp_path: Path) -> None:
    before, target = listing(mount.fast, mount.slow), tmp_path / "target"
    report = rescue(target, "--fast", str(mount.fast), "--slow", str(mount.slow), status=0)
    assert listing(mount.fast, mount.slow) == before
    assert rescued(target) == tree_contents(mount.tree)
    assert (report["complete"], report["files"]) == (True, 5)
    for path in mount.tree.rglob("*.log"):
        copy, status = (target / path.relative_to(mount.tree)).stat(), path.stat()
        for key in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
            assert getattr(copy, key) == getattr(status, key)


def test_without_the_fast_tier_demoted_segments_come_under_their_names(
    mount: Mount, tmp_path: Path
) -> None:
    expected = tree_contents(mount.tree)
    shutil.rmtree(mount.fast)
    before, target = listing(mount.slow), tmp_path / "target"
    report = rescue(target, "--slow", str(mount.slow))
    assert listing(mount.slow) == before
    kept = {
        f"orders-0/{base:020}.log": expected[f"orders-0/{base:020}.log"] for base in (0, 100, 200)
    }
    assert rescued(target) == kept | {"orders-0": ("directory", b"")}
    (missing,) = report["partitions"]["orders-0"]["missing"]
    assert (missing["from"], missing["to"]) == (300, None)
    status = (target / "orders-0/00000000000000000100.log").stat()
    assert (status.st_uid, status.st_mode & 0o777, status.st_mtime_ns) == (
        1234,
        0o640,
        10**18 + 100,
    )
    assert (target / "orders-0").stat().st_uid == 1234


def test_without_the_slow_tier_names_of_lost_segments_are_left_out_and_told(
    mount: Mount, tmp_path: Path
) -> None:
    shutil.rmtree(mount.slow)
    target = tmp_path / "target"
    report = rescue(target, "--fast", str(mount.fast))
    assert sorted(rescued(target)) == [
        "meta.properties",
        "orders-0",
        f"orders-0/{300:020}.log",
    ]
    assert report["lost"] == [f"orders-0/{base:020}.log" for base in (0, 100, 200)]
    assert [(g["from"], g["to"]) for g in report["partitions"]["orders-0"]["missing"]] == [(0, 300)]


def test_lost_segment_between_others_is_a_range(mount: Mount, tmp_path: Path) -> None:
    (mount.tree / f"orders-0/{100:020}.log").readlink().unlink()
    target = tmp_path / "target"
    report = rescue(target, "--fast", str(mount.fast), "--slow", str(mount.slow))
    assert report["lost"] == [f"orders-0/{100:020}.log"]
    assert [(g["from"], g["to"]) for g in report["partitions"]["orders-0"]["missing"]] == [
        (100, 200)
    ]


def test_torn_segment_is_cut_after_its_last_whole_batch(mount: Mount, tmp_path: Path) -> None:
    name = f"orders-0/{100:020}.log"
    object_ = (mount.tree / name).readlink()
    data = object_.read_bytes()
    os.truncate(object_, len(data) - 10)
    target = tmp_path / "target"
    report = rescue(target, "--slow", str(mount.slow))
    assert (target / name).read_bytes() == segment_bytes(100, 190)
    assert object_.read_bytes() == data[:-10]
    assert "whole batches" in report["damaged"][name]
    first, _ = report["partitions"]["orders-0"]["missing"]
    assert (first["from"], first["to"]) == (190, 200)


def test_bytes_that_cannot_be_read_end_a_segment(mount: Mount, tmp_path: Path) -> None:
    name = f"orders-0/{100:020}.log"
    object_ = (mount.tree / name).readlink()
    target = tmp_path / "target"
    inject = ["-e", "inject=pread64:error=EIO"]
    tracer = ["strace", "-f", "-o", str(tmp_path / "trace"), "-P", str(object_), *inject]
    command = [*tracer, PAFKAFS]
    arguments = ["rescue", "--slow", str(mount.slow), str(target)]
    result = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1, result.stderr
    assert f"damaged: {name}: cannot be read from byte 0 on" in result.stdout
    assert "missing: orders-0: offsets 100 to 199" in result.stdout
    assert (target / name).read_bytes() == b""
    assert (target / f"orders-0/{200:020}.log").read_bytes() == segment_bytes(200, 300)


def test_of_two_objects_of_one_name_the_whole_one_is_taken(mount: Mount, tmp_path: Path) -> None:
    name = f"orders-0/{100:020}.log"
    object_ = (mount.tree / name).readlink()
    garbage = object_.with_name(object_.name[:-16] + "f" * 16)
    garbage.write_bytes(object_.read_bytes()[:700] + bytes(10**6))  # newer, larger, and cut off
    target = tmp_path / "target"
    report = rescue(target, "--slow", str(mount.slow))
    assert (target / name).read_bytes() == segment_bytes(100, 200)
    assert list(report["left_out"]) == [str(garbage)]
    report = rescue(
        tmp_path / "named", "--fast", str(mount.fast), "--slow", str(mount.slow), status=0
    )
    assert report["left_out"] == {str(garbage): "no name leads to it"}


def test_objects_of_what_was_being_deleted_are_left_out(mount: Mount, tmp_path: Path) -> None:
    object_ = (mount.tree / f"orders-0/{100:020}.log").readlink()
    directory = object_.parents[1] / "gone-1.0123-delete"
    directory.mkdir()
    suffix = object_.name[24:]
    object_.rename(directory / object_.name)
    other = (mount.tree / f"orders-0/{200:020}.log").readlink()
    other.rename(other.with_name(f"{200:020}.log.deleted{suffix[:-1]}0"))
    target = tmp_path / "target"
    report = rescue(target, "--slow", str(mount.slow))
    assert sorted(rescued(target)) == ["orders-0", f"orders-0/{0:020}.log"]
    assert sorted(report["left_out"].values()) == [
        "it was being deleted when it moved",
        "its partition was being deleted when it moved",
    ]


def test_growing_segments_are_copied_up_to_what_was_written(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount(*STILL, *GROWING).start()
    (mount.mountpoint / "orders-0").mkdir()
    wait_until(lambda: mount.status()["pool"]["files"] > 0, "the pool")
    path = mount.mountpoint / f"orders-0/{0:020}.log"
    data = segment_bytes(0, 1000)
    file = path.open("wb", buffering=0)
    file.write(data)
    mount.kill()
    with suppress(OSError):
        file.close()
    home = mount.tree / f"orders-0/{0:020}.log"
    assert home.stat().st_size > len(data)
    before, target = listing(mount.fast), tmp_path / "target"
    report = rescue(target, "--fast", str(mount.fast), "--slow", str(mount.slow), status=0)
    assert (target / f"orders-0/{0:020}.log").read_bytes() == data
    assert report["damaged"] == {}
    assert listing(mount.fast) == before


def test_without_slots_a_growing_segment_is_cut_after_its_last_batch(
    mount: Mount, tmp_path: Path
) -> None:
    home = mount.tree / f"orders-0/{300:020}.log"
    data = home.read_bytes()
    with home.open("ab") as file:
        file.write(bytes(1 << 20))
    (mount.fast / "sizes").write_bytes(b"no slots")
    target = tmp_path / "target"
    report = rescue(target, "--fast", str(mount.fast), "--slow", str(mount.slow))
    assert (target / f"orders-0/{300:020}.log").read_bytes() == data
    assert list(report["notes"]) == [f"{mount.fast}/sizes"]


def test_of_objects_with_one_id_the_one_that_the_stub_names_is_taken(
    mount: Mount, tmp_path: Path
) -> None:
    object_ = (mount.tree / f"orders-0/{100:020}.log").readlink()
    for name in ("aaa-0", "zzz-0"):
        copy = object_.parents[1] / name / object_.name
        copy.parent.mkdir()
        copy.write_bytes(b"something else")
    target = tmp_path / "target"
    devices = "--fast", str(mount.fast), "--slow", str(mount.slow)
    report = rescue(target, *devices, status=0)
    assert rescued(target) == tree_contents(mount.tree)
    assert len(report["left_out"]) == 2


def test_holes_stay_holes(make_mount: MakeMount, tmp_path: Path) -> None:
    mount = make_mount(*STILL).start()
    path = mount.mountpoint / "orders-0.index"
    path.touch()
    os.truncate(path, 64 << 20)
    mount.stop()
    target = tmp_path / "target"
    rescue(target, "--fast", str(mount.fast), "--slow", str(mount.slow), status=0)
    status = (target / "orders-0.index").stat()
    assert (status.st_size, status.st_blocks) == (64 << 20, 0)


def test_object_that_is_shorter_than_its_file_is_told(mount: Mount, tmp_path: Path) -> None:
    mount.start()
    paths = write_topic(mount, "extra-0", [0, 100, 200])
    migrate("slow", paths[0])
    mount.stop()
    (object_,) = (path for path in mount.objects if path.parent.name == "extra-0")
    os.truncate(object_, len(segment_bytes(0, 50)))  # at the end of a batch
    report = rescue(
        tmp_path / "target", "--fast", str(mount.fast), "--slow", str(mount.slow), status=1
    )
    assert "bytes" in json.dumps(report["damaged"])
    assert f"extra-0/{0:020}.log" in json.dumps(report["damaged"])


def test_name_that_cannot_be_made_ends_no_rescue(mount: Mount, tmp_path: Path) -> None:
    mount.start()
    paths = write_topic(mount, "extra-0", [0, 100])
    migrate("slow", paths[0])
    mount.stop()
    directory = mount.slow / "objects" / "extra-0"
    (directory / f"..~0a1b2c3d.{1:016x}").write_bytes(b"planted")
    (directory / f".swap~0a1b2c3d.{2:016x}").write_bytes(b"planted")
    rescue(tmp_path / "target", "--slow", str(mount.slow), status=1)
    assert (tmp_path / "target" / "extra-0" / f"{0:020}.log").exists()
    assert b"planted" not in [entry[1] for entry in rescued(tmp_path / "target").values()]


def test_directories_get_their_owners_last(mount: Mount, tmp_path: Path) -> None:
    """Who owns one could put a symlink in the way of what is made below it."""
    mount.start()
    write_topic(mount, "extra-0", [0, 100])
    os.chown(mount.mountpoint / "extra-0", 1234, 1234)
    os.chmod(mount.mountpoint / "extra-0", 0o755)
    mount.stop()
    trace = tmp_path / "trace"
    calls = "trace=openat,open,openat2,mkdirat,mkdir,fchown,fchownat,chown"
    command = ["strace", "-f", "-yy", "-o", str(trace), "-e", calls, PAFKAFS, "rescue"]
    target = tmp_path / "target"
    arguments = ["--fast", str(mount.fast), "--slow", str(mount.slow), str(target)]
    subprocess.run([*command, *arguments], capture_output=True, check=False, timeout=120)
    lines = trace.read_text().splitlines()
    given = [n for n, line in enumerate(lines) if f"{target}/extra-0>, 1234" in line]
    made = [n for n, line in enumerate(lines) if "O_CREAT" in line and "extra-0/" in line]
    assert (target / "extra-0").stat().st_uid == 1234
    assert given
    assert made
    assert max(made) < min(given)


def test_planted_symlinks_are_not_followed(mount: Mount, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(segment_bytes(100, 200))
    object_ = (mount.tree / f"orders-0/{100:020}.log").readlink()
    object_.unlink()
    object_.symlink_to(outside)
    (mount.slow / "objects/more-0").symlink_to(object_.parent)
    target = tmp_path / "target"
    rescue(target, "--slow", str(mount.slow))
    assert sorted(rescued(target)) == [
        "orders-0",
        f"orders-0/{0:020}.log",
        f"orders-0/{200:020}.log",
    ]


def test_devices_of_a_mount_are_refused(mount: Mount, tmp_path: Path) -> None:
    mount.start()
    result = run_pafkafs("rescue", "--slow", str(mount.slow), str(tmp_path / "target"))
    assert result.returncode == 1
    assert "in use" in result.stderr
    assert not (tmp_path / "target").exists()


def test_target_that_is_not_new_or_on_a_device_is_refused(mount: Mount, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for target, why in ((full, "not empty"), (mount.slow / "new", "inside each other")):
        result = run_pafkafs("rescue", "--slow", str(mount.slow), str(target))
        assert result.returncode == 1
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (mount.slow / "new").exists()
    assert run_pafkafs("rescue", str(tmp_path / "target")).returncode == 2


def test_target_where_somebody_else_may_write_is_refused(mount: Mount, tmp_path: Path) -> None:
    """It could put symlinks in the way of what root makes there."""
    for name, owner, mode in (("of-user", 1234, 0o755), ("group", 0, 0o775), ("all", 0, 0o1777)):
        target = tmp_path / name
        target.mkdir()
        target.chmod(mode)
        os.chown(target, owner, -1)
        before = listing(target)
        result = run_pafkafs("rescue", "--slow", str(mount.slow), str(target))
        assert result.returncode == 1
        assert result.stderr.startswith(f"pafkafs: {target} ")
        assert result.stderr.count("\n") == 1
        assert "could redirect what is written" in result.stderr
        assert listing(target) == before


@pytest.mark.parametrize("with_names", [True, False])
def test_nothing_is_written_through_what_is_in_the_place_of_a_directory(
    mount: Mount, tmp_path: Path, with_names: bool
) -> None:
    """As on a target that takes names of upper and lower case for the same."""
    victim = tmp_path / "victim"
    victim.mkdir()
    fast, slow = [str(mount.fast)] if with_names else [], [str(mount.slow)]
    fds = rescuing.open_sources(fast, slow)
    target_fd = rescuing.make_target(str(tmp_path / "target"), [*fast, *slow])
    (tmp_path / "target/orders-0").symlink_to(victim)
    devices = list(zip([*fast, *slow], fds, strict=True))
    outcome = Rescue(devices[: len(fast)], devices[len(fast) :], target_fd, lambda _: None).run()
    for fd in (*fds, target_fd):
        os.close(fd)
    assert list(victim.iterdir()) == []
    assert not outcome.complete
    assert {f"orders-0/{base:020}.log" for base in (0, 100, 200)} <= outcome.damaged.keys()
    assert (tmp_path / "target/meta.properties").exists() == with_names


def test_fast_device_without_a_home_tree_is_refused(mount: Mount, tmp_path: Path) -> None:
    result = run_pafkafs("rescue", "--fast", str(mount.slow), str(tmp_path / "target"))
    assert result.returncode == 1
    assert "--slow" in result.stderr
    assert not (tmp_path / "target").exists()


def test_directory_that_is_no_device_is_refused(mount: Mount, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for option, wrong in (("--slow", mount.slow / "objects"), ("--fast", tmp_path)):
        result = run_pafkafs("rescue", option, str(wrong), str(target))
        assert result.returncode == 1
        assert result.stderr == f"pafkafs: {wrong} is no device of pafkafs: it has no objects/\n"
        assert not target.exists()
