"""Runs in the VM: recovers what power cuts left, and copies what the mounts show to the host.

    python recover.py SHARE MEMORY...

The log directory that was on a MEMORY is afterwards in SHARE, under its name.
"""

import subprocess
import sys
from pathlib import Path

from mounting import MOUNTPOINT, mount


def main() -> None:
    share = Path(sys.argv[1])
    for memory in map(Path, sys.argv[2:]):
        mountpoint = MOUNTPOINT.with_name(memory.name)
        mount(memory, mountpoint)
        copy = share / memory.name
        subprocess.run(["cp", "-r", "--sparse=always", str(mountpoint), str(copy)], check=True)
        subprocess.run(["umount", str(mountpoint)], check=True)


main()
