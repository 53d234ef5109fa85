"""The command line: one module for each verb.  Turns errors into one line and an exit status."""

import importlib
import os
import sys

import click

from pafkafs import __version__

try:
    importlib.import_module("pafkafs._native")
except ImportError as error:
    sys.exit(
        f"pafkafs: its native module cannot be loaded: {error}; "
        "apt-get install libpmem1, or install pafkafs again"
    )

from pafkafs.commands.adopt import adopt
from pafkafs.commands.check import check
from pafkafs.commands.completion import completion
from pafkafs.commands.doctor import doctor
from pafkafs.commands.ls import ls
from pafkafs.commands.migrate import migrate, pause, resume
from pafkafs.commands.mount import mount
from pafkafs.commands.rescue import rescue
from pafkafs.commands.settings import get, reload, set_
from pafkafs.commands.status import status
from pafkafs.commands.umount import umount
from pafkafs.errors import PafkafsError
from pafkafs.units import printable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pafkafs")
def cli() -> None:
    """A fast and a slow tier in one directory, for stock Kafka.

    \b
    pafkafs mount /pmem /hdd /kafka-logs    then log.dirs=/kafka-logs
    pafkafs status                          what is where, and what is wrong
    pafkafs umount /kafka-logs
    pafkafs doctor /pmem /hdd /kafka-logs   what this host lacks
    pafkafs check /pmem /hdd                what is wrong on the devices
    """


for command in (
    mount,
    umount,
    status,
    ls,
    migrate,
    pause,
    resume,
    get,
    set_,
    reload,
    adopt,
    doctor,
    check,
    rescue,
    completion,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of `pafkafs`."""
    run(cli)


def run(command: click.Command, arguments: list[str] | None = None) -> None:
    """Runs a command; exits with 0, 1 (something is wrong) or 2 (usage)."""
    try:
        result = command.main(arguments, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except PafkafsError as error:
        click.echo(f"pafkafs: {printable(str(error))}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        named = isinstance(error.filename, (str, bytes))  # else a descriptor
        where = f": {os.fsdecode(error.filename)}" if named else ""
        click.echo(printable(f"pafkafs: {error.strerror or error}{where}"), err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
