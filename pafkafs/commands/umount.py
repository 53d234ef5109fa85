"""`pafkafs umount`: unmounts and waits until the daemon has made everything durable."""

import os
import select
import signal

import click

from pafkafs import control, mountpoint
from pafkafs.commands import completing
from pafkafs.errors import PafkafsError

# The daemon syncs for at most a minute, twice.
_DAEMON_PATIENCE_S = 150.0


@click.command()
@click.argument("mountpoint", metavar="MOUNTPOINT", shell_complete=completing.mountpoints)
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
    pid = _daemon_of(where)
    if pid is None:
        # Dead, or the daemon of another user, which nobody waits for.
        _detach(where, lazy=lazy or mountpoint.is_dead(where))
        return
    watch = os.pidfd_open(pid)
    try:
        if lazy:
            signal.pidfd_send_signal(watch, signal.SIGTERM)  # it syncs, detaches and cuts off
        else:
            _detach(where, lazy=False)
        if not select.select([watch], [], [], _DAEMON_PATIENCE_S)[0]:
            raise PafkafsError(
                f"unmounted, but the daemon (pid {pid}) still waits for a device; see its log"
            )
    finally:
        os.close(watch)


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
