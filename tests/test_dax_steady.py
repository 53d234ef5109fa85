"""What an append to a file in persistent memory does not do, on real fsdax in a VM."""

import subprocess
import sys
from pathlib import Path

import pytest
from daxvm.vm import MIB, Vm

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "guest" / "steady.c"
# Of the program itself: its stack, its first calls.
OWN_FAULTS = 20

STATUS = f"""
import os, sys
from pathlib import Path
for name in ("fast", "slow"):
    Path("/pmem", name).mkdir()
Path("/tmp/mnt").mkdir()
sys.argv = ["pafkafs", "mount", "/pmem/fast", "/pmem/slow", "/tmp/mnt"]
from pafkafs.commands import main
if os.fork() == 0:
    main()
os.wait()
path = "/tmp/mnt/{0:020}.log"
with open(path, "wb", buffering=0) as file:
    file.write(b"x" * 100)
    print(os.stat(path).st_size, os.stat("/pmem/fast/tree/{0:020}.log").st_size)
sys.argv = ["pafkafs", "status", "--json"]
main()
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = tmp_path_factory.mktemp("steady") / "steady"
    native = ROOT / "native"
    sources = [str(native / f"{name}.c") for name in ("media", "persist", "pmem", "sizes")]
    command = ["gcc", "-std=gnu11", "-O2", "-pthread", f"-I{native}", str(SOURCE), *sources]
    subprocess.run([*command, "-lpmem", "-o", str(program)], check=True)
    script = f'{program} /pmem /proc/fs/jbd2/pmem0-8/info; exec "$0" -c "$1"'
    with Vm(pmem_size=256 * MIB) as vm:
        vm.start(["sh", "-c", script, sys.executable, STATUS])
        lines = list(vm.stdout.lines())
        assert vm.wait(60) == 0, list(vm.stderr.lines())
    return "\n".join(lines)


def number(output: str, name: str) -> int:
    return int(next(line for line in output.splitlines() if line.startswith(name)).split()[1])


def test_append_makes_no_system_call(output: str) -> None:
    assert number(output, "status") == 0  # else it was killed for one


def test_append_meets_no_page_fault_and_commits_no_journal(output: str) -> None:
    assert number(output, "faults") < OWN_FAULTS
    assert number(output, "commits") == 0


def test_dax_is_detected_and_new_segments_grow_there(output: str) -> None:
    assert '"kind": "dax"' in output
    assert '"durability": "power"' in output
    assert '"persist": "cl' in output
    seen, in_tree = next(line for line in output.splitlines() if line.startswith("100 ")).split()
    assert int(in_tree) > int(seen)
