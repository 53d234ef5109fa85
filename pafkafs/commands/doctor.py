"""`pafkafs doctor`: what a host lacks for a mount."""

import json
from dataclasses import asdict
from typing import Any

import click

from pafkafs.config import mount_options
from pafkafs.doctor import OK, PROBLEM, WARNING, examine

_COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


@click.command()
@click.argument("fast")
@click.argument("slow")
@click.argument("mountpoint")
@click.option("--kafka-config", metavar="FILE", help="The broker's server.properties.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(kafka_config: str | None, as_json: bool, **given: Any) -> int:
    """Say what a mount of FAST and SLOW at MOUNTPOINT lacks on this host; change nothing.

    Exit status: 0 when it can be mounted, 1 when not, 2 wrong usage.
    """
    found = examine(mount_options({}, given), kafka_config)
    if as_json:
        click.echo(json.dumps({"version": 1, "findings": [asdict(f) for f in found]}, indent=2))
    else:
        for finding in found:
            level = click.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
            click.echo(f"{level} {finding.what}")
            if finding.action:
                click.echo(f"{'':8} -> {finding.action}")
    return 1 if any(finding.level == PROBLEM for finding in found) else 0
