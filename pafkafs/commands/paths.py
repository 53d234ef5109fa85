"""Paths as an operator gives them: as seen in a mount."""

import os
from pathlib import Path

from pafkafs import mountpoint
from pafkafs.errors import PafkafsError


def below_mount(text: str) -> tuple[str, str]:
    """(mountpoint, path below it) of a path in a pafkafs mount, symlinks followed; the latter is
    empty for the mountpoint itself."""
    path = Path(os.path.realpath(text))
    mounts = [m.mountpoint for m in mountpoint.all_mounted() if path.is_relative_to(m.mountpoint)]
    if not mounts:
        raise PafkafsError(f"{text} is not in a pafkafs mount; give it as seen in the mount")
    where = max(mounts, key=len)
    relative = os.path.relpath(path, where)
    return where, "" if relative == "." else relative
