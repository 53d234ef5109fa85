"""The daemon is killed at each system call that changes a device, in each operation that does.

A first run lists the calls; then one run for each of them, from the same devices, has it be the
last of the daemon: SIGKILL before it, and for writes a second time after a part. The next mount
must find the names as they were before the step in flight or after it, all that was acked, and
leave nothing over.
"""

import time

import pytest
from faults import Action, Kind
from operations import OPERATIONS, Operation, run_all
from steps import Scene

from pafkafs.errors import PafkafsError

SAMPLE = 2  # calls of each operation that are hit in the default run


def run(scene: Scene, operation: Operation, action: Action, which: int, kinds: Kind) -> str | None:
    """The operation, of which one call is the last of the daemon: which, None if none was."""
    scene.restore(operation)
    if not operation.mounts:
        scene.start()
        scene.expect_tidy()
    operation.begin(scene)
    scene.faults.arm(scene.root, action, which, kinds=kinds)
    try:
        operation.act(scene)
        scene.wait(lambda: scene.faults.hit or operation.settled(scene), "the end of it")
    except (OSError, AssertionError, PafkafsError):
        if scene.faults.hit is None:
            raise
    scene.faults.disarm()
    return scene.faults.hit


def crash(scene: Scene, operation: Operation, action: Action, which: int, kinds: Kind) -> bool:
    """False when the operation makes fewer calls."""
    hit = run(scene, operation, action, which, kinds)
    scene.kill()
    operation.recover(scene)
    try:
        scene.check()
        scene.check_tree()
        scene.expect_tidy()
        scene.expect_no_traceback()
    except AssertionError as error:
        raise AssertionError(f"{operation}, killed at call {which}, {hit}: {error}") from error
    return hit is not None


WAYS = ((Action.DIE, Kind.CHANGE), (Action.TEAR, Kind.TORN))


@pytest.mark.parametrize("sample", [SAMPLE, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.timeout(3600)
def test_daemon_that_dies_at_any_call_leaves_every_name_whole(
    scene: Scene, operation: Operation, sample: int | None
) -> None:
    scene.prepare(operation)
    failures: list[str] = []
    for action, kinds in WAYS:
        crash(scene, operation, Action.COUNT, 0, kinds)
        calls = len(scene.faults.calls)

        def hit(which: int, action: Action = action, kinds: Kind = kinds) -> bool:
            try:
                return crash(scene, operation, action, which, kinds)
            except AssertionError as error:
                failures.append(str(error))
                print(failures[-1])
                return True

        began = time.monotonic()
        hits = run_all(calls, sample, OPERATIONS.index(operation), hit)
        print(f"{operation} {action.name}: {hits} calls, {time.monotonic() - began:.1f} s")
    assert not failures, "\n".join(failures)
