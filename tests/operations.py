"""The operations that change a device, each small: what campaigns of faults run.

`prepare` makes what is there before, once; `begin` does what has to be done by the daemon that is
hit; `act` is hit; `settled` tells when what `act` has left to the background is done.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

from steps import KAFKA, Entry, Scene, as_user

MISSES_MAX = 3
KIB = 1 << 10
MIB = 1 << 20

Act = Callable[[Scene], None]
NO_MOVES = ("--threshold", "-1")
SMALL = (*NO_MOVES, "--fast-capacity", "2MiB")
GROWING = (*NO_MOVES, "--pmem", "on", "--fast-capacity", "128MiB", "--pool-ratio", "0.04")
POOLED = 2  # files that this ratio makes


def nothing(scene: Scene) -> None:
    pass


@dataclass(frozen=True)
class Operation:
    name: str
    act: Act
    prepare: Act
    begin: Act
    recover: Act
    settled: Callable[[Scene], bool]
    options: tuple[str, ...]
    mounts: bool  # what is hit is a command, not a daemon that serves

    def __str__(self) -> str:
        return self.name


OPERATIONS: list[Operation] = []


def operation(
    *,
    prepare: Act = nothing,
    begin: Act = nothing,
    recover: Act = Scene.start,
    settled: Callable[[Scene], bool] = Scene.is_tidy,
    options: tuple[str, ...] = NO_MOVES,
    mounts: bool = False,
) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        OPERATIONS.append(
            Operation(act.__name__, act, prepare, begin, recover, settled, options, mounts)
        )
        return act

    return register


def run_all(calls: int, sample: int | None, turn: int, hit: Callable[[int], bool]) -> int:
    """Has hit called for all calls, or for some that differ from turn to turn; how many times it
    was true.  A run may make some calls more than the one that was counted, or less."""
    if calls == 0:
        return 0
    if sample is not None:
        numbers = {1 + (turn * 5 + i * calls // sample) % calls for i in range(sample)}
        return sum(map(hit, sorted(numbers)))
    hits, missed = 0, 0
    for which in count(1):
        missed = 0 if hit(which) else missed + 1
        hits += not missed
        if missed == MISSES_MAX:
            break
    return hits


def segment(number: int, directory: str = "t-0") -> str:
    return f"{directory}/{number:020}.log"


def data(size: int, seed: int = 1) -> bytes:
    """Bytes that differ from place to place."""
    return bytes((seed * 7 + i * 31 + (i >> 8)) & 0xFF for i in range(size))


# -- what is there before -----------------------------------------------------------------------


def topic(scene: Scene) -> None:
    scene.mkdir("t-0")


def two_segments(scene: Scene) -> None:
    topic(scene)
    scene.make(segment(0), data(10_000))
    scene.make(segment(10), data(300, 2))


def demoted(scene: Scene) -> None:
    two_segments(scene)
    scene.move(segment(0), "slow")


def two_demoted(scene: Scene) -> None:
    demoted(scene)
    scene.make(segment(20))
    scene.move(segment(10), "slow")


def full(scene: Scene) -> None:
    """No room for a new segment on the fast tier."""
    topic(scene)
    with scene.created("t-0/filler") as fd:
        for number in range(23):
            scene.append("t-0/filler", data(64 * KIB, number), fd)


def almost_full(scene: Scene) -> None:
    topic(scene)
    scene.make(segment(0), data(64 * KIB))
    with scene.created("t-0/filler") as fd:
        for number in range(21):
            scene.append("t-0/filler", data(64 * KIB, number), fd)


# -- files on the fast tier ---------------------------------------------------------------------


@operation(prepare=topic)
def create(scene: Scene) -> None:
    scene.make(segment(0), data(5000))
    scene.make("t-0/leader-epoch-checkpoint", data(20), 0o600)


@operation(prepare=two_segments)
def append(scene: Scene) -> None:
    with scene.opened(segment(10)) as fd:
        scene.append(segment(10), data(20_000), fd)
        scene.append(segment(10), data(1), fd)
        scene.sync(fd)
        scene.append(segment(10), data(4096), fd)


@operation(prepare=two_segments)
def truncate(scene: Scene) -> None:
    scene.truncate(segment(0), 4097)
    scene.truncate(segment(0), 20_000)


@operation(prepare=two_segments)
def unlink(scene: Scene) -> None:
    scene.remove(segment(0))
    with scene.opened(segment(10)) as fd:
        scene.remove(segment(10))
        os.pwrite(fd, b"unseen", 0)
        os.fsync(fd)


@operation()
def directories(scene: Scene) -> None:
    scene.mkdir("t-1")
    scene.mkdir("t-1/deeper")
    scene.remove("t-1/deeper")
    scene.remove("t-1")


@operation(prepare=two_segments)
def links(scene: Scene) -> None:
    text = "t-0"
    scene.model.step(
        lambda: scene.path("link").symlink_to(text),
        {"link": Entry("symlink", text.encode(), 0o777)},
        torn=None,
    )
    entry = scene.model.state[segment(0)]
    scene.model.step(
        lambda: os.link(scene.path(segment(0)), scene.path("second")),
        {"second": entry},
        torn=None,
    )
    scene.remove("link")
    scene.remove(segment(0))


@operation(prepare=two_segments)
def rename(scene: Scene) -> None:
    scene.rename(segment(0), segment(0) + ".deleted")
    scene.make("t-0/checkpoint.tmp", data(50))
    scene.make("t-0/checkpoint", data(60))
    scene.rename("t-0/checkpoint.tmp", "t-0/checkpoint")
    scene.rename("t-0", "t-0.0123456789abcdef-delete")


@operation(prepare=two_segments)
def attributes(scene: Scene) -> None:
    set_attributes(scene, segment(0))


def set_attributes(scene: Scene, name: str) -> None:
    path, entry = scene.path(name), scene.model.state[name]
    entry = replace(entry, mode=0o400)
    scene.model.step(lambda: path.chmod(0o400), {name: entry}, torn=None)
    entry = replace(entry, mtime_ns=10**18 + 7)
    scene.model.step(lambda: os.utime(path, ns=(10**18, 10**18 + 7)), {name: entry}, torn=None)
    entry = replace(entry, owner=KAFKA + 1)

    def change_owner() -> None:
        with as_user(0):
            os.chown(path, KAFKA + 1, -1)

    scene.model.step(change_owner, {name: entry}, torn=None)


# -- files on the slow tier ---------------------------------------------------------------------


@operation(prepare=full, options=SMALL)
def create_on_slow_tier(scene: Scene) -> None:
    with scene.created(segment(0)) as fd:
        scene.append(segment(0), data(8000), fd)
        scene.sync(fd)
        scene.append(segment(0), data(100), fd)
    assert scene.faults.hit or scene.is_demoted(segment(0))


@operation(prepare=almost_full, options=SMALL)
def spill(scene: Scene) -> None:
    with scene.opened(segment(0)) as fd:
        for number in range(3):
            scene.append(segment(0), data(64 * KIB, number), fd)
        scene.sync(fd)
    assert scene.faults.hit or scene.is_demoted(segment(0))


@operation(prepare=demoted)
def write_demoted(scene: Scene) -> None:
    with scene.opened(segment(0)) as fd:
        scene.append(segment(0), data(5000), fd)
        scene.write(segment(0), 100, data(300, 5), fd)
        scene.sync(fd)
    scene.truncate(segment(0), 4097)
    scene.truncate(segment(0), 9000)


@operation(prepare=demoted)
def attributes_of_demoted(scene: Scene) -> None:
    set_attributes(scene, segment(0))


@operation(prepare=two_demoted)
def rename_demoted(scene: Scene) -> None:
    scene.rename(segment(0), segment(0) + ".deleted")
    scene.make("t-0/new", data(30))
    scene.rename("t-0/new", segment(0) + ".deleted")
    scene.rename("t-0", "t-0.0123456789abcdef-delete")
    scene.make("over", data(30))
    scene.rename(segment(10, "t-0.0123456789abcdef-delete"), "over")


@operation(prepare=two_demoted)
def unlink_demoted(scene: Scene) -> None:
    scene.remove(segment(0))
    with scene.opened(segment(10)) as fd:
        scene.remove(segment(10))
        os.pwrite(fd, b"unseen", 0)


@operation(prepare=two_segments)
def demote(scene: Scene) -> None:
    scene.move(segment(0), "slow")


@operation(prepare=demoted)
def promote(scene: Scene) -> None:
    scene.move(segment(0), "fast")


# -- files that grow in persistent memory -------------------------------------------------------


def is_pool_full(scene: Scene) -> bool:
    return scene.status()["pool"]["files"] == POOLED


def all_are_sealed(scene: Scene) -> bool:
    return scene.status()["pool"]["growing"] == 0 and is_pool_full(scene)


def the_older_is_sealed(scene: Scene) -> bool:
    return scene.status()["pool"]["growing"] == 1 and is_pool_full(scene)


def filled_pool(scene: Scene) -> None:
    scene.wait(lambda: is_pool_full(scene), "the pool")


def growing(scene: Scene) -> None:
    filled_pool(scene)
    scene.hold(scene.created(segment(0)))
    scene.append(segment(0), data(5000), scene.held[0])
    filled_pool(scene)


@operation(prepare=topic, begin=filled_pool, settled=all_are_sealed, options=GROWING)
def create_growing(scene: Scene) -> None:
    with scene.created(segment(0)) as fd:
        scene.append(segment(0), data(5000), fd)
        scene.append(segment(0), data(64 * KIB), fd)
        scene.sync(fd)


@operation(prepare=topic, begin=growing, settled=is_pool_full, options=GROWING)
def grow(scene: Scene) -> None:
    for number in range(20):
        scene.append(segment(0), data(128 * KIB, number), scene.held[0])


@operation(prepare=topic, begin=growing, settled=all_are_sealed, options=GROWING)
def truncate_growing(scene: Scene) -> None:
    scene.truncate(segment(0), 1000)
    scene.append(segment(0), data(500), scene.held[0])
    scene.release()


@operation(prepare=topic, begin=growing, settled=the_older_is_sealed, options=GROWING)
def seal(scene: Scene) -> None:
    scene.hold(scene.created(segment(10)))
    scene.append(segment(0), data(100), scene.held[0])
    scene.append(segment(10), data(100), scene.held[1])


@operation(prepare=topic, begin=growing, options=GROWING)
def unlink_growing(scene: Scene) -> None:
    scene.remove(segment(0))
    scene.release()


# -- mounts -------------------------------------------------------------------------------------


def mount(scene: Scene) -> None:
    """What comes of it is told by the campaign, which knows whether the daemon was hit."""
    scene.result = scene.mount.mount()


@operation(prepare=Scene.empty, mounts=True)
def first_mount(scene: Scene) -> None:
    mount(scene)


@operation(prepare=Scene.empty, mounts=True, settled=is_pool_full, options=GROWING)
def first_mount_with_growing_files(scene: Scene) -> None:
    mount(scene)


@operation(prepare=demoted, mounts=True)
def mount_with_another_device(scene: Scene) -> None:
    another = scene.slow.with_name("another")
    another.mkdir(exist_ok=True)
    scene.mount.slow_list = f"{scene.slow},{another}"
    mount(scene)


@operation(prepare=two_demoted, mounts=True)
def mount_with_devices_elsewhere(scene: Scene) -> None:
    moved = scene.slow.with_name("elsewhere")
    if not moved.exists():
        scene.slow.rename(moved)
    scene.mount.slow_list = str(moved)
    mount(scene)


def left_over(scene: Scene) -> None:
    """As a crash at the worst time leaves it."""
    demoted(scene)
    scene.stop()
    identifier = "0123456789abcdef"
    objects = scene.slow / "objects"
    (objects / "t-9").mkdir()
    (objects / "t-9" / f"x.log~{'0' * 8}.{identifier}").write_bytes(b"left")
    (scene.fast / "shadows" / identifier).write_bytes(b"")
    (scene.fast / "tmp" / "fedcba9876543210").symlink_to("nowhere")
    (scene.fast / "tmp" / "a-copy").write_bytes(b"half")


@operation(prepare=left_over, mounts=True)
def collect_garbage(scene: Scene) -> None:
    mount(scene)


def died_growing(scene: Scene) -> None:
    scene.start()
    growing(scene)
    scene.kill()


@operation(prepare=topic, begin=died_growing, mounts=True, settled=is_pool_full, options=GROWING)
def recover_growing(scene: Scene) -> None:
    mount(scene)


def changed_behind(scene: Scene) -> None:
    """A Kafka on tree/ has appended to one object, and truncated another."""
    two_demoted(scene)
    scene.stop()
    for number, size in ((0, 12_000), (10, 100)):
        name = segment(number)
        entry = scene.model.state[name]
        content = entry.content[:size].ljust(size, b"+")
        (scene.fast / "tree" / name).write_bytes(content)
        scene.model.state = {**scene.model.state, name: replace(entry, content=content)}


@operation(prepare=changed_behind, mounts=True)
def reconcile(scene: Scene) -> None:
    mount(scene)


@operation(prepare=two_demoted, begin=unlink_demoted)
def unmount(scene: Scene) -> None:
    with scene.opened(segment(20)) as fd:
        scene.append(segment(20), data(100), fd)
    scene.result = scene.mount.command("umount", str(scene.mount.mountpoint))


def kafka_directory(scene: Scene) -> None:
    """A log directory to be adopted, not pafkafs' yet."""
    scene.empty()
    source = scene.fast.with_name("kafka")
    source.mkdir(mode=0o755)
    (source / "t-0").mkdir(mode=0o750)
    (source / "t-0").chmod(0o750)
    names = {"t-0": replace(Entry("directory", mode=0o750), owner=0)}
    for name in (segment(0), "meta.properties"):
        (source / name).write_bytes(data(1000))
        (source / name).chmod(0o640)
        names[name] = Entry("file", data(1000), owner=0)
    scene.model.state = names


def adopt_again(scene: Scene) -> None:
    if (scene.fast.with_name("kafka")).exists():
        adopt(scene)
        assert scene.result is not None
        assert scene.result.returncode == 0, scene.result.stderr
    scene.start()


@operation(prepare=kafka_directory, mounts=True, recover=adopt_again, settled=lambda scene: True)
def adopt(scene: Scene) -> None:
    source = scene.fast.with_name("kafka")
    scene.result = scene.mount.command("adopt", str(source), str(scene.fast), str(scene.slow))


# What power mode adds: fsyncs of directories, synchronous writes, sizes of shadows.
IN_POWER_MODE = {"create", "append", "directories", "links", "rename", "create_on_slow_tier",
                 "write_demoted", "rename_demoted"}  # fmt: skip
OPERATIONS += [
    replace(o, name=f"{o.name}_power", options=(*o.options, "--durability", "power"))
    for o in OPERATIONS
    if o.name in IN_POWER_MODE
]
