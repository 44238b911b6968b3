"""Writes go.mod and go.sum: `python -m lab.kube pin v1.35.4`, `pin-cni v4.2.2 v1.9.1` for Multus and the plugins, and
`pin-upstream v1.2.0` for upstream's programs.

The module k8s.io/kubernetes takes its own libraries from the folder staging/ beside it, by `replace` lines that count
only where it is the main module. Each library is published as a module of its own, v1.35.4 of the whole being v0.35.4
of the part, so the same lines are written here with these versions. Everything else has the version that the release
was tested with, etcd too.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from lab.kube.build import CNI, KUBERNETES, MULTUS, PLUGINS, SPIDERPOOL, UPSTREAM, Pins
from lab.layout import LabError

_STAGING = "./staging/src/"
_UNRECORDED = f"{SPIDERPOOL},github.com/tigera/operator"
"""Modules that not every mirror of the Go checksum database can tell about: upstream, and one its controller needs.
Their hashes are in go.sum as all others', but nobody vouched for them when they were written there."""
_GO_TIMEOUT = 1800
"""Seconds for one run of go; the first one downloads 600 MB of sources."""


def pin(release: str) -> int:
    """Pin `release`, as `v1.35.4`; how many modules are in go.mod. Raises LabError; then nothing has changed."""
    if not release.startswith("v1."):
        raise LabError(f"{release!r} is no release of Kubernetes; say it like v1.35.4")
    with tempfile.TemporaryDirectory() as folder:
        _go(folder, "mod", "init", "spiderpool.invalid/lab/kube")
        found = _json(folder, "mod", "download", "-json", f"k8s.io/kubernetes@{release}")
        upstream = _json(folder, "mod", "edit", "-json", found["GoMod"])
        published = release.replace("v1.", "v0.", 1)
        edits = [f"-go={upstream['Go']}", f"-require=k8s.io/kubernetes@{release}"]
        edits += [
            f"-replace={line['Old']['Path']}={line['Old']['Path']}@{published}"
            for line in upstream["Replace"]
            if line["New"]["Path"].startswith(_STAGING)
        ]
        return _write(folder, KUBERNETES, edits)


def pin_cni(multus: str, plugins: str) -> int:
    """Pin Multus and the standard plugins, as `v4.2.2` and `v1.9.1`; as `pin` otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        _go(folder, "mod", "init", "spiderpool.invalid/lab/kube/cni")
        return _write(folder, CNI, [f"-require={MULTUS}@{multus}", f"-require={PLUGINS}@{plugins}"])


def pin_upstream(release: str) -> int:
    """Pin upstream's programs, as `v1.2.0`; as `pin` otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        _go(folder, "mod", "init", "spiderpool.invalid/lab/kube/upstream")
        return _write(folder, UPSTREAM, [f"-require={SPIDERPOOL}@{release}"])


def _write(folder: str, pins: Pins, edits: list[str]) -> int:
    """Edit the go.mod in `folder`, complete it, and put it in place of the one there is."""
    edits += [f"-tool={package}" for package in pins.packages.values()]
    _go(folder, "mod", "edit", *edits)
    _go(folder, "list", "-mod=mod", "-deps", "tool")
    count = len(_json(folder, "mod", "edit", "-json")["Require"])
    for name in ("go.mod", "go.sum"):
        with open(f"{folder}/{name}") as new, open(f"{pins.folder}/{name}.tmp", "w") as file:
            file.write(new.read())
        os.rename(f"{pins.folder}/{name}.tmp", f"{pins.folder}/{name}")
    return count


def _go(folder: str, *arguments: str) -> str:
    argv: Sequence[str] = ("go", *arguments)
    try:
        result = subprocess.run(
            argv,
            cwd=folder,
            env=os.environ | {"GOWORK": "off", "CGO_ENABLED": "0", "GONOSUMDB": _UNRECORDED},
            stdout=subprocess.PIPE,
            text=True,
            timeout=_GO_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise LabError("go is not installed") from None
    if result.returncode:
        said = f":\n{result.stdout.strip()[-2000:]}" if result.stdout else "; its messages are above"
        raise LabError(f"{' '.join(argv)[:200]} ended with {result.returncode}{said}")
    return result.stdout


def _json(folder: str, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(_go(folder, *arguments))
    return answer
