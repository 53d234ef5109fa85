"""A watch on the response times of a mount."""

import os
import time
from pathlib import Path

from kafkarun.beside import Beside


class StallWatch(Beside):
    """Lists and stats the top of a directory all the time and keeps the longest it took."""

    def __init__(self, top: Path) -> None:
        super().__init__()
        self._top = top
        self._worst_s = 0.0
        self._started: float | None = None

    @property
    def worst_s(self) -> float:
        """Seconds of the slowest round, one that has not come back yet included."""
        started = self._started
        running_s = time.monotonic() - started if started is not None else 0.0
        return max(self._worst_s, running_s)

    def tick(self) -> None:
        self._started = time.monotonic()
        for name in os.listdir(self._top):
            try:
                os.stat(self._top / name)
            except FileNotFoundError:  # Kafka replaces checkpoints all the time
                continue
        self._worst_s = self.worst_s
        self._started = None
