"""The demonstration that a new user runs first: it works, and leaves nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kafkarun.distribution import Distribution

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture
def demo(kafka: Distribution) -> Iterator[subprocess.Popen[bytes]]:
    """Running, in a session of its own, whose process group is what a Ctrl-C would hit."""
    pipe = subprocess.PIPE
    command = [sys.executable, str(DEMO)]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)
    yield process
    process.terminate()  # only a test that failed leaves it running
    process.communicate()


def expect_nothing_left(work: str) -> None:
    assert work not in Path("/proc/self/mounts").read_text()
    commands = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if work in " ".join(command)]


def test_demo_checks_every_record_and_leaves_nothing(demo: subprocess.Popen[bytes]) -> None:
    output, errors = demo.communicate(timeout=200)
    assert demo.returncode == 0, errors.decode()
    text = output.decode()
    assert "[7/11] move all sealed segments" in text
    assert re.search(r"3\d\d,\d{3} records acknowledged, 0 lost", text)
    work = re.search(r"/var/tmp/pafkafs-demo\.\w+", text)
    assert work is not None
    assert not Path(work[0]).exists()
    expect_nothing_left(work[0])


@pytest.mark.parametrize(
    "interrupt",
    [lambda pid: os.kill(pid, signal.SIGTERM), lambda pid: os.killpg(pid, signal.SIGINT)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_demo_interrupted_while_producing_says_so_and_leaves_only_logs(
    demo: subprocess.Popen[bytes], interrupt: Callable[[int], None]
) -> None:
    assert demo.stdout is not None
    seen = b""
    while b"[5/11] produce" not in seen:
        more = os.read(demo.stdout.fileno(), 4096)
        assert more, demo.communicate()[1].decode()
        seen += more
    interrupt(demo.pid)
    errors = demo.communicate(timeout=60)[1].decode()
    assert demo.returncode == 1
    assert re.match(r"demo: step 5 \(produce .*\) was interrupted\n", errors), errors
    logs = re.search(r"logs are in (\S+)/logs\n$", errors)
    assert logs is not None, errors
    expect_nothing_left(logs[1])
    assert (Path(logs[1]) / "logs" / "broker.log").stat().st_size > 0
    assert not (Path(logs[1]) / "disk").exists()
    shutil.rmtree(logs[1])
