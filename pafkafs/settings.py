"""The options of a mount while it serves: shown, changed, and read again from their file.

A change is checked as at mount and taken over as a whole, or not at all.  It ends with the mount.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import trio

from pafkafs.config import CHANGEABLE, DEFAULTS, KEYS, MountOptions, read_config, with_values
from pafkafs.control import Commands
from pafkafs.errors import PafkafsError, UsageError

log = logging.getLogger(__name__)

# Less than the patience of the command that asks for it.
_FILE_PATIENCE_S = 3.0


def written(options: MountOptions, key: str) -> str:
    """An option as it was given, or its default; empty when it has none."""
    if key == "low-watermark" and key not in options.values:
        return f"{options.limits.low_watermark:g}"
    value = options.values.get(key, DEFAULTS.get(key, ""))
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def changes(before: MountOptions, after: MountOptions) -> dict[str, tuple[str, str]]:
    """What differs, by option: as it was written before and after."""
    pairs = {key: (written(before, key), written(after, key)) for key in KEYS}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def changed(options: MountOptions, wanted: Mapping[str, Any]) -> MountOptions:
    """The options with some values changed; an empty one is the default.  Raises UsageError."""
    for key, value in wanted.items():
        _check_known(key)
        if key not in CHANGEABLE:
            raise UsageError(
                f"{key} cannot be changed while it is mounted: unmount, and mount with it"
            )
        if not isinstance(value, str):
            raise UsageError(f"{key} needs a text as its value")
    values = {**options.values, **wanted}
    return with_values(options, {key: value for key, value in values.items() if value != ""})


def reread(options: MountOptions, table: Mapping[str, Any]) -> tuple[MountOptions, list[str]]:
    """The options with what the file says now, and what would need a remount.  What was changed
    meanwhile by command is forgotten.  Raises UsageError."""
    values = {**table, **options.given}
    after = with_values(options, values)
    fixed = [key for key in KEYS if key not in CHANGEABLE]
    return after, [key for key in fixed if values.get(key) != options.values.get(key)]


def _check_known(key: str) -> None:
    if key not in KEYS:
        raise UsageError(f"there is no option '{key}'; known are {', '.join(KEYS)}")


class Settings:
    """The options of a mount, and who takes changed ones over."""

    def __init__(self, options: MountOptions, take_over: Callable[[MountOptions], None]) -> None:
        self.options = options
        self._take_over = take_over

    def commands(self) -> Commands:
        """For the control socket."""
        return {"get": self._get, "set": self._set, "reload": self._reload}

    async def _get(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: {
                "value": written(self.options, key),
                "given": key in self.options.values,
                "changeable": key in CHANGEABLE,
            }
            for key in KEYS
        }

    async def _set(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        wanted = asked.get("values")
        if not isinstance(wanted, dict):
            raise UsageError("set needs 'values', by option")
        return self._change(changed(self.options, wanted), "by command")

    async def _reload(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return await self.reload()

    async def reload(self) -> dict[str, Any]:
        """Reads the file again.  PafkafsError when it cannot be read, or says what is refused;
        then nothing has changed."""
        path = self.options.config
        if path is None:
            raise PafkafsError("there is nothing to reload: it was mounted without --config")
        # In a thread: the file may be anywhere by now, in our own mount too.
        with trio.move_on_after(_FILE_PATIENCE_S):
            table = await trio.to_thread.run_sync(read_config, path, abandon_on_cancel=True)
            after, need_remount = reread(self.options, table)
            return {"changed": self._change(after, f"by {path}"), "need_remount": need_remount}
        raise PafkafsError(f"the configuration {path} could not be read: it does not answer")

    def _change(self, after: MountOptions, why: str) -> dict[str, tuple[str, str]]:
        """Atomic for the trio thread."""
        found = changes(self.options, after)
        for key, (old, new) in found.items():
            log.info("%s changed %s from '%s' to '%s'", key, why, old, new)
        self.options = after
        if found:
            self._take_over(after)
        return found
