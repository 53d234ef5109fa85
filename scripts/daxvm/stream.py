"""One output of the guest: read by a thread as fast as it comes, handed out as wanted."""

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue


class Stream:
    """The bytes the guest wrote to one port, up to the end mark or the VM's death.

    Taken off the socket at once, so that a slow consumer does not delay the guest.
    """

    def __init__(self, port: socket.socket, end: bytes) -> None:
        self.complete = False  # whether the guest said that this was all
        self._chunks: SimpleQueue[bytes] = SimpleQueue()  # an empty one is the last
        self._lines: deque[bytes] = deque()  # whole, of chunks that were taken
        self._rest = b""  # of a line, of the chunk that was taken last
        self._port = port
        self._taking = threading.Lock()  # from the socket to the queue
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
        more = True
        while more:
            while self._lines:
                yield self._lines.popleft().decode(errors="replace")
            more = self._split()
        if self._rest and self.complete:
            yield self._rest.decode(errors="replace")

    def lines_here(self) -> list[str]:
        """Whole lines that have come and were not taken yet."""
        while not self._chunks.empty() and self._split():
            pass
        here = [line.decode(errors="replace") for line in self._lines]
        self._lines.clear()
        return here

    def settle(self) -> None:
        """Wait until all that was written is there to be taken; its writer must stand still."""
        while self._port.fileno() >= 0 and select.select([self._port], [], [], 0)[0]:
            time.sleep(0.001)
        with self._taking:
            pass

    def join(self) -> None:
        """Wait until everything that will ever come is there to be taken."""
        self._thread.join()

    def _split(self) -> bool:
        """Take the next chunk, waiting for it, apart into lines; False if there are no more."""
        chunk = self._chunks.get()
        if not chunk:
            self._chunks.put(b"")  # for who asks again
            return False
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        self._lines.extend(whole)
        return True

    def _read(self, port: socket.socket, end: bytes) -> None:
        held = b""
        data = b"-"
        with port:
            while not self.complete and data:
                select.select([port], [], [])
                with self._taking:
                    data = _receive(port)
                    held = self._hand_out(held + data, end)
        if held and not self.complete:
            self._chunks.put(held)
        self._chunks.put(b"")

    def _hand_out(self, held: bytes, end: bytes) -> bytes:
        """What is left: the mark may come in pieces, so what could be its start is held back."""
        self.complete = held.endswith(end)
        kept = next((n for n in range(len(end), 0, -1) if held.endswith(end[:n])), 0)
        if ready := held[: len(held) - kept]:
            self._chunks.put(ready)
        return held[len(held) - kept :]


def _receive(port: socket.socket) -> bytes:
    try:
        return port.recv(1 << 16)
    except ConnectionError:
        return b""  # QEMU was killed with something of ours unread
