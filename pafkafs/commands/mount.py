"""`pafkafs mount`: checks, mounts, and serves in the background or in the foreground."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from pafkafs.commands import completing
from pafkafs.config import (
    DURABILITIES,
    MODES,
    PMEM_CHOICES,
    MountOptions,
    mount_options,
    read_config,
)
from pafkafs.errors import PafkafsError

_OK = b"ok"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@click.command()
@click.argument("fast", required=False, shell_complete=completing.directories)
@click.argument("slow", required=False, shell_complete=completing.directories)
@click.argument("mountpoint", required=False, shell_complete=completing.directories)
@click.option(
    "--fast-capacity",
    metavar="SIZE[,SIZE…]",
    help="Room to use on each fast device, like 8GiB; -1 is the whole filesystem (default).",
)
@click.option(
    "--slow-capacity",
    metavar="SIZE[,SIZE…]",
    help="The same for the slow devices. A short list repeats its last size.",
)
@click.option(
    "--tier",
    multiple=True,
    metavar="DEVICE[,DEVICE…]",
    help="A tier between FAST and SLOW; given again, one below it.",
)
@click.option(
    "--middle-capacity",
    metavar="SIZE[,SIZE…]",
    help="As --fast-capacity, for the devices of all tiers between.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Where new data goes: tiered (default): fast, and slow when there is no room; "
    "fast: only there, ENOSPC when it is full; slow: to the slow tier.",
)
@click.option(
    "--durability",
    type=click.Choice(DURABILITIES),
    help="What a written byte survives: power (default on DAX): loss of power; process (default "
    "elsewhere): death of pafkafs and of Kafka, power loss needs fsync as on any filesystem.",
)
@click.option(
    "--pmem",
    type=click.Choice(PMEM_CHOICES),
    help="Write new segments through a mapping: auto (default): on DAX; on: also without DAX, for "
    "tests and measurements; off: never.",
)
@click.option(
    "--pool-ratio",
    metavar="SHARE",
    help="Of the free room on PMem, how much may be prepared for new segments (default 0.8).",
)
@click.option(
    "--segment-size",
    metavar="SIZE",
    help="Kafka's log.segment.bytes: files on PMem are not prepared beyond it. Without, it is what "
    "Kafka is seen to roll at.",
)
@click.option(
    "--threshold",
    metavar="SHARE",
    help="Of the fast tier's capacity: above it sealed segments go down, oldest first (default "
    "0.5; -1: never by usage).",
)
@click.option(
    "--low-watermark",
    metavar="SHARE",
    help="Down to here; below it segments come up again (default 0.8 of the threshold).",
)
@click.option("--max-age", metavar="TIME", help="Sealed segments older than this go down: 12h, 7d.")
@click.option("--min-age", metavar="TIME", help="Younger segments stay (default 0s).")
@click.option(
    "--cool-down", metavar="TIME", help="What went down stays there at least so long (1h)."
)
@click.option(
    "--read-wait",
    metavar="TIME",
    help="What is read heavily may stay so much longer (default 1m; 0s: not at all).",
)
@click.option("--interval", metavar="TIME", help="How often to look (default 5s).")
@click.option("--migrate-threads", metavar="N", help="Files that move at once (default 1).")
@click.option(
    "--migrate-rate",
    metavar="SIZE",
    help="Bytes per second to move at most; 0: no bound (default).",
)
@click.option(
    "--pin", metavar="GLOB[,GLOB…]", help="Paths below the mount that stay on the fast tier."
)
@click.option(
    "--metrics",
    metavar="ADDRESS:PORT",
    help="Serve metrics for Prometheus there, to whoever can connect: 127.0.0.1:9464 or "
    "[::1]:9464 for this host only; port 0 is any, which status tells.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="TOML file with these options (fast, slow, mountpoint too); see pafkafs reload.",
    shell_complete=completing.files,
)
@click.option(
    "--log-file",
    metavar="FILE",
    help="Where the daemon logs.",
    shell_complete=completing.files,
)
@click.option(
    "-f", "--foreground", is_flag=True, help="Stay in the foreground and log to stderr: systemd."
)
def mount(config: str | None, foreground: bool, **given: Any) -> None:
    """Mount the tiers FAST and SLOW as one directory at MOUNTPOINT.

    FAST and SLOW are directories, best the roots of their own filesystems; lists are separated by
    commas. New directories are made into devices of a set; later mounts need all of them.
    Returns when the mount is ready.
    """
    given["tier"] = list(given["tier"]) or None
    options = mount_options(
        read_config(config) if config is not None else {},
        {name.replace("_", "-"): value for name, value in given.items()},
        config,
    )
    if foreground:
        _serve_in_foreground(options)
    else:
        start_in_background(options)


def _serve_in_foreground(options: MountOptions) -> None:
    from pafkafs.daemon import serve

    file = options.log_file
    handler = _stderr_handler() if file is None else _log_handler(Path(file))
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[handler])
    serve(options, lambda: click.echo(f"{options.mountpoint} is mounted", err=True))


def start_in_background(options: MountOptions) -> None:
    """Forks the daemon and waits until it serves; raises what it failed with."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        _become_daemon(options, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        message = pipe.read()
    if message != _OK:
        raise PafkafsError(message.decode() or f"the daemon died; see {log_path(options)}")


def _become_daemon(options: MountOptions, write_end: int) -> NoReturn:
    """In the child: never returns."""
    os.setsid()
    starter = Starter(write_end)
    exit_status = 1
    try:
        path = log_path(options)
        logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, handlers=[_log_handler(path)])
        from pafkafs.daemon import serve

        serve(options, starter.tell_ready)
        exit_status = 0
    except PafkafsError as error:
        logging.error("%s", error)
        starter.tell(str(error).encode())
    except BaseException as error:
        logging.exception("the daemon failed")
        starter.tell(f"unexpected error: {error!r}; see {log_path(options)}".encode())
    finally:
        logging.shutdown()
        os._exit(exit_status)


class Starter:
    """Who waits for the daemon: it is told one thing, through a pipe."""

    def __init__(self, write_end: int) -> None:
        self._write_end = write_end

    def tell_ready(self) -> None:
        """Lets go of the terminal: from now on errors go to the log."""
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        self.tell(_OK)

    def tell(self, message: bytes) -> None:
        """Once: afterwards the number of the pipe may be that of somebody's file."""
        write_end, self._write_end = self._write_end, -1
        if write_end < 0:
            return
        try:
            os.write(write_end, message)
            os.close(write_end)
        except OSError:
            logging.exception("nobody waits for the daemon any more")


def log_path(options: MountOptions) -> Path:
    """Where the daemon of a mount logs."""
    if options.log_file is not None:
        return Path(options.log_file)
    name = options.mountpoint.strip("/").replace("/", "-") + ".log"
    if os.geteuid() == 0:
        return Path("/var/log/pafkafs", name)
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "pafkafs", name)


def _log_handler(path: Path) -> logging.Handler:
    from logging.handlers import WatchedFileHandler  # goes on after logrotate

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files are bytes, and need not be UTF-8.
        return WatchedFileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        print(f"pafkafs: cannot log to {path}: {error.strerror}", file=sys.stderr)
        return _stderr_handler()


def _stderr_handler() -> logging.Handler:
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    return logging.StreamHandler()
