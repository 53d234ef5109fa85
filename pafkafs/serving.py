"""Looking at devices that a mount serves from: what is found twice, unchanged, is wrong; all else
was on its way."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pafkafs import control, mountpoint
from pafkafs.checking import Finding, Kind, Totals
from pafkafs.deviceset import SetDevice
from pafkafs.errors import PafkafsError
from pafkafs.inspecting import Inspection

# Longer than the daemon collects what is to be done on objects.
_BETWEEN_LOOKS_S = 2.0
# A clock that was set, and the grain of ctime.
_START_MARGIN_S = 2.0


@dataclass(frozen=True)
class Daemon:
    """Who serves: since_ns is when it began, known whether it has read the whole home tree."""

    mountpoint: str
    pid: int
    since_ns: int


def find_daemon(devices: Sequence[SetDevice]) -> Daemon | None:
    """The daemon of these devices; None when this user cannot ask it, or it is in another mount
    namespace."""
    home = os.path.realpath(devices[0].member.path)
    for mounted in mountpoint.all_mounted():
        first = mounted.source.partition(":")[0].partition(",")[0]
        if os.path.realpath(first) != home:
            continue
        try:
            status = control.ask(mounted.mountpoint, "status")
        except PafkafsError:
            continue
        since_s = time.time() - status["uptime_s"] - _START_MARGIN_S
        return Daemon(mounted.mountpoint, status["pid"], int(since_s * 1e9))
    return None


def findings(devices: Sequence[SetDevice], daemon: Daemon | None) -> tuple[list[Finding], Totals]:
    """What two looks agree on, and the totals of the last one."""
    first, totals = _look(devices, daemon)
    if not first:
        return [], totals
    time.sleep(_BETWEEN_LOOKS_S)
    known = set(first)
    second, totals = _look(devices, daemon)
    again = [found for found in second if found in known]
    return _not_in_use(devices, daemon, again), totals


def _look(devices: Sequence[SetDevice], daemon: Daemon | None) -> tuple[list[Finding], Totals]:
    since_ns = None if daemon is None else daemon.since_ns
    inspection = Inspection(devices, serving=True, since_ns=since_ns)
    try:
        return list(inspection.run()), inspection.totals
    finally:
        inspection.close()


def _not_in_use(
    devices: Sequence[SetDevice], daemon: Daemon | None, found: list[Finding]
) -> list[Finding]:
    """Without the objects and shadows of files that were removed and are still open."""
    without_name = (Kind.OBJECT_WITHOUT_STUB, Kind.SHADOW_WITHOUT_STUB)
    if daemon is None or not any(each.kind in without_name for each in found):
        return found
    opened = _open_object_ids(daemon.pid)
    return [
        each
        for each in found
        if each.kind not in without_name or each.where.path[-16:] not in opened
    ]


def _open_object_ids(pid: int) -> set[bytes]:
    """Ids of the objects and shadows that a process has open: both names end with them."""
    found: set[bytes] = set()
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        try:
            target = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
        found.add(os.fsencode(target.removesuffix(" (deleted)"))[-16:])
    return found
