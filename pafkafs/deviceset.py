"""Who the devices are: recognising, forming and locking the set that belongs together.

Each device has a record, pafkafs.json; that of the first fast device also lists all members.
A set is formed in an order that can be cut anywhere: first the list of members, marked as
forming, with those that have no record yet, then each member's own record, then the mark is
removed.  A mount that finds the mark goes on where the first one stopped.  Later changes, a device
that joins or is elsewhere, are written in the same way; the devices that had a record are needed
then as ever.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pafkafs import layout
from pafkafs.errors import PafkafsError
from pafkafs.placement import tier_name

FORMAT = 1
# A daemon that was killed holds its locks until the last of its threads has ended.
_LOCK_PATIENCE_S = 2.0
_LOCK_POLL_S = 0.05
_IGNORED_ENTRIES = {"lost+found"}  # every new ext4 has one
# What a mount that was killed leaves where it wrote a record or looked whether it may.
_OWN_TEMPORARY = re.compile(r"\.pafkafs(\.json\.|-)[0-9a-f]{8}")


@dataclass(frozen=True)
class Member:
    """A device as its record and the list of members have it.

    earlier are the paths it was mounted at before: stubs may still have them.
    """

    device: str
    tier: int
    index: int
    path: str
    earlier: tuple[str, ...] = ()

    def at(self, path: str) -> "Member":
        """The same device, mounted at path now."""
        if path == self.path:
            return self
        earlier = tuple(p for p in (*self.earlier, self.path) if p != path)
        return replace(self, path=path, earlier=earlier)


@dataclass(frozen=True)
class Record:
    """pafkafs.json.  members is empty on all but the first fast device.

    unformed are ids of members that had no record when forming began: no file is on them.
    """

    format: int
    set: str
    member: Member
    members: tuple[Member, ...] = ()
    forming: bool = False
    unformed: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetDevice:
    """A device that was recognised, opened and locked."""

    member: Member
    fd: int

    @property
    def path(self) -> bytes:
        """Where it is now."""
        return os.fsencode(self.member.path)

    @property
    def all_paths(self) -> tuple[bytes, ...]:
        """Where its stubs may say that it is."""
        return tuple(map(os.fsencode, (self.member.path, *self.member.earlier)))


def parse_record(text: bytes) -> Record:
    """The record in a pafkafs.json; ValueError when it is not one."""
    try:
        raw: Any = json.loads(text)
        record = Record(
            format=raw["format"],
            set=raw["set"],
            member=_member(raw["member"]),
            members=tuple(_member(member) for member in raw["members"]),
            forming=raw["forming"],
            unformed=tuple(raw.get("unformed", ())),
        )
    except (TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a device record: {error}") from error
    _check_types(record)
    return record


def _member(raw: Any) -> Member:
    return Member(**{**raw, "earlier": tuple(raw["earlier"])})


def _check_types(record: Record) -> None:
    for member in (record.member, *record.members):
        good = (
            isinstance(member.device, str)
            and len(member.device) == 8
            and isinstance(member.tier, int)
            and isinstance(member.index, int)
            and isinstance(member.path, str)
            and all(isinstance(path, str) for path in member.earlier)
        )
        if not good:
            raise ValueError("not a device record: a member has fields of the wrong type")
    good = (
        isinstance(record.set, str)
        and isinstance(record.forming, bool)
        and all(isinstance(device, str) for device in record.unformed)
    )
    if not good:
        raise ValueError("not a device record: fields of the wrong type")


def read_record(fd: int, path: str) -> Record | None:
    """The record of the device open at fd; None when it is new."""
    try:
        record_fd = os.open(layout.RECORD, layout.LOOKING, dir_fd=fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PafkafsError(f"cannot read {path}/{layout.RECORD}: {error.strerror}") from error
    with os.fdopen(record_fd, "rb") as stream:
        text = stream.read(1 << 20)
    try:
        record = parse_record(text)
    except ValueError as error:
        raise PafkafsError(
            f"{path}/{layout.RECORD} is damaged ({error}); restore it from a backup of the "
            "device, do not delete it: the files on the other devices depend on it"
        ) from error
    if record.format != FORMAT:
        raise PafkafsError(
            f"{path} has format {record.format}, this pafkafs knows {FORMAT}: use a newer pafkafs"
        )
    return record


def owner(fd: int) -> int:
    """The uid of whose set the device open at fd is of: of who wrote its record.  Others cannot
    mount it, and what they have there in the place of its own directories is none."""
    record_fd = os.open(layout.RECORD, layout.LOOKING, dir_fd=fd)
    try:
        return os.fstat(record_fd).st_uid
    finally:
        os.close(record_fd)


def write_record(fd: int, record: Record) -> None:
    """Replaces the record durably: after a crash it is the old or the new one."""
    text = json.dumps(asdict(record), indent=2).encode() + b"\n"
    temporary = f".{layout.RECORD}.{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=fd), "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, layout.RECORD, src_dir_fd=fd, dst_dir_fd=fd)
    os.fsync(fd)


@contextmanager
def _using(path: str, role: str) -> Iterator[None]:
    """What a device answers is told with its name."""
    try:
        yield
    except OSError as error:
        raise PafkafsError(
            f"cannot use the {role} device {path}: {error.strerror}; check it: dmesg, df {path}"
        ) from error


def open_device(path: str, role: str) -> int:
    """Opens and locks a device's directory, for as long as the descriptor is open."""
    fd = open_unlocked(path, role)
    try:
        if not _lock(fd):
            raise PafkafsError(
                f"the {role} device {path} is in use by another pafkafs; see pafkafs status"
            )
    except OSError as error:
        os.close(fd)
        raise PafkafsError(f"cannot lock the {role} device {path}: {error.strerror}") from error
    except PafkafsError:
        os.close(fd)
        raise
    return fd


def _lock(fd: int) -> bool:
    until = time.monotonic() + _LOCK_PATIENCE_S
    while not try_lock(fd):
        if time.monotonic() > until:
            return False
        time.sleep(_LOCK_POLL_S)
    return True


def try_lock(fd: int) -> bool:
    """Locks a device; False when somebody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_unlocked(path: str, role: str) -> int:
    """Opens a device's directory."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PafkafsError(
            f"the {role} device {path} does not exist: mount it, or create the directory"
        ) from None
    except NotADirectoryError:
        raise PafkafsError(f"the {role} device {path} is not a directory") from None
    except OSError as error:
        raise PafkafsError(f"cannot open the {role} device {path}: {error.strerror}") from error


def check_writable(fd: int, path: str, role: str) -> None:
    """Refuses a device where nothing can be written, before anything is changed."""
    try:
        probe = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise PafkafsError(
                f"cannot write to the {role} device {path}: {error.strerror}"
            ) from error
        return _check_by_file(fd, path, role)  # NFS and FUSE have no O_TMPFILE
    os.close(probe)


def _check_by_file(fd: int, path: str, role: str) -> None:
    name = f".pafkafs-{secrets.token_hex(4)}"
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd))
        os.unlink(name, dir_fd=fd)
    except OSError as error:
        raise PafkafsError(f"cannot write to the {role} device {path}: {error.strerror}") from error


def check_new(fd: int, path: str, role: str, adopting: frozenset[str]) -> None:
    """A device without a record must be empty: nobody's data is taken over by mistake."""
    found = [
        name
        for name in os.listdir(fd)
        if name not in _IGNORED_ENTRIES | adopting and _OWN_TEMPORARY.fullmatch(name) is None
    ]
    if found:
        advice = (
            "for an existing Kafka log directory see pafkafs adopt --help"
            if role == "fast"
            else "give an empty directory"
        )
        raise PafkafsError(
            f"the {role} device {path} is not empty and was not made by pafkafs "
            f"(it has '{sorted(found)[0]}'); {advice}"
        )


@dataclass(frozen=True)
class Adoption:
    """What an adoption asks for: entries that a new fast device may have; and mark, which is called
    with the first fast device when all devices have passed, before anything is changed."""

    entries: frozenset[str]
    mark: Callable[[int], None]


def assemble(
    tiers: Sequence[Sequence[str]], *, adopting: Adoption | None = None
) -> list[SetDevice]:
    """Opens, locks and checks the devices of a mount, given by tier from the fast one to the slow
    one; forms the set when they are new.

    adopting is None for a mount.  Nothing is changed unless all devices pass.  Raises
    PafkafsError.
    """
    with _opened(tiers, open_device) as (wanted, fds):
        return _recognise(wanted, fds, adopting)


def recognise(tiers: Sequence[Sequence[str]]) -> tuple[list[SetDevice], bool]:
    """Opens the devices of a set that was formed, and changes nothing; and whether they are in
    use by another pafkafs.  If not, they are locked, for as long as they are open.  Raises
    PafkafsError.
    """
    with _opened(tiers, open_unlocked) as (wanted, fds):
        members = _members_of(wanted, fds)
        in_use = not all(map(try_lock, fds))
    if in_use:
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_UN)
    return [SetDevice(member, fd) for member, fd in zip(members, fds, strict=True)], in_use


@contextmanager
def _opened(
    tiers: Sequence[Sequence[str]], open_one: Callable[[str, str], int]
) -> Iterator[tuple[list[tuple[int, int, str]], list[int]]]:
    """The devices with their places, as tier, index and path, and their descriptors, which are
    closed only when that fails for which they are opened."""
    wanted = [(t, i, path) for t, tier in enumerate(tiers) for i, path in enumerate(tier)]
    _check_distinct([path for _, _, path in wanted])
    fds: list[int] = []
    try:
        for tier, _, path in wanted:
            fds.append(open_one(path, _name(tier, wanted)))
        yield wanted, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def last_path(device: SetDevice) -> str:
    """Where a device was at its last mount, as its stubs say."""
    record = read_record(device.fd, device.member.path)
    assert record is not None
    return record.member.path


def _members_of(wanted: list[tuple[int, int, str]], fds: list[int]) -> list[Member]:
    records = [read_record(fd, path) for (_, _, path), fd in zip(wanted, fds, strict=True)]
    for (tier, _, path), record in zip(wanted, records, strict=True):
        if record is None:
            raise PafkafsError(
                f"the {_name(tier, wanted)} device {path} has no {layout.RECORD}: it is none of a "
                "set that was mounted"
            )
    home = records[0]
    assert home is not None
    _check_first(home, wanted)
    if home.forming:
        raise PafkafsError(f"the set of {wanted[0][2]} is only half formed: mount it once")
    return _match_members(home, wanted, records)


def _recognise(
    wanted: list[tuple[int, int, str]], fds: list[int], adopting: Adoption | None
) -> list[SetDevice]:
    records: list[Record | None] = []
    for (tier, _, path), fd in zip(wanted, fds, strict=True):
        with _using(path, _name(tier, wanted)):
            records.append(_examine(fd, path, tier, _name(tier, wanted), adopting))
    home = records[0]
    if home is None:
        _check_all_new(wanted, records)
        members = [Member(secrets.token_hex(4), t, i, p) for t, i, p in wanted]
        home = Record(FORMAT, secrets.token_hex(8), members[0], tuple(members), forming=True)
    else:
        _check_first(home, wanted)
        members = _match_members(home, wanted, records)
    if adopting is not None:
        with _using(wanted[0][2], _name(0, wanted)):
            adopting.mark(fds[0])
    return _form(home, members, records, fds)


def _examine(fd: int, path: str, tier: int, role: str, adopting: Adoption | None) -> Record | None:
    """The record of a device that may be mounted; None when it is new."""
    record = read_record(fd, path)
    if adopting is None and tier == 0 and layout.exists(layout.ADOPTING, fd):
        raise PafkafsError(
            f"a log directory is only half adopted into {path}: "
            "run the same pafkafs adopt command again, it goes on where it stopped"
        )
    if record is None:
        check_new(fd, path, role, adopting.entries if tier == 0 and adopting else frozenset())
    check_writable(fd, path, role)
    return record


def _name(tier: int, wanted: list[tuple[int, int, str]]) -> str:
    return tier_name(tier, wanted[-1][0])


def _check_first(home: Record, wanted: list[tuple[int, int, str]]) -> None:
    if not home.members:
        raise PafkafsError(
            f"{wanted[0][2]} is not the first fast device of its set; "
            "give the fast devices in the order of the first mount"
        )


def _check_distinct(paths: Sequence[str]) -> None:
    real = {path: Path(os.path.realpath(path)) for path in paths}
    if len(set(real.values())) < len(paths):
        raise PafkafsError("the same directory was given twice: each device needs its own")
    for path in paths:
        for other in paths:
            if path != other and real[other].is_relative_to(real[path]):
                raise PafkafsError(f"the device {other} is inside the device {path}")


def _check_all_new(wanted: list[tuple[int, int, str]], records: list[Record | None]) -> None:
    for (tier, _, path), record in zip(wanted, records, strict=True):
        if record is not None:
            raise PafkafsError(
                f"the {_name(tier, wanted)} device {path} belongs to a set whose first fast device "
                f"is not {wanted[0][2]}, which is new; mount the right fast device"
            )


def _match_members(
    home: Record, wanted: list[tuple[int, int, str]], records: list[Record | None]
) -> list[Member]:
    """The members in the order they were given; new devices join at the end of their tier."""
    members: list[Member] = []
    _check_tiers(home, wanted)
    for (tier, index, path), record in zip(wanted, records, strict=True):
        expected = next((m for m in home.members if (m.tier, m.index) == (tier, index)), None)
        if record is None:
            if expected is not None and expected.device not in home.unformed:
                raise PafkafsError(
                    f"{path} is new, but the set needs its {_name(tier, wanted)} device "
                    f"{expected.device}, last at {expected.path}; mount that one there"
                )
            # Not the id of an unformed one: that may be on a disk that is away just now.
            members.append(Member(secrets.token_hex(4), tier, index, path))
            continue
        if record.set != home.set:
            raise PafkafsError(f"{path} belongs to another set of devices than {wanted[0][2]}")
        if record.member.tier != tier:
            raise PafkafsError(
                f"{path} is a {tier_name(record.member.tier, wanted[-1][0])} device of its set, "
                f"but was given as {_name(tier, wanted)}: swap the arguments"
            )
        members.append(record.member.at(path))
    _check_none_missing(home, members)
    return members


def _check_tiers(home: Record, wanted: list[tuple[int, int, str]]) -> None:
    formed, given = max(m.tier for m in home.members) + 1, wanted[-1][0] + 1
    if formed != given:
        raise PafkafsError(
            f"the set of {wanted[0][2]} has {formed} tiers, and {given} were given: their number "
            "stays what it was at the first mount"
        )


def _check_none_missing(home: Record, members: list[Member]) -> None:
    given = {member.device for member in members}
    for member in home.members:
        if member.device not in given and member.device not in home.unformed:
            name = tier_name(member.tier, members[-1].tier)
            raise PafkafsError(
                f"the {name} device {member.device}, last at {member.path}, "
                "is missing: give all devices of the set"
            )
    if members[0].index != 0:
        raise PafkafsError("the first fast device must be given first")


def _remove_temporaries(fd: int) -> None:
    for name in os.listdir(fd):
        if _OWN_TEMPORARY.fullmatch(name) is not None:
            os.unlink(name, dir_fd=fd)


def _form(
    home: Record, members: list[Member], records: list[Record | None], fds: list[int]
) -> list[SetDevice]:
    """Writes what is new or has moved, in the order that survives a crash."""
    formed = replace(home, member=members[0], members=tuple(members), forming=False, unformed=())
    if records[0] != formed:
        unformed = tuple(m.device for m, r in zip(members, records, strict=True) if r is None)
        roles = [tier_name(member.tier, members[-1].tier) for member in members]
        devices = list(zip(members, roles, fds, strict=True))
        for member, role, fd in devices:
            with _using(member.path, role):
                _remove_temporaries(fd)
        with _using(members[0].path, roles[0]):
            write_record(fds[0], replace(formed, forming=True, unformed=unformed))
        for (member, role, fd), record in zip(devices[1:], records[1:], strict=True):
            mine = Record(FORMAT, home.set, member)
            if record != mine:
                with _using(member.path, role):
                    write_record(fd, mine)
        with _using(members[0].path, roles[0]):
            write_record(fds[0], formed)
    return [SetDevice(member, fd) for member, fd in zip(members, fds, strict=True)]
