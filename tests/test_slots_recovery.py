"""Recovery of growing files from their slots: what each step leaves for a mount after it."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import tmpfs

from pafkafs import _native, growing, opening
from pafkafs.errors import PafkafsError
from pafkafs.growing import Recovery, Slot

PAGE = 4096
WRITTEN = b"written"


class Home:
    """A fast device whose slots are opened anew by each mount."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._natives: list[_native.Device] = []

    def mounted(self) -> SimpleNamespace:
        native = _native.Device(os.dup(self.fd), slow=False, memory=True, power=False)
        native.limit_bytes = 32 << 20
        self._natives.append(native)
        device = SimpleNamespace(native=native, fd=self.fd, kind="memory", path=bytes(self.path))
        growing.open_sizes(device)
        return device

    def grown(self, name: str = "0.log", length: int = 4 * PAGE) -> Path:
        """A file that was growing when its daemon died."""
        path, device = self.path / name, self.mounted()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        number = growing.take_slot(device, fd, 0, 5)
        front, kernel = _front()
        file = front.open_growing(1, device.native, fd, number)
        file.grow(length)
        os.pwrite(fd, WRITTEN, 0)
        _set_size(self.path / "sizes", number, len(WRITTEN))
        file.close()
        del file, front
        os.close(kernel)
        assert path.stat().st_size == length
        return path

    def recovery(self) -> Recovery:
        return Recovery(self.mounted())

    def find(self, recovery: Recovery, path: Path) -> bool:
        return recovery.file_found(self.fd, path.name.encode(), path.stat().st_ino)

    def slots(self) -> int:
        return len(self.mounted().native.slots())

    def close(self) -> None:
        for native in self._natives:
            native.stop()
        os.close(self.fd)


def _front() -> tuple[_native.Front, int]:
    fuse, kernel = os.pipe()
    return _native.Front(fuse, 2), kernel


def _set_size(sizes: Path, number: int, size: int) -> None:
    with sizes.open("r+b") as file:
        file.seek(64 * number + 8)
        file.write(size.to_bytes(8, "little"))


def _set_settled(sizes: Path, number: int, size: int) -> None:
    with sizes.open("r+b") as file:
        file.seek(64 * number + 40)
        file.write(size.to_bytes(8, "little"))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with tmpfs(tmp_path / "memory", "64m") as path:
        home = Home(path)
        try:
            yield home
        finally:
            home.close()


def fail(error: int = errno.EIO):
    def failing(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return failing


def test_file_is_cut_when_it_is_found_and_its_slot_stays_until_all_is_durable(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.grown()
    recovery = home.recovery()
    monkeypatch.setattr(os, "fsync", fail())
    assert home.find(recovery, path)
    assert path.read_bytes() == WRITTEN
    assert path.stat().st_mtime_ns == 5
    assert os.listxattr(path) == []
    assert (recovery.recovered, recovery.refused, recovery.unrecovered) == (1, [], [])
    assert home.slots() == 1
    recovery.finish()
    assert home.slots() == 0


def test_slots_stay_when_what_was_recovered_cannot_be_made_durable(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.grown()
    recovery = home.recovery()
    home.find(recovery, path)
    monkeypatch.setattr(_native, "syncfs", fail())
    with pytest.raises(OSError, match="Input/output error"):
        recovery.finish()
    assert home.slots() == 1


def test_what_was_appended_after_recovery_is_never_cut(home: Home) -> None:
    path = home.grown()
    home.find(home.recovery(), path)
    with path.open("ab") as file:
        file.write(bytes(2 * PAGE - len(WRITTEN)))  # a length that it might have grown to
    later = home.recovery()  # the slots of the first one were never given back
    home.find(later, path)
    assert path.stat().st_size == 2 * PAGE
    assert (later.recovered, later.refused) == (0, [])


@pytest.mark.parametrize("length", [PAGE + 1, 2 * PAGE, 5 * PAGE])
def test_file_that_others_changed_is_told_and_never_cut(home: Home, length: int) -> None:
    path = home.grown()
    os.truncate(path, length)  # whole pages, too, by chance
    recovery = home.recovery()
    assert home.find(recovery, path)
    assert path.stat().st_size == length
    assert recovery.refused == [f"{path}: {length} bytes, {len(WRITTEN)} of ours"]
    os.truncate(path, 2 * PAGE)
    later = home.recovery()
    home.find(later, path)
    assert path.stat().st_size == 2 * PAGE
    assert later.refused == []


def test_growth_that_was_cut_anywhere_is_recovered(home: Home) -> None:
    path = home.grown()
    _set_settled(home.path / "sizes", 1, 2 * PAGE)
    for length in (2 * PAGE, 3 * PAGE, 4 * PAGE):
        os.truncate(path, length)
        assert Slot(*home.mounted().native.slots()[0]).is_ours(length)
    assert home.find(home.recovery(), path)
    assert path.read_bytes() == WRITTEN


def test_file_larger_than_a_window_does_not_grow(home: Home) -> None:
    device = home.mounted()
    fd = os.open(home.path / "large", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 5 << 30)
    number = growing.take_slot(device, fd, 5 << 30, 5)
    front, kernel = _front()
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        front.open_growing(1, device.native, fd, number)
    del front
    os.close(kernel)
    assert device.native.slots() == []


def test_file_in_a_directory_without_a_path_is_recovered_at_the_next_look(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.grown()
    recovery = home.recovery()
    monkeypatch.setattr(os, "readlink", fail(errno.ENAMETOOLONG))
    assert home.find(recovery, path)
    fd = os.open(path, os.O_RDWR)
    assert recovery.must_not_be_opened(fd)
    os.close(fd)
    recovery.finish()
    assert home.slots() == 1


@pytest.mark.parametrize("call", ["open", "getxattr", "ftruncate", "utime", "removexattr"])
def test_file_that_cannot_be_recovered_must_not_be_opened_and_keeps_its_slot(
    home: Home, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = home.grown()
    recovery = home.recovery()
    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail())
        assert home.find(recovery, path)
    assert recovery.unrecovered == [f"{path}: Input/output error"]
    with path.open("rb") as file:
        assert recovery.must_not_be_opened(file.fileno())
    recovery.finish()
    later = home.recovery()
    home.find(later, path)
    assert path.read_bytes() == WRITTEN
    with path.open("rb") as file:
        assert not later.must_not_be_opened(file.fileno())


def test_new_file_with_the_number_of_one_that_was_not_recovered_may_be_opened(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.grown()
    recovery = home.recovery()
    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", fail())
        home.find(recovery, path)
    os.removexattr(path, _native.NONCE_ATTRIBUTE)  # as another file, with the same number
    with path.open("rb") as file:
        assert not recovery.must_not_be_opened(file.fileno())


def test_file_with_the_number_of_one_that_is_gone_is_left_alone(home: Home) -> None:
    path = home.grown()
    os.setxattr(path, _native.NONCE_ATTRIBUTE, bytes(8))  # of a slot of this mount
    recovery = home.recovery()
    home.find(recovery, path)
    assert path.stat().st_size == 4 * PAGE
    assert os.getxattr(path, _native.NONCE_ATTRIBUTE) == bytes(8)
    assert (recovery.recovered, recovery.refused, recovery.unrecovered) == (0, [], [])


def test_slots_of_files_that_are_gone_are_given_back(home: Home) -> None:
    home.grown().unlink()
    recovery = home.recovery()
    recovery.finish()
    assert home.slots() == 0


def test_slot_is_given_back_once(home: Home) -> None:
    path = home.grown()
    device = home.mounted()
    recovery = Recovery(device)
    ino = path.stat().st_ino
    recovery.finish()
    numbers = {device.native.take_slot(1, 1, 0, 0) for _ in range(growing.SLOTS - 1)}
    assert len(numbers) == growing.SLOTS - 1
    recovery.file_found(home.fd, path.name.encode(), ino)  # too late: the slot is another's
    assert path.stat().st_size == 4 * PAGE
    assert len(device.native.slots()) == growing.SLOTS - 1


def test_only_files_of_slots_are_looked_at(home: Home) -> None:
    path = home.grown()
    other = home.path / "other"
    other.write_bytes(bytes(PAGE))
    recovery = home.recovery()
    assert recovery.pending(path.stat().st_ino)
    assert not recovery.pending(other.stat().st_ino)
    assert not home.find(recovery, other)


def test_who_meets_a_file_while_another_thread_recovers_it_waits(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.grown()
    recovery = home.recovery()
    ino, truncate = path.stat().st_ino, os.ftruncate
    entered, go_on = threading.Event(), threading.Event()

    def slow(fd: int, length: int) -> None:
        entered.set()
        go_on.wait()
        truncate(fd, length)

    monkeypatch.setattr(os, "ftruncate", slow)
    found: list[tuple[bool, int]] = []

    def meet() -> None:
        again = not recovery.pending(ino) or home.find(recovery, path)
        found.append((again, path.stat().st_size))

    threads = [threading.Thread(target=meet) for _ in range(2)]
    threads[0].start()
    entered.wait()
    threads[1].start()
    threads[1].join(0.3)  # it has ended by then, if it does not wait
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [(True, len(WRITTEN))] * 2
    assert recovery.recovered == 1


def test_slots_that_cannot_be_read_fail_the_mount_with_one_line(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.grown()
    opened = growing.open_sizes

    def open_and_break(device: SimpleNamespace) -> None:
        opened(device)
        os.truncate(home.path / "sizes", PAGE)  # what is behind is a SIGBUS, as a bad page is

    device = home.mounted()
    device.native = _native.Device(os.dup(home.fd), slow=False, memory=True, power=False)
    monkeypatch.setattr(growing, "open_sizes", open_and_break)
    with pytest.raises(PafkafsError, match=r"cannot use .*/sizes.*Input/output error") as raised:
        opening.open_sizes(device, grows=True)
    assert "\n" not in str(raised.value)
    device.native.stop()
