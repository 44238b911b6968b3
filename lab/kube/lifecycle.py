"""Brings a cluster up, as a whole or not at all, and takes it down without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence

from lab.kube import node
from lab.kube.build import CONTROL_PLANE, missing, release
from lab.kube.cluster import RECORD, Cluster, free_ports
from lab.kube.components import CONTROLLERS, ETCD, ORDER, SERVER, STOP_WITHIN, Place
from lab.layout import STATE_ROOT, Lab, LabError
from lab.process import cgroup2_root, end, kill_cgroup
from lab.state import locked
from lab.table import Paper


def preflight(lab: Lab) -> None:
    """Whether this machine can carry a cluster. Raises LabError."""
    if os.geteuid():
        raise LabError("must run as root: the cluster's processes live in a cgroup of the lab")
    cgroup2_root()
    if absent := missing(CONTROL_PLANE):
        raise LabError(f"{', '.join(absent)} of Kubernetes {release()} not built: run `make kube`")
    if not os.path.exists(lab.state):
        return
    if not os.path.exists(f"{lab.state}/{RECORD}"):
        raise LabError(f"{lab.state} is another lab's; choose another --name")
    cluster = Cluster.load(lab)
    if cluster.complete and any(cluster.runs(component) for component in ORDER):
        raise LabError(f"cluster {lab.name!r} is up already; `python -m lab.kube --name {lab.name} down` removes it")


def up(lab: Lab, paper: Paper, *, crds: bool = False, nodes: bool = False, server_flags: Sequence[str] = ()) -> Cluster:
    """A new cluster; what an unfinished `up` left is removed, and so is this one if it fails. Raises LabError."""
    preflight(lab)
    if nodes:
        node.preflight()
    down(lab)
    os.makedirs(lab.state, mode=0o700)
    with locked(lab):
        cluster = Cluster(Place(lab, free_ports(1)[0], tuple(server_flags)), {}, complete=False)
        try:
            _up(cluster, paper, crds=crds, nodes=nodes)
        except BaseException:
            _remove(lab)
            raise
    return cluster


def _up(cluster: Cluster, paper: Paper, *, crds: bool, nodes: bool) -> None:
    def timed(text: str, work: Callable[[], object]) -> None:
        begin = time.monotonic()
        work()
        paper.step(text, time.monotonic() - begin)

    timed("keys, certificates, kubeconfigs", cluster.prepare)
    timed("etcd, on a Unix socket", lambda: cluster.start(ETCD))
    timed(f"kube-apiserver {release()} at {cluster.place.url}, with RBAC", lambda: cluster.start(SERVER))
    if crds or nodes:  # before the controllers: the garbage collector learns of later kinds after half a minute only
        timed("our resource definitions", cluster.apply_crds)
    timed("kube-controller-manager", lambda: cluster.start(CONTROLLERS))
    if nodes:
        node.up(cluster, paper)
    cluster.complete = True
    cluster.save()


def down(lab: Lab) -> bool:
    """Remove everything of the cluster, or what is left of it; False if there was nothing. Raises LabError."""
    if os.geteuid():
        raise LabError("must run as root")
    if os.path.isdir(lab.state) and os.path.exists(f"{lab.state}/lab.json"):
        raise LabError(f"lab {lab.name!r} is no cluster: `spiderpool-lab --name {lab.name} down` removes it")
    found = os.path.exists(lab.state) or os.path.isdir(f"{cgroup2_root()}/{lab.name}")
    with locked(lab) if os.path.isdir(lab.state) else contextlib.nullcontext():
        _remove(lab)
    return found


def _remove(lab: Lab) -> None:
    with contextlib.suppress(LabError):  # no record: then nothing was started, or the cgroup has it
        # Nobody wants what they could still write, and the API server would wait for its clients for ten seconds.
        for process in Cluster.load(lab).processes.values():
            end(process, signal.SIGKILL, STOP_WITHIN)
    kill_cgroup(f"{cgroup2_root()}/{lab.name}")
    node.remove(lab)
    shutil.rmtree(lab.state, ignore_errors=True)
    if os.path.exists(lab.state):
        raise LabError(f"{lab.state} cannot be removed")
    with contextlib.suppress(OSError):  # absent, or another lab's folder is in it
        os.rmdir(STATE_ROOT)
