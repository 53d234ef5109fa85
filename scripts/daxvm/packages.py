"""Debian's packages: what the host needs for a VM is installed when it is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from daxvm.errors import VmError

# ndctl and mkfs run in the guest, from the host's root.
_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "ndctl": "ndctl",
    "mkfs.ext4": "e2fsprogs",
    "setpriv": "util-linux",
}
_TIMEOUT_S = 900


def install() -> None:
    """Install what is missing."""
    missing = sorted({package for name, package in _PROGRAMS.items() if not shutil.which(name)})
    if missing:
        update_lists()
        say(f"installing {' '.join(missing)}")
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing])


def update_lists() -> None:
    if not shutil.which("apt-get"):
        raise VmError("apt-get not found: Debian is needed")
    run(["apt-get", "update", "-qq"])


def say(what: str) -> None:
    print(f"dax-vm: {what}", file=sys.stderr, flush=True)


def run(command: list[str], cwd: Path | None = None) -> str:
    """Run a tool to its end and return what it printed."""
    what = " ".join(command[:2])
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as late:
        raise VmError(f"{what}: no end within {_TIMEOUT_S} s") from late
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E:")]
        raise VmError(f"{what} failed: {(errors or lines[-1:] or ['it said nothing'])[0]}")
    return done.stdout
