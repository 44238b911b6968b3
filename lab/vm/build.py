"""The guest's kernel, modules and initramfs, made of the distribution's packages; what is made once is found again.

The kernel's package is unpacked, not installed. Of its 4,000 compressed modules those are kept that a test of networks
can want, uncompressed, since the guest computes slowly. Everything lies in build/vm, in folders whose names follow from
what decides about their contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import lzma
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lab.layout import SOURCES, LabError
from lab.process import run
from lab.table import Paper

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = f"{SOURCES}/build/vm"
PACKAGES = f"{CACHE}/packages"
BUSYBOX = "/bin/busybox"
PROVIDE = "run `make vm`, which installs it"

FIRST = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
"""What the initramfs loads to reach the host's file system; some kernels have part of it built in."""
KEPT = (
    *(f"drivers/net/{name}" for name in ("bonding", "ipvlan", "vxlan", "ethernet/intel/igb", "ethernet/intel/igbvf")),
    *(f"drivers/net/{name}.ko" for name in ("dummy", "geneve", "ifb", "macvlan", "macvtap", "nlmon", "tap", "tun")),
    *(f"drivers/net/{name}.ko" for name in ("veth", "virtio_net", "vrf")),
    *(f"net/{name}" for name in ("8021q", "802", "bridge", "core", "ipv4", "ipv6", "llc", "netfilter", "packet")),
    *(f"net/{name}" for name in ("sched", "unix", "xfrm")),
    *("net/9p", "fs/9p", "fs/overlayfs", "drivers/virtio", "drivers/char/virtio_console.ko"),
    "crypto/crc32c_generic.ko",  # nf_tables finds it by its algorithm, so it is nobody's dependency
    *(f"drivers/vfio/{name}" for name in ("vfio.ko", "vfio_iommu_type1.ko", "pci")),
)
"""Folders and files below the package's `kernel`; what they depend on is kept with them."""
_FORMAT = 2
"""Raised by whoever changes what `build` makes of the same input."""


class Image(NamedTuple):
    """What a virtual machine is started from."""

    release: str
    """Of the kernel, as `uname -r` tells it."""
    kernel: str
    modules: str
    """The guest's /lib/modules/<release>."""
    initramfs: str


def build(paper: Paper) -> Image:
    """What a virtual machine is started from, made now if it is not there. Raises LabError naming what is missing."""
    package = _package()
    if not os.access(BUSYBOX, os.X_OK):
        raise LabError(f"{BUSYBOX} is missing: {PROVIDE}")
    kernel = f"{CACHE}/kernel-{_digest([os.path.basename(package), repr(KEPT), repr(_FORMAT)])}"
    init = _read(f"{HERE}/init.sh")
    early = f"{CACHE}/initramfs-{_digest([kernel, init, _read(BUSYBOX), repr(FIRST)])}.cpio"
    if not (os.path.isdir(kernel) and os.path.exists(early)):
        with _alone(paper):
            if not os.path.isdir(kernel):
                _timed(paper, "kernel and modules", lambda: _unpack(package, kernel))
            if not os.path.exists(early):
                _timed(paper, "initramfs", lambda: _initramfs(kernel, init, early))
            _forget({kernel, early})
    return _image(kernel, early)


def _image(kernel: str, early: str) -> Image:
    release = _release(kernel)
    return Image(release, f"{kernel}/vmlinuz", f"{kernel}/lib/modules/{release}", early)


def _release(root: str) -> str:
    found = os.listdir(f"{root}/lib/modules")
    if len(found) != 1:
        raise LabError(f"{root}/lib/modules has {len(found)} kernels, not one: remove {root}")
    return found[0]


def _package() -> str:
    found = glob.glob(f"{PACKAGES}/linux-image-*.deb")
    if len(found) != 1:
        raise LabError(f"{PACKAGES} has {len(found)} packages of a kernel, not one: {PROVIDE}")
    return found[0]


def _timed(paper: Paper, what: str, work: Callable[[], None]) -> None:
    begin = time.monotonic()
    paper.passing(f"  {what} …")
    work()
    paper.step(what, time.monotonic() - begin)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(paper: Paper) -> Iterator[None]:
    lock = os.open(f"{CACHE}/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            paper.line("  another build is at work here, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _forget(wanted: set[str]) -> None:
    """Remove what was made of other packages or scripts."""
    for path in {*glob.glob(f"{CACHE}/kernel-*"), *glob.glob(f"{CACHE}/initramfs-*")} - wanted:
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _unpack(package: str, target: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="unpack-") as folder:
        run(["dpkg-deb", "-x", package, folder], timeout=180)
        release = _release(folder)
        _depmod(folder, release)
        source, kept = f"{folder}/lib/modules/{release}", f"{folder}/kept/lib/modules/{release}"
        wanted = closure(dependencies(_read(f"{source}/modules.dep").decode()), (f"kernel/{path}" for path in KEPT))
        for path in wanted:
            _plain(f"{source}/{path}", f"{kept}/{path}")
        for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copy(f"{source}/{name}", kept)
        _depmod(f"{folder}/kept", release)
        shutil.copy(f"{folder}/boot/vmlinuz-{release}", f"{folder}/kept/vmlinuz")
        os.rename(f"{folder}/kept", target)


def _depmod(root: str, release: str) -> None:
    try:
        run(["/usr/sbin/depmod", "-b", root, release], timeout=120)
    except LabError as error:
        raise LabError(f"{error} ({PROVIDE})") from None


def _plain(source: str, target: str) -> None:
    """Copy a module uncompressed."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    content = _read(source)
    with open(target.removesuffix(".xz"), "wb") as file:
        file.write(lzma.decompress(content) if source.endswith(".xz") else content)


def dependencies(listing: str) -> dict[str, list[str]]:
    """Module path to the paths of what it needs, from the text of a modules.dep (depmod(8))."""
    pairs = (line.split(":", 1) for line in listing.splitlines())
    return {path: needs.split() for path, needs in pairs}


def closure(needs: Mapping[str, Sequence[str]], wanted: Iterable[str]) -> list[str]:
    """The modules at or below the `wanted` paths and all they need, in an order in which they can be loaded.

    A path in `wanted` is a folder's or ends with .ko; what there is no module of is left out.
    """
    folders = tuple(f"{path}." if path.endswith(".ko") else f"{path}/" for path in wanted)
    order: dict[str, None] = {}
    for path in sorted(needs):
        if f"{path}.".startswith(folders):
            # modules.dep lists all of them, the one that nothing else needs first.
            order.update(dict.fromkeys((*reversed(needs[path]), path)))
    return list(order)


def _initramfs(kernel: str, init: bytes, target: str) -> None:
    _, _, modules, _ = _image(kernel, target)
    needs = dependencies(_read(f"{modules}/modules.dep").decode())
    names = {os.path.basename(path).removesuffix(".ko").replace("-", "_"): path for path in needs}
    order = closure(needs, [names[name] for name in FIRST if name in names])
    files = {"init": (0o755, init), "bin/busybox": (0o755, _read(BUSYBOX))}
    for path in order:
        files[f"modules/{os.path.basename(path)}"] = (0o644, _read(f"{modules}/{path}"))
    files["modules/order"] = (0o644, "".join(f"{os.path.basename(path)}\n" for path in order).encode())
    with open(f"{target}.tmp", "wb") as file:
        file.write(archive(files))
    os.rename(f"{target}.tmp", target)


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """An initramfs with these files and their folders: permissions and content by path (cpio's "newc" format).

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    folders = sorted({folder for path in files for folder in _parents(path)})
    entries = [(folder, stat.S_IFDIR | 0o755, b"") for folder in folders]
    entries += [(path, stat.S_IFREG | mode, content) for path, (mode, content) in files.items()]
    blob = bytearray()
    for inode, (path, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        blob += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        blob += bytes(-len(blob) % 4) + content
        blob += bytes(-len(blob) % 4)
    return bytes(blob)


def _parents(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path
