"""Builds Kubernetes' programs from the Go modules that go.mod and go.sum pin; what is built once is found again.

Binaries lie in build/kube/<key>/, where the key follows from everything that decides what is in them. Go's own caches
make a second checkout cheap: it only links.
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
from collections.abc import Callable, Iterable, Iterator

from lab.layout import SOURCES, LabError
from lab.table import Paper

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = f"{SOURCES}/build/kube"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
}
"""Go package of each program; the `tool` directives of go.mod name the same. Small ones first: errors show early."""
CONTROL_PLANE = ("etcd", "kubectl", "kube-apiserver", "kube-controller-manager")
NODE = ("kube-scheduler", "kubelet")
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


def _link_flags() -> str:
    version = release()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return " ".join(["-s -w", *(f"-X {path}.{name}={value}" for path in _VERSIONS for name, value in values.items())])


def folder() -> str:
    """Where the binaries of exactly these pins are, or will be."""
    digest = hashlib.sha256(_link_flags().encode())
    for name in ("go.mod", "go.sum"):
        with open(f"{HERE}/{name}", "rb") as file:
            digest.update(file.read())
    return f"{CACHE}/{digest.hexdigest()[:16]}"


def program(name: str) -> str:
    """Path of a program. Raises LabError if it is not built."""
    path = f"{folder()}/{name}"
    if not os.access(path, os.X_OK):
        raise LabError(f"{name} of Kubernetes {release()} is not built: run `make kube`")
    return path


def build(paper: Paper, names: Iterable[str] = CONTROL_PLANE) -> None:
    """Build what is missing of `names`, one at a time. Raises LabError with what the compiler says."""
    target = folder()
    if missing(names) and shutil.which("go") is None:
        raise LabError(f"go is not installed; Kubernetes {release()} needs the Go that {HERE}/go.mod names, or newer")
    os.makedirs(target, exist_ok=True)
    with _alone(paper):
        for name in missing(names):
            begin = time.monotonic()
            count = _compile(name, f"{target}/{name}", _Progress(paper, name))
            size = os.stat(f"{target}/{name}").st_size >> 20
            paper.step(f"{name}: {count} packages compiled, {size} MiB", time.monotonic() - begin)


def missing(names: Iterable[str]) -> list[str]:
    """Which of `names` are not built, in the order in which they are built."""
    wanted, target = set(names), folder()
    return [name for name in PACKAGES if name in wanted and not os.access(f"{target}/{name}", os.X_OK)]


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


def _compile(name: str, target: str, progress: Callable[[int, str], None]) -> int:
    """Compile one program; how many packages had to be. Raises LabError with what the compiler says."""
    argv = ["nice", "-n", "10", "go", "build", "-v", "-mod=readonly", "-trimpath", "-ldflags", _link_flags()]
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*argv, "-o", f"{target}.tmp", PACKAGES[name]],
        cwd=HERE,
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
