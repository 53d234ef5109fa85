"""One VM, from boot to its end or to a power cut."""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from daxvm import kernel, packages
from daxvm.errors import TimePassed, VmError
from daxvm.stream import Stream

MIB = 1 << 20
GIB = 1 << 30
# The kernel's memory sections: persistent memory has to consist of whole ones.
_PMEM_UNIT = 128 * MIB
_BOOT_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 60
# What only costs time in an emulated CPU is left out. Time comes from a timer of known frequency:
# measured while the host was busy, that of the TSC has been wrong by a factor of 8. Another such
# timer, acpi_pm, wraps every 5 s, and a busy host lets the guest wait longer.
_KERNEL_OPTIONS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no5lvl clocksource=hpet "
    "cryptomgr.notests random.trust_cpu=on audit=0 apparmor=0"
)


class Vm:
    """Runs one command in a guest with `pmem_file` as its persistent memory, at /pmem.

    `more_pmem` are files that other VMs filled, if `keep_filesystem` as well: what is on them is
    mounted at /pmem1, /pmem2 and so on.

    Must be started by a thread that outlives it: QEMU is killed when that thread ends, so that a
    dead test leaves no VM behind.
    """

    def __init__(
        self,
        *,
        pmem_file: Path | None = None,
        pmem_size: int = GIB,
        keep_filesystem: bool = False,
        more_pmem: Sequence[Path] = (),
        share: Path | None = None,
        memory: int = 4 * GIB,
    ) -> None:
        self._work = Path(tempfile.mkdtemp(prefix="dax-vm."))
        self._pmem_file = (pmem_file or self._work / "pmem").absolute()
        self._pmem_size = pmem_size
        self._keep = keep_filesystem
        self._more_pmem = [path.absolute() for path in more_pmem]
        self._share = share.resolve() if share else None
        self._memory = memory
        self._end = b"\0" + secrets.token_hex(16).encode()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Boot and return when `command` is about to run, with our environment if not another."""
        if self._qemu is not None:
            raise VmError("a VM is started once")
        packages.install()
        boot = kernel.prepare()
        self._prepare_pmem()
        self._write_orders(command, cwd or Path.cwd(), os.environ if env is None else env)
        self._spawn(boot)
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        if (said := self._next_word(deadline, "the VM did not boot")) != "start":
            raise VmError(f"the VM failed: {said.removeprefix('fail ')}")
        if self._pmem_file.parent == self._work:
            self._pmem_file.unlink()  # QEMU holds it: so it is gone however we end

    def wait(self, timeout_s: float | None = None) -> int:
        """The command's exit status, 128 + N if a signal N ended it.

        TimePassed when it takes longer (the VM then goes on), VmError when the VM dies before.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        status = int(self._next_word(deadline, "the command did not end").removeprefix("exit "))
        self._join_streams()
        # Only now is the filesystem whole without its journal.
        stop_deadline = time.monotonic() + _STOP_TIMEOUT_S
        self._next_word(stop_deadline, "the VM did not unmount its filesystem")
        self.power_cut()
        return status

    def power_cut(self) -> None:
        """End the VM at this instant; what the guest had in its page cache is gone.

        Lines of output that were received before can still be read.
        """
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._join_streams()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """A copy of the persistent memory made meanwhile is what a power cut would leave now, and
        `lines_here` of an output are all that the guest had written."""
        assert self._qemu is not None
        self._qemu.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._qemu.pid, os.WSTOPPED)  # all of its threads
        try:
            for stream in (self.stdout, self.stderr):
                stream.settle()
            yield
        finally:
            self._qemu.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the VM, and remove what is temporary."""
        self.power_cut()
        if self._control is not None:
            self._control.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def _prepare_pmem(self) -> None:
        if self._keep:
            self._pmem_size = _size_of(self._pmem_file)
        if self._pmem_size % _PMEM_UNIT or not self._pmem_size:
            size = f"{self._pmem_size / MIB:g} MiB"
            raise VmError(f"persistent memory of {size} is not a multiple of {_PMEM_UNIT // MIB}")
        if not self._keep:
            try:
                with self._pmem_file.open("wb") as file:
                    file.truncate(self._pmem_size)
            except OSError as error:
                raise VmError(f"{self._pmem_file}: {error.strerror}") from error

    def _write_orders(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        """What `init.sh` reads: shell files, whose words are quoted here."""
        settings = {
            "END": self._end[1:].decode(),
            "KEEP": "yes" if self._keep else "",
            "SHARE": str(self._share or ""),
        }
        words = ["exec", "env", "-i", "-C", str(cwd)]
        words += [f"{name}={value}" for name, value in env.items()]
        words += ["PAFKAFS_DAX=/pmem", *command]
        lines = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
        (self._work / "settings").write_text(lines)
        (self._work / "command").write_text(shlex.join(words) + "\n")

    def _spawn(self, boot: kernel.Boot) -> None:
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
        command = self._qemu_command(boot, [end.fileno() for end in theirs])
        with (self._work / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end.fileno() for end in theirs],
            )
        for end in theirs:
            end.close()
        self._control = ours[0]
        self.stdout, self.stderr = (Stream(port, self._end) for port in ours[1:])

    def _qemu_command(self, boot: kernel.Boot, ports: Sequence[int]) -> list[str]:
        pmem = [(self._pmem_file, self._pmem_size)]
        pmem += [(path, _size_of(path)) for path in self._more_pmem]
        total = self._memory + sum(size for _, size in pmem)
        command = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
        command += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]
        command += ["-machine", "q35,nvdimm=on", "-nodefaults", "-no-user-config", "-no-reboot"]
        command += ["-m", f"{self._memory // MIB}M,slots={len(pmem)},maxmem={total // MIB}M"]
        for number, (path, size) in enumerate(pmem):
            file = f"mem-path={_escaped(path)},size={size},share=on,pmem=off"
            command += ["-object", f"memory-backend-file,id=pmem{number},{file}"]
            command += ["-device", f"nvdimm,memdev=pmem{number},unarmed=off"]
        command += ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd)]
        command += ["-append", f'{_KERNEL_OPTIONS} "WORK={self._work}"', "-display", "none"]
        command += ["-chardev", f"file,id=console,path={_escaped(self._console)}"]
        command += ["-serial", "chardev:console"]
        # Without ioeventfd a write of the guest returns when it is in our socket: a line that is
        # not here at a power cut was not written.
        command += ["-device", "virtio-serial-pci,ioeventfd=off"]
        for number, descriptor in enumerate(ports, 1):
            command += ["-chardev", f"socket,id=port{number},fd={descriptor}"]
            command += ["-device", f"virtserialport,chardev=port{number},nr={number}"]
        command += _shared("host", Path("/"), ",readonly=on")
        if self._share is not None:
            command += _shared("share", self._share)
        return command

    def _join_streams(self) -> None:
        for stream in (self.stdout, self.stderr):
            stream.join()

    @property
    def _console(self) -> Path:
        return self._work / "console.log"

    def _next_word(self, deadline: float | None, what: str) -> str:
        """The next line of the guest's init; `what` is the complaint if it comes too late."""
        if self._control is None:
            raise VmError("the VM was not started")
        while b"\n" not in self._said:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self._control.settimeout(left)
            try:
                data = self._control.recv(4096)
            except TimeoutError as late:
                raise TimePassed(f"{what} in time") from late
            except ConnectionError:
                data = b""
            if not data:
                raise VmError(f"the VM died: {self._last_words()}")
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode(errors="replace")

    def _last_words(self) -> str:
        """Why QEMU ended: what it or the guest's kernel said last."""
        assert self._qemu is not None
        status = self._qemu.wait()
        if status == -signal.SIGKILL:
            return "it was killed"
        for log in (self._work / "qemu.log", self._console):
            lines = log.read_text(errors="replace").split("\n") if log.exists() else []
            if said := [line.strip() for line in lines if line.strip()]:
                return next((line for line in said if "panic" in line), said[-1])
        return f"QEMU ended with status {status}"


def _size_of(pmem_file: Path) -> int:
    try:
        return pmem_file.stat().st_size
    except OSError as error:
        raise VmError(f"no filesystem to keep: {pmem_file}: {error.strerror}") from error


def _escaped(path: Path) -> str:
    """For QEMU's options, in which a comma separates."""
    return str(path).replace(",", ",,")


def _shared(tag: str, directory: Path, more: str = "") -> list[str]:
    options = f"mount_tag={tag},security_model=passthrough,multidevs=remap{more}"
    return ["-virtfs", f"local,path={_escaped(directory)},{options}"]
