"""A mount in the VM, as the programs beside this make it."""

from collections.abc import Mapping
from pathlib import Path

from pafkafs.commands.mount import start_in_background
from pafkafs.config import mount_options

MOUNTPOINT = Path("/tmp/kafka-logs")


def mount(memory: Path, mountpoint: Path, options: Mapping[str, str] | None = None) -> None:
    """Mounts with both tiers on the persistent memory, one for each device that is needed."""
    fast, slow = memory / "fast", memory / "slow"
    for directory in (mountpoint, fast, slow):
        directory.mkdir(exist_ok=True)
    given = {"fast": str(fast), "slow": str(slow), "mountpoint": str(mountpoint)}
    log = f"/tmp/{mountpoint.name}.log"
    start_in_background(mount_options({}, {**given, "log-file": log, **(options or {})}))
