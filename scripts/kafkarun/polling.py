"""Waiting for a condition with a deadline, the only place that sleeps."""

import time
from collections.abc import Callable
from typing import TypeVar

from kafkarun.errors import DeadlinePassed

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], *, within_s: float, what: str, every_s: float = 0.05
) -> T:
    """Return the first true result of `condition`; raise when `within_s` has passed.

    The condition is tried once more after the deadline, so that a machine which slept
    through it is not blamed on the condition.
    """
    deadline = time.monotonic() + within_s
    while True:
        late = time.monotonic() >= deadline
        if result := condition():
            return result
        if late:
            raise DeadlinePassed(f"{what}: not within {within_s:g} s")
        time.sleep(every_s)
