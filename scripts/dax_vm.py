"""Runs a command in a VM with persistent memory, as if it ran here: its output, its status."""

import argparse
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

from daxvm.errors import TimePassed, VmError
from daxvm.stream import Stream
from daxvm.vm import GIB, MIB, Vm

TIMEOUT_STATUS = 124
VM_FAILED_STATUS = 125
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
DESCRIPTION = """\
Runs a command in a VM with ext4 on DAX persistent memory at /pmem (also in $PAFKAFS_DAX). The
guest's root is the host's; what the command writes elsewhere than to /pmem and the shared
directory is gone afterwards. Killing this program, or QEMU, is a power cut for the guest."""
EPILOG = f"""\
The status is the command's; {TIMEOUT_STATUS} after --timeout, {VM_FAILED_STATUS} when the VM itself
failed (with a line that says why), 2 for wrong usage."""


def main() -> int:
    options = parse()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, leave)
    try:
        return run(options)
    except TimePassed as late:
        print(f"dax-vm: {late}", file=sys.stderr)
        return TIMEOUT_STATUS
    except VmError as failure:
        print(f"dax-vm: {failure}", file=sys.stderr)
        return VM_FAILED_STATUS


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dax-vm", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--pmem-file", type=Path, metavar="F", help="holds the persistent memory; is not removed")
    add("--pmem-size", type=size, default=GIB, metavar="SIZE", help="like 512MiB; default 1GiB")
    add("--keep-filesystem", action="store_true", help="mount what is on the pmem file")
    more = (
        "filled by another VM: its filesystem is mounted at /pmem1, the next one's at /pmem2, ..."
    )
    add("--more-pmem", type=Path, action="append", default=[], metavar="F", help=more)
    add("--share", type=Path, metavar="DIR", help="a directory the guest can write to")
    add("--memory", type=size, default=4 * GIB, metavar="SIZE", help="of the guest; default 4GiB")
    add("--timeout", type=float, metavar="S", help="seconds the command may take")
    add("command", nargs=argparse.REMAINDER, metavar="CMD [ARG...]")
    options = parser.parse_args()
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("a command is needed")
    if options.keep_filesystem and not options.pmem_file:
        parser.error("--keep-filesystem needs --pmem-file")
    if options.more_pmem and not options.keep_filesystem:
        parser.error("--more-pmem needs --keep-filesystem")
    if options.share and not options.share.is_dir():
        parser.error(f"--share: {options.share} is no directory")
    return options


def size(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size like 512MiB or 2GiB")
    return int(match[1]) * {"MiB": MIB, "GiB": GIB}[match[2]]


def leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that what is temporary is removed."""
    raise SystemExit(128 + signal_number)


def run(options: argparse.Namespace) -> int:
    broken = threading.Event()
    with Vm(
        pmem_file=options.pmem_file,
        pmem_size=options.pmem_size,
        keep_filesystem=options.keep_filesystem,
        more_pmem=options.more_pmem,
        share=options.share,
        memory=options.memory,
    ) as vm:

        def copy(stream: Stream, output: BinaryIO) -> None:
            try:
                for chunk in stream.chunks():
                    output.write(chunk)
                    output.flush()
            except BrokenPipeError:  # nobody listens any more, as to `dax-vm ... | head`
                broken.set()
                vm.power_cut()

        vm.start(options.command)
        outputs = ((vm.stdout, sys.stdout.buffer), (vm.stderr, sys.stderr.buffer))
        copiers = [threading.Thread(target=copy, args=pair, daemon=True) for pair in outputs]
        for copier in copiers:
            copier.start()
        try:
            status = vm.wait(options.timeout)
        except VmError:
            if broken.is_set():
                return BROKEN_PIPE_STATUS
            raise
        finally:
            vm.power_cut()
            for copier in copiers:
                copier.join()
    return status


if __name__ == "__main__":
    sys.exit(main())
