"""A slow tier on an emulated hard disk."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from hdd import HddError, hdd

from kafka.logdirs import MountedDirectory


@contextmanager
def made_disk(tmp_path: Path, bytes_per_s: int, **options: Any) -> Iterator[Path]:
    """Skips the test, with the reason, where none can be made."""
    directory = tmp_path / "disk"
    directory.mkdir()
    with ExitStack() as stack:
        try:
            made = hdd(directory, bytes_per_s, image_in=tmp_path, **options)
            yield stack.enter_context(made)
        except HddError as error:
            pytest.skip(str(error))


@contextmanager
def over_disk(mount: Mount, disk: Path) -> Iterator[MountedDirectory]:
    """The mount, with its slow device there."""
    mount.slow = disk / "pafkafs"
    mount.slow.mkdir()
    provider = MountedDirectory(mount)
    provider.attach()
    yield provider
    provider.discard()
