"""Which device a new file starts on, and where a file without room goes on.

Pure: it reads a frozen snapshot and returns a decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# Above this share of the room on a fast device new segments start on the slow tier, so that
# those that are being written have room to grow where they are.
HIGH_MARK = 0.95


def tier_name(tier: int, lowest: int) -> str:
    """What people call a tier of a mount whose last one is lowest: fast, slow; between them middle,
    or middle1, middle2 …"""
    if tier in (0, lowest):
        return "fast" if tier == 0 else "slow"
    return "middle" if lowest == 2 else f"middle{tier}"


class Mode(Enum):
    """Which tiers new data may use."""

    TIERED = "tiered"
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True)
class Room:
    """A device as placement sees it, in bytes."""

    tier: int
    used_bytes: int
    limit_bytes: int
    in_service: bool = True

    @property
    def free_bytes(self) -> int:
        """What may still be written there."""
        return max(0, self.limit_bytes - self.used_bytes)


def place_new(
    mode: Mode, devices: Sequence[Room], *, bulk: bool, kept_off_fast: bool = False
) -> int:
    """The index of the device where a new file starts.

    bulk tells a segment from the small files that, in tiered mode, may use the fast tier to
    its last byte; kept_off_fast one whose topic is not to use it while another has room.
    """
    tiers = sorted({device.tier for device in devices})
    if mode is Mode.SLOW or (kept_off_fast and mode is Mode.TIERED):
        tiers = tiers[1:] + tiers[:1]
    elif mode is Mode.FAST:
        tiers = tiers[:1]
    mark = HIGH_MARK if bulk and mode is Mode.TIERED else 1.0
    for tier in tiers:
        best = _roomiest(devices, tier)
        if best is not None and devices[best].used_bytes < mark * devices[best].limit_bytes:
            return best
    # Full everywhere: its first write will find out, with the error that fits.
    first = _roomiest(devices, tiers[0])
    return 0 if first is None else first


def place_spill(mode: Mode, devices: Sequence[Room], source: int, need_bytes: int) -> int | None:
    """The device that a file without room on device source goes on on; None when there is none.

    need_bytes is the file with what waits to be written to it.
    """
    if mode is Mode.FAST:
        return None
    fits = [
        index
        for index, device in enumerate(devices)
        if index != source and device.free_bytes >= need_bytes
    ]
    # One that does not answer is still better than ENOSPC: a writer can wait for it.  Sideways
    # or down before up.
    above = devices[source].tier

    def cost(i: int) -> tuple[bool, bool, int, int]:
        device = devices[i]
        return (not device.in_service, device.tier < above, device.tier, -device.free_bytes)

    return min(fits, key=cost, default=None)


def _roomiest(devices: Sequence[Room], tier: int) -> int | None:
    fits = [i for i, device in enumerate(devices) if device.tier == tier and device.in_service]
    return max(fits, key=lambda i: devices[i].free_bytes, default=None)
