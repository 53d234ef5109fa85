"""One output of the guest: read by a thread as fast as it comes, handed out as wanted."""

import socket
import threading
from collections.abc import Iterator
from queue import SimpleQueue


class Stream:
    """The bytes the guest wrote to one port, up to the end mark or the VM's death.

    Taken off the socket at once, so that a slow consumer does not delay the guest.
    """

    def __init__(self, port: socket.socket, end: bytes) -> None:
        self.complete = False  # whether the guest said that this was all
        self._chunks: SimpleQueue[bytes] = SimpleQueue()  # an empty one is the last
        self._thread = threading.Thread(target=self._read, args=(port, end), daemon=True)
        self._thread.start()

    def chunks(self) -> Iterator[bytes]:
        """What was written, as it comes; can be gone through once."""
        while chunk := self._chunks.get():
            yield chunk
        self._chunks.put(b"")  # for who asks again

    def lines(self) -> Iterator[str]:
        """Whole lines as they come, without their newline; can be gone through once.

        What a power cut left of a line is dropped: the guest cannot know that it was received.
        """
        rest = b""
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest and self.complete:
            yield rest.decode(errors="replace")

    def join(self) -> None:
        """Wait until everything that will ever come is there to be taken."""
        self._thread.join()

    def _read(self, port: socket.socket, end: bytes) -> None:
        held = b""
        with port:
            while not self.complete and (data := _receive(port)):
                held += data
                self.complete = held.endswith(end)
                # The mark may come in pieces: what could be its start is held back.
                kept = next((n for n in range(len(end), 0, -1) if held.endswith(end[:n])), 0)
                if ready := held[: len(held) - kept]:
                    self._chunks.put(ready)
                held = held[len(held) - kept :]
        if held and not self.complete:
            self._chunks.put(held)
        self._chunks.put(b"")


def _receive(port: socket.socket) -> bytes:
    try:
        return port.recv(1 << 16)
    except ConnectionError:
        return b""  # QEMU was killed with something of ours unread
