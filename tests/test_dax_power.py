"""Power cuts while segments grow in persistent memory, on real fsdax in a VM."""

import random
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from daxvm.vm import MIB, Vm

WRITER = Path(__file__).parent / "guest" / "writer.py"
PMEM_SIZE = 256 * MIB
CUTS = 20


class Expected:
    """What must be there after a cut, by what the writer said before it."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.may_be_gone: set[str] = set()

    def note(self, lines: Iterable[str]) -> None:
        for line in lines:
            kind, name, *numbers = line.split()
            if kind == "acked":
                self.sizes[name] = int(numbers[0]) + int(numbers[1])
            elif kind == "made":
                self.sizes[name] = 0
            elif kind == "removing":
                self.may_be_gone.add(name)

    def check(self, found: dict[str, int], in_flight_max: int) -> None:
        for name, size in self.sizes.items():
            if name not in found:
                assert name in self.may_be_gone, f"{name} is gone"
                continue
            assert size <= found[name] <= size + in_flight_max, name
        self.sizes = dict(found)
        self.may_be_gone = set()


def cut_once(pmem: Path, seed: int, expected: Expected, acks: int) -> None:
    """One boot: checks what the last cut left, writes, and cuts."""
    with Vm(pmem_file=pmem, pmem_size=PMEM_SIZE, keep_filesystem=pmem.exists()) as vm:
        vm.start([sys.executable, str(WRITER), str(seed)])
        lines = vm.stdout.lines()
        found: dict[str, int] = {}
        for line in lines:
            if line == "checked":
                break
            kind, name, size, *_ = line.split()
            assert kind == "found", line
            found[name] = int(size)
        else:
            pytest.fail("the writer ended: " + "\n".join(vm.stderr.lines()))
        expected.check(found, in_flight_max=40_000)
        said = [next(lines) for _ in range(acks)]
        vm.power_cut()
        said += lines
        expected.note(said)


@pytest.mark.parametrize(
    "cuts", [CUTS, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_every_acked_byte_survives_power_cuts_and_nothing_else(cuts: int, tmp_path: Path) -> None:
    choose = random.Random(cuts)
    expected = Expected()
    for seed in range(cuts):
        cut_once(tmp_path / "pmem", seed, expected, acks=choose.randrange(20, 250))
