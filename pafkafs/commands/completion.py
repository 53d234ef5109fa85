"""`pafkafs completion`: the script that lets a shell complete pafkafs."""

import click
from click.shell_completion import get_completion_class

_VARIABLE = "_PAFKAFS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash   pafkafs completion bash > /etc/bash_completion.d/pafkafs
    zsh    pafkafs completion zsh > /usr/local/share/zsh/site-functions/_pafkafs
    fish   pafkafs completion fish > ~/.config/fish/completions/pafkafs.fish
    """
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, "pafkafs", _VARIABLE).source())
