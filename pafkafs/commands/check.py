"""`pafkafs check`: what is wrong on the devices of a set, and mending it."""

import json
import os
from collections.abc import Sequence

import click

from pafkafs import brokers, deepreading, deviceset, serving
from pafkafs.checking import Finding, Totals, show
from pafkafs.commands import completing
from pafkafs.commands.bar import byte_bar
from pafkafs.config import device_tiers
from pafkafs.deviceset import SetDevice
from pafkafs.errors import EXIT_UNHEALTHY, PafkafsError
from pafkafs.inspecting import Inspection
from pafkafs.repairing import Repairs
from pafkafs.units import format_size, printable

_JSON_VERSION = 1


@click.command()
@click.argument("fast", shell_complete=completing.directories)
@click.argument("slow", shell_complete=completing.directories)
@click.option(
    "--tier", multiple=True, metavar="DEVICE[,DEVICE…]", help="A tier between FAST and SLOW."
)
@click.option("--repair", is_flag=True, help="Mend what can be mended. Nothing is deleted.")
@click.option("--deep", is_flag=True, help="Read every byte, for errors of the media.")
@click.option("--json", "as_json", is_flag=True, help="For programs; the format has a version.")
def check(
    fast: str, slow: str, tier: tuple[str, ...], repair: bool, deep: bool, as_json: bool
) -> int:
    """Say what is wrong on the devices FAST and SLOW, which may be mounted; change nothing.

    A line for each problem says what --repair, which needs them unmounted, would do. What has no
    name any more goes to lost/ of its device. Exit status: 0 clean, or all was mended; 1 problems
    are left; 2 wrong usage.
    """
    tiers = device_tiers({"fast": fast, "tier": list(tier), "slow": slow})
    devices, in_use = deviceset.recognise(tiers)
    if in_use and repair:
        raise PafkafsError(
            f"{fast} is in use by another pafkafs: nothing is repaired under a mount; unmount it"
        )
    if not in_use:
        fds = [device.fd for device in devices]
        brokers.refuse_running_on_tree(fds[0], devices[0].member.path, fds)
    if repair:
        _check_owner(devices)
        _check_paths(devices)
    paths = [device.member.path for device in devices]
    report = _JsonReport(in_use, paths) if as_json else _TextReport(paths)
    totals = (
        _check_serving(devices, deep, report)
        if in_use
        else _check_unmounted(devices, repair, deep, report)
    )
    report.end(totals)
    return EXIT_UNHEALTHY if totals.left else 0


def _check_owner(devices: list[SetDevice]) -> None:
    """What another user, even root, made there would lock them out."""
    for device in devices:
        uid = deviceset.owner(device.fd)
        if uid != os.geteuid():
            raise PafkafsError(
                f"{device.member.path} is of a set of uid {uid}: only that user may --repair it"
            )


def _check_paths(devices: list[SetDevice]) -> None:
    """A repair writes paths into stubs, which the next mount has to know."""
    for device in devices:
        path, last = device.member.path, deviceset.last_path(device)
        if path != last:
            raise PafkafsError(
                f"{path} was at {last} when it was mounted last: --repair needs the devices where "
                "they were, or one mount where they are now"
            )


class _TextReport:
    """A line for each finding, and one at the end."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def add(self, found: Finding, repaired: str | None) -> None:
        """repaired: what became of it, None when it was not tried."""
        if repaired is not None:
            outcome = repaired
        elif found.action is not None:
            outcome = f"--repair {found.action}"
        else:
            outcome = f"--repair does nothing: {found.advice}"
        line = printable(f"{show(self._paths, found.where)}: {found.what}; {outcome}")
        click.echo(line)

    def note(self, text: str) -> None:
        """What was not looked at."""
        click.echo(f"note: {text}")

    def end(self, totals: Totals) -> None:
        """The last line."""
        verdict = f"{totals.problems} problems, {totals.repaired} repaired, {totals.left} left"
        click.echo(
            f"checked {totals.files} files and {totals.objects} objects, "
            f"{format_size(totals.bytes)}: {verdict if totals.problems else 'clean'}"
        )


class _JsonReport(_TextReport):
    """One document, written as it comes."""

    def __init__(self, serving: bool, paths: Sequence[str]) -> None:
        super().__init__(paths)
        self._notes: list[str] = []
        self._first = True
        head = json.dumps({"version": _JSON_VERSION, "mounted": serving})
        click.echo(head[:-1] + ', "findings": [')

    def add(self, found: Finding, repaired: str | None) -> None:
        """One line of the list."""
        item = {
            "kind": found.kind.value,
            "path": show(self._paths, found.where),
            "what": found.what,
            "repair": found.action,
            "advice": found.advice or None,
            "outcome": repaired,
        }
        click.echo(("" if self._first else ",") + json.dumps(item))
        self._first = False

    def note(self, text: str) -> None:
        """Kept for the end."""
        self._notes.append(text)

    def end(self, totals: Totals) -> None:
        """The rest of the document."""
        found = {
            "files": totals.files,
            "objects": totals.objects,
            "bytes": totals.bytes,
            "problems": totals.problems,
            "repaired": totals.repaired,
            "left": totals.left,
        }
        click.echo(f'], "notes": {json.dumps(self._notes)}, "totals": {json.dumps(found)}}}')


def _check_unmounted(
    devices: list[SetDevice], repair: bool, deep: bool, report: _TextReport
) -> Totals:
    inspection = Inspection(devices)
    repairs = Repairs(devices) if repair else None
    totals = inspection.totals
    for found in inspection.run():
        _settle(found, repairs, totals, report)
    if repairs is not None:
        repairs.finish(slots_may_go=inspection.slots_may_go)
    if deep:
        _read_deep(inspection, len(devices), totals, report)
    inspection.close()
    return totals


def _settle(found: Finding, repairs: Repairs | None, totals: Totals, report: _TextReport) -> None:
    totals.problems += 1
    outcome = None
    if repairs is not None and found.action is not None:
        try:
            repairs.repair(found)
        except OSError as error:
            outcome = f"cannot be repaired: {error.strerror or error}"
        else:
            outcome = "repaired"
            totals.repaired += 1
    report.add(found, outcome)


def _check_serving(devices: list[SetDevice], deep: bool, report: _TextReport) -> Totals:
    daemon = serving.find_daemon(devices)
    if daemon is None:
        report.note(
            "the daemon of this mount cannot be asked: objects and shadows without a stub were "
            "not looked for"
        )
    found, totals = serving.findings(devices, daemon)
    for each in found:
        _settle(each, None, totals, report)
    if deep:
        inspection = Inspection(devices, serving=True)
        inspection.open()
        _read_deep(inspection, len(devices), totals, report)
        inspection.close()
    return totals


def _read_deep(inspection: Inspection, devices: int, totals: Totals, report: _TextReport) -> None:
    with byte_bar(totals.bytes) as progress:
        for found in deepreading.read_all(inspection, devices, progress):
            _settle(found, None, totals, report)
