"""Each single flush, drain and fsync of the write path for persistent memory is needed: without it
tests/native/test_pmem.c fails.  They are found in the sources: a new one is a new mutant."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
C_TESTS = Path(__file__).parent / "native"
SOURCES = ("persist.c", "pmem.c", "sizes.c")

# What takes one of them out, and leaves all else.
MUTATIONS = (
    (r"\bpersist_drain\(\);", ";"),
    (r"\bpersist_store\(", "atomic_store("),
    (r"\bpersist_copy\((?=\w+->)", "__builtin_memcpy("),
    (r"\bpmem_drain\(\);", ";"),
    (r"\bpmem_flush\(\w+, [^;]*;", ";"),
    (r"\bPMEM_F_MEM_NONTEMPORAL\b", "PMEM_F_MEM_NOFLUSH"),
    # Of the growing file.  The fdatasync of a growth only spares its writer a wait.
    (r"\bfsync\(p->fd\)", "0"),
)


@dataclass(frozen=True)
class Mutant:
    source: str
    line: int
    start: int
    end: int
    replacement: str
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} {self.text}"

    def code(self) -> str:
        whole = (NATIVE / self.source).read_text()
        return whole[: self.start] + self.replacement + whole[self.end :]


def find_mutants() -> Iterator[Mutant]:
    for source in SOURCES:
        code = (NATIVE / source).read_text()
        for pattern, replacement in MUTATIONS:
            for match in re.finditer(pattern, code):
                line = code.count("\n", 0, match.start()) + 1
                text = code.splitlines()[line - 1].strip()
                if not text.startswith("void "):  # the definition
                    yield Mutant(source, line, *match.span(), replacement, text)


MUTANTS = list(find_mutants())


class Build:
    """A copy of native/ and what is built of it: only what has changed is built again."""

    def __init__(self, directory: Path) -> None:
        self._native = directory / "native"
        self._build = directory / "build"
        shutil.copytree(NATIVE, self._native)

    def run(self, source: str, code: str) -> subprocess.CompletedProcess[str]:
        """The tests with this code in the place of a source."""
        (self._native / source).write_text(code)
        program = self._build / "test_pmem"
        variables = [f"NATIVE={self._native}", f"BUILD={self._build}"]
        command = ["make", "--no-print-directory", "-s", "-j2", *variables, str(program)]
        built = subprocess.run(command, cwd=C_TESTS, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        (self._native / source).write_text((NATIVE / source).read_text())
        return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("mutants"))


def test_the_sources_as_they_are_pass(build: Build) -> None:
    done = build.run("pmem.c", (NATIVE / "pmem.c").read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_kind_of_mutation_finds_something() -> None:
    found = {mutant.replacement for mutant in MUTANTS}
    assert found == {replacement for _, replacement in MUTATIONS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_without_one_of_them_the_tests_fail(build: Build, mutant: Mutant) -> None:
    done = build.run(mutant.source, mutant.code())
    assert done.returncode == 1, f"nothing has noticed that it is gone: {mutant}"
