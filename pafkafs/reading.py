"""Segments that are read heavily: they may stay on the fast tier a little longer than policy says.

A consumer that catches up reads a segment from end to end and is done with it.  What comes from the
page cache does not count: it costs no device anything.
"""

from pafkafs.catalogue import Entry

# From here on it is reading that a slower device would be felt by.
HEAVY_BYTES_PER_S = 16 << 20
# How long one is left alone before it is looked at again.
LOOK_AGAIN_S = 5.0


class ReadersFirst:
    """Which segments wait for their readers.

    **Invariant:** none waits for longer than its limit, counted from when it first should have
    gone; one that waited for so long goes whatever is read of it.
    """

    def __init__(self) -> None:
        self._since_s: dict[Entry, float] = {}
        self._until_s: dict[Entry, float] = {}

    def waiting(self, now_s: float) -> int:
        """Segments that are left alone for it now."""
        self._until_s = {e: until for e, until in self._until_s.items() if until > now_s}
        return len(self._until_s)

    def wait_s(self, entry: Entry, bytes_per_s: int, now_s: float, limit_s: float) -> float:
        """How long to leave it alone for those who read it at this rate; 0: it may go."""
        self._forget(now_s, limit_s)
        if bytes_per_s < HEAVY_BYTES_PER_S or limit_s <= 0:
            return 0.0
        left_s = limit_s - (now_s - self._since_s.setdefault(entry, now_s))
        wait_s = max(0.0, min(left_s, LOOK_AGAIN_S))
        self._until_s[entry] = now_s + wait_s
        return wait_s

    def _forget(self, now_s: float, limit_s: float) -> None:
        """Those that had their time long ago: they have moved, or are gone."""
        late_s = now_s - 2 * limit_s - LOOK_AGAIN_S
        self._since_s = {e: since for e, since in self._since_s.items() if since > late_s}
