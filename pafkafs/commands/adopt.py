"""`pafkafs adopt`: turns an existing Kafka log directory into a home tree, without copying."""

import click

from pafkafs import adoption


@click.command()
@click.argument("log_dir")
@click.argument("fast")
@click.argument("slow")
def adopt(log_dir: str, fast: str, slow: str) -> None:
    """Take over the Kafka log directory LOG_DIR, on the filesystem of FAST, as the home tree.

    LOG_DIR is moved to FAST/tree by rename: nothing is copied, and Kafka must be stopped. It may
    be FAST itself. Afterwards mount FAST and SLOW where Kafka's log.dirs points.
    """
    count = adoption.adopt(log_dir, fast, slow.split(","))
    click.echo(f"adopted {count} entries; now: pafkafs mount {fast} {slow} MOUNTPOINT")
