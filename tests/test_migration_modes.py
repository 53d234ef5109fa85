"""In which modes segments move by themselves."""

import pytest
import trio
from trio.testing import MockClock

from pafkafs.migration import MigrationOptions, Migrator, Outlook
from pafkafs.placement import Mode
from pafkafs.policy import Limits, Rules

INTERVAL_S = 5.0


class Due(Migrator):
    """A task that counts how often it looks."""

    looks = 0

    def __init__(self, mode: Mode) -> None:
        self.paused = False
        self._mode = mode
        self._options = MigrationOptions(Limits(), Rules(), INTERVAL_S, threads=1)
        self._wanted = trio.Event()

    def outlook(self) -> Outlook:
        self.looks += 1
        return Outlook()


@pytest.mark.parametrize(
    ("mode", "looks"), [(Mode.TIERED, 12), (Mode.FAST, 0), (Mode.SLOW, 0)], ids=lambda v: str(v)
)
def test_segments_move_by_themselves_in_tiered_mode_only(mode: Mode, looks: int) -> None:
    migrator = Due(mode)

    async def minute() -> None:
        with trio.move_on_after(12.5 * INTERVAL_S):
            await migrator.run()

    trio.run(minute, clock=MockClock(autojump_threshold=0))
    assert migrator.looks == looks
