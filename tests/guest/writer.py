"""Runs in the VM: checks what earlier writes left after a power cut, and goes on writing until the
next one.

    python writer.py SEED [MEMORY…]

What is on each MEMORY is only checked, `checked` after each; then, on /pmem, it goes on.
Each line on standard output acknowledges one write of `NAME` that has returned: `NAME OFFSET LEN`.
The bytes of a file follow from its name and their offsets.
"""

import os
import random
import sys
import zlib
from pathlib import Path

from mounting import MOUNTPOINT, mount

from pafkafs.commands.umount import unmount

PARTITIONS = 4
SEGMENT_BYTES = 3_000_000
BATCH_MAX = 40_000


def pattern(name: str, offset: int, length: int) -> bytes:
    """What a file of this name has there."""
    seed = zlib.crc32(name.encode())
    unit = b"".join(((seed + 8 * i) & (2**64 - 1)).to_bytes(8, "little") for i in range(1009))
    start = offset % len(unit)
    return (unit * ((start + length) // len(unit) + 1))[start : start + length]


def report_what_is_there() -> None:
    """`found NAME SIZE`, or `damaged NAME …`, for each file."""
    for path in sorted(MOUNTPOINT.glob("*/*.log")):
        name = str(path.relative_to(MOUNTPOINT))
        content = path.read_bytes()
        if len(content) != path.stat().st_size or content != pattern(name, 0, len(content)):
            print(f"damaged {name} {len(content)} {path.stat().st_size}", flush=True)
        print(f"found {name} {len(content)}", flush=True)


def write_until_cut(seed: int) -> None:
    """Appends to the active segments of some partitions, rolls them, deletes old ones."""
    choose = random.Random(seed)
    active: dict[int, tuple[str, int, int]] = {}
    while True:
        partition = choose.randrange(PARTITIONS)
        name, fd, size = active.get(partition, ("", -1, SEGMENT_BYTES))
        if size >= SEGMENT_BYTES:
            if fd >= 0 and choose.random() < 0.2:
                print(f"removing {name}", flush=True)
                (MOUNTPOINT / name).unlink()  # while it grows
            if fd >= 0:
                os.close(fd)
            directory = MOUNTPOINT / f"topic-{partition}"
            directory.mkdir(exist_ok=True)
            name = f"{directory.name}/{choose.getrandbits(60):020}.log"
            fd, size = os.open(MOUNTPOINT / name, os.O_RDWR | os.O_CREAT | os.O_EXCL), 0
            print(f"made {name}", flush=True)
            for old in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime)[:-3]:
                print(f"removing {directory.name}/{old.name}", flush=True)
                old.unlink()
        length = choose.randrange(1, BATCH_MAX)
        os.write(fd, pattern(name, size, length))
        os.write(1, b"acked %s %d %d\n" % (name.encode(), size, length))
        active[partition] = (name, fd, size + length)


def main() -> None:
    seed, *memories = sys.argv[1:]
    for memory in memories:
        mount(Path(memory), MOUNTPOINT)
        report_what_is_there()
        print("checked", flush=True)
        unmount(str(MOUNTPOINT), lazy=False)
    mount(Path("/pmem"), MOUNTPOINT)
    report_what_is_there()
    print("checked", flush=True)
    write_until_cut(int(seed))


main()
