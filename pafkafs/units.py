"""Sizes, durations and names as people write and read them."""

import re

from pafkafs.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?b?)", re.IGNORECASE)
_SIZE_LIMIT = 1 << 62
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def parse_size(text: str) -> int:
    """Bytes of a size such as `8GiB`, `512m` (binary) or `1GB` (decimal).

    A bare prefix is binary, as for `-Xmx` and in Kafka's own documentation.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a size; write it like 8GiB, 512MiB or 1000000")
    number, prefix, unit = match.groups()
    base = 1000 if unit.lower() == "b" and prefix else 1024
    size = int(float(number) * base ** _POWERS[prefix.lower()])
    if size >= _SIZE_LIMIT:
        raise UsageError(f"'{text}' is more than any device has")
    return size


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `30s`, `10min`, `12h`, `7d`."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"'{text}' is not a duration; write it like 30s, 10min, 12h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(count: int) -> str:
    """A size for people, in binary units with at most four digits: `1.5 GiB`."""
    value = float(count)
    for prefix in _PREFIXES:
        if abs(value) < 1024 or prefix == _PREFIXES[-1]:
            break
        value /= 1024
    digits = 0 if prefix == "" or value >= 100 else 1
    return f"{value:.{digits}f} {prefix}B"


def format_duration(seconds: float) -> str:
    """A duration for people: `42 s`, `3 min 5 s`, `2 h 10 min`, `5 d 3 h`."""
    whole = int(seconds)
    for size, name, below_size, below in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below_size} {below}"
    return f"{whole} s"


def printable(text: str) -> str:
    """A text with names in it as one line that any terminal can show: names are bytes, and may
    be no text, or one that steers the terminal."""
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8, as os.fsdecode gives it
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
