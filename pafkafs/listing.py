"""What `pafkafs ls` is told: the segments of the catalogue, page by page."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import trio

from pafkafs.catalogue import Catalogue, CatalogueView, Directory, Entry
from pafkafs.control import Commands
from pafkafs.device import Device
from pafkafs.errors import PafkafsError
from pafkafs.placement import tier_name
from pafkafs.policy import Rules, Segment

# A page ends with the directory in which it has so many segments.
_PAGE_SEGMENTS = 2000
_PAGE_DIRECTORIES = 500


@dataclass(frozen=True)
class ListedSegment:
    """A segment for people and programs; age in seconds since its last write."""

    path: str
    tier: str
    device: str
    size_bytes: int
    age_s: float
    state: str  # active, sealed, moving, waiting (a move of it failed), stays, removed
    why: str  # it is where it is


class Lister:
    """Answers the command; a page at a time, so that nothing else waits for a long list."""

    def __init__(
        self,
        catalogue: Catalogue,
        devices: Sequence[Device],
        rules: Callable[[], Rules],
        moving: Callable[[], set[str]],
        active: Callable[[Entry], Segment | None],
    ) -> None:
        """moving has the paths of files under way; active looks at a segment that grows."""
        self._catalogue = catalogue
        self._devices = devices
        self._tiers = [device.tier for device in devices]
        self._rules = rules
        self._moving = moving
        self._active = active

    def commands(self) -> Commands:
        """For the control socket."""
        return {"ls": self._list}

    async def _list(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        path, after = asked.get("path", ""), asked.get("after", "")
        if not isinstance(path, str) or not isinstance(after, str):
            raise PafkafsError("ls needs a path below the mount")
        try:
            below, last = os.fsencode(path), os.fsencode(after)
        except ValueError:
            raise PafkafsError(f"{path!r} is no path below the mount") from None
        directories = self._catalogue.directories_below(below)
        if not directories and below:  # a segment, perhaps
            directories = self._catalogue.directories_below(os.path.dirname(below))[:1]
        await trio.lowlevel.checkpoint()
        return self._page([d for d in directories if d.path > last or not last], below)

    def _page(self, directories: list[Directory], below: bytes) -> dict[str, Any]:
        found: list[ListedSegment] = []
        moving = self._moving()
        view = CatalogueView(
            self._catalogue, self._tiers, time.time_ns(), time.monotonic(), lambda tier: []
        )
        next_page = None
        for number, directory in enumerate(directories, 1):
            for _, entry in sorted(directory.segments.items()):
                if entry.path == below or not below or entry.path.startswith(below + b"/"):
                    found.append(self._listed(entry, view, moving))
            full = len(found) >= _PAGE_SEGMENTS or number >= _PAGE_DIRECTORIES
            if full and number < len(directories):
                next_page = os.fsdecode(directory.path)
                break
        return {"segments": [asdict(segment) for segment in found], "next": next_page}

    def _listed(self, entry: Entry, view: CatalogueView, moving: set[str]) -> ListedSegment:
        segment = (self._active(entry) if entry.is_active else None) or view.segment(entry)
        path = os.fsdecode(segment.path)
        device = self._devices[entry.device]
        return ListedSegment(
            path=path,
            tier=tier_name(device.tier, self._tiers[-1]),
            device=os.fsdecode(device.path),
            size_bytes=segment.bytes,
            age_s=round(segment.age_s, 1),
            state="moving" if path in moving else _state(entry),
            why=entry.why or self._reason(entry),
        )

    def _reason(self, entry: Entry) -> str:
        """For what was not moved since the mount."""
        if entry.is_active:
            return "active"
        rules, directory = self._rules(), entry.directory
        if directory.rule is None:
            return "does not move"
        if rules.is_pinned(os.fsdecode(entry.path)):
            return "pinned"
        keep = rules.all[directory.rule].keep
        if keep is not None:
            return f"topic: {keep.value}"
        return "was there" if self._tiers[entry.device] > 0 else "room"


def _state(entry: Entry) -> str:
    if entry.directory.rule is None:
        return "removed" if entry.directory.name.endswith(b"-delete") else "stays"
    if entry.is_active:
        return "active"
    return "waiting" if entry.held_until else "sealed"
