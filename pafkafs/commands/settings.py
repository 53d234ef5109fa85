"""`pafkafs get`, `set` and `reload`: the options of a mount while it serves."""

import json
import os
from typing import Any

import click

from pafkafs import control
from pafkafs.commands import completing
from pafkafs.errors import EXIT_UNHEALTHY, UsageError
from pafkafs.units import printable

_JSON_VERSION = 1


@click.command()
@click.argument("where", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
@click.argument("option", metavar="[OPTION]", required=False, shell_complete=completing.options)
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
def get(where: str, option: str | None, as_json: bool) -> None:
    """Show the options of the mount at MOUNTPOINT, or one of them.

    Values are written as for pafkafs mount; an option that was not given has its default.
    """
    where = os.path.realpath(where)
    found: dict[str, Any] = control.ask(where, "get")
    if option is not None and option not in found:
        raise UsageError(f"there is no option '{option}'; known are {', '.join(found)}")
    if option is not None:
        found = {option: found[option]}
    if as_json:
        document = {"version": _JSON_VERSION, "mountpoint": where, "options": found}
        click.echo(json.dumps(document, indent=2))
    elif option is not None:
        click.echo(printable(found[option]["value"]))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    width = max(map(len, found))
    for changeable, title in ((True, "may be set:"), (False, "need a remount:")):
        click.echo(title)
        for key, option in found.items():
            if option["changeable"] == changeable:
                click.echo(f"  {key:<{width}}  {printable(option['value'])}".rstrip())


@click.command("set")
@click.argument("where", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
@click.argument(
    "changes",
    metavar="OPTION=VALUE…",
    nargs=-1,
    required=True,
    shell_complete=completing.changes,
)
def set_(where: str, changes: tuple[str, ...]) -> None:
    """Change options of the mount at MOUNTPOINT while it serves.

    These may change: threshold, low-watermark, max-age, min-age, cool-down, read-wait, interval,
    migrate-threads, migrate-rate, pin. Values are checked as at mount, all together: either all
    are taken over, or none. An empty value is the default. What is set ends with the mount, and
    with pafkafs reload.
    """
    values: dict[str, str] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"'{change}' is no change; write OPTION=VALUE, like threshold=0.6")
        if key in values:
            raise UsageError(f"'{key}' is given twice")
        values[key] = value
    _show_changes(control.ask(os.path.realpath(where), "set", values=values))


@click.command()
@click.argument("where", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
def reload(where: str) -> int:
    """Read the --config file of the mount at MOUNTPOINT again, as SIGHUP does.

    Options that may change are taken over; options of the command line still go before the file,
    and what was set by command is forgotten. Exit status: 0, or 1 when there are other changes,
    which need a remount, or nothing could be reloaded.
    """
    where = os.path.realpath(where)
    answer = control.ask(where, "reload")
    _show_changes(answer["changed"])
    for key in answer["need_remount"]:
        click.echo(
            f"pafkafs: {key} was left as it is: unmount {where} and mount it again", err=True
        )
    return EXIT_UNHEALTHY if answer["need_remount"] else 0


def _show_changes(changed: dict[str, tuple[str, str]]) -> None:
    for key, (before, after) in changed.items():
        click.echo(printable(f"{key}: '{before}' is now '{after}'"))
    if not changed:
        click.echo("nothing has changed")
