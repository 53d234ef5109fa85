"""Segments that are read heavily: they stay a little longer, and status says so."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from conftest import MakeMount
from filetools import MIB, Background, is_spilled
from harness import Mount, wait_until

from pafkafs.catalogue import Catalogue, Place
from pafkafs.policy import Rules
from pafkafs.reading import HEAVY_BYTES_PER_S, ReadersFirst

NOTE = "segments that stay while they are read heavily: 1"


def old_segments(mount: Mount) -> tuple[Path, Path]:
    """Two sealed segments; nothing makes them go yet."""
    directory = mount.mountpoint / "topic-0"
    directory.mkdir()
    paths = directory / f"{0:020}.log", directory / f"{1:020}.log"
    for path in paths:
        path.write_bytes(os.urandom(4 * MIB))
    (directory / f"{2:020}.log").touch()
    return paths


@contextmanager
def read_heavily(path: Path) -> Iterator[Background]:
    """Reads it again and again, past the page cache."""
    ended, warm = Event(), Event()

    def read() -> None:
        buffer = mmap.mmap(-1, MIB)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        done = 0
        while not ended.is_set():
            done += os.preadv(fd, [buffer], done % (4 * MIB))
            if done >= 2 * HEAVY_BYTES_PER_S:
                warm.set()
        os.close(fd)

    reader = Background(read)
    try:
        assert warm.wait(60), "the reader does not get on"
        yield reader
    finally:
        ended.set()
        reader.join()


def notes(mount: Mount) -> list[str]:
    found: list[str] = mount.status()["migration"]["notes"]
    return found


def make_old(*paths: Path) -> None:
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))


def test_segment_that_is_read_heavily_stays_while_others_go_and_status_says_so(
    make_mount: MakeMount,
) -> None:
    mount = make_mount("--interval", "100ms", "--max-age", "1h", "--read-wait", "1h").start()
    read, other = old_segments(mount)
    with read_heavily(read):
        make_old(read, other)
        wait_until(lambda: is_spilled(mount, other), "the other one to go down")
        wait_until(lambda: any(NOTE in note for note in notes(mount)), "the note in status")
        assert not is_spilled(mount, read)
    wait_until(lambda: is_spilled(mount, read), "it to go when it is read no more", 60)
    assert notes(mount) == []


def test_segment_does_not_stay_for_its_readers_longer_than_read_wait(make_mount: MakeMount) -> None:
    mount = make_mount("--interval", "100ms", "--max-age", "1h", "--read-wait", "1s").start()
    read, other = old_segments(mount)
    with read_heavily(read) as reader:
        make_old(read, other)
        wait_until(lambda: is_spilled(mount, read), "it to go down")
        assert reader.running


def test_segment_that_is_read_goes_when_the_fast_tier_is_nearly_full(make_mount: MakeMount) -> None:
    mount = make_mount(
        *("--interval", "100ms", "--max-age", "1h", "--read-wait", "1h"),
        *("--fast-capacity", "64MiB", "--threshold", "-1"),
    ).start()
    read, other = old_segments(mount)
    filler = mount.mountpoint / "filler"
    with read_heavily(read):
        filler.write_bytes(bytes(53 * MIB + MIB // 2))
        make_old(read)
        wait_until(lambda: is_spilled(mount, read), "it to go down")
    assert not is_spilled(mount, other)


def test_wait_for_readers_is_bounded_from_when_it_began() -> None:
    catalogue = Catalogue([0, 1], Rules(), 1, 0.0)
    directory = catalogue.directory(2, catalogue.root, b"topic-0")
    catalogue.put(directory, b"%020d.log" % 0, Place(0, 4096, 0))
    entry, readers = directory.segments[0], ReadersFirst()
    waited = [readers.wait_s(entry, HEAVY_BYTES_PER_S, now, 12.0) for now in (100, 105, 110, 112)]
    assert waited == [5.0, 5.0, 2.0, 0.0]
    assert readers.wait_s(entry, HEAVY_BYTES_PER_S, 113, 12.0) == 0.0
    assert readers.wait_s(entry, HEAVY_BYTES_PER_S - 1, 100, 12.0) == 0.0
    assert readers.wait_s(entry, HEAVY_BYTES_PER_S, 100, 0.0) == 0.0
