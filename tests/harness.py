"""What tests of a whole mount share: a mount in a directory of its own, and waiting."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pafkafs import mountpoint
from pafkafs.commands.status import ask as ask_for_status

PAFKAFS = str(Path(sys.executable).with_name("pafkafs"))
MOUNT_PAFKAFS = str(Path(sys.executable).with_name("mount.pafkafs"))
# How many times longer than on a bare machine everything may take.
SLOWNESS = int(os.environ.get("PAFKAFS_TEST_SLOWNESS", "1"))
COMMAND_TIMEOUT_S = 60.0 * SLOWNESS
# A directory on persistent memory, as scripts/dax-vm has it: fast tiers are there if it is given.
DAX = os.environ.get("PAFKAFS_DAX")
# Whether segments grow through a mapping has to be said where it is not the default.
GROWING = () if DAX else ("--pmem", "on")
PLAIN = ("--pmem", "off") if DAX else ()


def wait_until(
    condition: Callable[[], Any], what: str, timeout_s: float = 20.0, poll_s: float = 0.02
) -> Any:
    """The first true value of condition; fails with what when it does not come."""
    deadline = time.monotonic() + timeout_s * SLOWNESS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s * SLOWNESS:g} s for {what}"
        time.sleep(poll_s)
    return value


def run_pafkafs(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A pafkafs command with its output, whatever its exit status."""
    return subprocess.run(
        [PAFKAFS, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
        **options,
    )


@dataclass
class Mount:
    """A pafkafs mount, to be started and stopped any number of times."""

    fast: Path
    slow: Path
    mountpoint: Path
    options: tuple[str, ...] = ()
    log: Path = Path("/dev/null")
    fast_list: str = field(default="")
    slow_list: str = field(default="")
    command: Callable[..., subprocess.CompletedProcess[str]] = run_pafkafs

    @property
    def tree(self) -> Path:
        """The home tree."""
        return self.fast / "tree"

    @property
    def objects(self) -> list[Path]:
        """All objects of the slow device."""
        return [p for p in (self.slow / "objects").rglob("*") if p.is_file()]

    def mount(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Runs `pafkafs mount`, whatever comes of it."""
        return self.command(
            "mount",
            "--log-file",
            str(self.log),
            *self.options,
            *more,
            self.fast_list or str(self.fast),
            self.slow_list or str(self.slow),
            str(self.mountpoint),
        )

    def start(self, *more: str) -> "Mount":
        """Mounts; fails when that fails."""
        result = self.mount(*more)
        assert result.returncode == 0, result.stderr + self.log_text()
        return self

    def stop(self) -> None:
        """Unmounts cleanly; fails when that fails."""
        result = self.command("umount", str(self.mountpoint))
        assert result.returncode == 0, result.stderr

    def restart(self, *more: str) -> None:
        """Unmounts and mounts."""
        self.stop()
        self.start(*more)

    def status(self) -> dict[str, Any]:
        """This mount in `pafkafs status --json`, without the start of a process."""
        mounted = mountpoint.find_mounted(str(self.mountpoint))
        assert mounted is not None, f"nothing is mounted at {self.mountpoint}"
        return ask_for_status(mounted)

    def device(self, tier: str, index: int = 0) -> dict[str, Any]:
        """A device in the status."""
        tiers = {t["name"]: t for t in self.status()["tiers"]}
        device: dict[str, Any] = tiers[tier]["devices"][index]
        return device

    @property
    def pid(self) -> int:
        """Of the daemon."""
        pid: int = self.status()["pid"]
        return pid

    def kill(self) -> None:
        """SIGKILL to the daemon, as the OOM killer would."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_dead_mount(self.mountpoint), "the daemon's death")

    def log_text(self) -> str:
        """What the daemon logged."""
        return self.log.read_text() if self.log.is_file() else ""

    def clean_up(self) -> None:
        """Leaves nothing mounted and no daemon, in whatever state a test left it."""
        if os.path.ismount(self.mountpoint) or is_dead_mount(self.mountpoint):
            run_pafkafs("umount", "--lazy", str(self.mountpoint))
        while is_mounted(self.mountpoint):
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=True)


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def mount_line(path: Path) -> str | None:
    """The line of mountinfo for path, read without touching it; the mount may be dead."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next((line for line in reversed(lines) if line.split()[4] == str(path)), None)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted at path, dead or alive."""
    return mount_line(path) is not None


def is_dead_mount(path: Path) -> bool:
    """Whether a mount is there whose daemon is gone."""
    try:
        os.statvfs(path)  # which the kernel never answers from its cache
    except OSError as error:
        return error.errno == 107  # ENOTCONN
    return False


@contextmanager
def tmpfs(path: Path, size: str, *options: str) -> Iterator[Path]:
    """A tmpfs of its own, as a fast tier in memory."""
    path.mkdir(parents=True, exist_ok=True)
    flags = ",".join([f"size={size}", *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def fast_memory(path: Path, size: str) -> Iterator[Path]:
    """A directory for a fast tier in memory: a tmpfs of its own, or, where there is some, on
    persistent memory, whose size is another."""
    if DAX is None:
        with tmpfs(path, size) as made:
            yield made
    else:
        with tempfile.TemporaryDirectory(dir=DAX) as made_there:
            yield Path(made_there)


@contextmanager
def loop_filesystem(image: Path, path: Path, size: str, mkfs: tuple[str, ...]) -> Iterator[Path]:
    """A filesystem of its own on a loop device."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    subprocess.run([*mkfs, str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
        image.unlink()


def tree_contents(root: Path) -> dict[str, tuple[str, bytes]]:
    """Every name below root with what it is and holds, symlinks to files followed: what the
    mount shows, or what its home tree shows without it."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir() and not path.is_symlink():
            found[name] = ("directory", b"")
        elif path.is_file():
            found[name] = ("file", path.read_bytes())
        else:
            found[name] = ("other", b"")
    return found


def let_others_search(path: Path) -> None:
    """Opens pytest's private directories above path to other users."""
    for parent in path.parents:
        if parent.is_relative_to(tempfile.gettempdir()) and not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
