"""A stock broker whose machine loses power, on real fsdax in a VM.

The persistent memory of the VM is a file. QEMU is stopped at some instant and the file copied: that
is what a power cut then would have left. The last cut is a real one. What is on the copies is
recovered in a second VM and handed to a stock broker here, which has to find every record that was
acked before the cut.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
from daxvm.vm import MIB, Vm
from kafka.powercut import (
    IN_FLIGHT_MAX,
    KAFKA_VERSION,
    PARTITIONS,
    PAYLOADS,
    START_TIMEOUT_S,
    TOPIC_CONFIG,
    jvm,
)
from kafkarun import distribution, topics
from kafkarun.broker import Broker
from kafkarun.check import Ledger
from kafkarun.traffic import CheckedProducer, check_topic

TESTS = Path(__file__).parent
GUEST = TESTS / "guest"
PMEM_SIZE = 512 * MIB
ACKS_BETWEEN_CUTS = range(200, 1500)
# An instant anywhere between two acks, not just after one.
PAUSE_MAX_S = 0.05


@dataclass(frozen=True)
class Cut:
    """The persistent memory after a cut, and what had been acked before it, by topic."""

    memory: Path
    acked: dict[str, Ledger]


@dataclass(frozen=True)
class Prepared:
    """What a broker in the VM needs, made once."""

    classes: Path
    formatted: Path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A broker's life here, whose loaded classes save the one in the VM most of its start."""
    work = tmp_path_factory.mktemp("broker")
    classes, formatted, logs = work / "classes.jsa", work / "formatted", work / "logs"
    formatted.mkdir()
    options = jvm(classes, dump=True)
    with Broker(distribution.fetch(KAFKA_VERSION), [formatted], work, jvm=options) as broker:
        broker.format()
        shutil.copytree(formatted, logs)
        broker.use([logs])
        broker.start()
        topics.create(broker.bootstrap, "trial", PARTITIONS, TOPIC_CONFIG)
        producer = CheckedProducer(broker.bootstrap, "trial", PARTITIONS, PAYLOADS)
        producer.send(1000)
        producer.flush()
        broker.stop()
    return Prepared(classes, formatted)


def in_guest(program: str, *arguments: str) -> list[str]:
    return [sys.executable, str(GUEST / program), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{TESTS.parent / 'scripts'}:{TESTS}"}


def note(ledger: Ledger, lines: Sequence[str]) -> None:
    for line in lines:
        kind, *numbers = line.split()
        assert kind == "acked", line
        partition, seq, offset = map(int, numbers)
        ledger.add(partition, seq, offset)


def cut_often(
    memory: Path, acked: dict[str, Ledger], cuts: int, prepared: Prepared, choose: random.Random
) -> list[Cut]:
    """One life of a broker in the VM: some instants of it kept, the end a real power cut."""
    topic = f"topic-{len(acked)}"
    ledger = acked[topic] = Ledger()
    found = []
    with Vm(pmem_file=memory, pmem_size=PMEM_SIZE, keep_filesystem=memory.exists()) as vm:
        orders = in_guest("broker.py", topic, str(prepared.classes), str(prepared.formatted))
        vm.start(orders, env=environment())
        lines = vm.stdout.lines()
        if next(lines, "") != "ready":
            vm.power_cut()
            pytest.fail("\n".join(vm.stderr.lines()))
        for number in range(cuts):
            note(ledger, [next(lines) for _ in range(choose.choice(ACKS_BETWEEN_CUTS))])
            time.sleep(choose.random() * PAUSE_MAX_S)
            copy = memory.with_name(f"{memory.name}-{topic}-{number}")
            if number == cuts - 1:
                vm.power_cut()
                keep_sparse(memory, copy)
                note(ledger, vm.stdout.lines_here())
            else:
                with vm.standing_still():
                    keep_sparse(memory, copy)
                    note(ledger, vm.stdout.lines_here())
            found.append(Cut(copy, deepcopy(acked)))
    return found


def keep_sparse(memory: Path, copy: Path) -> None:
    subprocess.run(["cp", "--sparse=always", str(memory), str(copy)], check=True)


def recover(cuts: Sequence[Cut], share: Path) -> list[Path]:
    """What pafkafs shows after each of the cuts: log directories."""
    share.mkdir()
    names = ["pmem", *(f"pmem{number}" for number in range(1, len(cuts)))]
    first, *more = (cut.memory for cut in cuts)
    with Vm(pmem_file=first, keep_filesystem=True, more_pmem=more, share=share) as vm:
        memories = [f"/{name}" for name in names]
        vm.start(in_guest("recover.py", str(share), *memories), env=environment())
        assert vm.wait(START_TIMEOUT_S) == 0, list(vm.stderr.lines())
    return [share / name for name in names]


def expect_every_ack(logs: Path, cut: Cut, work: Path, prepared: Prepared) -> None:
    """A stock broker finds each acked record once, in order; what else there is was in flight."""
    kafka = distribution.fetch(KAFKA_VERSION)
    with Broker(kafka, [logs], work, jvm=jvm(prepared.classes)) as broker:
        broker.start()
        for topic, ledger in cut.acked.items():
            report = check_topic(broker.bootstrap, topic, ledger, PAYLOADS)
            assert report.intact, f"{cut.memory.name}, {topic}: {report}"
            assert report.unacked <= IN_FLIGHT_MAX, f"{cut.memory.name}, {topic}: {report}"
        assert not broker.errors()


@pytest.mark.parametrize(
    ("lives", "cuts"),
    [
        pytest.param(1, 4, marks=pytest.mark.timeout(1800)),
        pytest.param(8, 8, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_every_acked_record_survives_power_cuts(
    lives: int, cuts: int, prepared: Prepared, tmp_path: Path
) -> None:
    choose = random.Random()
    memory = tmp_path / "pmem"
    acked: dict[str, Ledger] = {}
    for life in range(lives):
        found = cut_often(memory, acked, cuts, prepared, choose)
        for number, logs in enumerate(recover(found, tmp_path / f"share-{life}")):
            work = tmp_path / f"work-{life}-{number}"
            expect_every_ack(logs, found[number], work, prepared)
            shutil.rmtree(logs)
            found[number].memory.unlink()
