"""Fixtures for tests with a real broker.

KAFKA_TESTS_ON=directory runs them on a plain directory instead of a mount, to tell whether
a failure is the mount's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import Mount
from kafkarun import distribution
from kafkarun.distribution import Distribution

from kafka.cluster import TIDY, Cluster, StartCluster
from kafka.logdirs import LogDir, MountedDirectory, PlainDirectory

KAFKA_VERSION = "4.1.1"
FAST_CAPACITY = "32MiB"


@pytest.fixture(scope="session")
def kafka() -> Distribution:
    return distribution.fetch(KAFKA_VERSION)


@pytest.fixture
def logdir(make_mount: Callable[..., Mount], tmp_path: Path) -> Iterator[LogDir]:
    provider: LogDir
    if os.environ.get("KAFKA_TESTS_ON") == "directory":
        provider = PlainDirectory(tmp_path / "logs")
    else:
        provider = MountedDirectory(make_mount("--fast-capacity", FAST_CAPACITY))
    provider.attach()
    yield provider
    provider.discard()


@pytest.fixture
def start_cluster(logdir: LogDir, kafka: Distribution, tmp_path: Path) -> Iterator[StartCluster]:
    """Starts brokers on `logdir`; whatever is still running after the test is killed."""
    with ExitStack() as stack:

        def start(version: Distribution = kafka, **options: Any) -> Cluster:
            cluster = Cluster(logdir, version, tmp_path / "broker", **options)
            stack.callback(cluster.broker.close)
            return cluster

        yield start


@pytest.fixture
def cluster(start_cluster: StartCluster) -> Cluster:
    """A broker with no more than the mountpoint itself as its log directory."""
    return start_cluster()


@pytest.fixture
def tidy(start_cluster: StartCluster) -> Cluster:
    """A broker that looks for things to clean all the time instead of every few minutes."""
    return start_cluster(properties=TIDY)
