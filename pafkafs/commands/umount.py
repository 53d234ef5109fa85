"""`pafkafs umount`: unmounts and waits until the daemon has made everything durable."""

import os
import select
import signal
from collections.abc import Callable
from typing import Any

import click

from pafkafs import control, mountpoint
from pafkafs.commands import completing
from pafkafs.errors import PafkafsError

# The daemon syncs for at most a minute, twice.
_DAEMON_PATIENCE_S = 150.0
_END_PATIENCE_S = 10.0


@click.command()
@click.argument("mountpoint", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
@click.option("--lazy", is_flag=True, help="Detach also when files are open; they are cut off.")
def umount(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT.

    Refused while files are open, unless --lazy. Returns when the daemon has synced and ended; with
    1 when it could not sync a device.
    """
    unmount(os.path.realpath(mountpoint), lazy=lazy)


def unmount(where: str, *, lazy: bool) -> None:
    """Unmounts; PafkafsError when nothing is mounted there, or it is busy."""
    if mountpoint.find_mounted(where) is None:
        raise PafkafsError(f"no pafkafs is mounted at {where}")
    pid = _daemon_of(where)
    if pid is None:
        # Dead, or the daemon of another user, which nobody waits for.
        _detach(where, lazy=lazy or mountpoint.is_dead(where))
        return
    watch = os.pidfd_open(pid)
    try:
        with control.asking(where, control.AWAIT_END) as answer:
            answer(control.TIMEOUT_S)  # it knows that we wait
            if lazy:
                signal.pidfd_send_signal(watch, signal.SIGTERM)  # it syncs, detaches and cuts off
            else:
                _detach(where, lazy=False)
            unsynced = _unsynced(answer, pid)
        # Then the devices are free; but one that hangs holds the daemon.
        select.select([watch], [], [], _END_PATIENCE_S)
    finally:
        os.close(watch)
    if unsynced:
        raise PafkafsError(
            f"unmounted, but {' and '.join(unsynced)} could not be synced, and may lack what was "
            "written there without fsync; see the log of the daemon"
        )


def _unsynced(answer: Callable[[float], Any], pid: int) -> list[str]:
    """The devices that were not synced."""
    try:
        unsynced: list[str] = answer(_DAEMON_PATIENCE_S)
    except PafkafsError as error:
        raise PafkafsError(
            f"unmounted, but the daemon (pid {pid}) has not told that all is synced; see its log"
        ) from error
    return unsynced


def _daemon_of(where: str) -> int | None:
    try:
        pid: int = control.ask(where, "status")["pid"]
    except control.NoDaemon:
        return None
    return pid


def _detach(where: str, *, lazy: bool) -> None:
    try:
        mountpoint.detach(where, lazy=lazy)
    except OSError as error:
        raise PafkafsError(
            f"cannot unmount {where}: {error.strerror}; stop what has files open there "
            f"(fuser -vm {where}), or use --lazy"
        ) from error
