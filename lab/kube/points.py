"""The folders where a node has something of its own, and that this machine must have for it to be mounted there.

What is missing is made, and removed when no lab needs it any more: to remove a folder on which another mount namespace
has something mounted succeeds, and takes the mount away from those who use it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator

from lab import layout
from lab.layout import NODES, Lab

POINTS = {
    "run-containerd": "/run/containerd",
    "run-netns": "/run/netns",
    "run-spidernet": "/run/spidernet",
    "lib-containerd": "/var/lib/containerd",
    "lib-kubelet": "/var/lib/kubelet",
    "lib-cni": "/var/lib/cni",
    "lib-spidernet": "/var/lib/spidernet",
    "log-pods": "/var/log/pods",
    "log-containers": "/var/log/containers",
    "etc-cni": "/etc/cni",
    "opt-cni": "/opt/cni",
}
"""Folder of the node, and where it is on the node."""


def _record() -> str:
    """Path of the list of folders that labs have made."""
    return f"{layout.STATE_ROOT}/.points"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    root = os.open(layout.STATE_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(root, fcntl.LOCK_EX)
        yield
    finally:
        os.close(root)


def make() -> None:
    """Make what this machine does not have; the folders of the node are there already. Raises OSError."""
    with _alone():
        for target in POINTS.values():
            if not os.path.isdir(target):
                with open(_record(), "a") as made:
                    made.write(f"{target}\n")
                os.makedirs(target)


def remove(lab: Lab) -> None:
    """Remove the folders of the lab's nodes, and with the last of all labs' nodes what was made for them."""
    with _alone():
        for node in NODES:
            shutil.rmtree(lab.node(node.name), ignore_errors=True)
        if glob.glob(f"{layout.STATE_ROOT}/*/*/run-containerd") or not os.path.exists(_record()):
            return
        with open(_record()) as made:
            for target in reversed(made.read().split()):
                with contextlib.suppress(OSError):  # somebody else has put something there
                    os.rmdir(target)
        os.unlink(_record())
