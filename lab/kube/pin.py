"""Writes go.mod and go.sum for a release of Kubernetes: `python -m lab.kube pin v1.35.4`.

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

from lab.kube.build import HERE, PACKAGES
from lab.layout import LabError

_STAGING = "./staging/src/"
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
        edits += [f"-tool={package}" for package in PACKAGES.values()]
        _go(folder, "mod", "edit", *edits)
        _go(folder, "list", "-mod=mod", "-deps", "tool")
        count = len(_json(folder, "mod", "edit", "-json")["Require"])
        for name in ("go.mod", "go.sum"):
            with open(f"{folder}/{name}") as new, open(f"{HERE}/{name}.tmp", "w") as file:
                file.write(new.read())
            os.rename(f"{HERE}/{name}.tmp", f"{HERE}/{name}")
    return count


def _go(folder: str, *arguments: str) -> str:
    argv: Sequence[str] = ("go", *arguments)
    try:
        result = subprocess.run(
            argv,
            cwd=folder,
            env=os.environ | {"GOWORK": "off"},
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
