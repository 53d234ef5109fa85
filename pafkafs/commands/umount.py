"""`pafkafs umount`: unmounts and waits until the daemon has made everything durable."""

import os

import click
import psutil

from pafkafs import control, mountpoint
from pafkafs.errors import PafkafsError

# The daemon syncs for at most a minute, twice.
_DAEMON_PATIENCE_S = 150.0


@click.command()
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("--lazy", is_flag=True, help="Detach also when files are open; they are cut off.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT.

    Refused while files are open, unless --lazy. Returns when the daemon has synced and ended.
    """
    unmount(os.path.realpath(mountpoint), lazy=lazy)


def unmount(where: str, *, lazy: bool) -> None:
    """Unmounts; PafkafsError when nothing is mounted there, or it is busy."""
    if mountpoint.find_mounted(where) is None:
        raise PafkafsError(f"no pafkafs is mounted at {where}")
    daemon = _daemon_of(where)
    if lazy and daemon is not None:
        daemon.terminate()  # it syncs, detaches and cuts off
    else:
        _detach(where, dead=daemon is None)
    if daemon is None:
        return
    try:
        daemon.wait(_DAEMON_PATIENCE_S)
    except psutil.TimeoutExpired:
        raise PafkafsError(
            f"unmounted, but the daemon (pid {daemon.pid}) still waits for a device; see its log"
        ) from None


def _daemon_of(where: str) -> psutil.Process | None:
    try:
        return psutil.Process(control.ask(where, "status")["pid"])
    except (control.NoDaemon, psutil.NoSuchProcess):
        return None


def _detach(where: str, *, dead: bool) -> None:
    try:
        mountpoint.detach(where, lazy=dead)
    except OSError as error:
        raise PafkafsError(
            f"cannot unmount {where}: {error.strerror}; stop what has files open there "
            f"(fuser -vm {where}), or use --lazy"
        ) from error
