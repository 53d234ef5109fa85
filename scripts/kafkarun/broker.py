"""One single-node KRaft broker in a process of its own: format, start, stop, kill.

Knows nothing of what its log directories are. Its configuration and its log are in a work
directory that should not be one of them, so that they survive whatever happens there.
"""

import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from kafkarun.clients import client_config
from kafkarun.distribution import Distribution
from kafkarun.errors import DeadlinePassed, KafkaRunError
from kafkarun.polling import wait_until

# Fixed, so that a broker object made later can run on directories formatted by an earlier one.
CLUSTER_ID = "cGFma2Fmcy1rYWZrYS0wMQ"

# With the line below it if that is an exception's and not the log's next entry.
_ERROR = re.compile(r"^\[[^]]*\] (?:ERROR|FATAL) .*(?:\n(?!\[).+)?", re.MULTILINE)
# Errors that a healthy broker logs in races of its own, on any filesystem, and recovers from.
_HARMLESS = (
    # It has just elected itself, turns down its own registration and then repeats it.
    "NotControllerException: The active controller appears to be node 1.",
    # A replica that moves was promoted before the answer to its assignment came (Kafka 4.1).
    "NullPointerException: Cannot invoke "
    '"kafka.server.ReplicaAlterLogDirsThread$PromotionState.withAssignment',
    # A broker that was killed leads its partitions again, for a moment, until its new registration
    # fences it: loading ends and begins anew.  A log directory that failed logs more than this.
    "NotLeaderOrFollowerException: Stopped loading records from __consumer_offsets-",
    # The machine is busy.
    "Exceptionally slow controller event",
)
_EXITS_AFTER_SIGTERM = (0, 143)
_LOG4J2 = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d] %p %m (%c{1})%n
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = out
"""
_LOG4J1 = """\
log4j.rootLogger=INFO, out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=[%d] %p %m (%c{1})%n
"""


class Broker:
    """A combined broker and controller on two ports of 127.0.0.1 that stay its own."""

    def __init__(
        self,
        distribution: Distribution,
        log_dirs: Sequence[Path],
        work_dir: Path,
        *,
        properties: Mapping[str, str] | None = None,
        heap: str = "512m",
        jvm: Sequence[str] = (),
    ) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        self.distribution = distribution
        self.log_file = work_dir / "broker.log"
        self._config_file = work_dir / "server.properties"
        self._logging_file = work_dir / "log4j.properties"
        self._jvm = (f"-Xmx{heap}", *jvm)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._reserved = _reserve_port(), _reserve_port()
        port, controller_port = (held.getsockname()[1] for held in self._reserved)
        self.bootstrap = f"127.0.0.1:{port}"
        self._settings = _settings(port, controller_port) | dict(properties or {})
        self.use(log_dirs)
        self._logging_file.write_text(_LOG4J2 if distribution.uses_log4j2 else _LOG4J1)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def use(self, log_dirs: Sequence[Path]) -> None:
        """Have the next start run on these log directories."""
        self._settings["log.dirs"] = ",".join(map(str, log_dirs))
        lines = (f"{name}={value}\n" for name, value in self._settings.items())
        self._config_file.write_text("".join(lines))

    def expect_running(self) -> subprocess.Popen[bytes]:
        """The process; raises with its last words if it has ended by itself."""
        if self._process is None:
            raise KafkaRunError("the broker was not started")
        code = self._process.poll()
        if code is not None:
            raise KafkaRunError(f"broker ended by itself with status {code}; {self._last_words()}")
        return self._process

    def format(self) -> None:
        """Make the log directories part of the cluster; refused by Kafka if they are already."""
        arguments = ("format", "-t", CLUSTER_ID, "-c", str(self._config_file))
        self.distribution.run_tool("kafka.tools.StorageTool", *arguments)

    def start(self, within_s: float = 60) -> None:
        """Start the process and wait until it answers a metadata request."""
        self.spawn()
        try:
            self.wait_ready(within_s)
        except BaseException:
            self.kill()
            raise

    def spawn(self) -> None:
        """Start the process without waiting for it to be of use."""
        if self.running:
            raise KafkaRunError(f"the broker at {self.bootstrap} is running already")
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            # Its own session: a Ctrl-C in the terminal is its starter's to handle, not its own.
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, within_s: float = 60) -> None:
        admin = AdminClient(client_config(self.bootstrap))
        try:
            wait_until(lambda: self._answers(admin), within_s=within_s, what="broker start")
        except DeadlinePassed as late:
            raise KafkaRunError(f"{late}; {self._last_words()}") from late

    def stop(self, within_s: float = 90) -> None:
        """Shut down cleanly; if that fails the process is killed and the failure raised."""
        process = self.expect_running()
        process.terminate()
        try:
            code = process.wait(within_s)
        except subprocess.TimeoutExpired as late:
            self.kill()
            raise KafkaRunError(
                f"broker still up {within_s:g} s after SIGTERM; {self._last_words()}"
            ) from late
        if code not in _EXITS_AFTER_SIGTERM:
            raise KafkaRunError(f"broker ended with status {code}; {self._last_words()}")

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. No-op if it already is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def has_logged(self, text: str) -> bool:
        """Whether the text is in the log of its present or latest run."""
        return text in self._log_of_this_run()

    def errors(self) -> list[str]:
        """What all its runs have logged as ERROR or FATAL, each with its exception if any."""
        if not self.log_file.exists():
            return []
        found = _ERROR.findall(self.log_file.read_text(errors="replace"))
        return [error for error in found if not any(known in error for known in _HARMLESS)]

    def close(self) -> None:
        """Leave nothing behind: neither the process nor the ports."""
        self.kill()
        for held in self._reserved:
            held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _command(self) -> list[str]:
        key = "log4j2.configurationFile" if self.distribution.uses_log4j2 else "log4j.configuration"
        jvm = (*self._jvm, "-XX:+ExitOnOutOfMemoryError", f"-D{key}={self._logging_uri()}")
        return self.distribution.command("kafka.Kafka", str(self._config_file), jvm=jvm)

    def _logging_uri(self) -> str:
        return self._logging_file.absolute().as_uri()

    def _answers(self, admin: AdminClient) -> bool:
        self.expect_running()
        try:
            # A broker that is still fenced answers too, but does not list itself.
            return bool(admin.list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def _last_words(self) -> str:
        """Its last error with the exception below it, else the last line it logged."""
        log = self._log_of_this_run()
        said = (_ERROR.findall(log) or log.splitlines() or ["nothing"])[-1]
        return f"{self.log_file} ends with: {said.replace(chr(10), ' ')[:400]}"

    def _log_of_this_run(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")


def _reserve_port() -> socket.socket:
    """Bind a free port without listening on it.

    Java binds with SO_REUSEADDR as well, which Linux allows as long as no other socket
    listens there; nobody else is given the port, not even while the broker is down.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _settings(port: int, controller_port: int) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.min.isr": "1",
        "auto.create.topics.enable": "false",
        # A killed broker may not register again before its last session has timed out.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
    }
