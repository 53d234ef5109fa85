"""What Prometheus is told: a frozen snapshot of a mount, and its metrics in the text format.

A snapshot is made from memory alone, like that of status.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from pafkafs import __version__
from pafkafs.device import Device
from pafkafs.moving import MoveTotals
from pafkafs.placement import tier_name
from pafkafs.status import HEALTHY, DeviceStatus, MigrationStatus, MountStatus
from pafkafs.units import printable

_DEVICE = ("tier", "device")


@dataclass(frozen=True)
class Latency:
    """One operation on files of one device: how many requests took at most 2^i us and more than
    2^(i-1), and in the last place longer."""

    tier: str
    device: str
    operation: str
    sum_s: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    """A mount, as it was at one moment."""

    mount: MountStatus
    answered: int  # requests, by the native front
    forwarded: int
    moves: Mapping[str, MoveTotals]  # by direction
    latencies: tuple[Latency, ...]


def latencies(devices: Sequence[Device]) -> tuple[Latency, ...]:
    """Of all operations that were answered natively since the mount."""
    return tuple(
        Latency(
            tier_name(device.tier, devices[-1].tier),
            printable(device.path.decode(errors="surrogateescape")),
            operation,
            sum_ns / 1e9,
            counts,
        )
        for device in devices
        for operation, sum_ns, counts in device.native.latencies()
        if any(counts)
    )


class _Snapshot(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        yield from _mount(self._figures)
        yield from _devices(self._figures.mount)
        yield _histogram(self._figures.latencies)
        if self._figures.mount.migration is not None:
            yield from _migration(self._figures.mount.migration, self._figures.moves)
        yield from _process()


def render(figures: Figures) -> tuple[bytes, str]:
    """The page, and its content type."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(figures))
    return generate_latest(registry), CONTENT_TYPE_LATEST


def _mount(figures: Figures) -> Iterator[Metric]:
    mount = figures.mount
    yield InfoMetricFamily(
        "pafkafs_mount",
        "The mount",
        {
            "version": __version__,
            "mountpoint": printable(mount.mountpoint),
            "mode": mount.mode or "",
            "durability": mount.durability or "",
        },
    )
    yield GaugeMetricFamily(
        "pafkafs_healthy", "1 when status has no problem to tell", float(mount.state == HEALTHY)
    )
    yield GaugeMetricFamily("pafkafs_problems", "Problems in status", len(mount.problems))
    yield GaugeMetricFamily("pafkafs_open_files", "Inodes that are open", mount.open_files)
    requests = CounterMetricFamily(
        "pafkafs_requests", "Requests of the kernel, by who answers", labels=("answered_by",)
    )
    requests.add_metric(("native",), figures.answered)
    requests.add_metric(("session",), figures.forwarded)
    yield requests
    if mount.pool is not None:
        yield GaugeMetricFamily(
            "pafkafs_pool_files", "Files prepared for new segments", mount.pool.files
        )
        yield GaugeMetricFamily("pafkafs_pool_bytes", "Room that they take", mount.pool.bytes)


def _devices(mount: MountStatus) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "pafkafs_device_used_bytes", "Room that is taken on a device", labels=_DEVICE
    )
    capacity = GaugeMetricFamily(
        "pafkafs_device_capacity_bytes", "Room that may be used on a device", labels=_DEVICE
    )
    files = GaugeMetricFamily(
        "pafkafs_device_files", "Files whose data is on a device", labels=_DEVICE
    )
    hung = GaugeMetricFamily(
        "pafkafs_device_hung_seconds",
        "For how long a busy device has completed nothing; 0 when that is no cause for worry",
        labels=_DEVICE,
    )
    errors = CounterMetricFamily(
        "pafkafs_device_errors", "Errors of a device, as they are logged", labels=_DEVICE
    )
    for labels, device in _labelled(mount):
        used.add_metric(labels, device.used_bytes)
        capacity.add_metric(labels, device.capacity_bytes)
        files.add_metric(labels, device.files)
        hung.add_metric(labels, device.hung_s)
        errors.add_metric(labels, device.errors)
    yield from (used, capacity, files, hung, errors)


def _labelled(mount: MountStatus) -> Iterator[tuple[tuple[str, str], DeviceStatus]]:
    for tier in mount.tiers:
        for device in tier.devices:
            yield (tier.name, printable(device.path)), device


def _histogram(measured: Sequence[Latency]) -> Metric:
    family = HistogramMetricFamily(
        "pafkafs_request_duration_seconds",
        "Natively answered requests, from when they were read to when they are answered, by the "
        "device that has the file's data",
        labels=("operation", *_DEVICE),
    )
    for one in measured:
        ends = [f"{2**i / 1e6:.6f}" for i in range(len(one.counts) - 1)]
        buckets = zip([*ends, "+Inf"], itertools.accumulate(one.counts), strict=True)
        labels = (one.operation, one.tier, one.device)
        family.add_metric(labels, [(end, float(n)) for end, n in buckets], one.sum_s)
    return family


def _migration(migration: MigrationStatus, moves: Mapping[str, MoveTotals]) -> Iterator[Metric]:
    labels = ("direction",)
    files = CounterMetricFamily("pafkafs_moved_files", "Files that have moved", labels=labels)
    moved = CounterMetricFamily("pafkafs_moved_bytes", "Their bytes", labels=labels)
    failed = CounterMetricFamily(
        "pafkafs_failed_moves", "Moves that left a file where it was", labels=labels
    )
    running = GaugeMetricFamily("pafkafs_running_moves", "Files on their way", labels=labels)
    longest = GaugeMetricFamily(
        "pafkafs_cut_over_max_seconds",
        "The longest time that a move has let writers wait since the mount",
        labels=labels,
    )
    for direction, totals in moves.items():
        files.add_metric((direction,), totals.files)
        moved.add_metric((direction,), totals.bytes)
        failed.add_metric((direction,), totals.failed)
        longest.add_metric((direction,), totals.cut_over_max_s)
        count = sum(move.direction == direction for move in migration.running)
        running.add_metric((direction,), count)
    yield from (files, moved, failed, running, longest)
    yield GaugeMetricFamily("pafkafs_planned_moves", "Files that go next", migration.planned)
    yield GaugeMetricFamily(
        "pafkafs_migration_paused", "1 between pafkafs pause and resume", float(migration.paused)
    )


def _process() -> Iterator[Metric]:
    """Under the names that all exporters use."""
    process = psutil.Process()
    with process.oneshot():
        cpu, memory = process.cpu_times(), process.memory_info()
        threads, fds, started = process.num_threads(), process.num_fds(), process.create_time()
    yield CounterMetricFamily(
        "process_cpu_seconds", "User and system CPU time spent", cpu.user + cpu.system
    )
    yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size", memory.rss)
    yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size", memory.vms)
    yield GaugeMetricFamily("process_threads", "Number of threads", threads)
    yield GaugeMetricFamily("process_open_fds", "Number of open file descriptors", fds)
    yield GaugeMetricFamily("process_start_time_seconds", "Start time since the epoch", started)
