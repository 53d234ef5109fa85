"""Each fsync, each step of an order that a crash relies on, and each gate is needed: without it a
test fails.  Flushes and drains of persistent memory are in test_native_mutants.py.

    scripts/test tests/test_mutants.py -m slow

A mutant is a copy of the sources with one change, and the tests that have to notice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACE = "tests/test_mount_trace.py::test_"
CUTS = "tests/test_mount_cuts.py::test_"
POWER = "tests/test_durability.py::test_"
MOVES = "tests/test_mount_migration.py::test_"
DEMOTION = f"{TRACE}demotion_frees_nothing_before_all_that_replaces_it_is_durable"
PROMOTION = f"{TRACE}promotion_frees_nothing_before_all_that_replaces_it_is_durable"
REMOVAL = f"{TRACE}object_of_a_removed_file_goes_after_the_removal_of_its_stub_is_durable"
REMOVAL_FAILS = (
    f"{TRACE}object_of_a_removed_file_stays_when_the_removal_of_its_stub_cannot_be_made_durable"
)
RECORDS = f"{TRACE}records_of_new_devices_are_durable_in_the_order_in_which_a_set_is_formed"
APPENDS = f"{TRACE}power_mode_makes_the_size_and_the_entries_of_an_object_durable_with_the_append"
COMMANDS = "tests/test_command_trace.py::test_"
FSYNC = f"{TRACE}fsync_of_a_demoted_file_covers_object_and_shadow"
DURING_MOVES = (
    f"{MOVES}writes_and_truncations_during_the_copy_are_in_the_result",
    f"{MOVES}appends_go_on_while_the_file_moves_back_and_forth",
)
NAMES = f"{TRACE}power_mode_fsyncs_the_directory_of_a_new_name_before_it_returns"


@dataclass(frozen=True)
class Mutant:
    """`old`, which is there once, becomes `new`."""

    name: str
    source: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "record not fsynced",
        "pafkafs/deviceset.py",
        "        os.fsync(stream.fileno())\n",
        "",
        (RECORDS,),
    ),
    Mutant(
        "directory of a record not fsynced",
        "pafkafs/deviceset.py",
        "dst_dir_fd=fd)\n    os.fsync(fd)\n",
        "dst_dir_fd=fd)\n",
        (RECORDS,),
    ),
    Mutant(
        "set not marked as forming",
        "pafkafs/deviceset.py",
        "            write_record(fds[0], replace(formed, forming=True, unformed=unformed))\n",
        "            pass\n",
        (f"{CUTS}first_mount_killed_at_any_step_is_finished_by_the_next",),
    ),
    Mutant(
        "copy not fsynced",
        "pafkafs/copying.py",
        "        os.fsync(fd)\n",
        "",
        (DEMOTION, PROMOTION),
    ),
    Mutant(
        "directories of an object not fsynced",
        "pafkafs/copying.py",
        "            layout.sync_object_directories(self.target.objects_fd, self._stub.object)\n",
        "            pass\n",
        (DEMOTION,),
    ),
    Mutant(
        "directory objects/ not fsynced",
        "pafkafs/layout.py",
        "            os.close(fd)\n    os.fsync(objects_fd)\n",
        "            os.close(fd)\n",
        (DEMOTION,),
    ),
    Mutant(
        "shadow not fsynced",
        "pafkafs/moving.py",
        "(shadow_fd, self._home.shadows_fd)",
        "(self._home.shadows_fd,)",
        (DEMOTION,),
    ),
    Mutant(
        "directory of shadows not fsynced",
        "pafkafs/moving.py",
        "(shadow_fd, self._home.shadows_fd)",
        "(shadow_fd,)",
        (DEMOTION,),
    ),
    Mutant(
        "directory of a moved file not fsynced",
        "pafkafs/moving.py",
        "            await self._namespace.sync_directory(file.node.names[0][0])\n",
        "            pass\n",
        (DEMOTION, PROMOTION),
    ),
    Mutant(
        "what was written during a copy is lost",
        "pafkafs/moving.py",
        "        elif (changes := file.native.take_changes()) is not None:\n",
        "        elif (changes := file.native.take_changes()) is not None and False:\n",
        DURING_MOVES,
    ),
    Mutant(
        "gate of a move not closed",
        "pafkafs/moving.py",
        "            if not gate_closed:\n                await file.close_gate()\n",
        "            file.gate_open = trio.Event()\n",
        DURING_MOVES,
    ),
    Mutant(
        "source not fsynced before it is copied",
        "pafkafs/moving.py",
        "                await self._sync_source(file, file.sync)\n",
        "                pass\n",
        (DEMOTION,),
    ),
    Mutant(
        "source not fsynced again before its copy replaces it",
        "pafkafs/moving.py",
        "        if file.native.unsynced:\n",
        "        if False:\n",
        (
            f"{TRACE}source_that_was_written_to_during_the_copy_is_fsynced_again"
            "_before_it_is_replaced",
        ),
    ),
    Mutant(
        "object removed before the removal of its stub is durable",
        "pafkafs/objects.py",
        "        if removals and await self._removals_are_durable():\n",
        "        if removals:\n",
        (REMOVAL,),
    ),
    Mutant(
        "object removed though that fsync failed",
        "pafkafs/objects.py",
        "        return not self._sync_failed\n",
        "        return True\n",
        (REMOVAL_FAILS,),
    ),
    Mutant(
        "entries not fsynced in power mode",
        "pafkafs/making.py",
        "                await self.sync_directory(parent)\n",
        "                pass\n",
        (NAMES,),
    ),
    Mutant(
        "slow devices not synced at unmount",
        "pafkafs/ending.py",
        "                await device.run(lambda: _native.syncfs(device.fd))\n",
        "",
        (f"{POWER}umount_makes_durable_what_nobody_fsynced",),
    ),
    Mutant(
        "objects of an earlier daemon taken for durable",
        "pafkafs/daemon.py",
        "(_native.syncfs, device.fd, abandon_on_cancel=True)",
        "(int, abandon_on_cancel=True)",
        (f"{POWER}fsync_covers_what_a_daemon_that_was_killed_had_acked",),
    ),
    Mutant(
        "adoption not marked",
        "pafkafs/deviceset.py",
        "            adopting.mark(fds[0])\n",
        "            pass\n",
        (f"{CUTS}adoption_killed_at_any_step_is_not_mounted_and_goes_on",),
    ),
    Mutant(
        "what a repair puts aside not fsynced",
        "pafkafs/layout.py",
        "            os.fsync(lost_fd)\n            os.fsync(parent_fd)\n",
        "            pass\n",
        (f"{COMMANDS}repair_makes_durable_what_it_puts_aside",),
    ),
    Mutant(
        "what was rescued not synced",
        "pafkafs/rescuing.py",
        "        _native.syncfs(self._target_fd)\n",
        "",
        (f"{COMMANDS}rescue_makes_all_of_its_target_durable",),
    ),
    Mutant(
        "renames of an adoption not fsynced",
        "pafkafs/adoption.py",
        "        layout.sync_all((tree_fd, device_fd, source_fd))\n",
        "",
        (f"{COMMANDS}adoption_is_marked_before_the_first_rename_and_until_all_are_durable",),
    ),
    Mutant(
        "acked writes not durable in power mode",
        "native/io.c",
        "durable ? RWF_DSYNC : 0",
        "durable ? 0 : 0",
        (f"{POWER}power_mode_keeps_every_acked_byte_of_new_files_through_a_power_cut",),
    ),
    Mutant(
        "size of a demoted file not durable in power mode",
        "native/io.c",
        "	return grew && fdatasync(b->shadow_fd) != 0 ? sync_failed(errno) : 0;\n",
        "	return 0;\n",
        (APPENDS,),
    ),
    Mutant(
        "entries of an object not durable before its shadow has a length",
        "native/io.c",
        "	err = object_sync_entries(b);\n	if (err < 0)\n		return sync_failed(-err);\n",
        "",
        (f"{TRACE}entries_of_a_new_object_are_durable_before_its_shadow_has_a_length",),
    ),
    Mutant(
        "fsync without the data",
        "native/io.c",
        "	if ((data_only ? fdatasync(fd) : fsync(fd)) != 0) {\n",
        "	if (data_only && fd < 0) {\n",
        (f"{POWER}fsync_in_process_mode_holds_through_a_power_cut_on_either_tier",),
    ),
    Mutant(
        "fsync without the shadow",
        "native/io.c",
        "	if (b->shadow_fd >= 0 && fsync(b->shadow_fd) != 0)\n		return -errno;\n",
        "",
        (FSYNC,),
    ),
    Mutant(
        "writes do not wait at a closed gate",
        "native/file.c",
        "	file->gate_closed = true;\n",
        "",
        DURING_MOVES,
    ),
    Mutant(
        "gate closed with changes under way",
        "native/file.c",
        "	bool quiet = file->changes == 0;\n",
        "	bool quiet = true;\n",
        ("tests/test_mount_frozen.py::test_move_waits_for_a_write_that_the_device_holds_back",),
    ),
)
IN_EACH_RUN = {"gate of a move not closed", "copy not fsynced"}


def copy_sources(mutant: Mutant, to: Path) -> None:
    for part in ("pafkafs", "native", "tests", "scripts"):
        shutil.copytree(
            ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, to)
    source = to / mutant.source
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.source} does not have it once"
    source.write_text(text.replace(mutant.old, mutant.new))


def build_native(to: Path) -> None:
    (target,) = (to / "pafkafs").glob("_native*.so")
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", f"-I{to / 'native'}"]
    define = "-DPy_LIMITED_API=0x030b0000"
    include = f"-I{sysconfig.get_path('include')}"
    sources = map(str, (to / "native").glob("*.c"))
    command = ["gcc", *flags, define, include, "-o", str(target), *sources, "-lpmem"]
    subprocess.run(command, check=True, capture_output=True)


def is_noticed(mutant: Mutant, sources: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    base = ["--basetemp", str(sources / "basetemp")]
    environment = {**os.environ, "PYTHONPATH": str(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *base, *mutant.tests],
        cwd=sources,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 1


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.name, marks=() if m.name in IN_EACH_RUN else pytest.mark.slow)
        for m in MUTANTS
    ],
)
def test_its_tests_notice(mutant: Mutant, tmp_path: Path) -> None:
    copy_sources(mutant, tmp_path)
    if mutant.source.endswith(".c"):
        build_native(tmp_path)
    assert is_noticed(mutant, tmp_path), f"no test notices: {mutant.name}"
