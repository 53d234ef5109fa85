"""The native core by itself: the C programs of tests/native, plain and under sanitizers."""

import subprocess
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent / "native"


@pytest.mark.parametrize(
    "sanitizers",
    [
        pytest.param("", id="plain"),
        pytest.param("address,undefined", id="asan-ubsan"),
        pytest.param("thread", id="tsan"),
    ],
)
def test_native_core_passes_its_c_tests(sanitizers: str) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-s", "-j2", f"SAN={sanitizers}", "check"],
        cwd=DIRECTORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
