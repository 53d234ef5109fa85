"""`pafkafs status` and the control socket behind it."""

import json
import os
import socket
from pathlib import Path

import pytest
from conftest import MakeMount
from filetools import Child
from harness import Mount, run_pafkafs, wait_until

from pafkafs import control
from pafkafs.errors import UsageError


def test_json_has_what_its_version_promises(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "8MiB", "--slow-capacity", "1GiB").start()
    (mount.mountpoint / "spilled").write_bytes(os.urandom(16 << 20))
    (mount.mountpoint / "small").write_bytes(b"x" * 4096)
    status = mount.status()
    assert status["mountpoint"] == str(mount.mountpoint)
    assert status["state"] == "healthy"
    assert status["durability"] == "process"
    assert status["mode"] == "tiered"
    assert status["uptime_s"] >= 0
    assert os.path.exists(f"/proc/{status['pid']}")
    fast, slow = status["tiers"]
    assert (fast["name"], fast["kind"]) == ("fast", "memory")
    assert (slow["name"], slow["kind"]) == ("slow", "block")
    assert fast["devices"] == [
        {
            "path": str(mount.fast),
            "capacity_bytes": 8 << 20,
            "used_bytes": 4096,
            "files": 1,
            "errors": 0,
            "hung_s": 0.0,
        }
    ]
    assert slow["devices"][0]["files"] == 1
    assert 16 << 20 <= slow["devices"][0]["used_bytes"] <= 17 << 20


def test_usage_survives_a_remount(make_mount: MakeMount) -> None:
    mount = make_mount("--fast-capacity", "8MiB", "--slow-capacity", "1GiB").start()
    (mount.mountpoint / "spilled").write_bytes(os.urandom(16 << 20))
    (mount.mountpoint / "small").write_bytes(b"x" * 4096)
    mount.restart()
    assert (mount.device("fast")["used_bytes"], mount.device("fast")["files"]) == (4096, 1)
    assert 16 << 20 <= mount.device("slow")["used_bytes"] <= 17 << 20
    assert mount.device("slow")["files"] == 1


def test_table_is_for_people_and_exit_status_0_when_healthy(mount: Mount) -> None:
    result = run_pafkafs("status", str(mount.mountpoint))
    assert result.returncode == 0
    for text in (str(mount.mountpoint), "healthy", "64.0 MiB", "power loss"):
        assert text in result.stdout


def test_without_argument_all_mounts_are_shown(make_mount: MakeMount) -> None:
    mounts = [make_mount(name=name).start() for name in ("one", "two")]
    shown = json.loads(run_pafkafs("status", "--json").stdout)["mounts"]
    assert {str(m.mountpoint) for m in mounts} <= {m["mountpoint"] for m in shown}


def test_dead_mount_is_unhealthy_and_the_action_revives_it(mount: Mount) -> None:
    mount.kill()
    result = run_pafkafs("status", str(mount.mountpoint))
    assert result.returncode == 1
    assert "dead" in result.stdout
    action = next(line for line in result.stdout.splitlines() if "action:" in line)
    command = action.partition("action: ")[2].split()
    assert command[0] == "pafkafs"
    assert run_pafkafs(*command[1:]).returncode == 0
    assert mount.status()["state"] == "healthy"


def test_path_without_a_mount_is_an_error(tmp_path: Path) -> None:
    result = run_pafkafs("status", str(tmp_path))
    assert result.returncode == 1
    assert "no pafkafs is mounted" in result.stderr


def test_unknown_option_is_a_usage_error() -> None:
    assert run_pafkafs("status", "--frobnicate").returncode == 2


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"{}\n",
        b"[]\n",
        b"nonsense\n",
        b'{"command": "halt"}\n',
        b'{"command": []}\n',
        b"\xff\n",
        b"[" * 4000 + b"\n",
    ],
)
def test_bad_request_is_answered_and_harms_nothing(mount: Mount, request_bytes: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(control.socket_path(str(mount.mountpoint))))
        client.sendall(request_bytes)
        assert json.loads(client.recv(65536))["ok"] is False
    assert mount.status()["state"] == "healthy"


def test_endless_request_is_cut_off(mount: Mount) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(control.socket_path(str(mount.mountpoint))))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall(b"x" * (4 << 20))
    assert mount.status()["state"] == "healthy"


def test_idle_connections_do_not_lock_status_out_for_long(mount: Mount) -> None:
    path = str(control.socket_path(str(mount.mountpoint)))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    try:
        for client in clients:
            client.connect(path)
        wait_until(
            lambda: run_pafkafs("status", str(mount.mountpoint)).returncode == 0, "status", 20
        )
    finally:
        for client in clients:
            client.close()


def test_socket_is_for_its_owner_alone(mount: Mount) -> None:
    path = control.socket_path(str(mount.mountpoint))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o022 == 0


def test_other_user_gets_no_answer(mount: Mount) -> None:
    path = control.socket_path(str(mount.mountpoint))
    path.chmod(0o666)
    mode = path.parent.stat().st_mode
    path.parent.chmod(0o755)
    try:

        def ask() -> bytes:
            os.setuid(12345)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(b'{"command": "status"}\n')
                try:
                    return client.recv(65536)
                except ConnectionResetError:
                    return b""

        assert Child(ask).result() == b""
    finally:
        path.parent.chmod(mode)
        path.chmod(0o600)
    assert mount.status()["state"] == "healthy"


def test_request_that_trickles_and_answer_that_is_not_read_are_given_up(mount: Mount) -> None:
    path = str(control.socket_path(str(mount.mountpoint)))
    with socket.socket(socket.AF_UNIX) as slow, socket.socket(socket.AF_UNIX) as deaf:
        for client in (slow, deaf):
            client.settimeout(60)
            client.connect(path)
        deaf.sendall(b'{"command": "status"}\n')
        slow.sendall(b'{"command": ')
        assert mount.status()["state"] == "healthy"
        assert slow.recv(1) == b""  # after its time
    assert mount.status()["state"] == "healthy"


@pytest.mark.parametrize(
    "arguments", [{}, {"values": 7}, {"values": {"threshold": 7}}, {"values": {"": "x"}}]
)
def test_malformed_set_is_refused(mount: Mount, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        control.ask(str(mount.mountpoint), "set", **arguments)
    assert mount.status()["state"] == "healthy"
