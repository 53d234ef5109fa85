"""What status and metrics say of a mount: frozen snapshots, made from memory alone."""

import os
import time
from collections.abc import Callable

import trio

from pafkafs import _native, growing, layout, metrics, status
from pafkafs.config import MountOptions
from pafkafs.device import Device
from pafkafs.files import OpenFiles
from pafkafs.migration import Migrator
from pafkafs.moving import Mover, MoveTotals
from pafkafs.opening import Opened
from pafkafs.survey import Survey


class Reporter:
    """Looks at the parts of a mount, in the trio thread."""

    def __init__(
        self,
        options: Callable[[], MountOptions],
        opened: Opened,
        front: _native.Front,
        files: OpenFiles,
        survey: Survey,
        mover: Mover,
        migrator: Migrator,
        pool: growing.Pool | None,
        metrics_address: str | None,
    ) -> None:
        """options are those of now."""
        self._options = options
        self._opened = opened
        self._devices = opened.devices
        self._front = front
        self._files = files
        self._survey = survey
        self._mover = mover
        self._migrator = migrator
        self._pool = pool
        self._metrics_address = metrics_address
        self._started = time.monotonic()

    def snapshot(self) -> status.MountStatus:
        """The mount as it is now."""
        problems = [p for device in self._devices for p in status.device_problems(device)]
        problems += self._own_problems()
        return status.MountStatus(
            mountpoint=self._options().mountpoint,
            state=status.DEGRADED if problems else status.HEALTHY,
            durability=self._opened.durability,
            mode=self._options().mode.value,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 1),
            known_files=self._survey.files,
            all_known=self._survey.done.is_set(),
            open_files=len(self._files),
            requests=self._front.answered + self._front.forwarded,
            metrics=self._metrics_address,
            pool=self._pool_status(),
            migration=self._migration_status(),
            tiers=status.tier_statuses(self._devices),
            problems=tuple(problems),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> list[str]:
        found = notes(self._devices, self._opened.durability, grows=self._opened.grows)
        found += status.slot_notes(*self._devices[0].native.slot_counts)
        if not self._survey.done.is_set():
            found.append(
                f"the home tree is being read, {self._survey.files} files so far: until it is, "
                "used room and what may move are not all known"
            )
        return found

    def figures(self) -> metrics.Figures:
        """The mount as it is now, for metrics."""
        return metrics.Figures(
            self.snapshot(),
            self._front.answered,
            self._front.forwarded,
            dict(self._mover.totals),
            metrics.latencies(self._devices),
        )

    def _migration_status(self) -> status.MigrationStatus:
        now, outlook = trio.current_time(), self._migrator.outlook()
        totals = sum(self._mover.totals.values(), MoveTotals())
        return status.MigrationStatus(
            paused=self._migrator.paused,
            running=tuple(
                status.MoveStatus(
                    move.path,
                    move.source,
                    move.target,
                    move.direction,
                    move.size_bytes,
                    move.copied_bytes,
                    round(now - move.started, 1),
                )
                for move in self._mover.running
            ),
            planned=len(outlook.decisions),
            planned_bytes=outlook.bytes,
            why=outlook.decisions[0].why if outlook.decisions else None,
            next=os.fsdecode(outlook.decisions[0].segment.path) if outlook.decisions else None,
            notes=outlook.notes,
            files=totals.files,
            bytes=totals.bytes,
            failed=totals.failed,
            cut_over_max_s=round(totals.cut_over_max_s, 4),
            last_error=self._migrator.last_error,
        )

    def _pool_status(self) -> status.PoolStatus | None:
        if self._pool is None:
            return None
        home = self._devices[0]
        slots_used, slots = home.native.slot_counts
        return status.PoolStatus(
            files=self._pool.files,
            bytes=self._pool.bytes,
            segment_bytes=home.native.segment_bytes,
            persist=growing.persist_method(),
            growing=len(self._files.all_growing(home)),
            ahead_bytes=self._files.ahead_bytes(home),
            slots_used=slots_used,
            slots=slots,
        )

    def _own_problems(self) -> list[status.Problem]:
        found = []
        damaged = self._survey.damaged
        if damaged:
            example = os.fsdecode(min(damaged.values()))
            found.append(
                status.Problem(
                    f"{len(damaged)} stubs do not lead to a device of this set, and opening them "
                    f"fails with EIO, such as {example}",
                    "unmount and restore the symlinks in tree/, or remove the files: rm",
                )
            )
        if self._survey.unreadable is not None:
            found.append(
                status.Problem(
                    f"the home tree cannot be read at {self._survey.unreadable}",
                    "check the filesystem of the first fast device: dmesg, fsck",
                )
            )
        found += [] if self._opened.sizes is None else _recovery_problems(self._opened.sizes)
        if self._survey.copied:
            found.append(
                status.Problem(
                    f"{len(self._survey.copied)} objects have several stubs: copied by hand?",
                    "copy demoted files with cp -L",
                )
            )
        if self._mover.degraded is not None:
            found.append(status.Problem(self._mover.degraded, "check the fast device: dmesg"))
        return found


def notes(devices: list[Device], durability: str, *, grows: bool) -> list[str]:
    """What the operator should know, though nothing is wrong."""
    found = []
    if devices[0].kind == "memory":
        found.append("the fast tier is in memory: a power loss takes its data and all names")
    if durability == "power" and devices[0].kind != "dax":
        found.append("durability power without DAX: each write is synchronous, and slow")
    if grows and devices[0].kind != "dax":
        found.append("--pmem on without DAX is for tests and measurements")
    for device in devices:
        if device.lost:
            where = os.path.join(os.fsdecode(device.path), layout.LOST)
            found.append(
                f"{device.lost} files without a name were put aside to {where}; a mount removes "
                "those of more than a week"
            )
    return found


def _recovery_problems(sizes: growing.Recovery) -> list[status.Problem]:
    found = []
    if sizes.refused:
        found.append(
            status.Problem(
                f"{len(sizes.refused)} segments that were being written when the last mount ended "
                "were changed by others since, and are served as they are, such as "
                f"{sizes.refused[0]}",
                "if no Kafka ran on tree/ itself, check the first fast device: dmesg, fsck",
            )
        )
    if sizes.unrecovered:
        found.append(
            status.Problem(
                f"{len(sizes.unrecovered)} segments that were being written when the last mount "
                "ended could not be cut to their length, and opening them fails with EIO, such as "
                f"{sizes.unrecovered[0]}",
                "check the first fast device (dmesg, fsck) and mount again",
            )
        )
    return found
