"""What a host lacks for a mount, or would make it slow: each finding with the command that helps.

It changes nothing.
"""

import os
import re
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pafkafs import kernel, mountpoint, pmemhost
from pafkafs.config import MountOptions
from pafkafs.device import device_kind, filesystem_type
from pafkafs.errors import PafkafsError
from pafkafs.growing import persist_method

OK, WARNING, PROBLEM = "ok", "warning", "problem"

_KERNEL_MIN = (5, 12)
_FILES_MIN = 65536
_MAPS_MIN = 262144
_BDI = Path("/sys/class/bdi")
# What log.flush.interval.messages is when nobody sets it.
_NEVER = str((1 << 63) - 1)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; action is empty when nothing needs to be done."""

    level: str
    what: str
    action: str = ""


def examine(options: MountOptions, kafka_config: str | None) -> list[Finding]:
    """Everything that a mount with these options needs, and that Kafka needs of it."""
    found = [*_fuse(), *_native(), *_kernel(), *_limits()]
    for path in options.tiers[0]:
        found += _directory("fast", path)
        if os.path.isdir(path):
            found += _fast(path)
    for path in options.devices[len(options.tiers[0]) :]:
        found += _directory("slow", path)
    found += _apart(options)
    found += _mountpoint(options)
    if kafka_config is not None:
        found += _kafka(kafka_config, options)
    return found


# -- the host -----------------------------------------------------------------------------------


def _fuse() -> Iterator[Finding]:
    if not os.path.exists("/dev/fuse"):
        yield Finding(
            PROBLEM, "/dev/fuse is missing", "modprobe fuse; in a container: --device /dev/fuse"
        )
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield Finding(PROBLEM, "this user may not open /dev/fuse", "chmod 0666 /dev/fuse, as root")
    else:
        yield Finding(OK, "/dev/fuse can be opened")
    if os.geteuid() != 0:
        if shutil.which("fusermount3") is None:
            yield Finding(PROBLEM, "fusermount3 is missing", "apt-get install fuse3")
        yield Finding(
            WARNING,
            "not root: other users cannot use the mount, and its page cache is not tuned",
            "mount as root; Kafka runs as its own user all the same",
        )


def _native() -> Iterator[Finding]:
    """Nothing of pafkafs runs without it: that it is here tells that it loads."""
    yield Finding(OK, f"native module and libpmem: a store is made durable with {persist_method()}")


def _kernel() -> Iterator[Finding]:
    release = os.uname().release
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if version < _KERNEL_MIN:
        yield Finding(PROBLEM, f"Linux {release} is too old", "use 5.12 or later")
    elif not kernel.drops_pages_after_direct_write(release):
        yield Finding(
            WARNING,
            f"Linux {release} is not known to keep the page cache right after direct writes: "
            "an append takes two requests instead of one",
            "use 6.6.130, 6.12.75, 6.18.10, 6.19 or later",
        )
    else:
        yield Finding(OK, f"Linux {release}")


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(hard, _number("/proc/sys/fs/nr_open")) if os.geteuid() == 0 else hard
    if most < _FILES_MIN:
        yield Finding(
            WARNING,
            f"at most {most} descriptors: each open file takes two",
            "ulimit -Hn 1048576; under systemd LimitNOFILE=1048576",
        )
    else:
        yield Finding(OK, f"{most} descriptors")
    maps = _number("/proc/sys/vm/max_map_count")
    if maps < _MAPS_MIN:
        yield Finding(
            WARNING,
            f"vm.max_map_count is {maps}: Kafka maps two files for each segment",
            f"sysctl -w vm.max_map_count={_MAPS_MIN}",
        )


def _number(path: str) -> int:
    return int(Path(path).read_text())


# -- the devices --------------------------------------------------------------------------------


def _directory(tier: str, path: str) -> Iterator[Finding]:
    if not os.path.isdir(path):
        yield Finding(PROBLEM, f"the {tier} device {path} is no directory", f"mkdir -p {path}")
        return
    if not os.access(path, os.W_OK | os.X_OK):
        yield Finding(
            PROBLEM,
            f"this user may not write to the {tier} device {path}",
            f"chown it: ls -ld {path}",
        )
    usage = psutil.disk_usage(path)
    yield Finding(OK, f"{tier} device {path}: {filesystem_type(path)}, {usage.free >> 30} GiB free")


def _fast(path: str) -> Iterator[Finding]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind = device_kind(fd, path)
    finally:
        os.close(fd)
    if kind == "dax":
        yield Finding(OK, f"{path} is on DAX; stores are made durable with {persist_method()}")
        return
    if kind == "memory":
        yield Finding(
            WARNING,
            f"{path} is in memory: a power loss takes its data and all names",
            "for production use NVMe or persistent memory",
        )
        yield from _huge_pages(path)
        return
    yield from _pmem(path, list(pmemhost.namespaces()), list(pmemhost.free_regions()))


def _pmem(
    path: str, namespaces: Sequence[pmemhost.Namespace], regions: Sequence[pmemhost.Region]
) -> Iterator[Finding]:
    """A fast device that is not on DAX, on a host with this persistent memory."""
    mine = next((n for n in namespaces if n.holds(os.stat(path).st_dev)), None)
    if mine is not None:
        where = mount_point_of(path)
        yield Finding(
            WARNING,
            f"{path} is on persistent memory (/dev/{mine.block_device}), but not mounted with DAX",
            f"umount {where} && mount -o dax=always /dev/{mine.block_device} {where}",
        )
        return
    if not namespaces and not regions:
        yield Finding(OK, f"{path} is an ordinary filesystem; this host has no persistent memory")
    for namespace in namespaces:
        yield Finding(
            WARNING,
            f"this host has persistent memory ({namespace.name}, {namespace.mode}, "
            f"{namespace.size_bytes >> 30} GiB), and {path} does not use it",
            _where_mounted(namespace) or namespace.commands,
        )
    for region in regions:
        yield Finding(
            WARNING,
            f"this host has persistent memory without a namespace ({region.name}, "
            f"{region.available_bytes >> 30} GiB)",
            region.commands,
        )


def _where_mounted(namespace: pmemhost.Namespace) -> str | None:
    """What to do when it is mounted already."""
    device = f"/dev/{namespace.block_device}"
    mine = next((p for p in psutil.disk_partitions(all=True) if p.device == device), None)
    if mine is None:
        return None
    if {"dax", "dax=always"} & set(mine.opts.split(",")):
        return f"give a directory below {mine.mountpoint} as FAST"
    where = mine.mountpoint
    return f"umount {where} && mount -o dax=always {device} {where}, and a directory there as FAST"


def _huge_pages(path: str) -> Iterator[Finding]:
    mounts = [p for p in psutil.disk_partitions(all=True) if p.fstype == "tmpfs"]
    real = os.path.realpath(path)
    mine = [p for p in mounts if Path(real).is_relative_to(p.mountpoint)]
    if mine and "huge=" not in max(mine, key=lambda p: len(p.mountpoint)).opts:
        where = max(mine, key=lambda p: len(p.mountpoint)).mountpoint
        yield Finding(
            WARNING,
            f"the tmpfs at {where} uses small pages: it is several times slower",
            f"mount -o remount,huge=within_size {where}",
        )


def mount_point_of(path: str) -> str:
    """Where the filesystem of a path is mounted."""
    real = Path(os.path.realpath(path))
    while not real.is_mount():
        real = real.parent
    return str(real)


def _apart(options: MountOptions) -> Iterator[Finding]:
    there = [path for path in options.devices if os.path.isdir(path)]
    filesystems: dict[int, str] = {}
    for path in there:
        number = os.stat(path).st_dev
        if number in filesystems:
            yield Finding(
                WARNING,
                f"{filesystems[number]} and {path} are on one filesystem: they share its room",
                "give each its own, or limit them with --fast-capacity and --slow-capacity",
            )
        filesystems[number] = path


def _mountpoint(options: MountOptions) -> Iterator[Finding]:
    where = options.mountpoint
    mounted = mountpoint.find_mounted(where)
    if mounted is not None and mounted.source == options.source and not mountpoint.is_dead(where):
        yield Finding(OK, f"{where} is mounted")
        yield from page_cache(mounted)
        return
    try:
        mountpoint.check(options.mountpoint, options.devices)
    except PafkafsError as error:
        yield Finding(PROBLEM, str(error), f"see pafkafs status {options.mountpoint}")
    else:
        yield Finding(OK, f"mountpoint {options.mountpoint}")
    if os.geteuid() == 0 and not os.access(_BDI, os.W_OK):
        yield Finding(
            WARNING,
            "/sys is read-only, as in a container: the page cache of a mount cannot be tuned here",
            "run pafkafs doctor again after the mount: it tells what root of the host has to do",
        )


def page_cache(mounted: mountpoint.Mounted, settings: Path = _BDI) -> Iterator[Finding]:
    """Whether the mount may dirty memory and read ahead as a disk may."""
    directory = settings / mounted.device
    found = {name: pmemhost.attribute(directory, name) for name in mountpoint.PAGE_CACHE}
    wrong = [
        name for name, wanted in mountpoint.PAGE_CACHE.items() if found[name] not in (None, wanted)
    ]
    if not wrong:
        yield Finding(OK, f"the page cache of {mounted.mountpoint} is tuned")
        return
    differing = ", ".join(f"{name} is {found[name]}" for name in wrong)
    if os.geteuid() != 0:
        who = "as root: "
    elif not all(os.access(directory / name, os.W_OK) for name in wrong):
        who = "/sys is read-only here; as root of the host: "
    else:
        who = ""
    commands = [f"echo {mountpoint.PAGE_CACHE[name]} > {directory / name}" for name in wrong]
    yield Finding(
        WARNING,
        f"the page cache of {mounted.mountpoint} is not tuned, reads are slower: {differing}",
        who + "; ".join(commands),
    )


# -- Kafka --------------------------------------------------------------------------------------


def _kafka(path: str, options: MountOptions) -> Iterator[Finding]:
    try:
        settings = read_properties(path)
    except OSError as error:
        yield Finding(PROBLEM, f"cannot read {path}: {error.strerror}", "give server.properties")
        return
    value = settings.get("log.dirs") or settings.get("log.dir") or "/tmp/kafka-logs"
    for directory in value.split(","):
        if not Path(directory.strip()).is_relative_to(options.mountpoint):
            yield Finding(
                WARNING,
                f"log.dirs has {directory.strip()}, which is not below {options.mountpoint}",
                f"log.dirs={options.mountpoint}",
            )
    if settings.get("log.preallocate", "false").lower() == "true":
        yield Finding(
            WARNING,
            "log.preallocate=true: segments have their full size from the start, take it, and are "
            "written with pwrite on persistent memory, too",
            "log.preallocate=false: pafkafs prepares room itself",
        )
    yield from _flushes(settings)
    yield from _segments(settings.get("log.segment.bytes", str(1 << 30)), options)


def _flushes(settings: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("log.flush.interval.messages", "log.flush.interval.ms"):
        value = settings.get(name, _NEVER)
        if value == _NEVER:
            continue
        yield Finding(
            WARNING,
            f"{name}={value}: Kafka fsyncs while it appends, up to once for each append, and its "
            "appends wait for it",
            "leave it out with durability power (the default on DAX): an acked append survives a "
            "power loss without it; with durability process it does not, unless replicas do",
        )


def _segments(text: str, options: MountOptions) -> Iterator[Finding]:
    if not text.isdigit():
        yield Finding(PROBLEM, f"log.segment.bytes={text} is no number", "bytes, such as 268435456")
        return
    segment = int(text)
    for device in options.tiers[0]:
        if os.path.isdir(device) and psutil.disk_usage(device).total < 16 * segment:
            yield Finding(
                WARNING,
                f"{device} has room for less than 16 segments of {segment >> 20} MiB",
                "a smaller log.segment.bytes: whole segments move",
            )


def read_properties(path: str) -> dict[str, str]:
    """A Java properties file, as far as server.properties needs it."""
    found: dict[str, str] = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and not name.startswith(("#", "!")):
            found[name.strip()] = value.strip()
    return found
