"""The command line: one module for each verb.  Turns errors into one line and an exit status."""

import sys

import click

from pafkafs import __version__
from pafkafs.commands.adopt import adopt
from pafkafs.commands.doctor import doctor
from pafkafs.commands.migrate import migrate, pause, resume
from pafkafs.commands.mount import mount
from pafkafs.commands.status import status
from pafkafs.commands.umount import umount
from pafkafs.errors import PafkafsError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pafkafs")
def cli() -> None:
    """A fast and a slow tier in one directory, for stock Kafka.

    \b
    pafkafs mount /pmem /hdd /kafka-logs    then log.dirs=/kafka-logs
    pafkafs status                          what is where, and what is wrong
    pafkafs umount /kafka-logs
    pafkafs doctor /pmem /hdd /kafka-logs   what this host lacks
    """


for command in (mount, umount, status, migrate, pause, resume, adopt, doctor):
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
        click.echo(f"pafkafs: {error}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        click.echo(f"pafkafs: {error.strerror or error}{where}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
