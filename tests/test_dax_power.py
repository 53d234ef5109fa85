"""Power cuts while segments grow in persistent memory, on real fsdax in a VM.

The persistent memory of the VM is a file. While QEMU stands still it is copied: that is what a
power cut at that instant would have left. Each life of the VM ends with a real one.
"""

import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from daxvm.vm import MIB, Vm

WRITER = Path(__file__).parent / "guest" / "writer.py"
PMEM_SIZE = 256 * MIB
ACKS_BETWEEN_CUTS = range(20, 250)
# An instant anywhere between two acks, not just after one.
PAUSE_MAX_S = 0.05
IN_FLIGHT_MAX = 40_000


@dataclass
class Expected:
    """What must be there after a cut, by what the writer said before it."""

    sizes: dict[str, int] = field(default_factory=dict)
    may_be_gone: set[str] = field(default_factory=set)

    def note(self, lines: Iterable[str]) -> None:
        for line in lines:
            kind, name, *numbers = line.split()
            if kind == "acked":
                self.sizes[name] = int(numbers[0]) + int(numbers[1])
            elif kind == "made":
                self.sizes[name] = 0
            elif kind == "removing":
                self.may_be_gone.add(name)
            else:
                pytest.fail(line)

    def check(self, found: dict[str, int]) -> None:
        for name, size in self.sizes.items():
            if name not in found:
                assert name in self.may_be_gone, f"{name} is gone"
                continue
            assert size <= found[name] <= size + IN_FLIGHT_MAX, name
        self.sizes = dict(found)
        self.may_be_gone = set()


@dataclass(frozen=True)
class Cut:
    """The persistent memory after a cut, and what must be on it."""

    memory: Path
    expected: Expected


def found_on(lines: Iterator[str], vm: Vm) -> dict[str, int]:
    """The files that the writer found on one memory, whole, and their sizes."""
    found: dict[str, int] = {}
    for line in lines:
        if line == "checked":
            return found
        kind, name, size, *_ = line.split()
        assert kind == "found", line
        found[name] = int(size)
    pytest.fail("the writer ended: " + "\n".join(vm.stderr.lines()))


def live(
    memory: Path, before: Sequence[Cut], seed: int, cuts: int, choose: random.Random
) -> list[Cut]:
    """One life of the VM: checks what the cuts of the last one left, writes on, and is cut."""
    copies = [cut.memory for cut in before[:-1]]
    expected = before[-1].expected if before else Expected()
    made: list[Cut] = []
    with Vm(
        pmem_file=memory,
        pmem_size=PMEM_SIZE,
        keep_filesystem=memory.exists(),
        more_pmem=copies,
    ) as vm:
        memories = [f"/pmem{number}" for number in range(1, len(copies) + 1)]
        vm.start([sys.executable, str(WRITER), str(seed), *memories])
        lines = vm.stdout.lines()
        for cut in before[:-1]:
            cut.expected.check(found_on(lines, vm))
            cut.memory.unlink()
        expected.check(found_on(lines, vm))
        for number in range(cuts):
            expected.note(next(lines) for _ in range(choose.choice(ACKS_BETWEEN_CUTS)))
            time.sleep(choose.random() * PAUSE_MAX_S)
            if number == cuts - 1:
                vm.power_cut()
                expected.note(vm.stdout.lines_here())
                made.append(Cut(memory, expected))
                continue
            copy = memory.with_name(f"{memory.name}-{number}")
            with vm.standing_still():
                subprocess.run(["cp", "--sparse=always", str(memory), str(copy)], check=True)
                expected.note(vm.stdout.lines_here())
            made.append(Cut(copy, deepcopy(expected)))
    return made


@pytest.mark.parametrize(
    ("lives", "cuts"),
    [
        pytest.param(4, 5, marks=pytest.mark.timeout(1800)),
        pytest.param(30, 10, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_every_acked_byte_survives_power_cuts_and_nothing_else(
    lives: int, cuts: int, tmp_path: Path
) -> None:
    choose = random.Random()
    before: list[Cut] = []
    for seed in range(lives):
        before = live(tmp_path / "pmem", before, seed, cuts, choose)
    live(tmp_path / "pmem", before, lives, 1, choose)
