"""The options of a mount: their names, their defaults, and the TOML file that can hold them."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pafkafs.errors import UsageError
from pafkafs.policy import HIGH_MARK, Limits, Mode
from pafkafs.units import parse_duration, parse_size

WHOLE_FILESYSTEM = -1
DURABILITIES = ("power", "process")
PMEM_CHOICES = ("auto", "on", "off")
POOL_RATIO = 0.8
_LOW_OF_THRESHOLD = 0.8
_THREADS_MAX = 8
MODES = tuple(mode.value for mode in Mode)


@dataclass(frozen=True)
class MountOptions:
    """What `pafkafs mount` was asked for.  Capacities are bytes, one for each device."""

    fast: tuple[str, ...]
    slow: tuple[str, ...]
    mountpoint: str
    fast_capacity: tuple[int, ...]
    slow_capacity: tuple[int, ...]
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
    pin: tuple[str, ...]

    @property
    def source(self) -> str:
        """The devices as fstab and /proc/mounts write them: `/pmem:/hdd0,/hdd1`."""
        return f"{','.join(self.fast)}:{','.join(self.slow)}"


KEYS = (
    "fast",
    "slow",
    "mountpoint",
    "fast-capacity",
    "slow-capacity",
    "mode",
    "durability",
    "log-file",
    "pmem",
    "pool-ratio",
    "segment-size",
    "threshold",
    "low-watermark",
    "max-age",
    "min-age",
    "cool-down",
    "interval",
    "migrate-threads",
    "migrate-rate",
    "pin",
)


def read_config(path: str) -> dict[str, Any]:
    """The options of a TOML file, checked for unknown names."""
    try:
        with open(path, "rb") as stream:
            table = tomllib.load(stream)
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


def mount_options(config: Mapping[str, Any], given: Mapping[str, Any]) -> MountOptions:
    """The options of a mount: what was given on the command line goes before the file."""
    merged = {**config, **{key: value for key, value in given.items() if value is not None}}
    fast, slow = _devices(merged, "fast"), _devices(merged, "slow")
    return MountOptions(
        fast=fast,
        slow=slow,
        mountpoint=os.path.realpath(_text(merged, "mountpoint")),
        fast_capacity=_capacities(merged, "fast-capacity", len(fast)),
        slow_capacity=_capacities(merged, "slow-capacity", len(slow)),
        mode=Mode(_choice(merged, "mode", MODES) or Mode.TIERED.value),
        durability=_choice(merged, "durability", DURABILITIES),
        log_file=_text(merged, "log-file") if "log-file" in merged else None,
        pmem=_choice(merged, "pmem", PMEM_CHOICES) or "auto",
        pool_ratio=_share(merged, "pool-ratio", POOL_RATIO),
        segment_size=parse_size(str(merged["segment-size"])) if "segment-size" in merged else None,
        limits=_limits(merged),
        interval_s=_duration(merged, "interval", "5s") or 0.0,
        migrate_threads=_threads(merged),
        migrate_rate=parse_size(str(merged.get("migrate-rate", 0))),
        pin=tuple(_items(merged, "pin")),
    )


def _limits(options: Mapping[str, Any]) -> Limits:
    """The lines of the fast tier; UsageError when they contradict each other."""
    defaults = Limits()
    threshold = -1.0
    if str(options.get("threshold")) != "-1":
        threshold = _share(options, "threshold", defaults.threshold)
    low = _share(options, "low-watermark", max(0.0, threshold) * _LOW_OF_THRESHOLD)
    if threshold >= 0 and not low < threshold <= HIGH_MARK:
        raise UsageError(
            f"low-watermark {low:g} must be less than threshold {threshold:g}, "
            f"and that at most {HIGH_MARK:g}"
        )
    max_age_s = _duration(options, "max-age", None)
    min_age_s = _duration(options, "min-age", "0s") or 0.0
    if max_age_s is not None and max_age_s <= min_age_s:
        raise UsageError("max-age must be more than min-age")
    cool_down_s = _duration(options, "cool-down", f"{defaults.cool_down_s}s") or 0.0
    return Limits(threshold, low, max_age_s, min_age_s, cool_down_s)


def _duration(options: Mapping[str, Any], key: str, default: str | None) -> float | None:
    text = options.get(key, default)
    return None if text is None else parse_duration(str(text))


def _threads(options: Mapping[str, Any]) -> int:
    text = str(options.get("migrate-threads", 1))
    if not text.isdecimal() or not 1 <= int(text) <= _THREADS_MAX:
        raise UsageError(f"'{text}' is no migrate-threads; give a number from 1 to {_THREADS_MAX}")
    return int(text)


def _share(options: Mapping[str, Any], key: str, default: float) -> float:
    value = options.get(key, default)
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


def _choice(options: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str | None:
    value = options.get(key)
    if value is not None and value not in allowed:
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


def _capacities(options: Mapping[str, Any], key: str, count: int) -> tuple[int, ...]:
    texts = _items(options, key) or [str(WHOLE_FILESYSTEM)]
    if len(texts) > count:
        raise UsageError(f"'{key}' has {len(texts)} sizes for {count} devices; leave some out")
    sizes = [WHOLE_FILESYSTEM if t == str(WHOLE_FILESYSTEM) else parse_size(t) for t in texts]
    return tuple(sizes + sizes[-1:] * (count - len(sizes)))
