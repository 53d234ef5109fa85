"""What is wrong with the devices of a set, given what was found on them.  Pure: who looked is
`inspecting`, who mends is `repairing`.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from pafkafs.layout import STATE_MODES, TREE, Stub
from pafkafs.units import format_size, printable

# A write sets the time of an object and then that of its shadow; a thread may be kept waiting
# between the two.
MTIME_SKEW_MAX_NS = 1_000_000_000


class Kind(Enum):
    """What can be wrong.  The values are for programs."""

    OBJECT_MISSING = "object-missing"
    OBJECT_ELSEWHERE = "object-elsewhere"
    OBJECT_WITHOUT_STUB = "object-without-stub"
    OBJECT_SHARED = "object-shared"
    SHADOW_MISSING = "shadow-missing"
    SHADOW_WITHOUT_STUB = "shadow-without-stub"
    ATTRIBUTES_DIFFER = "attributes-differ"
    STUB_REFUSED = "stub-refused"
    NOT_A_FILE = "not-a-file"
    STATE_DIRECTORY = "state-directory"
    LEFTOVER = "leftover"
    UNKNOWN_ENTRY = "unknown-entry"
    SLOT_OF_FILE = "slot-of-file"
    SLOTS_WITHOUT_FILE = "slots-without-file"
    NONCE_WITHOUT_SLOT = "nonce-without-slot"
    UNREADABLE = "unreadable"


_ASIDE = "moves it to lost/ of its device, which mounts empty of what is older than a week"

# What --repair does, or None; and what else helps.
_ACTIONS: dict[Kind, tuple[str | None, str]] = {
    Kind.OBJECT_MISSING: (
        None,
        "it is the name of lost data: pafkafs rescue makes a log directory without it, or remove "
        "the file through the mount",
    ),
    Kind.OBJECT_ELSEWHERE: ("points the stub at it", ""),
    Kind.OBJECT_WITHOUT_STUB: (_ASIDE, ""),
    Kind.OBJECT_SHARED: ("gives this one a copy of its own", ""),
    Kind.SHADOW_MISSING: ("makes it from the object", ""),
    Kind.SHADOW_WITHOUT_STUB: (_ASIDE, ""),
    Kind.ATTRIBUTES_DIFFER: ("makes them alike", ""),
    Kind.STUB_REFUSED: (None, "remove it through the mount, or restore the device that it names"),
    Kind.NOT_A_FILE: (None, "somebody put it there: move it away"),
    Kind.STATE_DIRECTORY: ("sets it", ""),
    Kind.LEFTOVER: (_ASIDE, ""),
    Kind.UNKNOWN_ENTRY: (None, "somebody put it there: move it away"),
    Kind.SLOT_OF_FILE: ("brings the file to its size, as a mount does", ""),
    Kind.SLOTS_WITHOUT_FILE: ("frees them, as a mount does", ""),
    Kind.NONCE_WITHOUT_SLOT: ("removes the mark", ""),
    Kind.UNREADABLE: (None, "check the device (dmesg)"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """An entry of a device: index of the device, its own directory (empty: the device itself),
    the path below that."""

    device: int
    area: str
    path: bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, at one place.

    stub is what the name there says; found is where its object is instead.  evidence is what it
    was concluded from: two looks at a mount that serves must have the same.
    """

    kind: Kind
    where: Place
    what: str = field(compare=False)  # it may have counts of a mount in motion
    stub: Stub | None = None
    found: Place | None = None
    evidence: tuple[object, ...] = ()
    hopeless: str = field(
        default="", compare=False
    )  # why it cannot be repaired though others of its kind can

    @property
    def action(self) -> str | None:
        """What --repair does; None: nothing."""
        return None if self.hopeless else _ACTIONS[self.kind][0]

    @property
    def advice(self) -> str:
        """What helps instead."""
        return self.hopeless or _ACTIONS[self.kind][1]


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is compared of an object and its shadow; mtime in ns."""

    is_file: bool
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    ino: int

    @classmethod
    def of(cls, s: os.stat_result) -> "Attributes":
        """Those of a status."""
        return cls(
            stat.S_ISREG(s.st_mode),
            s.st_size,
            stat.S_IMODE(s.st_mode),
            s.st_uid,
            s.st_gid,
            s.st_mtime_ns,
            s.st_ctime_ns,
            s.st_ino,
        )


def show(devices: Sequence[str], place: Place) -> str:
    """An absolute path that any terminal can show; devices are their paths."""
    parts = [devices[place.device], place.area, os.fsdecode(place.path)]
    return printable("/".join(part for part in parts if part))


def judge_stub(
    where: Place, stub: Stub, shadow: Attributes | None, object_: Attributes | None, *, root: bool
) -> Finding | None:
    """What is wrong with a stub, its shadow and its object; None for the last two: not there.

    OBJECT_MISSING is not the last word: it may be somewhere else.
    """
    evidence = (stub, shadow, object_)
    if shadow is not None and not shadow.is_file:
        return Finding(Kind.NOT_A_FILE, where, "its shadow is no file", stub, None, evidence)
    if object_ is not None and not object_.is_file:
        return Finding(Kind.NOT_A_FILE, where, "its object is no file", stub, None, evidence)
    if object_ is None:
        if shadow is not None and shadow.size == 0:
            return None  # an empty file gets its object when it is needed
        lost = "" if shadow is None else f", {format_size(shadow.size)}"
        what = f"its object {os.fsdecode(stub.object)} is missing{lost}"
        return Finding(Kind.OBJECT_MISSING, where, printable(what), stub, None, evidence)
    if shadow is None:
        return Finding(Kind.SHADOW_MISSING, where, "its shadow is missing", stub, None, evidence)
    different = _differences(shadow, object_, root)
    if different:
        what = f"object and shadow differ in {', '.join(different)}"
        return Finding(Kind.ATTRIBUTES_DIFFER, where, what, stub, None, evidence)
    return None


def _differences(shadow: Attributes, object_: Attributes, root: bool) -> list[str]:
    """Owners only as far as we may set them."""
    found = []
    if shadow.size != object_.size:
        found.append(f"size ({object_.size} and {shadow.size} bytes)")
    if shadow.mode != object_.mode:
        found.append(f"mode ({object_.mode:o} and {shadow.mode:o})")
    if root and (shadow.uid, shadow.gid) != (object_.uid, object_.gid):
        found.append(f"owner ({object_.uid}:{object_.gid} and {shadow.uid}:{shadow.gid})")
    if abs(shadow.mtime_ns - object_.mtime_ns) > MTIME_SKEW_MAX_NS:
        found.append("mtime")
    return found


def judge_state_directory(where: Place, status: os.stat_result | None, uid: int) -> Finding | None:
    """What is wrong with one of the own directories of a device; uid is whose it should be."""
    if status is None:
        why = ""
        if where.area == TREE:
            why = "all names are lost: pafkafs rescue --slow makes a log directory of the objects"
        what, evidence = "the directory is missing", ()
        return Finding(Kind.STATE_DIRECTORY, where, what, evidence=evidence, hopeless=why)
    evidence_now = (status.st_mode, status.st_uid)
    if not stat.S_ISDIR(status.st_mode):
        return Finding(Kind.NOT_A_FILE, where, "is no directory", evidence=evidence_now)
    wanted = STATE_MODES.get(where.area)
    if where.area == TREE or wanted is None:
        return None  # its attributes are those of the mountpoint
    if status.st_uid != uid:
        what = f"belongs to uid {status.st_uid}, not {uid}"
        why = f"if somebody put it there, move it away; if it is the device's own, chown {uid} it"
        return Finding(Kind.STATE_DIRECTORY, where, what, evidence=evidence_now, hopeless=why)
    if stat.S_IMODE(status.st_mode) != wanted:
        what = f"has mode {stat.S_IMODE(status.st_mode):o}, not {wanted:o}"
        return Finding(Kind.STATE_DIRECTORY, where, what, evidence=evidence_now)
    return None


def judge_elsewhere(missing: Finding, found: Place, shown: str) -> Finding:
    """A stub whose object is at another place than it says; shown is that place for people."""
    what = f"its object is {shown}"
    return Finding(
        Kind.OBJECT_ELSEWHERE, missing.where, what, missing.stub, found, missing.evidence
    )


def too_many(objects: int, without_stub: int) -> str:
    """Why objects without a stub are not touched: for `hopeless`."""
    return (
        f"{without_stub} of {objects} are too many to be garbage: is the fast device the right "
        "one? pafkafs rescue makes a log directory of objects alone"
    )


@dataclass
class Totals:
    """What was looked at, and what came of it."""

    files: int = 0  # of the home tree, stubs included
    objects: int = 0
    bytes: int = 0  # of both
    problems: int = 0
    repaired: int = 0

    @property
    def left(self) -> int:
        """Problems that are still there."""
        return self.problems - self.repaired
