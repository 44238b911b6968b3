"""Container images without a registry: archives as `docker save` writes them, made of the distribution's programs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence

BUSYBOX = "/bin/busybox"
"""Static, of the package busybox-static."""
PAUSE = "lab.invalid/pause:1"
WEB = "lab.invalid/web:1"
"""Answers HTTP GET / on port 8080, as does anything that is named so."""
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}


def _tar(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of executable files, the same bytes for the same files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _image(tag: str, entrypoint: Sequence[str], layer: bytes) -> bytes:
    config = {
        "architecture": _ARCHITECTURE.get(platform.machine(), platform.machine()),
        "os": "linux",
        # As the first process of its namespace it does not hear SIGTERM, and would be waited for.
        "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"], "StopSignal": "SIGKILL"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    return _tar(
        {
            "manifest.json": json.dumps(manifest).encode(),
            "config.json": json.dumps(config).encode(),
            "layer.tar": layer,
        }
    )


def write(folder: str) -> list[str]:
    """Write all images; their paths. Raises OSError if busybox is missing."""
    with open(BUSYBOX, "rb") as file:
        layer = _tar({"bin/busybox": file.read(), "www/index.html": b"ok\n"})
    images = {
        "pause": _image(PAUSE, ["/bin/busybox", "sleep", "2147483647"], layer),
        "web": _image(WEB, ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"], layer),
    }
    for name, content in images.items():
        with open(f"{folder}/{name}.tar", "wb") as file:
            file.write(content)
    return [os.path.join(folder, f"{name}.tar") for name in images]
