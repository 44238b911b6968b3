"""Processor time of processes: beside rates, a figure that says the same on a busy machine as on a calm one, nearly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from lab.kube.cluster import Cluster
from lab.kube.components import ETCD, SERVER

_TICKS = os.sysconf("SC_CLK_TCK")

Clock = Callable[[], dict[str, float]]
"""Processor seconds so far, by who spent them."""


def spent(pid: int) -> float:
    """Processor seconds of a process so far, those of its threads included (proc(5), utime and stime)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def clock(cluster: Cluster, others: Mapping[str, Iterable[int]]) -> Clock:
    """The clock of the cluster's API server and etcd, and of `others` by name, the sum of each."""
    processes = {
        "server": [cluster.processes[SERVER].pid],
        "etcd": [cluster.processes[ETCD].pid],
        **{name: list(pids) for name, pids in others.items()},
    }
    return lambda: {name: sum(map(spent, pids)) for name, pids in processes.items()}


def per_thousand(before: Mapping[str, float], after: Mapping[str, float], count: int) -> dict[str, float]:
    """Processor seconds for 1,000 of what was done `count` times in between."""
    return {name: (after[name] - before[name]) * 1000 / count for name in before}
