"""The options of a mount: their names, their defaults, and the TOML file that can hold them."""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pafkafs.errors import UsageError
from pafkafs.placement import HIGH_MARK, Mode
from pafkafs.policy import Keep, Limits, Rule, Rules
from pafkafs.units import parse_duration, parse_size

WHOLE_FILESYSTEM = -1
DURABILITIES = ("power", "process")
PMEM_CHOICES = ("auto", "on", "off")
_LOW_OF_THRESHOLD = 0.8
_THREADS_MAX = 8
_INTERVAL_MIN_S = 0.01
_FILE_BYTES_MAX = 1 << 20
MODES = tuple(mode.value for mode in Mode)


@dataclass(frozen=True)
class MountOptions:
    """What `pafkafs mount` was asked for.  Capacities are bytes, one for each device."""

    tiers: tuple[tuple[str, ...], ...]  # devices, from the fast tier to the slow one
    mountpoint: str
    capacity: tuple[int, ...]  # of all devices, in this order
    mode: Mode
    durability: str | None  # None: power on DAX, process elsewhere
    log_file: str | None
    pmem: str
    pool_ratio: float
    segment_size: int | None  # None: what Kafka is seen to roll at
    limits: Limits
    interval_s: float
    migrate_threads: int
    migrate_rate: int  # bytes per second; 0: no bound
    rules: Rules
    metrics: tuple[str, int] | None  # the address to listen on
    config: str | None = None  # the file, by an absolute path
    given: Mapping[str, Any] = field(default_factory=dict)  # before what the file says
    values: Mapping[str, Any] = field(default_factory=dict)  # both, as they were written

    @property
    def source(self) -> str:
        """The devices as fstab and /proc/mounts write them: `/pmem:/hdd0,/hdd1`."""
        return ":".join(",".join(tier) for tier in self.tiers)

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices, the first fast one first."""
        return tuple(device for tier in self.tiers for device in tier)


# What may change while it is mounted; all else is what the mount is built on.
CHANGEABLE = (
    "threshold",
    "low-watermark",
    "max-age",
    "min-age",
    "cool-down",
    "read-wait",
    "interval",
    "migrate-threads",
    "migrate-rate",
    "pin",
    "topics",
)

KEYS = (
    "fast",
    "tier",
    "slow",
    "mountpoint",
    "fast-capacity",
    "middle-capacity",
    "slow-capacity",
    "mode",
    "durability",
    "log-file",
    "pmem",
    "pool-ratio",
    "segment-size",
    *CHANGEABLE,
    "metrics",
)

# As they would be written.  What is not here has no default, or one that depends on others.
DEFAULTS = {
    "fast-capacity": str(WHOLE_FILESYSTEM),
    "middle-capacity": str(WHOLE_FILESYSTEM),
    "slow-capacity": str(WHOLE_FILESYSTEM),
    "mode": Mode.TIERED.value,
    "pmem": "auto",
    "pool-ratio": "0.8",
    "threshold": "0.5",
    "min-age": "0s",
    "cool-down": "1h",
    "read-wait": "1m",
    "interval": "5s",
    "migrate-threads": "1",
    "migrate-rate": "0",
}

_TOPIC_KEYS = ("name", "keep", "max-age", "min-age")


def read_config(path: str) -> dict[str, Any]:
    """The options of a TOML file, checked for unknown names."""
    try:
        with open(path, "rb") as stream:
            content = stream.read(_FILE_BYTES_MAX + 1)
        if len(content) > _FILE_BYTES_MAX:
            raise UsageError(f"the configuration {path} is larger than 1 MiB")
        table = tomllib.loads(content.decode())
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} is not TOML: {error}") from error
    unknown = sorted(set(table) - set(KEYS))
    if unknown:
        raise UsageError(
            f"the configuration {path} has an unknown option '{unknown[0]}'; "
            f"known are {', '.join(KEYS)}"
        )
    return table


def mount_options(
    table: Mapping[str, Any], given: Mapping[str, Any], config: str | None = None
) -> MountOptions:
    """The options of a mount: what was given on the command line goes before the table of the
    file config."""
    given = {key: value for key, value in given.items() if value is not None}
    values = {**table, **given}
    built = _build(values)
    where = os.path.realpath(built.mountpoint)
    if config is not None:
        config = os.path.abspath(config)
        if os.path.realpath(config).startswith(where.rstrip("/") + "/"):
            raise UsageError(f"the configuration {config} is inside the mountpoint {where}")
    return replace(built, mountpoint=where, config=config, given=given)


def with_values(options: MountOptions, values: Mapping[str, Any]) -> MountOptions:
    """The options of the same mount with other values of what may change, checked as at mount.
    Makes no system call on the mountpoint: it is served by who asks."""
    built = _build(values)
    return replace(
        options,
        limits=built.limits,
        interval_s=built.interval_s,
        migrate_threads=built.migrate_threads,
        migrate_rate=built.migrate_rate,
        rules=built.rules,
        values={
            **{key: value for key, value in options.values.items() if key not in CHANGEABLE},
            **{key: value for key, value in values.items() if key in CHANGEABLE},
        },
    )


def _build(values: Mapping[str, Any]) -> MountOptions:
    merged = {**DEFAULTS, **values}
    fast, slow = _devices(merged, "fast"), _devices(merged, "slow")
    middle = _middle_tiers(merged)
    return MountOptions(
        tiers=(fast, *middle, slow),
        mountpoint=_text(merged, "mountpoint"),
        capacity=(
            *_capacities(merged, "fast-capacity", len(fast)),
            *_capacities(merged, "middle-capacity", sum(map(len, middle))),
            *_capacities(merged, "slow-capacity", len(slow)),
        ),
        mode=Mode(_choice(merged, "mode", MODES)),
        durability=_choice(merged, "durability", DURABILITIES) if "durability" in merged else None,
        log_file=_text(merged, "log-file") if "log-file" in merged else None,
        pmem=_choice(merged, "pmem", PMEM_CHOICES),
        pool_ratio=_share(merged, "pool-ratio"),
        segment_size=parse_size(str(merged["segment-size"])) if "segment-size" in merged else None,
        limits=_limits(merged),
        interval_s=_interval(merged),
        migrate_threads=_threads(merged),
        migrate_rate=parse_size(str(merged["migrate-rate"])),
        rules=Rules(_topics(merged), tuple(_items(merged, "pin"))),
        metrics=_address(merged, "metrics"),
        values=values,
    )


def _limits(options: Mapping[str, Any]) -> Limits:
    """The lines of the fast tier; UsageError when they contradict each other."""
    threshold = -1.0
    if str(options["threshold"]) != "-1":
        threshold = _share(options, "threshold")
    low = max(0.0, threshold) * _LOW_OF_THRESHOLD
    if "low-watermark" in options:
        low = _share(options, "low-watermark")
    if threshold >= 0 and not low < threshold <= HIGH_MARK:
        raise UsageError(
            f"low-watermark {low:g} must be less than threshold {threshold:g}, "
            f"and that at most {HIGH_MARK:g}"
        )
    max_age_s = _duration(options, "max-age") if "max-age" in options else None
    min_age_s = _duration(options, "min-age")
    if max_age_s is not None and max_age_s <= min_age_s:
        raise UsageError("max-age must be more than min-age")
    cool_down_s, read_wait_s = _duration(options, "cool-down"), _duration(options, "read-wait")
    return Limits(threshold, low, max_age_s, min_age_s, cool_down_s, read_wait_s)


def _topics(options: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of [[topics]], which only a file can have."""
    tables = options.get("topics", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError("topics are tables: write [[topics]] before each")
    return tuple(_topic_rule(table) for table in tables)


def _topic_rule(table: Mapping[str, Any]) -> Rule:
    unknown = sorted(set(table) - set(_TOPIC_KEYS))
    if unknown:
        raise UsageError(
            f"topics have an unknown option '{unknown[0]}'; known are {', '.join(_TOPIC_KEYS)}"
        )
    names = _items(table, "name")
    if not names or not all(names):
        raise UsageError("topics without a name; give one, or a pattern like payments-*")
    kinds = tuple(keep.value for keep in Keep)
    keep = Keep(_choice(table, "keep", kinds)) if "keep" in table else None
    max_age_s, min_age_s = (
        _duration(table, key) if key in table else None for key in ("max-age", "min-age")
    )
    if max_age_s is not None and min_age_s is not None and max_age_s <= min_age_s:
        raise UsageError(f"topics {names[0]}: max-age must be more than min-age")
    return Rule(tuple(names), keep, max_age_s, min_age_s)


def _duration(options: Mapping[str, Any], key: str) -> float:
    return parse_duration(str(options[key]))


def _interval(options: Mapping[str, Any]) -> float:
    seconds = _duration(options, "interval")
    if seconds < _INTERVAL_MIN_S:
        raise UsageError("interval must be at least 10ms")
    return seconds


def _address(options: Mapping[str, Any], key: str) -> tuple[str, int] | None:
    """`127.0.0.1:9464` or `[::1]:9464`, never a name: whoever resolves it decides who listens."""
    if key not in options:
        return None
    text = str(options[key])
    match = re.fullmatch(r"(?:\[([^]]+)\]|([^:]+)):([0-9]{1,5})", text)
    try:
        if match is None or int(match[3]) >= 1 << 16:
            raise ValueError(text)
        host = ipaddress.IPv6Address(match[1]) if match[1] else ipaddress.IPv4Address(match[2])
    except ValueError:
        raise UsageError(
            f"'{text}' is no address for {key}; write it like 127.0.0.1:9464 or [::1]:9464"
        ) from None
    return str(host), int(match[3])


def _threads(options: Mapping[str, Any]) -> int:
    text = str(options["migrate-threads"])
    if not text.isdecimal() or not 1 <= int(text) <= _THREADS_MAX:
        raise UsageError(f"'{text}' is no migrate-threads; give a number from 1 to {_THREADS_MAX}")
    return int(text)


def _share(options: Mapping[str, Any], key: str) -> float:
    value = options[key]
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"'{value}' is no {key}; give a share between 0 and 1")
    return share


def _text(options: Mapping[str, Any], key: str) -> str:
    value = options.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"'{key}' is missing; see pafkafs mount --help")
    return value


def _choice(options: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = str(options[key])
    if value not in allowed:
        raise UsageError(f"'{value}' is no {key}; choose one of {', '.join(allowed)}")
    return value


def _items(options: Mapping[str, Any], key: str) -> list[str]:
    """A list as TOML writes it, or as the command line does, with commas."""
    value = options.get(key, [])
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items]


def _devices(options: Mapping[str, Any], key: str) -> tuple[str, ...]:
    devices = _items(options, key)
    if not devices or not all(devices):
        raise UsageError(f"the {key} devices are missing; see pafkafs mount --help")
    for device in devices:
        if "," in device or ":" in device:
            raise UsageError(f"'{device}' cannot be a device: its path has a comma or a colon")
    return tuple(str(Path(device).absolute()) for device in devices)


def device_tiers(options: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The devices of fast, tier and slow, from the fast tier to the slow one.  UsageError when
    they are missing, or cannot be devices."""
    middle = _middle_tiers(options)
    return (_devices(options, "fast"), *middle, _devices(options, "slow"))


def _middle_tiers(options: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Those between the fast and the slow one: each a list of devices, as they are."""
    tiers = options.get("tier", [])
    found = tiers if isinstance(tiers, list) else [tiers]
    return [_devices({"tier": tier}, "tier") for tier in found]


def _capacities(options: Mapping[str, Any], key: str, count: int) -> tuple[int, ...]:
    texts = _items(options, key) or [DEFAULTS[key]]
    if len(texts) > max(1, count):
        raise UsageError(f"'{key}' has {len(texts)} sizes for {count} devices; leave some out")
    if not count:
        return ()
    sizes = [WHOLE_FILESYSTEM if t == str(WHOLE_FILESYSTEM) else parse_size(t) for t in texts]
    return tuple(sizes + sizes[-1:] * (count - len(sizes)))
