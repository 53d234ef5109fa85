"""The persistent memory of this host, as sysfs has it: regions and their namespaces."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ND_DEVICES = Path("/sys/bus/nd/devices")
_MODES = {"memory": "fsdax", "dax": "devdax", "safe": "sector"}


@dataclass(frozen=True)
class Namespace:
    """A namespace; mode is fsdax, devdax, sector or raw."""

    name: str
    mode: str
    size_bytes: int
    block_device: str | None

    def holds(self, device_number: int) -> bool:
        """Whether a filesystem with this device number is on it."""
        if self.block_device is None:
            return False
        numbers = attribute(Path("/sys/class/block", self.block_device), "dev")
        return numbers == f"{os.major(device_number)}:{os.minor(device_number)}"

    @property
    def commands(self) -> str:
        """How to get a filesystem with DAX on it."""
        device = f"/dev/{self.block_device or 'pmem0'}"
        if self.mode == "fsdax":
            return f"if {device} holds nothing: {_filesystem(device)}"
        make = f"ndctl create-namespace -f -e {self.name} -m fsdax"
        return f"if it holds nothing: {make} && {_filesystem(device)}"


@dataclass(frozen=True)
class Region:
    """Persistent memory with room for another namespace."""

    name: str
    available_bytes: int

    @property
    def commands(self) -> str:
        """How to get a filesystem with DAX on it."""
        make = f"ndctl create-namespace -r {self.name} -m fsdax"
        return f"{make}, which names its device, then for /dev/pmem0: {_filesystem('/dev/pmem0')}"


def _filesystem(device: str) -> str:
    return f"mkfs.ext4 -b 4096 {device} && mount -o dax=always {device} /pmem"


def namespaces(devices: Path = _ND_DEVICES) -> Iterator[Namespace]:
    """The namespaces with some size."""
    for path in sorted(devices.glob("namespace*")):
        size = int(attribute(path, "size") or 0)
        if size == 0:
            continue
        blocks = sorted(path.glob("block/*")) or sorted(devices.glob(f"pfn{path.name[9:]}/block/*"))
        yield Namespace(
            path.name,
            _MODES.get(attribute(path, "mode") or "raw", "raw"),
            size,
            blocks[0].name if blocks else None,
        )


def free_regions(devices: Path = _ND_DEVICES) -> Iterator[Region]:
    """The regions that no namespace takes whole: all of them on a new host."""
    for path in sorted(devices.glob("region*")):
        available = int(attribute(path, "available_size") or 0)
        if available > 0:
            yield Region(path.name, available)


def attribute(path: Path, name: str) -> str | None:
    """A file of sysfs; None when it is not there."""
    try:
        return (path / name).read_text().strip()
    except OSError:
        return None
