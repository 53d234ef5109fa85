"""Two filesystems that lose power together, below a mount.

A power cut is the shutdown ioctl of ext4 and xfs without flushing their journals: nothing that was
not on the disk, or committed, at that moment is there afterwards.  What it cannot show is a disk
that forgets what is in its own cache: these loop devices have none.
"""

import fcntl
import os
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

from harness import Mount, is_mounted, loop_filesystem, wait_until

# _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are one.
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
MKFS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
# The smallest that mkfs.xfs makes is 300 MiB.
SIZES = {"ext4": {"fast": "64M", "slow": "256M"}, "xfs": {"fast": "300M", "slow": "300M"}}


class Machine:
    """A fast and a slow filesystem of one kind, and a mount on them."""

    def __init__(self, base: Path, kind: str, options: tuple[str, ...]) -> None:
        self.base = base
        self._stack = ExitStack()
        mountpoint = base / "mnt"
        mountpoint.mkdir(parents=True)
        for name, size in SIZES[kind].items():
            self._stack.enter_context(
                loop_filesystem(base / f"{name}.img", base / name, size, MKFS[kind])
            )
        self.mount = Mount(base / "fast", base / "slow", mountpoint, options, base / "log")

    def cut_power(self, *names: str) -> None:
        """These filesystems, or both, stop at once, in this order; the daemon, if there is one,
        dies; they are mounted again."""
        flag = struct.pack("I", _NO_LOG_FLUSH)
        paths = [self.base / name for name in names or ("fast", "slow")]
        fds = [os.open(path, os.O_RDONLY) for path in paths]
        for fd in fds:
            fcntl.ioctl(fd, _SHUTDOWN, flag)
        for fd in fds:
            os.close(fd)
        if is_mounted(self.mount.mountpoint):
            self.mount.kill()
            self.mount.clean_up()
        for path in paths:
            wait_until(lambda path=path: _unmounted(path), "umount")
            subprocess.run(["mount", "-o", "loop", f"{path}.img", str(path)], check=True)

    def close(self) -> None:
        """Nothing is left of it."""
        self.mount.clean_up()
        self._stack.close()


def _unmounted(path: Path) -> bool:
    return subprocess.run(["umount", str(path)], capture_output=True).returncode == 0
