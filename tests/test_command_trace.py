"""The order of system calls of the commands that change devices: what a power cut would tell."""

import shutil
from pathlib import Path

from conftest import MakeMount
from harness import PAFKAFS, Mount
from tracing import Call, Trace, syncs, traced_command


def demoted(make_mount: MakeMount) -> Mount:
    """Two files on the slow device, not mounted."""
    mount = make_mount("--mode", "slow").start()
    directory = mount.mountpoint / "orders-0"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_bytes(b"data")
    mount.stop()
    return mount


def synced_after(trace: Trace, call: Call, *directories: Path) -> bool:
    """Whether each of these was fsynced after this call."""
    return all(
        any(sync.began > call.returned for sync in syncs(trace, f"{directory}>"))
        for directory in directories
    )


def repaired(mount: Mount, tmp_path: Path) -> Trace:
    devices = str(mount.fast), str(mount.slow)
    return traced_command(tmp_path / "trace", PAFKAFS, "check", "--repair", *devices)


def test_repair_makes_durable_what_it_puts_aside(make_mount: MakeMount, tmp_path: Path) -> None:
    mount = demoted(make_mount)
    (mount.tree / "orders-0" / "a").unlink()
    trace = repaired(mount, tmp_path)
    (aside,) = trace.find("rename", f"{mount.slow}/lost")
    assert synced_after(trace, aside, mount.slow / "lost", mount.slow / "objects/orders-0")


def test_repair_makes_a_shadow_durable_before_it_is_done(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = demoted(make_mount)
    gone = next((mount.fast / "shadows").iterdir())
    gone.unlink()
    trace = repaired(mount, tmp_path)
    assert gone.exists()
    (made,) = syncs(trace, f"{gone}>")
    assert synced_after(trace, made, mount.fast / "shadows")


def test_rescue_makes_all_of_its_target_durable(make_mount: MakeMount, tmp_path: Path) -> None:
    mount, target = demoted(make_mount), tmp_path / "target"
    devices = ("--fast", str(mount.fast), "--slow", str(mount.slow))
    trace = traced_command(tmp_path / "trace", PAFKAFS, "rescue", *devices, str(target))
    (copied,) = trace.find("syncfs", f"{target}>")
    assert synced_after(trace, copied, target / "pafkafs-rescue.json", target)


def test_adoption_is_marked_before_the_first_rename_and_until_all_are_durable(
    make_mount: MakeMount, tmp_path: Path
) -> None:
    mount = make_mount()
    log_dir = mount.fast / "kafka-logs"
    shutil.copytree(Path(__file__).parent / "preload", log_dir)
    trace = traced_command(
        tmp_path / "trace", PAFKAFS, "adopt", str(log_dir), str(mount.fast), str(mount.slow)
    )
    renames = trace.find("rename", f"{mount.tree}>")
    (unmarked,) = trace.find("unlink", f"{mount.fast}>", "adopting")
    assert any(sync.returned < renames[0].began for sync in syncs(trace, f"{mount.fast}>"))
    for directory in (mount.tree, mount.fast, log_dir):
        found = syncs(trace, f"{directory}>")
        assert any(
            sync.began > renames[-1].returned and sync.returned < unmarked.began for sync in found
        ), directory
    assert synced_after(trace, unmarked, mount.fast)
