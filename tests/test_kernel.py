"""Which kernels are trusted with what."""

import pytest

from pafkafs.kernel import drops_pages_after_direct_write


@pytest.mark.parametrize(
    ("release", "known"),
    [
        ("6.19.0", True),
        ("6.19-rc4-amd64", True),
        ("7.0.3", True),
        ("6.18.44-cloud", True),
        ("6.12.90+deb13-amd64", True),
        ("6.12.43+deb13-amd64", False),
        ("6.18.1", False),
        ("6.6.0", False),
        ("6.8.0-124-generic", False),
        ("5.15.0", False),
        ("6.18", False),
        ("something", False),
    ],
)
def test_kernels_that_drop_pages_after_a_direct_write(release: str, known: bool) -> None:
    assert drops_pages_after_direct_write(release) == known
