"""The directory a broker is given: a pafkafs mount, or a plain directory as the control.

Both can be detached, after which `home` is an ordinary directory that holds the same files:
what the mount showed and what it leaves behind can be compared entry by entry.
"""

import hashlib
import os
import shutil
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from harness import Mount

# A write to a demoted file sets the time of its object and then that of its shadow, and on a
# busy machine a thread may be kept waiting between the two. Kafka's retention counts in seconds.
MTIME_SKEW_MAX_NS = 1_000_000_000


class LogDir(Protocol):
    """What the scenarios need to know of a log directory."""

    path: Path
    home: Path

    def attach(self) -> None:
        """Make `path` usable."""

    def detach(self) -> None:
        """Leave `home` alone with the files; raises if what it leaves is inconsistent."""

    def discard(self) -> None:
        """Delete the data, in whatever state a failed test left it."""

    def used_bytes(self) -> int:
        """What the files take on the disks below."""

    def expect_both_tiers(self) -> None:
        """Fail unless there are files on the fast and on the slow tier."""


class PlainDirectory:
    """The control: what fails here as well is not the fault of the mount."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = self.home = path

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def discard(self) -> None:
        shutil.rmtree(self.path)

    def used_bytes(self) -> int:
        return allocated_bytes(self.path)

    def expect_both_tiers(self) -> None:
        pass


class MountedDirectory:
    """A pafkafs mount with little room on its fast tier, so that files spill."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.path = mount.mountpoint
        self.home = mount.tree

    def attach(self) -> None:
        self.mount.start()

    def detach(self) -> None:
        self.mount.stop()
        stubs = (path.readlink() for path in self.home.rglob("*") if path.is_symlink())
        unreferenced = sorted(set(self.mount.objects) - set(stubs))
        assert not unreferenced, f"objects without a stub after a clean unmount: {unreferenced[:5]}"

    def discard(self) -> None:
        self.mount.clean_up()
        shutil.rmtree(self.mount.slow)

    def used_bytes(self) -> int:
        return allocated_bytes(self.mount.fast) + allocated_bytes(self.mount.slow)

    def expect_both_tiers(self) -> None:
        for tier in ("fast", "slow"):
            device = self.mount.device(tier)
            assert device["files"] > 0, device


@dataclass(frozen=True)
class Entry:
    """A file or directory as Kafka can see it."""

    mode: int
    uid: int
    gid: int
    size: int | None = None
    mtime_ns: int | None = None
    digest: str | None = None


def snapshot(top: Path) -> dict[str, Entry]:
    """Everything below `top` by relative path, symlinks followed to what they stand for."""
    found: dict[str, Entry] = {}
    for directory, names, files in os.walk(top, onerror=_raise):
        for name in names + files:
            path = Path(directory, name)
            found[str(path.relative_to(top))] = _entry(path)
    return found


def differences(shown: dict[str, Entry], kept: dict[str, Entry]) -> list[str]:
    """What the mount showed against what lies in the tiers, a line for each difference."""
    lines = [f"{name}: not in the tiers" for name in sorted(shown.keys() - kept.keys())]
    lines += [f"{name}: not shown by the mount" for name in sorted(kept.keys() - shown.keys())]
    for name in sorted(shown.keys() & kept.keys()):
        for field in fields(Entry):
            was, now = (getattr(side[name], field.name) for side in (shown, kept))
            if was != now and not _is_skew(field.name, was, now):
                lines.append(f"{name}: {field.name} shown as {was}, kept as {now}")
    return lines


def allocated_bytes(top: Path) -> int:
    """Blocks held below `top`; a broker deletes files while this walks."""
    total = 0
    for directory, _names, files in os.walk(top):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def _is_skew(field: str, was: int, now: int) -> bool:
    return field == "mtime_ns" and abs(was - now) <= MTIME_SKEW_MAX_NS


def _entry(path: Path) -> Entry:
    status = path.stat()
    owner = (status.st_mode, status.st_uid, status.st_gid)
    if not stat.S_ISREG(status.st_mode):
        return Entry(*owner)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha1").hexdigest()
    return Entry(*owner, size=status.st_size, mtime_ns=status.st_mtime_ns, digest=digest)


def _raise(error: OSError) -> None:
    raise error
