"""A command in a terminal of its own, for what only a terminal gets."""

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from harness import PAFKAFS, wait_until


class Terminal:
    """The command, and what it has shown so far."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self.shown = ""

    def see(self, word: str) -> None:
        """Waits until it has shown a word."""
        wait_until(lambda: word in self._read(), f"{word!r} on the terminal", 60)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._master, b"\x03")

    def exit_status(self) -> int:
        """After its end, with all that it has shown read."""
        wait_until(lambda: self._read() is not None and self._process.poll() is not None, "end", 60)
        self._read()
        return self._process.wait()

    def _read(self) -> str:
        try:
            while more := os.read(self._master, 65536):
                self.shown += more.decode(errors="replace")
        except OSError:  # nothing there now, or the other end is closed
            pass
        return self.shown


@contextmanager
def in_terminal(*arguments: str) -> Iterator[Terminal]:
    """`pafkafs` with these arguments, its output and its Ctrl-C on a terminal."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(
        # A shell's background job ignores SIGINT, and so does what it starts.
        ["env", "--default-signal=INT", "setsid", "--ctty", PAFKAFS, *arguments],
        stdin=slave, stdout=slave, stderr=slave, env=environment,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(master)
