"""From upstream's own programs to ours and back, with kubelets and pods that stay all the time (docs/upgrade.md)."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from lab.kube import node
from lab.kube.cluster import Cluster
from lab.process import run
from tests.kube import upstream_rig as upstream
from tests.kube.conftest import running
from tests.kube.node_rig import NAMES, Json, Pod, ask, claims, pods, until, workload
from tests.kube.node_rig import _pod as read_pod
from tests.kube.node_rig import _ready as is_ready
from tests.kube.test_server import apply

Held = Callable[[Cluster], set[tuple[str, str]]]


@pytest.fixture(scope="module")
def there() -> Iterator[Cluster]:
    """A cluster of its own, for other tests count on our agents."""
    with running(nodes=True) as cluster:
        upstream.define(cluster)
        yield cluster


def deploy(there: Cluster, kind: str, name: str, replicas: int) -> None:
    document: Json = workload(kind, name, replicas)
    annotation = f"kube-system/{upstream.NETWORK}"
    document["spec"]["template"]["metadata"]["annotations"] = {"v1.multus-cni.io/default-network": annotation}
    apply(there, document)


def settled(there: Cluster, held: Held, seconds: float = 120, **wanted: int) -> dict[str, Pod]:
    """The pods, by name, when just so many of each app run and just their addresses are taken."""
    found: list[Pod] = []

    def holds() -> bool:
        mine = [item for item in pods(there) if item["metadata"].get("labels", {}).get("app")]
        found[:] = [read_pod(item) for item in mine if is_ready(item)]
        counts = {app: sum(pod.app == app for pod in found) for app in wanted}
        taken = {(address, pod.uid) for pod in found for address in pod.addresses}
        return counts == wanted and len(found) == len(mine) and held(there) == taken

    until(there, holds, seconds, f"{wanted or 'no pods'}, and just their addresses")
    addresses = [address for pod in found for address in pod.addresses]
    assert len(set(addresses)) == len(addresses) == 2 * len(found)
    return {pod.name: pod for pod in found}


def reachable(there: Cluster, found: dict[str, Pod]) -> None:
    for pod in found.values():
        for address in pod.addresses:
            assert ask(there, pod.node, address) == "ok\n"


def processes(pod: Pod) -> set[int]:
    """The pod's, its sandbox among them."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/cgroup"):
        with contextlib.suppress(OSError), open(path) as file:
            if pod.uid in file.read():
                found.add(int(path.split("/")[2]))
    return found


def kill_sandbox(there: Cluster, pod: Pod) -> None:
    """The kubelet makes another one for the same pod: a DEL, and a second ADD."""
    killed = processes(pod)
    assert killed
    for each in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)

    def there_again() -> bool:
        now = processes(pod)
        return len(now) >= len(killed) and not now & killed

    until(there, there_again, 60, f"a new sandbox of {pod.name}")


@pytest.mark.timeout(600)
def test_there_and_back(there: Cluster) -> None:
    upstream.stop_ours(there)
    upstream.hand_back(there)
    upstream.executables(there, upstream=True)
    upstream.start(there)
    deploy(there, "Deployment", "web", 3)
    deploy(there, "StatefulSet", "db", 2)
    first = settled(there, upstream.records, web=3, db=2)
    assert claims(there) == set()
    reachable(there, first)

    upstream.stop(there)
    gone = next(pod for pod in first.values() if pod.app == "web")
    there.kubectl("delete", "pod", gone.name, "--force", "--grace-period=0")
    upstream.start_ours(there)
    second = settled(there, claims, web=3, db=2)
    assert {name: pod for name, pod in second.items() if name in first} == {
        name: pod for name, pod in first.items() if pod is not gone
    }
    reachable(there, second)

    kill_sandbox(there, next(pod for pod in second.values() if pod.app == "web" and pod.name in first))
    assert settled(there, claims, web=3, db=2) == second

    there.kubectl("scale", "deployment/web", "--replicas=5")
    there.kubectl("delete", "pod", "db-0")
    third = settled(there, claims, web=5, db=2)
    assert third["db-0"].addresses == second["db-0"].addresses
    assert third["db-0"].uid != second["db-0"].uid
    reachable(there, third)
    upstream.executables(there, upstream=False)
    there.kubectl("scale", "deployment/web", "--replicas=2")
    fourth = settled(there, claims, web=2, db=2)
    upstream.executables(there, upstream=True)

    upstream.stop_ours(there)
    upstream.hand_back(there)
    assert settled(there, upstream.records, web=2, db=2) == fourth
    assert claims(there) == set()
    upstream.start(there)
    there.kubectl("scale", "deployment/web", "--replicas=4")
    there.kubectl("delete", "pod", "db-1")
    fifth = settled(there, upstream.records, web=4, db=2)
    assert fifth["db-1"].addresses == fourth["db-1"].addresses
    assert {name: fifth[name] for name in fourth if name != "db-1"} == {
        name: pod for name, pod in fourth.items() if name != "db-1"
    }
    reachable(there, fifth)
    there.kubectl("delete", "deployment/web", "statefulset/db")
    settled(there, upstream.records, web=0, db=0)
    for each in NAMES:
        links = run(node.on_node(there, each, "ip", "-o", "link", "show", "type", "veth"))
        assert "veth" not in {line.split(":")[1].strip()[:4] for line in links.splitlines() if "eth0" not in line}
