"""Runs pafkafs commands in processes forked from one that has all of it loaded.

A mount takes 25 ms then instead of 350: what lets a campaign start thousands of daemons.  What
runs is the command line itself; only the interpreter's start and the imports are shared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


class Daemons:
    """A process that forks one command after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A pafkafs command with its output; its return code is negative when it was killed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, answer["status"], answer["stdout"], answer["stderr"]
        )

    def close(self) -> None:
        """Ends the process; what it has started goes on."""
        self._server.communicate()


def _serve() -> None:
    import pafkafs.daemon  # noqa: F401 - what a mount would import after its fork
    from pafkafs import commands

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with TemporaryFile() as out, TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _run(commands, json.loads(line))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            err.seek(0)
            answer = {
                "status": status,
                "stdout": out.read().decode(errors="replace"),
                "stderr": err.read().decode(errors="replace"),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(commands: Any, arguments: list[str]) -> None:
    """In the child: never returns."""
    try:
        commands.run(commands.cli, arguments)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _serve()
