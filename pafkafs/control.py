"""The daemon's control socket: where it is, who may use it, and its protocol.

One line of JSON asks, one line answers: {"command": "status", …arguments} -> {"ok": true,
"result": …} or {"ok": false, "error": "…", "usage": whether the request is at fault}.  All are
answered at once.  "await-end" is answered a second time when the mount has ended: with the devices
that were not synced.
"""

import errno
import hashlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import trio

from pafkafs.errors import PafkafsError, UsageError

log = logging.getLogger(__name__)

# A path of 4,096 bytes, each of them escaped.
REQUEST_BYTES_MAX = 32 << 10
ANSWER_BYTES_MAX = 16 << 20
TIMEOUT_S = 5.0
AWAIT_END = "await-end"
_CONNECTIONS_MAX = 16

# A command gets the whole request; a PafkafsError becomes its answer.
Commands = dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]]


class NoDaemon(PafkafsError):
    """Nobody listens on the control socket."""


def runtime_directory() -> Path:
    """Where the sockets of this user's daemons are."""
    if os.geteuid() == 0:
        return Path("/run/pafkafs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "pafkafs") if base else Path(f"/tmp/pafkafs-{os.geteuid()}")


def socket_path(mountpoint: str) -> Path:
    """The control socket of the daemon that serves a mountpoint."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
    return runtime_directory() / f"{digest}.sock"


def _own_directory() -> Path:
    directory = runtime_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_own(directory)
    return directory


def _check_own(directory: Path) -> None:
    """Whoever else may write there could answer in the name of a daemon."""
    status = os.lstat(directory)
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PafkafsError(
            f"{directory} is not a directory that only uid {os.geteuid()} may write to: remove it"
        )


@contextmanager
def _short_name(path: Path) -> Iterator[str]:
    """A name of the socket with room in a sockaddr_un, which ends at 107 bytes."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(mountpoint: str) -> socket.socket:
    """Binds the control socket.  The devices' locks have already excluded another daemon."""
    _own_directory()
    path = socket_path(mountpoint)
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)  # 0600 from its first moment
    try:
        with _short_name(path) as name:
            server.bind(name)
    finally:
        os.umask(before)
    server.listen(_CONNECTIONS_MAX)
    return server


# Who asked is not there any more, or is being told that it is known to wait.
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)


class End:
    """Who waits for the end of the mount, and is told how it ended."""

    def __init__(self) -> None:
        self._waiting: set[trio.SocketStream] = set()

    async def wait(self, stream: trio.SocketStream) -> None:
        """Until it was told, or has gone away."""
        self._waiting.add(stream)
        try:
            await _send(stream, {"ok": True, "result": None})
            await stream.receive_some(1)
        finally:
            self._waiting.remove(stream)

    async def tell(self, unsynced: Sequence[str]) -> None:
        """Names of the devices that may lack what was written."""
        for stream in tuple(self._waiting):
            with trio.move_on_after(TIMEOUT_S), suppress(*_GONE):
                await _send(stream, {"ok": True, "result": list(unsynced)})


async def serve(server: socket.socket, commands: Commands, end: End) -> None:
    """Answers requests until it is cancelled."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))
    places = trio.Semaphore(_CONNECTIONS_MAX)

    async def answer(stream: trio.SocketStream) -> None:
        try:
            places.acquire_nowait()
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            await _converse(stream, commands, end)
        except trio.BrokenResourceError:
            return  # the client went away
        except Exception:
            log.exception("a control request failed")  # a bug, but no reason to stop serving
        finally:
            places.release()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, answer, [listener])


async def _converse(stream: trio.SocketStream, commands: Commands, end: End) -> None:
    credentials = stream.socket.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()):
        return
    with trio.move_on_after(TIMEOUT_S) as patience:
        asked = await _receive(stream)
        if asked is not None and asked["command"] != AWAIT_END:
            await _send(stream, await _answer(asked, commands))
    if not patience.cancelled_caught and asked is not None and asked["command"] == AWAIT_END:
        await end.wait(stream)


async def _receive(stream: trio.SocketStream) -> Mapping[str, Any] | None:
    """What is asked, with at least a command; None when nobody asks."""
    request = b""
    while not request.endswith(b"\n"):
        more = await stream.receive_some(REQUEST_BYTES_MAX)
        request += more
        if not more or len(request) > REQUEST_BYTES_MAX:
            return None
    try:
        asked = json.loads(request)
    except (ValueError, RecursionError):
        asked = None
    return asked if isinstance(asked, dict) and "command" in asked else {"command": None}


async def _send(stream: trio.SocketStream, answer: Mapping[str, Any]) -> None:
    await stream.send_all(json.dumps(answer).encode() + b"\n")


async def _answer(asked: Mapping[str, Any], commands: Commands) -> dict[str, Any]:
    try:
        command = commands[asked["command"]]
    except (TypeError, KeyError):
        known = ", ".join((*commands, AWAIT_END))
        return {"ok": False, "error": f"unknown request; known are {known}"}
    try:
        return {"ok": True, "result": await command(asked)}
    except PafkafsError as error:
        return {"ok": False, "error": str(error), "usage": isinstance(error, UsageError)}


def ask(mountpoint: str, command: str, **arguments: Any) -> Any:
    """Asks the daemon of a mountpoint.  NoDaemon when none listens, UsageError when the request
    is at fault, PafkafsError otherwise."""
    with asking(mountpoint, command, **arguments) as answer:
        return answer(TIMEOUT_S)


@contextmanager
def asking(mountpoint: str, command: str, **arguments: Any) -> Iterator[Callable[[float], Any]]:
    """Asks as ask does; each answer is had by calling what this gives, with how long to wait for
    it, in seconds."""
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    if len(request) > REQUEST_BYTES_MAX:
        raise UsageError(f"this is longer than the {REQUEST_BYTES_MAX >> 10} KiB of a request")
    path = socket_path(mountpoint)
    if path.parent.is_symlink() or path.parent.exists():
        _check_own(path.parent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(TIMEOUT_S)
        with _errors_told(mountpoint):
            with _short_name(path) as name:
                client.connect(name)
            client.sendall(request)

        with client.makefile("rb") as lines:

            def answer(timeout_s: float) -> Any:
                client.settimeout(timeout_s)
                with _errors_told(mountpoint):
                    return _result(lines)

            yield answer


@contextmanager
def _errors_told(mountpoint: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoDaemon(f"no pafkafs daemon serves {mountpoint}") from error
    except PermissionError as error:
        raise PafkafsError(f"only root may ask the daemon of {mountpoint}") from error
    except OSError as error:
        reason = error.strerror or "it does not answer"
        raise PafkafsError(f"the daemon of {mountpoint} cannot be asked: {reason}") from error


def _result(lines: BinaryIO) -> Any:
    text = lines.readline(ANSWER_BYTES_MAX)
    if not text.endswith(b"\n"):
        raise OSError(errno.EPROTO, "the daemon closed the connection")
    answer: dict[str, Any] = json.loads(text)
    if not answer.get("ok"):
        kind = UsageError if answer.get("usage") else PafkafsError
        raise kind(str(answer.get("error", "the daemon refused the request")))
    return answer["result"]
