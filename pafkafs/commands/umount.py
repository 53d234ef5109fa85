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

# After its last word the daemon only ends, unless a device holds it.
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
    from pafkafs.ending import LONGEST_S  # late: it loads half of the daemon

    pid = _daemon_of(where)
    if pid is None:
        _unmount_without_daemon(where, lazy=lazy)
        return
    watch = os.pidfd_open(pid)
    try:
        with control.asking(where, control.AWAIT_END) as answer:
            told = _is_awaited(answer)
            if lazy:
                signal.pidfd_send_signal(watch, signal.SIGTERM)  # it syncs, detaches and cuts off
            else:
                _detach(where, lazy=False)
            unsynced = _unsynced(answer, LONGEST_S, pid) if told else []
        patience_s = _END_PATIENCE_S if told else LONGEST_S
        has_ended = bool(select.select([watch], [], [], patience_s)[0])
    finally:
        os.close(watch)
    if unsynced:
        raise PafkafsError(
            f"unmounted, but {' and '.join(unsynced)} could not be synced, and may lack what was "
            "written there without fsync; see the log of the daemon"
        )
    if not has_ended:
        raise PafkafsError(
            f"unmounted, but the daemon (pid {pid}) has not ended yet, and holds the devices; see "
            "its log"
        )


def _unmount_without_daemon(where: str, *, lazy: bool) -> None:
    """Of one that is dead, or of another user, for which nobody waits."""
    dead = mountpoint.is_dead(where)
    _detach(where, lazy=lazy or dead)
    if not dead:
        click.echo(
            "pafkafs: unmounted; its daemon cannot be asked, and may be writing yet", err=True
        )


def _is_awaited(answer: Callable[[float], Any]) -> bool:
    """Whether the daemon knows that its end is waited for; one of an earlier version does not."""
    try:
        answer(control.TIMEOUT_S)
    except PafkafsError:
        return False
    return True


def _unsynced(answer: Callable[[float], Any], patience_s: float, pid: int) -> list[str]:
    """The devices that were not synced."""
    try:
        unsynced: list[str] = answer(patience_s)
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
