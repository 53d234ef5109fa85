"""What the arguments of commands are completed to by a shell."""

import click
from click.shell_completion import CompletionItem

from pafkafs.config import CHANGEABLE, KEYS
from pafkafs.mountpoint import all_mounted


def mountpoints(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The pafkafs mounts of this host."""
    found = sorted({mounted.mountpoint for mounted in all_mounted()})
    return [CompletionItem(path) for path in found if path.startswith(incomplete)]


def directories(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Left to the shell."""
    return [CompletionItem(incomplete, type="dir")]


def files(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Left to the shell."""
    return [CompletionItem(incomplete, type="file")]


def options(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The options of a mount."""
    return [CompletionItem(key) for key in KEYS if key.startswith(incomplete)]


def changes(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """`OPTION=` of each that may change while it is mounted."""
    return [CompletionItem(f"{key}=") for key in CHANGEABLE if key.startswith(incomplete)]
