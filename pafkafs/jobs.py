"""What an operator asks the daemon to do with files: moves that run in the background, pausing.

A job is one file to be moved.  It is started by one request and asked about by others.
"""

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from pafkafs.control import Commands
from pafkafs.errors import PafkafsError
from pafkafs.migration import Migrator
from pafkafs.placement import tier_name

log = logging.getLogger(__name__)

_JOBS_MAX = 10_000
_RUNNING_MAX = 4


@dataclass
class Job:
    """state is waiting, running, done, there (nothing had to be done) or failed."""

    path: str
    tier: int
    state: str = "waiting"
    error: str | None = None


class Jobs:
    """The jobs of a mount; the last ones are remembered."""

    def __init__(self, nursery: trio.Nursery, migrator: Migrator, lowest_tier: int) -> None:
        self._tiers = {tier_name(tier, lowest_tier): tier for tier in range(lowest_tier + 1)}
        self._nursery = nursery
        self._migrator = migrator
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._numbers = itertools.count(1)
        self._places = trio.Semaphore(_RUNNING_MAX)

    def commands(self) -> Commands:
        """For the control socket."""
        return {
            "migrate": self._migrate,
            "job": self._show,
            "pause": self._pause,
            "resume": self._resume,
        }

    async def _migrate(self, asked: Mapping[str, Any]) -> int:
        path, tier = asked.get("path"), asked.get("to")
        if not isinstance(path, str) or tier not in self._tiers:
            known = " or ".join(self._tiers)
            raise PafkafsError(f"migrate needs a path below the mount, and 'to': {known}")
        parts = path.split("/")
        if not all(parts) or ".." in parts or "." in parts or "\0" in path:
            raise PafkafsError(f"'{path!r}' is no path below the mount")
        try:
            os.fsencode(path)
        except ValueError:
            raise PafkafsError(f"{path!r} is no path below the mount") from None
        waiting = sum(job.state == "waiting" for job in self._jobs.values())
        if waiting >= _JOBS_MAX // 2:
            raise PafkafsError(f"{waiting} moves are waiting already: try again later")
        number = next(self._numbers)
        self._jobs[number] = job = Job(path, self._tiers[tier])
        while len(self._jobs) > _JOBS_MAX:
            self._jobs.popitem(last=False)
        self._nursery.start_soon(self._run, job)
        return number

    async def _run(self, job: Job) -> None:
        async with self._places:
            job.state = "running"
            try:
                moved = await self._migrator.move(os.fsencode(job.path), job.tier, "command")
            except OSError as error:
                job.state, job.error = "failed", error.strerror or str(error)
            except Exception:  # a bug, but no reason to end the mount
                log.exception("a job failed")
                job.state, job.error = "failed", "internal error; see the log"
            else:
                job.state = "done" if moved else "there"

    async def _show(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        number = asked.get("job")
        job = self._jobs.get(number) if isinstance(number, int) else None
        if job is None:
            raise PafkafsError("there is no such job")
        return {"path": job.path, "state": job.state, "error": job.error}

    async def _pause(self, asked: Mapping[str, Any]) -> None:
        self._migrator.paused = True

    async def _resume(self, asked: Mapping[str, Any]) -> None:
        self._migrator.paused = False
