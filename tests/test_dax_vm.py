"""The VM with persistent memory: what runs in it, and what a power cut leaves."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from daxvm.errors import VmError
from daxvm.vm import MIB, Vm

DAX_VM = Path(__file__).parents[1] / "scripts" / "dax-vm"
PMEM_SIZE = 256 * MIB
TIMEOUT_S = 120
LINES_BEFORE_CUT = 300

# Flags that a kernel without DAX refuses: MAP_SHARED_VALIDATE | MAP_SYNC.
MAP_SYNC = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4096)
try:
    mmap.mmap(file, 4096, flags=0x3 | 0x80000)[:5] = b"store"
    print("synchronous")
except OSError as error:
    print(os.strerror(error.errno))
"""
# Acknowledges each record when it is durable, until the power is cut.
WRITER = """
import os
from pafkafs import _native
print(_native.is_dax(os.open("/pmem", os.O_RDONLY)), flush=True)
log = os.open("/pmem/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.fsync(os.open("/pmem", os.O_RDONLY))
number = 0
while True:
    os.write(log, b"%d\\n" % number)
    os.fsync(log)
    os.write(1, b"%d %s\\n" % (number, b"x" * 1000))
    number += 1
"""
# Runs after it, on what it left.
CHECKER = f"""
set -u
cp /pmem/log "$1"
cp /pmem1/log "$2"
cd /pmem
{sys.executable} -c '{MAP_SYNC}' /pmem/dax
{sys.executable} -c '{MAP_SYNC}' /dev/shm/memory
pwd >&2
printf 'no newline'
exit 42
"""


@dataclass(frozen=True)
class Cut:
    """A power cut while the writer ran, and a check in a second VM.

    Some time before it the memory was copied while the first VM stood still.
    """

    kind: str
    acked: list[str]
    acked_at_copy: list[str]
    ended: str
    log: list[str]
    log_of_copy: list[str]
    check: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    work = tmp_path_factory.mktemp("dax-vm")
    pmem, copy, share = work / "pmem", work / "copy", work / "share"
    share.mkdir()
    with Vm(pmem_file=pmem, pmem_size=PMEM_SIZE) as vm:
        vm.start([sys.executable, "-c", WRITER])
        lines = vm.stdout.lines()
        kind = next(lines)
        acked = [next(lines) for _ in range(LINES_BEFORE_CUT)]
        with vm.standing_still():
            shutil.copy(pmem, copy)
            acked += vm.stdout.lines_here()
        acked_at_copy = list(acked)
        acked += [next(lines) for _ in range(LINES_BEFORE_CUT)]
        vm.power_cut()
        acked += lines
        with pytest.raises(VmError) as ended:
            vm.wait()
    logs = [share / "log", share / "log-of-copy"]
    options = ["--pmem-file", str(pmem), "--keep-filesystem", "--more-pmem", str(copy)]
    options += ["--share", str(share)]
    check = dax_vm(*options, "sh", "-c", CHECKER, "sh", *map(str, logs))
    written = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    yield Cut(kind, acked, acked_at_copy, str(ended.value), *written, check)
    pmem.unlink()
    copy.unlink()


def dax_vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(DAX_VM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_native_core_takes_the_guests_pmem_for_dax(cut: Cut) -> None:
    assert cut.kind == "True"


def test_lines_received_before_a_power_cut_are_whole_and_in_order(cut: Cut) -> None:
    assert len(cut.acked) >= 2 * LINES_BEFORE_CUT
    assert cut.acked == [f"{number} {'x' * 1000}" for number in range(len(cut.acked))]


def test_what_was_fsynced_before_a_power_cut_is_there(cut: Cut) -> None:
    """And at most the one record more whose line was not written: no line is under way."""
    assert cut.log == [str(number) for number in range(len(cut.log))]
    assert len(cut.acked) <= len(cut.log) <= len(cut.acked) + 1


def test_copy_made_while_the_vm_stood_still_is_what_a_power_cut_would_have_left(cut: Cut) -> None:
    assert cut.log_of_copy == [str(number) for number in range(len(cut.log_of_copy))]
    assert len(cut.acked_at_copy) <= len(cut.log_of_copy) <= len(cut.acked_at_copy) + 1
    assert len(cut.log_of_copy) < len(cut.log)


def test_the_wait_for_a_command_whose_vm_lost_power_says_so(cut: Cut) -> None:
    assert cut.ended == "the VM died: it was killed"


def test_output_and_status_are_those_of_the_command(cut: Cut) -> None:
    assert cut.check.stdout.endswith("no newline")
    assert cut.check.stderr == "/pmem\n"
    assert cut.check.returncode == 42


def test_map_sync_works_on_pmem_and_only_there(cut: Cut) -> None:
    on_pmem, in_memory, _ = cut.check.stdout.split("\n")
    assert on_pmem == "synchronous"
    assert in_memory == "Operation not supported"


def test_timeout_ends_the_vm_and_is_told_from_a_status_of_the_command() -> None:
    late = dax_vm("--timeout", "0.5", "sleep", "1000")
    assert late.returncode == 124
    assert late.stderr == "dax-vm: the command did not end in time\n"


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--pmem-size", "100MiB", "true"], 125, "100 MiB is not a multiple of 128"),
        (["--memory", "1MiB", "true"], 125, "the VM died: qemu"),
        (["--keep-filesystem", "--pmem-file", "/none", "true"], 125, "/none: No such file"),
        (["--keep-filesystem", "true"], 2, "--keep-filesystem needs --pmem-file"),
        (["--more-pmem", "/none", "true"], 2, "--more-pmem needs --keep-filesystem"),
        (["--pmem-size", "1"], 2, "'1' is not a size like"),
        ([], 2, "a command is needed"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], status: int, complaint: str
) -> None:
    result = dax_vm(*arguments)
    assert result.returncode == status
    assert complaint in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


# A disk of 10 MB/s, where the kernel has its limits in cgroup v2 alone.
DISK = f"""
set -eu
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /tmp/disk
{DAX_VM.with_name("hdd")} /tmp/disk --rate 10MB --size 128MiB --image-in /pmem -- sh -c '
    grep -q hdd /proc/self/cgroup
    dd if=/dev/zero of=/tmp/disk/file bs=1M count=40 conv=fsync 2>&1
    echo 3 > /proc/sys/vm/drop_caches
    dd if=/tmp/disk/file of=/dev/null bs=1M 2>&1'
cat /proc/self/cgroup
ls -d /sys/fs/cgroup/*hdd* || true
"""


def test_hard_disk_is_throttled_by_cgroup_v2() -> None:
    done = subprocess.run(
        [DAX_VM, "sh", "-c", DISK], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    rates = [
        float(bytes_) / float(seconds)
        for bytes_, seconds in re.findall(r"(\d+) bytes .* copied, ([\d.]+) s", done.stdout)
    ]
    assert len(rates) == 2
    assert max(rates) < 12e6, rates
    assert done.stdout.endswith("\n0::/\n"), done.stdout
