"""What comes before a mount is served: the limits of the process, and its devices."""

import logging
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pafkafs import _native, brokers, deviceset, growing
from pafkafs.config import MountOptions
from pafkafs.device import Device, Home, device_kind, open_device, open_home
from pafkafs.errors import PafkafsError

log = logging.getLogger(__name__)

_DEVICE_PATIENCE_S = 10.0
_OOM_SCORE = -900

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """The devices of a mount, the first fast one first.  paths has, for each, where it is and where
    it was before; sizes are None when nothing grows in persistent memory, or did."""

    devices: list[Device]
    home: Home
    paths: dict[str, tuple[bytes, ...]]
    durability: str
    grows: bool
    sizes: growing.Recovery | None


def open_all(options: MountOptions) -> Opened:
    """Opens the devices, and forms their set at the first mount.  Raises PafkafsError."""
    devices, home, paths, durability = _within_patience(lambda: _open_devices(options))
    first = devices[0]
    grows = options.pmem == "on" or (options.pmem == "auto" and first.kind == "dax")
    if options.pmem == "on" and durability == "power" and first.kind != "dax":
        raise PafkafsError(
            f"{os.fsdecode(first.path)} is not on DAX: --pmem on is for tests there, and cannot be "
            "had with --durability power"
        )
    first.native.segment_bytes = options.segment_size or 0
    sizes = open_sizes(first, grows=grows)
    return Opened(devices, home, paths, durability, grows, sizes)


def _open_devices(
    options: MountOptions,
) -> tuple[list[Device], Home, dict[str, tuple[bytes, ...]], str]:
    members = deviceset.assemble(options.tiers)
    fds = [member.fd for member in members]
    brokers.refuse_running_on_tree(fds[0], members[0].member.path, fds)
    kinds = [device_kind(member.fd, member.member.path) for member in members]
    durability = options.durability or ("power" if kinds[0] == "dax" else "process")
    devices = [
        open_device(member, capacity, power=durability == "power", kind=kind)
        for member, capacity, kind in zip(members, options.capacity, kinds, strict=True)
    ]
    paths = {member.member.device: member.all_paths for member in members}
    return devices, open_home(devices[0]), paths, durability


def _within_patience(act: Callable[[], T]) -> T:
    """Runs what may hang in a device in a thread that can be left behind."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_DEVICE_PATIENCE_S)
    if errors:
        raise errors[0]
    if not results:
        raise PafkafsError(
            f"a device has not answered for {_DEVICE_PATIENCE_S:.0f} s: check it with dmesg"
        )
    return results[0]


def open_sizes(device: Device, *, grows: bool) -> growing.Recovery | None:
    """What was growing in persistent memory when the last mount ended; None when nothing grew, nor
    does now."""
    try:
        if not grows and not growing.was_used(device):
            return None
        growing.open_sizes(device)
        return growing.Recovery(device)
    except OSError as error:
        raise PafkafsError(
            f"cannot use {os.fsdecode(device.path)}/sizes, which has the lengths of segments that "
            f"were being written: {error.strerror}; check the device (dmesg), and do not remove it"
        ) from error


def raise_limits() -> None:
    """As many descriptors as we may have: two for each open file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, int(Path("/proc/sys/fs/nr_open").read_text()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (PermissionError, ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def protect_process() -> None:
    """Kafka dies with its file system: let the OOM killer take something else first, and let
    reclaim not wait for us.  Both take privilege; without it they are left."""
    try:
        _native.set_io_flusher()
    except OSError as error:
        log.info("reclaim of memory may wait for this process: %s", error.strerror)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    except OSError as error:
        log.info("not protected from the OOM killer: %s", error.strerror)
