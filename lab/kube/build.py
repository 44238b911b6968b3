"""Builds programs from the Go modules that go.mod and go.sum pin; what is built once is found again.

Kubernetes and etcd are pinned here, the CNI plugins in cni/, upstream in upstream/: they want other versions of the
same libraries. Binaries lie in build/kube/<key>/, where the key follows from everything that decides what is in them.
Go's own caches make a second checkout cheap: it only links.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import select
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lab.layout import SOURCES, LabError
from lab.table import Paper

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = f"{SOURCES}/build/kube"
PLUGINS = "github.com/containernetworking/plugins"
MULTUS = "gopkg.in/k8snetworkplumbingwg/multus-cni.v4"
SPIDERPOOL = "github.com/spidernet-io/spiderpool"


@dataclass(frozen=True, slots=True)
class Pins:
    """A folder with a go.mod and a go.sum, and the programs that are built there."""

    folder: str
    packages: Mapping[str, str]
    """Go package of each program; go.mod's `tool` directives name the same. Small ones first: errors show early."""


KUBERNETES = Pins(
    HERE,
    {
        "etcd": "go.etcd.io/etcd/server/v3",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
        "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
        "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
        "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
        "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    },
)
CNI = Pins(
    f"{HERE}/cni",
    {
        "loopback": f"{PLUGINS}/plugins/main/loopback",
        "macvlan": f"{PLUGINS}/plugins/main/macvlan",
        "ipvlan": f"{PLUGINS}/plugins/main/ipvlan",
        "vlan": f"{PLUGINS}/plugins/main/vlan",
        "bridge": f"{PLUGINS}/plugins/main/bridge",
        "ptp": f"{PLUGINS}/plugins/main/ptp",
        "host-local": f"{PLUGINS}/plugins/ipam/host-local",
        "tuning": f"{PLUGINS}/plugins/meta/tuning",
        "multus": f"{MULTUS}/cmd/multus",
    },
)
"""Multus is the plain executable, not the daemon: it comes and goes with each call, as our plugins do."""
UPSTREAM = Pins(
    f"{HERE}/upstream",
    {
        f"upstream-{name}": f"{SPIDERPOOL}/cmd/{name}"
        for name in ("spiderpool", "coordinator", "spiderpool-agent", "spiderpool-controller")
    },
)
"""What we replace, for tests beside it and of the way from there and back."""
ALL = (KUBERNETES, CNI, UPSTREAM)
CONTROL_PLANE = ("etcd", "kubectl", "kube-apiserver", "kube-controller-manager")
NODE = ("kube-scheduler", "kubelet", *CNI.packages)
"""What a node that runs pods needs besides."""

REPORT_EVERY = 15.0
"""Seconds between lines about the progress where there is no terminal to keep one line up to date."""
_VERSIONS = ("k8s.io/client-go/pkg/version", "k8s.io/component-base/version")
"""Go packages that know the release; set when linking, for the sources of a module do not know what they are."""
_IMPORT_PATH = re.compile(r"[\w.~-]+(/[\w.~-]+)*")


def release() -> str:
    """The release of Kubernetes that go.mod pins, as `v1.35.4`. Raises LabError."""
    with open(f"{HERE}/go.mod") as file:
        found = re.search(r"^require k8s\.io/kubernetes (v\S+)$", file.read(), re.MULTILINE)
    if found is None:
        raise LabError(f"{HERE}/go.mod requires no k8s.io/kubernetes; python -m lab.kube pin writes it")
    return found[1]


def _link_flags(pins: Pins) -> str:
    if pins is not KUBERNETES:
        return "-s -w"
    version = release()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X {path}.{name}={value}" for path in _VERSIONS for name, value in values.items())])


def folder(pins: Pins = KUBERNETES) -> str:
    """Where the binaries of exactly these pins are, or will be."""
    digest = hashlib.sha256(_link_flags(pins).encode())
    for name in ("go.mod", "go.sum"):
        with open(f"{pins.folder}/{name}", "rb") as file:
            digest.update(file.read())
    return f"{CACHE}/{digest.hexdigest()[:16]}"


def program(name: str) -> str:
    """Path of a program. Raises LabError if it is not built."""
    path = f"{folder(_pins(name))}/{name}"
    if not os.access(path, os.X_OK):
        raise LabError(f"{name} is not built: run `make kube`")
    return path


def build(paper: Paper, names: Iterable[str] = CONTROL_PLANE) -> None:
    """Build what is missing of `names`, one at a time. Raises LabError with what the compiler says."""
    if missing(names) and shutil.which("go") is None:
        raise LabError(f"go is not installed; Kubernetes {release()} needs the Go that {HERE}/go.mod names, or newer")
    for pins in ALL:
        os.makedirs(folder(pins), exist_ok=True)
    with _alone(paper):
        for name in missing(names):
            begin = time.monotonic()
            pins = _pins(name)
            target = f"{folder(pins)}/{name}"
            count = _compile(pins, name, target, _Progress(paper, name))
            paper.step(
                f"{name}: {count} packages compiled, {os.stat(target).st_size >> 20} MiB", time.monotonic() - begin
            )


def missing(names: Iterable[str]) -> list[str]:
    """Which of `names` are not built, in the order in which they are built."""
    wanted = set(names)
    return [
        name
        for pins in ALL
        for name in pins.packages
        if name in wanted and not os.access(f"{folder(pins)}/{name}", os.X_OK)
    ]


def _pins(name: str) -> Pins:
    return next((pins for pins in ALL if name in pins.packages), KUBERNETES)


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


class _Progress:
    """Elapsed time and what is being built: one line kept up to date on a terminal, a line now and then elsewhere."""

    def __init__(self, paper: Paper, name: str) -> None:
        self._paper, self._name = paper, name
        self._begin = time.monotonic()
        self._next = 0.0 if paper.live else REPORT_EVERY

    def __call__(self, count: int, doing: str) -> None:
        elapsed = time.monotonic() - self._begin
        if elapsed < self._next:
            return
        self._next = elapsed + (0.2 if self._paper.live else REPORT_EVERY)
        self._paper.passing(f"  {self._name} {elapsed // 60:3.0f}:{elapsed % 60:02.0f}  {count:4d} packages  {doing}")


def _compile(pins: Pins, name: str, target: str, progress: Callable[[int, str], None]) -> int:
    """Compile one program; how many packages had to be. Raises LabError with what the compiler says."""
    argv = ["nice", "-n", "10", "go", "build", "-v", "-mod=readonly", "-trimpath", "-ldflags", _link_flags(pins)]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*argv, "-o", f"{target}.tmp", pins.packages[name]],
        cwd=pins.folder,
        env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"},
        stdin=subprocess.DEVNULL,
        stderr=writer,
    )
    os.close(writer)
    packages, doing = 0, "reading the module graph"
    complaints: deque[str] = deque(maxlen=40)
    try:
        for line in _lines(reader):
            match line:
                case None:
                    pass
                case _ if line.startswith("go: downloading "):
                    doing = line.removeprefix("go: ")
                case _ if _IMPORT_PATH.fullmatch(line):
                    packages, doing = packages + 1, line
                case _:
                    complaints.append(line)
            progress(packages, doing)
        status = process.wait()
    finally:
        os.close(reader)
        process.terminate()
        process.wait()
    if status:
        raise LabError("\n    ".join([f"{name} cannot be built, go build ended with {status}:", *complaints]))
    os.rename(f"{target}.tmp", target)
    return packages


def _lines(fd: int) -> Iterator[str | None]:
    """The lines that come from a pipe, and None five times a second while none come."""
    rest = b""
    while True:
        if not select.select([fd], [], [], 0.2)[0]:
            yield None
            continue
        read = os.read(fd, 65536)
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if not read:
            if rest:
                yield rest.decode(errors="replace")
            return
