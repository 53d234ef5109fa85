"""What a VM boots: Debian's kernel, and an initrd of busybox, some modules and `init.sh`.

Both come from Debian's packages, which are downloaded once and never installed, and are kept in
the user's cache. A cached directory appears by one rename, so it is always whole.
"""

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from daxvm.errors import VmError
from daxvm.packages import run, say, update_lists

INIT = Path(__file__).with_name("init.sh")
# crc32c is loaded first since ext4 asks for it by a name that only modprobe can resolve.
_MODULES = ["crc32c_generic", "ext4", "nfit", "nd_pmem", "virtio_pci", "virtio_console"]
_MODULES += ["9pnet_virtio", "9p", "overlay", "fuse", "loop"]
_BUSYBOX = "busybox-static"


@dataclass(frozen=True)
class Boot:
    """The files that QEMU loads."""

    kernel: Path
    initrd: Path


def prepare(cache: Path | None = None) -> Boot:
    """What to boot, downloaded and built if the cache does not hold it."""
    cache = cache or default_cache()
    packages = cache / "packages"
    with _locked(cache / ".lock"):
        if not packages.is_dir():
            with _appearing(packages) as partial:
                _download(partial)
        archives = sorted(packages.glob("*.deb"))
        directory = cache / _key(archives)
        if not directory.is_dir():
            say("building the initrd")
            with _appearing(directory) as partial:
                _build(archives, partial)
    return Boot(directory / "kernel", directory / "initrd")


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pafkafs" / "dax-vm"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when all is in it."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    partial.rename(directory)


def _key(archives: Iterable[Path]) -> str:
    """The kernel's version, and a digest of what else is built into the initrd."""
    names = [archive.name for archive in archives]
    version = next(name.split("_")[0] for name in names if name.startswith("linux-image"))
    parts = [INIT.read_bytes(), Path(__file__).read_bytes(), "\n".join(names).encode()]
    return f"{version}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:8]}"


def _download(directory: Path) -> None:
    update_lists()
    depends = run(["apt-cache", "depends", "linux-image-amd64"])
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise VmError("apt knows no kernel: linux-image-amd64 depends on none (Debian is needed)")
    say(f"downloading {kernel[1]}")
    # As root, since apt's own user cannot write to a home directory and would say so.
    as_root = ["-o", "APT::Sandbox::User=root"]
    run(["apt-get", "download", "-qq", *as_root, kernel[1], _BUSYBOX], cwd=directory)


def _build(archives: Sequence[Path], directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for archive in archives:
            run(["dpkg-deb", "-x", str(archive), scratch])
        unpacked = Path(scratch)
        image = next(unpacked.glob("boot/vmlinuz-*"))
        (directory / "kernel").write_bytes(_uncompressed(image.read_bytes()))
        root = unpacked / "initrd"
        (root / "bin").mkdir(parents=True)
        (root / "modules").mkdir()
        busybox = root / "bin" / "busybox"
        (unpacked / "bin" / "busybox").rename(busybox)
        shutil.copy(INIT, root / "init")
        (root / "init").chmod(0o755)
        for number, module in enumerate(_with_dependencies(unpacked)):
            (root / "modules" / f"{number:02}-{module.name}").write_bytes(_plain(module))
        _pack(root, busybox, directory / "initrd")


def _uncompressed(image: bytes) -> bytes:
    """The ELF image in a bzImage, whose own unpacking takes seconds in an emulated CPU.

    The offsets are those of the x86 boot protocol: setup_sects, payload_offset, payload_length.
    """
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset :][:length]
    if not payload.startswith(b"\xfd7zXZ"):
        return image
    return lzma.LZMADecompressor().decompress(payload)


def _with_dependencies(unpacked: Path) -> list[Path]:
    """The modules in an order in which they can be loaded."""
    files = {_module_name(path): path for path in unpacked.glob("lib/modules/*/kernel/**/*.ko*")}
    builtin_list = next(unpacked.glob("lib/modules/*/modules.builtin")).read_text()
    builtin = {_module_name(Path(line)) for line in builtin_list.splitlines()}
    ordered: list[Path] = []

    def add(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise VmError(f"Debian's kernel has no module {name}")
        if files[name] in ordered:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", _plain(files[name]))
        for dependency in depends[1].decode().split(",") if depends else ():
            if dependency:
                add(dependency.replace("-", "_"))
        ordered.append(files[name])

    for name in _MODULES:
        add(name)
    return ordered


def _module_name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


def _plain(module: Path) -> bytes:
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def _pack(root: Path, busybox: Path, archive: Path) -> None:
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with archive.open("wb") as output:
        command = [str(busybox), "cpio", "-o", "-H", "newc"]
        subprocess.run(
            command,
            input=names.encode(),
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=root,
            check=True,
        )
