"""The order of system calls that a power cut would tell: seen by strace, with slow fsyncs."""

import os
import sys
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import MIB
from harness import Mount, run_pafkafs, wait_until
from tracing import Call, attached, syncs, traced, traced_command


def test_old_object_is_removed_after_the_fsync_of_the_name_that_leads_to_the_new_one(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, other = make_mount("--mode", "slow"), make_mount(name="other")
    mount.slow_list = f"{mount.slow},{other.slow}"
    mount.start("--slow-capacity", "8MiB,16MiB")
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    filler = directory / "filler"
    filler.write_bytes(bytes(12 * MIB))  # on the larger device: the next one goes to the other
    with open(directory / "file", "xb", buffering=0) as stream:
        stream.write(bytes(MIB))
        (old,) = [path for path in mount.objects if path.name.startswith("file~")]
        filler.unlink()
        wait_until(lambda: not list((other.slow / "objects").rglob("filler*")), "room there")
        with traced(mount.pid, tmp_path / "trace") as trace:
            for _ in range(9):
                stream.write(bytes(MIB))
            wait_for_removal(mount, old)
    assert list((other.slow / "objects").rglob("file~*"))
    (renamed,) = trace.find("rename", f"{mount.tree}/orders-0>", '"file"')
    (removed,) = trace.find("unlink", old.name)
    (synced,) = [
        call
        for call in trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")
        if call.began > renamed.returned
    ]
    assert synced.returned < removed.began


def test_power_mode_fsyncs_the_directory_of_a_new_name_before_it_returns(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--durability", "power").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    pid = mount.pid
    with traced(pid, tmp_path / "trace") as trace, open(directory / "file", "xb"):
        pass
    assert trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")
    with traced(pid, tmp_path / "trace") as trace:
        os.rename(directory / "file", directory / "renamed")
    assert trace.find("fsync", f"{mount.tree}/orders-0>", "= 0")


def wait_for_removal(mount: Mount, object_: Path) -> None:
    """Its shadow goes next: then the call that removed the object has returned, for strace too."""
    shadow = mount.fast / "shadows" / object_.name[-16:]
    wait_until(lambda: not object_.exists() and not shadow.exists(), "the removal of the object")


def expect_order(*calls: list[Call]) -> None:
    """Of each step one call has succeeded before the next step began."""
    before = -1
    for step, found in enumerate(calls):
        after = [call for call in found if call.began > before and ") = 0" in call.text]
        assert after, f"step {step} is missing, or too early: {[call.text for call in found]}"
        before = min(call.returned for call in after)


def sealed_segment(mount: Mount) -> Path:
    """In a directory of its own; a newer one is there."""
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    path = directory / f"{0:020}.log"
    path.write_bytes(bytes(MIB))
    (directory / f"{1:020}.log").touch()
    return path


def move(mount: Mount, path: Path, tier: str) -> None:
    result = run_pafkafs("migrate", "--wait", "--to", tier, str(path))
    assert result.returncode == 0, result.stderr


def demoted_segment(make_mount: MakeMount) -> tuple[Mount, Path, Path]:
    """A mount, a segment of it on the slow tier, and its object."""
    mount = make_mount("--threshold", "-1").start()
    path = sealed_segment(mount)
    move(mount, path, "slow")
    (object_,) = mount.objects
    return mount, path, object_


def test_demotion_frees_nothing_before_all_that_replaces_it_is_durable(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--threshold", "-1").start()
    path = sealed_segment(mount)
    with traced(mount.pid, tmp_path / "trace") as trace:
        move(mount, path, "slow")
    (copy,) = mount.objects
    commit = trace.find("rename", f"{mount.tree}/orders-0>", f'"{path.name}"')
    objects = mount.slow / "objects"
    # An error of the source that nobody has seen yet would be lost with it.
    expect_order(trace.find("fsync", f"{mount.tree}/orders-0/{path.name}>"), commit)
    expect_order(trace.find("fsync", f"{copy}>"), commit)
    expect_order(trace.find("fsync", f"{objects}/orders-0>"), commit)
    expect_order(trace.find("fsync", f"{objects}>"), commit)
    expect_order(trace.find("fsync", f"{mount.fast}/shadows/"), commit)
    expect_order(trace.find("fsync", f"{mount.fast}/shadows>"), commit)
    expect_order(commit, trace.find("fsync", f"{mount.tree}/orders-0>"))


def test_source_that_was_written_to_during_the_copy_is_fsynced_again_before_it_is_replaced(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--threshold", "-1", "--migrate-rate", "1MiB").start()
    path = sealed_segment(mount)
    with open(path, "r+b", buffering=0) as file, traced(mount.pid, tmp_path / "trace") as trace:
        run_pafkafs("migrate", "--to", "slow", str(path))
        wait_until(lambda: moving(mount), "the copy")
        file.write(b"late")  # the copy takes a second
        wait_until(lambda: mount.objects and not moving(mount), "the move")
    source, name = f"{mount.tree}/orders-0", path.name
    (commit,) = trace.find("rename", f"{source}>", f'"{name}"')
    assert len([c for c in trace.find("fsync", f"{source}/{name}>") if c.began < commit.began]) == 2


def moving(mount: Mount) -> bool:
    return bool(mount.status()["migration"]["running"])


def test_promotion_frees_nothing_before_all_that_replaces_it_is_durable(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, path, old = demoted_segment(make_mount)
    with traced(mount.pid, tmp_path / "trace") as trace:
        move(mount, path, "fast")
        wait_for_removal(mount, old)
    expect_order(
        trace.find("fsync", f"{mount.fast}/tmp/"),
        trace.find("rename", f"{mount.tree}/orders-0>", f'"{path.name}"'),
        trace.find("fsync", f"{mount.tree}/orders-0>"),
        trace.find("unlink", old.name),
    )


def test_object_of_a_removed_file_goes_after_the_removal_of_its_stub_is_durable(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, path, old = demoted_segment(make_mount)
    with traced(mount.pid, tmp_path / "trace") as trace:
        path.unlink()
        wait_for_removal(mount, old)
    expect_order(
        trace.find("unlink", f"{mount.tree}/orders-0>", f'"{path.name}"'),
        trace.find("fsync", f"{mount.tree}/orders-0>"),
        trace.find("unlink", old.name),
    )


def test_records_of_new_devices_are_durable_in_the_order_in_which_a_set_is_formed(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount()
    form = "import sys; from pafkafs import deviceset as d; d.assemble([[p] for p in sys.argv[1:]])"
    devices = str(mount.fast), str(mount.slow)
    trace = traced_command(tmp_path / "trace", sys.executable, "-c", form, *devices)

    def written(device: Path) -> tuple[list[Call], list[Call], list[Call]]:
        return (
            trace.find("fsync", f"{device}/.pafkafs.json."),
            trace.find("rename", f"{device}>", '"pafkafs.json"'),
            trace.find("fsync", f"{device}>"),
        )

    expect_order(*written(mount.fast), *written(mount.slow), *written(mount.fast))


def test_power_mode_makes_the_size_and_the_entries_of_an_object_durable_with_the_append(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--mode", "slow", "--durability", "power").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    with open(directory / f"{0:020}.log", "xb", buffering=0) as stream:
        with traced(mount.pid, tmp_path / "first") as first:
            stream.write(b"record")
        with traced(mount.pid, tmp_path / "second") as second:
            stream.write(b"record")
    assert syncs(first, f"{mount.slow}/objects/orders-0>")
    assert syncs(first, f"{mount.slow}/objects>")
    assert syncs(first, f"{mount.fast}/shadows/")
    assert syncs(second, f"{mount.fast}/shadows/")
    assert not syncs(second, f"{mount.slow}/objects>")


def test_fsync_of_a_demoted_file_covers_object_and_shadow(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount("--mode", "slow").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    with open(directory / f"{0:020}.log", "xb", buffering=0) as stream:
        stream.write(b"record")
        with traced(mount.pid, tmp_path / "trace") as trace:
            os.fsync(stream.fileno())
    assert syncs(trace, f"{mount.objects[0]}>")
    assert syncs(trace, f"{mount.fast}/shadows/")


def test_entries_of_a_new_object_are_durable_before_its_shadow_has_a_length(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    """The two lose power together, and one may have committed its journal and the other not."""
    mount = make_mount("--mode", "slow").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    with (
        open(directory / f"{0:020}.log", "xb", buffering=0) as stream,
        traced(mount.pid, tmp_path / "trace") as trace,
    ):
        stream.write(b"record")
    (grown,) = trace.find("ftruncate", f"{mount.fast}/shadows/", ", 6)")
    for where in (f"{mount.slow}/objects/orders-0>", f"{mount.slow}/objects>"):
        assert any(call.returned < grown.began for call in syncs(trace, where)), where


def test_object_of_a_removed_file_stays_when_the_removal_of_its_stub_cannot_be_made_durable(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount, path, old = demoted_segment(make_mount)
    failing = ("-P", str(mount.tree / "orders-0"), "-e", "inject=fsync:error=EIO")
    with attached(mount.pid, tmp_path / "trace", *failing):
        path.unlink()
        wait_until(lambda: "objects are kept" in mount.log_text(), "the fsync to fail")
    other = mount.mountpoint / "orders-0" / f"{2:020}.log"
    other.touch()
    run_pafkafs("migrate", "--wait", "--to", "slow", str(other.with_name(f"{1:020}.log")))
    other.with_name(f"{1:020}.log").unlink()
    mount.stop()
    assert old in mount.objects  # nor is it removed later, by a fsync that says nothing of it
    mount.start()
    wait_until(lambda: not mount.objects, "what has no stub to be put aside")


@pytest.mark.parametrize("whose", ["mover", "open caller", "caller"])
def test_file_whose_fsync_failed_does_not_move(
    make_mount: MakeMount, tmp_path: Path, whose: str
) -> None:
    mount = make_mount("--threshold", "-1").start()
    path = sealed_segment(mount)
    source = mount.tree / "orders-0" / path.name
    failing = ("-P", str(source), "-e", "inject=fsync:error=EIO:when=1")
    migrate = ("migrate", "--wait", "--to", "slow", str(path))
    with path.open("r+b", buffering=0) as stream:
        with attached(mount.pid, tmp_path / "trace", *failing):
            if whose == "mover":
                assert run_pafkafs(*migrate).returncode == 1
            else:
                stream.write(b"acked")
                with pytest.raises(OSError, match="Input/output error"):
                    os.fsync(stream.fileno())
        if whose == "caller":
            stream.close()
        again = run_pafkafs(*migrate)
        assert again.returncode == 1
        assert "an fsync of it failed" in again.stderr
        assert not source.is_symlink()
