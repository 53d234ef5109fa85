"""Copies a file to another, past the page cache, over and over: SOURCE TARGET BYTES_PER_S."""

import mmap
import os
import sys
import time

MIB = 1 << 20


def open_direct(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_RDONLY)  # a tmpfs of an older kernel has nothing to go past


def main() -> None:
    source, target, bytes_per_s = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from_fd = open_direct(source)
    to_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    size = os.fstat(from_fd).st_size
    os.posix_fallocate(to_fd, 0, size)
    block = mmap.mmap(-1, MIB)  # as O_DIRECT wants it: aligned to a page
    free_at = time.monotonic()
    while True:
        for at in range(0, size, MIB):
            os.preadv(from_fd, [block], at)
            os.pwritev(to_fd, [block], at)
            if bytes_per_s:
                free_at = max(free_at + MIB / bytes_per_s, time.monotonic() - 0.1)
                time.sleep(max(0.0, free_at - time.monotonic()))


if __name__ == "__main__":
    main()
