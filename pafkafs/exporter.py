"""Serves one page over HTTP, for scrapers of metrics.

The server that comes with prometheus-client makes a thread for each connection, without a bound and
without a timeout.  This one belongs to a daemon that must go on whatever a client does: few
connections, each for a short time, one page made at a time, and the same page for those who ask
again at once.
"""

import logging
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import trio

from pafkafs.errors import PafkafsError

log = logging.getLogger(__name__)

F = TypeVar("F")

PATH = "/metrics"
_CONNECTIONS_MAX = 8
_REQUEST_BYTES_MAX = 8192
_TIMEOUT_S = 5.0
# Whoever connects again and again gets no more of the daemon's time than this.
_PAUSE_S = 0.005
_PAGE_IS_NEW_S = 0.2
_REST_S = 1.0


def listen(address: tuple[str, int]) -> socket.socket:
    """Binds; port 0 is any that is free.  Raises PafkafsError."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        return socket.create_server(address, family=family, backlog=_CONNECTIONS_MAX)
    except OSError as error:
        raise PafkafsError(
            f"cannot serve metrics at {shown(address)}: {error.strerror}; choose another address "
            "with --metrics"
        ) from error


def shown(address: tuple[str, int]) -> str:
    """An address as `--metrics` takes it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Exporter(Generic[F]):
    """take makes a snapshot, in the trio thread; render makes a page of it, in another one."""

    def __init__(
        self,
        server: socket.socket,
        take: Callable[[], F],
        render: Callable[[F], tuple[bytes, str]],
    ) -> None:
        self._server = server
        self._take = take
        self._render = render
        self._making = trio.Lock()
        self._page = b"", ""  # with its content type
        self._made = -math.inf

    async def run(self) -> None:
        """Serves until it is cancelled."""
        places = trio.Semaphore(_CONNECTIONS_MAX)
        with trio.socket.from_stdlib_socket(self._server) as listener:
            async with trio.open_nursery() as nursery:
                while True:
                    await places.acquire()
                    try:
                        connection, _ = await listener.accept()
                    except OSError as error:  # it has gone, or no descriptors are left
                        log.warning("metrics: %s", error.strerror)
                        places.release()
                        await trio.sleep(_REST_S)
                    else:
                        nursery.start_soon(self._serve, connection, places)
                    await trio.sleep(_PAUSE_S)

    async def _serve(self, connection: trio.socket.SocketType, places: trio.Semaphore) -> None:
        stream = trio.SocketStream(connection)
        try:
            with trio.move_on_after(_TIMEOUT_S), suppress(trio.BrokenResourceError):
                await stream.send_all(await self._answer(await _receive(stream)))
        except Exception:  # a bug, but no reason to end the mount
            log.exception("a request for metrics failed")
        finally:
            places.release()
            await trio.aclose_forcefully(stream)

    async def _answer(self, request: bytes) -> bytes:
        words = request.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is no request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed\r\nAllow: GET, HEAD", b"GET it\n")
        if words[1].partition(b"?")[0] != PATH.encode():
            return _response("404 Not Found", f"metrics are at {PATH}\n".encode())
        page, content_type = await self._new_page()
        return _response("200 OK", page, content_type, head_only=words[0] == b"HEAD")

    async def _new_page(self) -> tuple[bytes, str]:
        async with self._making:
            if trio.current_time() - self._made > _PAGE_IS_NEW_S:
                self._page = await trio.to_thread.run_sync(self._render, self._take())
                self._made = trio.current_time()
            return self._page


async def _receive(stream: trio.SocketStream) -> bytes:
    """A request without its body; less when there is no whole one."""
    request = b""
    while b"\r\n\r\n" not in request and len(request) < _REQUEST_BYTES_MAX:
        more = await stream.receive_some(_REQUEST_BYTES_MAX)
        if not more:
            return b""
        request += more
    return request


def _response(
    result: str, body: bytes, content_type: str = "text/plain", *, head_only: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {result}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if head_only else body)
