"""Metrics as a scraper sees them."""

import os
import socket
import subprocess
import urllib.request
from contextlib import ExitStack

import pytest
from conftest import MakeMount
from filetools import MIB, opened
from harness import Mount, is_mounted, run_pafkafs, wait_until
from prometheus_client.parser import text_string_to_metric_families

# One request, wherever in a page its buffer begins.
BATCH = 64 << 10
ANY_PORT = ("--metrics", "127.0.0.1:0")


@pytest.fixture
def mount(make_mount: MakeMount) -> Mount:
    return make_mount(*ANY_PORT, "--fast-capacity", "64MiB", "--threshold", "-1").start()


def address(mount: Mount) -> tuple[str, int]:
    host, _, port = mount.status()["metrics"].rpartition(":")
    return host, int(port)


class Scrape:
    """The samples of one page."""

    def __init__(self, where: tuple[str, int]) -> None:
        with urllib.request.urlopen(f"http://{where[0]}:{where[1]}/metrics", timeout=30) as page:
            assert page.headers["Content-Type"].startswith("text/plain")
            text = page.read().decode()
        families = text_string_to_metric_families(text)
        self.samples = [sample for family in families for sample in family.samples]

    def get(self, name: str, **labels: str) -> float:
        """The sum of what has this name and these labels."""
        found = [
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        ]
        return sum(found)

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self.samples)


def answer_to(where: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(where, timeout=30) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        received = b""
        while more := client.recv(65536):
            received += more
    return received


def test_metrics_count_what_was_done(mount: Mount) -> None:
    where = address(mount)
    path = mount.mountpoint / "topic-0" / f"{0:020}.log"
    path.parent.mkdir()
    (path.parent / f"{10**6:020}.log").touch()
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for _ in range(7):
            os.write(fd, os.urandom(BATCH))
        os.fsync(fd)
        before = wait_until(
            lambda: (s := Scrape(where)).get("pafkafs_open_files") == 1 and s, "the open file"
        )
    count = "pafkafs_request_duration_seconds_count"
    assert before.get(count, operation="write", tier="fast", device=str(mount.fast)) == 7
    assert before.get(count, operation="fsync", tier="fast") == 1
    assert before.get("pafkafs_request_duration_seconds_bucket", operation="write", le="+Inf") == 7
    assert 0 < before.get("pafkafs_request_duration_seconds_sum", operation="write") < 60
    assert before.get("pafkafs_device_used_bytes", tier="fast") == 7 * BATCH
    assert before.get("pafkafs_device_capacity_bytes", tier="fast") == 64 * MIB
    assert before.get("pafkafs_device_files", device=str(mount.fast)) == 2
    assert before.get("pafkafs_requests_total", answered_by="native") >= 8
    assert before.get("pafkafs_requests_total", answered_by="session") >= 3
    assert before.get("pafkafs_healthy") == 1
    assert before.get("pafkafs_moved_files_total", direction="demote") == 0
    assert before.get("process_resident_memory_bytes") > MIB
    assert before.get("pafkafs_mount_info", mode="tiered") == 1
    assert run_pafkafs("migrate", "--wait", "--to", "slow", str(path)).returncode == 0
    after = wait_until(
        lambda: (s := Scrape(where)).get("pafkafs_device_files", tier="slow") == 1 and s, "the move"
    )
    assert after.get("pafkafs_moved_files_total", direction="demote") == 1
    assert after.get("pafkafs_moved_bytes_total", direction="demote") == 7 * BATCH
    assert after.get("pafkafs_moved_files_total", direction="promote") == 0
    assert after.get("pafkafs_device_used_bytes", tier="fast") < BATCH
    assert path.read_bytes()
    wait_until(lambda: Scrape(where).get(count, operation="read", tier="slow") > 0, "reads there")


def test_move_that_fails_and_error_of_a_device_are_counted(mount: Mount) -> None:
    where = address(mount)
    path = mount.mountpoint / "topic-0" / f"{0:020}.log"
    path.parent.mkdir()
    path.write_bytes(b"x")
    (path.parent / f"{10**6:020}.log").touch()
    (mount.slow / "objects").rename(mount.slow / "elsewhere")
    (mount.slow / "elsewhere").rmdir()
    assert run_pafkafs("migrate", "--wait", "--to", "slow", str(path)).returncode == 1
    wait_until(
        lambda: Scrape(where).get("pafkafs_failed_moves_total", direction="demote") == 1, "it"
    )


def test_there_is_no_endpoint_without_the_option(make_mount: MakeMount) -> None:
    assert make_mount().start().status()["metrics"] is None


def test_endpoint_listens_on_the_address_alone_and_ends_with_the_mount(mount: Mount) -> None:
    host, port = address(mount)
    assert host == "127.0.0.1"
    listening = subprocess.run(["ss", "-Hltn", f"sport = {port}"], capture_output=True, text=True)
    assert f"127.0.0.1:{port}" in listening.stdout
    assert f"0.0.0.0:{port}" not in listening.stdout
    mount.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=30).close()


def test_ipv6_address_is_served(make_mount: MakeMount) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    mount = make_mount("--metrics", "[::1]:0").start()
    shown = mount.status()["metrics"]
    assert shown.startswith("[::1]:")
    assert b"200 OK" in answer_to(
        ("::1", int(shown.rpartition(":")[2])), b"GET /metrics HTTP/1.0\r\n\r\n"
    )


def test_idle_and_half_said_connections_hold_nothing_up(mount: Mount) -> None:
    where = address(mount)
    with ExitStack() as stack:
        for number in range(60):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(where)
            if number % 2:
                wait_until(lambda c=client: c.connect_ex(where) in (0, 106, 114), "a connection")
        (mount.mountpoint / "file").write_bytes(b"x" * MIB)
        assert (mount.mountpoint / "file").stat().st_size == MIB
        assert mount.status()["state"] == "healthy"
    # Each idle one is dropped after some seconds, and what remains was closed.
    assert wait_until(lambda: Scrape(where).has("pafkafs_healthy"), "a scrape", 60)


def test_reader_that_does_not_read_holds_nothing_up(mount: Mount) -> None:
    where = address(mount)
    with ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(socket.create_connection(where, timeout=30))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        (mount.mountpoint / "file").write_bytes(b"x" * MIB)
        assert mount.status()["state"] == "healthy"


@pytest.mark.parametrize(
    ("request_bytes", "result"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"\xff\xfe\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /metrics", b"HTTP/1.1 400 Bad Request"),
        (b"x" * 8192, b"HTTP/1.1 400 Bad Request"),
    ],
)
def test_whatever_is_asked_is_answered(mount: Mount, request_bytes: bytes, result: bytes) -> None:
    answer = answer_to(address(mount), request_bytes)
    assert answer.startswith(result)
    head, _, body = answer.partition(b"\r\n\r\n")
    if request_bytes.startswith(b"HEAD"):
        assert body == b""
        assert b"Content-Length: 0" not in head
    else:
        assert f"Content-Length: {len(body)}\r\n".encode() in head


@pytest.mark.parametrize(
    "text", ["9464", "localhost:9464", "127.0.0.1", "127.0.0.1:99999", "[::1]", ":::1", "x:y:z"]
)
def test_bad_address_is_a_usage_error(make_mount: MakeMount, text: str) -> None:
    mount = make_mount()
    result = mount.mount("--metrics", text)
    assert result.returncode == 2
    assert "no address for metrics" in result.stderr
    assert result.stderr.count("\n") == 1


def test_address_in_use_is_refused_before_anything_is_changed(make_mount: MakeMount) -> None:
    mount = make_mount()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        result = mount.mount("--metrics", taken)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert taken in result.stderr
    assert "in use" in result.stderr
    assert not is_mounted(mount.mountpoint)
    assert not os.listdir(mount.fast)
    assert not os.listdir(mount.slow)
