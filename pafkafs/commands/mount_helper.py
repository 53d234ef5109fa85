"""`mount.pafkafs`: what mount(8) runs for `mount -t pafkafs /pmem:/hdd /kafka-logs -o …`."""

import sys
from typing import Any

import click

from pafkafs.commands import run
from pafkafs.commands.mount import start_in_background
from pafkafs.config import KEYS, mount_options, read_config
from pafkafs.errors import UsageError

# Of mount(8) itself, of systemd and of fstab; what they ask for is so in any case, or is theirs.
_NOT_OURS = {
    "rw",
    "defaults",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "user",
    "nouser",
    "users",
    "owner",
    "relatime",
    "allow_other",
    "default_permissions",
    "async",
}
_NOT_OURS_PREFIXES = ("x-", "comment=")
_ELSEWHERE = ("fast", "tier", "slow", "mountpoint", "topics")
_OPTIONS = (*(key for key in KEYS if key not in _ELSEWHERE), "config")


def parse_options(text: str) -> dict[str, str]:
    """The options of `-o`; UsageError for one that is neither ours nor mount's.

    Lists of capacities are separated by colons, since mount separates options by commas.
    """
    found: dict[str, str] = {}
    for option in filter(None, text.split(",")):
        key, _, value = option.partition("=")
        if option in _NOT_OURS or option.startswith(_NOT_OURS_PREFIXES):
            continue
        if key not in _OPTIONS or not value:
            raise UsageError(f"unknown mount option '{option}'; known are {', '.join(_OPTIONS)}")
        found[key] = value.replace(":", ",") if key.endswith("-capacity") else value
    return found


@click.command()
@click.argument("source")
@click.argument("mountpoint")
@click.option("-o", "options", default="", help="Mount options.")
@click.option("-f", "--fake", is_flag=True, help="Check only, do not mount.")
@click.option("-n", is_flag=True, help="Accepted for mount(8): there is no /etc/mtab.")
@click.option("-s", is_flag=True, help="Accepted for mount(8).")
@click.option("-v", is_flag=True, help="Accepted for mount(8).")
def helper(source: str, mountpoint: str, options: str, fake: bool, **_accepted: Any) -> None:
    """Mount SOURCE, FAST:SLOW or FAST:MIDDLE:SLOW, at MOUNTPOINT."""
    if ":" not in source:
        raise UsageError(f"'{source}' does not name the tiers; write FAST:SLOW, like /pmem:/hdd")
    fast, *middle, slow = source.split(":")
    given: dict[str, Any] = dict(parse_options(options))
    config = given.pop("config", None)
    given.update(fast=fast, tier=middle or None, slow=slow, mountpoint=mountpoint)
    checked = mount_options({} if config is None else read_config(config), given, config)
    if not fake:
        start_in_background(checked)


def main() -> None:
    """Entry point of `mount.pafkafs`."""
    run(helper, sys.argv[1:])
