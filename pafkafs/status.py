"""What `pafkafs status` reports: a frozen snapshot of a mount, and its JSON.

A snapshot is made from memory alone: no device can delay it.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pafkafs.device import Device
from pafkafs.placement import tier_name
from pafkafs.units import format_duration

JSON_VERSION = 1

# Of the slots: above this share it is told that they may run out.
_SLOTS_MANY = 0.9

HEALTHY = "healthy"
DEGRADED = "degraded"
DEAD = "dead"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command or step that helps."""

    problem: str
    action: str


@dataclass(frozen=True)
class DeviceStatus:
    """A device.  used_bytes counts all that takes room there."""

    path: str
    capacity_bytes: int
    used_bytes: int
    files: int
    errors: int  # since the mount
    hung_s: float  # since it has completed nothing, when that is suspicious; else 0


@dataclass(frozen=True)
class TierStatus:
    """A tier with its devices."""

    name: str
    kind: str
    devices: tuple[DeviceStatus, ...]


@dataclass(frozen=True)
class MoveStatus:
    """A file on its way from one device to another."""

    path: str
    source: str
    target: str
    direction: str  # demote, promote, or sideways
    size_bytes: int
    copied_bytes: int
    seconds: float


@dataclass(frozen=True)
class MigrationStatus:
    """The background task; files, bytes and failures since the mount."""

    paused: bool
    running: tuple[MoveStatus, ...]
    planned: int  # files that go next
    planned_bytes: int
    why: str | None
    next: str | None  # the first of them
    notes: tuple[str, ...]  # what keeps the task from what the lines ask for
    files: int
    bytes: int
    failed: int
    cut_over_max_s: float
    last_error: str | None


@dataclass(frozen=True)
class PoolStatus:
    """Segments that grow in persistent memory, and files prepared for new ones."""

    files: int
    bytes: int
    segment_bytes: int  # what Kafka rolls at, as far as known; else 0
    persist: str  # what makes a store durable
    growing: int  # segments that grow now
    ahead_bytes: int  # allocated for them beyond their logical sizes
    slots_used: int  # one for each of them, and for each file of the pool
    slots: int


@dataclass(frozen=True)
class MountStatus:
    """A mount.  pid and uptime_s are None when no daemon serves it."""

    mountpoint: str
    state: str
    durability: str | None
    mode: str | None
    pid: int | None
    uptime_s: float | None
    known_files: int = 0
    all_known: bool = False  # else the home tree is still being read
    open_files: int = 0
    requests: int = 0
    metrics: str | None = None  # the address where they are served
    pool: PoolStatus | None = None
    migration: MigrationStatus | None = None
    tiers: tuple[TierStatus, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def to_json(mounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of `pafkafs status --json`."""
    return {"version": JSON_VERSION, "mounts": list(mounts)}


def as_dict(mount: MountStatus) -> dict[str, Any]:
    """A mount of that document."""
    return asdict(mount)


def tier_statuses(devices: Sequence[Device]) -> tuple[TierStatus, ...]:
    """The devices by tier."""
    return tuple(
        TierStatus(
            name=tier_name(tier, devices[-1].tier),
            kind=next(device.kind for device in devices if device.tier == tier),
            devices=tuple(_device(device) for device in devices if device.tier == tier),
        )
        for tier in sorted({device.tier for device in devices})
    )


def _device(device: Device) -> DeviceStatus:
    return DeviceStatus(
        path=os.fsdecode(device.path),
        capacity_bytes=device.capacity_bytes,
        used_bytes=max(0, device.native.used_bytes),
        files=device.files,
        errors=device.errors,
        hung_s=round(device.hung_s, 1),
    )


def slot_notes(used: int, slots: int) -> list[str]:
    """Whether segments will soon not grow, for lack of slots."""
    if used <= _SLOTS_MANY * slots:
        return []
    return [
        f"{used} of {slots} slots of segments that grow in persistent memory are in use: with none "
        "left, new segments are written with pwrite, which is slower"
    ]


def device_problems(device: Device) -> list[Problem]:
    """What is wrong with a device."""
    path = os.fsdecode(device.path)
    found = []
    if device.hung_s:
        found.append(
            Problem(
                f"{path} has not answered a request for {format_duration(device.hung_s)}; "
                "reads and writes of data that is on it wait, all else goes on",
                f"check the device: dmesg | tail; findmnt -T {path}",
            )
        )
    if device.missing_objects:
        found.append(
            Problem(
                f"{len(device.missing_objects)} objects are missing on {path}: "
                "reading these files fails with EIO",
                f"restore {path}/objects from where it was moved or backed up to",
            )
        )
    if device.suspicious_objects:
        found.append(
            Problem(
                f"{device.suspicious_objects} objects on {path} have no stub, too many to be left "
                "over by crashes; nothing was removed",
                f"if their files were deleted on purpose, delete them below {path}/objects too",
            )
        )
    if device.recent_error is not None:
        found.append(Problem(f"{path}: {device.recent_error}", "check the device: dmesg | tail"))
    return found
