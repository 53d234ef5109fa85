"""The tests of the native core and of mounts once more, on real fsdax in a VM.

Fast tiers are on persistent memory there, and durability is `power` without a word.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from daxvm.vm import GIB, Vm

pytestmark = pytest.mark.timeout(1800)

TESTS = Path(__file__).parent
NATIVE = TESTS / "native"
SLOWNESS = 15
SCRIPT = """
make --no-print-directory -s -C "$1" check TESTS="$2"
echo "native core: $?"
shift 2
exec "$@"
"""
FILES, PMEM, MIGRATION = (f"tests/test_mount_{name}.py" for name in ("files", "pmem", "migration"))
# Of the core what meets a filesystem; of mounts some of growing segments, and of the slow tier.
NATIVE_TESTS = "test_gate test_object test_plain test_room test_sync"
SAMPLE = [
    f"{FILES}::{test}[{kind}]"
    for test in (
        "test_truncated_bytes_are_zero_when_the_file_grows_again",
        "test_stores_into_a_shared_mapping_are_read",
        "test_index_is_grown_mapped_closed_and_shrunk_as_kafka_does",
        "test_sendfile_at_the_tail_sends_each_append_as_it_was_written",
        "test_fallocate_extends_with_zeros_and_allocates",
        "test_punched_hole_reads_as_zeros_and_gives_its_room_back",
        "test_seek_finds_data_and_holes",
    )
    for kind in ("growing segment", "spilled segment")
]
SAMPLE += [
    f"{PMEM}::test_growing_file_is_longer_in_the_tree_and_as_long_as_written_in_the_mount",
    f"{PMEM}::test_growing_file_spills_when_nothing_is_left",
    f"{PMEM}::test_size_that_was_set_survives_the_daemon[down]",
    f"{MIGRATION}::test_file_is_the_same_after_a_way_down_and_up[growing]",
    f"{MIGRATION}::test_old_segments_go_down_though_there_is_room",
]


@dataclass(frozen=True)
class Run:
    """What the tests in the VM said."""

    native: str
    mounts: str
    status: int


def run_in_vm(mount_tests: Sequence[str], timeout_s: int) -> Run:
    subprocess.run(["make", "-s", "-j2", "-C", str(NATIVE), "all"], check=True)
    # Plugins that nothing here needs would take longer to be loaded than some tests to run.
    pytest_options = ["-p", "no:cacheprovider", "-p", "pytest_timeout", "-q"]
    pytest_options += ["--basetemp=/pmem/pytest", "--durations=10"]
    pytest_options += [f"--timeout={60 * SLOWNESS}"]
    command = [sys.executable, "-m", "pytest", *pytest_options, *mount_tests]
    with Vm(pmem_size=2 * GIB) as vm:
        env = os.environ | {
            "PAFKAFS_TEST_SLOWNESS": str(SLOWNESS),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        script = ["sh", "-c", SCRIPT, "sh", str(NATIVE), NATIVE_TESTS]
        vm.start([*script, *command], cwd=TESTS.parent, env=env)
        lines = vm.stdout.lines()
        native = []
        for line in lines:
            native.append(line)
            if line.startswith("native core: "):
                break
        mounts = list(lines)
        status = vm.wait(timeout_s)
        return Run("\n".join(native), "\n".join(mounts), status)


@pytest.fixture(scope="module")
def run() -> Run:
    return run_in_vm(SAMPLE, timeout_s=900)


def test_native_core_passes_its_c_tests_on_dax(run: Run) -> None:
    assert "native core: 0" in run.native, run.native
    assert "ok " in run.native


def test_mounts_on_dax_pass_a_sample_of_their_tests(run: Run) -> None:
    assert run.status == 0, run.mounts
    assert f"{len(SAMPLE)} passed" in run.mounts, run.mounts


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_mounts_on_dax_pass_their_tests() -> None:
    run = run_in_vm([FILES, PMEM, MIGRATION], timeout_s=7000)
    assert run.status == 0, run.mounts
