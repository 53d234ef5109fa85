"""Faults from below: each system call on a device, in each operation that changes one, fails with
EIO or ENOSPC, is interrupted, or falls short.

An error reaches the caller of the step in flight, or the status or the log, or does no harm;
interrupted and short calls are never noticed.  No byte that was acked is lost, the mount goes on,
and the names are what the model has, then and after the next mount.
"""

import errno
import os
import time
from dataclasses import dataclass
from itertools import count

import pytest
from faults import ANY, Action, Kind
from operations import OPERATIONS, Operation, run_all, segment
from steps import Scene

from pafkafs.errors import PafkafsError

# A move that fails, and a file that finds no device to go to, whatever the reason was.
TOLD_AS = (errno.EIO, errno.ENOSPC)
SYNCS = ("fsync", "fdatasync", "syncfs", "msync")
SAMPLE = 1  # calls of each operation that are hit in each way in the default run


@dataclass(frozen=True)
class Fault:
    """What happens to one call, and to which kinds of them."""

    action: Action
    kinds: Kind
    error: int = 0

    def __str__(self) -> str:
        return errno.errorcode[self.error] if self.error else self.action.name

    @property
    def is_harmless(self) -> bool:
        """Whether nobody may notice."""
        return self.error in (0, errno.EINTR)


FAULTS = (
    Fault(Action.FAIL, ANY, errno.EIO),
    Fault(Action.FAIL, Kind.ROOM, errno.ENOSPC),
    Fault(Action.FAIL, Kind.SLOW, errno.EINTR),
    Fault(Action.SHORT, Kind.PARTIAL),
)


def act(scene: Scene, operation: Operation, fault: Fault, which: int) -> OSError | None:
    """The operation, with the fault; the error of a step, if one failed."""
    scene.restore(operation)
    if not operation.mounts:
        scene.start()
        scene.expect_tidy()
    operation.begin(scene)
    scene.faults.arm(scene.root, fault.action, which, fault.error, fault.kinds)
    try:
        operation.act(scene)
        scene.wait(lambda: scene.faults.hit or operation.settled(scene), "the end of it")
    except OSError as error:
        return error
    return None


def fail(scene: Scene, operation: Operation, fault: Fault, which: int) -> str | None:
    """What was hit, None when the operation makes fewer calls; fails when something is lost."""
    error = act(scene, operation, fault, which)
    hit = scene.faults.hit
    scene.faults.disarm()
    if hit is None:
        assert error is None, f"{error} without a fault"
        return None
    if operation.mounts:
        refused = scene.result is not None and scene.result.returncode != 0
        if refused:
            assert scene.result is not None
            told = scene.result.stderr
            assert "unexpected" not in told, told
            assert told.count("\n") == 1, told
    if scene.is_dead():
        scene.kill()
        raise AssertionError(f"the daemon has died: {scene.mount.log_text()}")
    if not scene.is_mounted():
        scene.kill()
        operation.recover(scene)
    else:
        expect_told(scene, fault, hit, error)
    # A segment that cannot be recovered is not to be opened before the next mount.
    if "could not be cut" not in str(scene.status()["problems"]):
        scene.check_soon()
    scene.probe()
    scene.release()
    stop(scene, hit)
    scene.start()
    scene.check()
    scene.check_tree()
    scene.expect_tidy()
    scene.expect_no_traceback()
    return hit


def stop(scene: Scene, hit: str) -> None:
    """umount is the last one who can be told that something was not written, if nobody asked."""
    try:
        scene.stop()
    except AssertionError as error:
        if "could not be synced" not in str(error) or not hit.startswith((*SYNCS, "pwrite")):
            raise AssertionError(f"{error}{scene.mount.log_text()}") from error


def expect_told(scene: Scene, fault: Fault, hit: str, error: OSError | None) -> None:
    """Of an error who called, or status or the log; of one of an fsync in any case."""
    assert error is None or error.errno in (fault.error, *TOLD_AS), f"{error!r}"
    words = {os.strerror(number) for number in (fault.error, errno.EIO)}

    def is_told() -> bool:
        told = f"{error or ''}{scene.status()['problems']}{scene.mount.log_text()}"
        return any(word in told for word in words)

    if fault.is_harmless and not hit.startswith(SYNCS):
        assert error is None, f"noticed: {error!r}"
    elif fault.error != errno.EINTR and hit.startswith(SYNCS):
        scene.wait(is_told, "word of a failed fsync")


@pytest.mark.parametrize("sample", [SAMPLE, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.timeout(7200)
def test_fault_at_any_call_loses_nothing_and_is_told(
    scene: Scene, operation: Operation, sample: int | None
) -> None:
    scene.prepare(operation)
    failures: list[str] = []
    turn = OPERATIONS.index(operation)
    for fault in FAULTS if sample is None else (FAULTS[0], FAULTS[1 + turn % 3]):
        act(scene, operation, Fault(Action.COUNT, fault.kinds), 0)
        calls = len(scene.faults.calls)

        def hit(which: int, fault: Fault = fault) -> bool:
            try:
                return fail(scene, operation, fault, which) is not None
            except (AssertionError, OSError, PafkafsError) as error:
                failures.append(f"{operation} {fault} {which} {scene.faults.hit}: {error!r}")
                print(failures[-1])
                return True

        began = time.monotonic()
        hits = run_all(calls, sample, turn, hit)
        print(f"{operation} {fault}: {hits} of {calls} calls, {time.monotonic() - began:.1f} s")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", ["append", "write_demoted"])
def test_failed_fsync_is_told_once_to_each_handle_whichever_call_of_it_failed(
    scene: Scene, name: str
) -> None:
    operation = next(o for o in OPERATIONS if o.name == name)
    scene.prepare(operation)
    calls = 0
    for which in count():
        scene.restore(operation)
        scene.start()
        action = Action.FAIL if which else Action.COUNT
        with scene.opened(segment(0)) as one, scene.opened(segment(0)) as other:
            scene.append(segment(0), b"not yet durable", one)
            scene.faults.arm(scene.root, action, which, errno.EIO, Kind.SYNC)
            told = [error_of_fsync(one)]
            calls = calls or len(scene.faults.calls)
            told += [error_of_fsync(fd) for fd in (other, one, other)]
        hit = scene.faults.hit
        scene.check()
        if which:
            assert told == [errno.EIO, errno.EIO, 0, 0], hit
        if which == calls:
            break
    assert calls


def test_file_is_created_where_none_can_be_made_without_a_name(scene: Scene) -> None:
    operation = next(o for o in OPERATIONS if o.name == "create")
    scene.prepare(operation)
    scene.restore(operation)
    scene.start()
    scene.faults.arm(scene.root, Action.FAIL, 1, errno.EOPNOTSUPP, Kind.ROOM)
    scene.make(segment(0), b"records")
    assert (scene.faults.hit or "").startswith("openat")
    scene.check()
    scene.check_tree()
    scene.expect_tidy()


def error_of_fsync(fd: int) -> int:
    try:
        os.fsync(fd)
    except OSError as error:
        return error.errno or 0
    return 0
