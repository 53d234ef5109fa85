"""Fixtures of all tests: a mount with a fast tier in memory and a slow one on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from faults import Faults
from harness import Mount, fast_memory, let_others_search, tmpfs
from steps import Scene

MakeMount = Callable[..., Mount]


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[MakeMount]:
    """Makes mounts, not started yet, that are cleaned up after the test.

    A traceback in a daemon's log fails the test: no fault may be unexpected.
    """
    made: list[Mount] = []
    with fast_memory(tmp_path / "memory", "2g") as memory:

        def make(*options: str, name: str = "m") -> Mount:
            fast, slow = memory / name, tmp_path / f"{name}-slow"
            mountpoint = tmp_path / f"{name}-mnt" / "kafka-logs"
            for directory in (fast, slow, mountpoint):
                directory.mkdir(parents=True)
            mount = Mount(fast, slow, mountpoint, options, tmp_path / f"{name}.log")
            made.append(mount)
            return mount

        yield make
        for mount in made:
            mount.clean_up()
        for mount in made:
            assert "Traceback" not in mount.log_text(), mount.log_text()


@pytest.fixture
def mount(make_mount: MakeMount) -> Mount:
    """A running mount with 64 MiB of fast tier."""
    return make_mount("--fast-capacity", "64MiB").start()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Devices and a daemon for campaigns of faults at each call."""
    directory = tmp_path_factory.mktemp("crash")
    let_others_search(directory / "x")
    devices = directory / "devices"
    with tmpfs(devices / "memory", "256m"), tmpfs(devices / "disk", "256m"):
        faults = Faults(directory)
        daemons = Daemons(faults.environment)
        scene = Scene(directory, faults, daemons)
        yield scene
        scene.kill()
        daemons.close()
