"""docs/guarantees.md names tests: each of them is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", TEXT)))


@pytest.mark.parametrize("named", NAMED)
def test_named_test_is_there(named: str) -> None:
    file, _, test = named.partition("::")
    text = (ROOT / file).read_text()
    assert not test or f"def {test}(" in text
