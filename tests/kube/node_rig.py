"""What tests see of pods, their addresses and their nodes; and what they say when that is not as it should be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, NamedTuple

from api.meta import GROUP, VERSION
from lab.kube import controller, image, network, node
from lab.kube.cluster import Cluster
from lab.kube.components import ORDER
from lab.layout import NODES
from lab.nodes import agent, entering
from lab.pods import cgroup
from lab.process import last_lines, run
from lab.snapshot import LOOKS

Json = dict[str, Any]
API = f"/apis/{GROUP}/{VERSION}"
NAMES = tuple(each.name for each in NODES)
POOLS = {
    4: (ip_address("172.20.0.100"), ip_address("172.20.0.149")),
    6: (ip_address("fd00:20::100"), ip_address("fd00:20::131")),
}
"""First and last address of the default pools."""
_LOOK_EVERY = 0.1


class Pod(NamedTuple):
    """A pod that runs and answers its probes."""

    app: str
    name: str
    uid: str
    node: str
    addresses: tuple[str, ...]


def workload(kind: str, name: str, replicas: int = 3, lost_after: int = 300) -> Json:
    """A Deployment or StatefulSet of web servers, which leave a lost node after some seconds."""
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    container = {"name": "web", "image": image.WEB, "imagePullPolicy": "Never"}
    away = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": lost_after}
    keys = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    template = {
        "metadata": {"labels": {"app": name}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [container | {"readinessProbe": probe, "livenessProbe": probe}],
            "tolerations": [away | {"key": key} for key in keys],
        },
    }
    spec: Json = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template}
    if kind == "StatefulSet":
        spec["podManagementPolicy"] = "Parallel"  # one after the other only takes longer
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def pods(there: Cluster) -> list[Json]:
    """All pods, as the API server has them."""
    items: list[Json] = _items(there, "/api/v1/pods")
    return items


def claims(there: Cluster) -> set[tuple[str, str]]:
    """Addresses that are taken, and the UIDs of the pods that have them."""
    items = _items(there, f"{API}/spideripclaims")
    return {(item["spec"]["address"], item["spec"]["podUID"]) for item in items}


def quiet(there: Cluster) -> dict[str, set[str]]:
    """Bring the cluster to where a test can begin, whatever became of the one before; the traces on its nodes.

    All its parts run, and no pods, addresses or applications are in the namespace `default`.
    """
    for component in ORDER:
        there.start(component)
    if not there.runs(controller.NAME):
        controller.start(there)
    for name in NAMES:
        if not there.runs(f"{name}-init"):
            node.start(there, name)
        if not there.runs(agent(name)):
            node.start_agent(there, name)
        if not there.runs(f"{name}-kubelet"):
            node.start_kubelet(there, name)
    there.kubectl("uncordon", *NAMES)
    there.kubectl("delete", "deployments,statefulsets,daemonsets,jobs,pods", "--all", "--timeout=60s", timeout=70)
    there.kubectl("delete", "services", "--field-selector=metadata.name!=kubernetes", "--timeout=30s")
    settle(there)
    return {name: traces(there, name) for name in NAMES}


def views(there: Cluster, found: list[Pod], seconds: float = 30) -> None:
    """Wait until the pools' status and the SpiderEndpoints tell of just these pods' addresses."""
    held = sorted(address for pod in found for address in pod.addresses)
    until(there, lambda: _shown(there) == (held, held), seconds, f"pools' status and endpoints with just {held}")


def _shown(there: Cluster) -> tuple[list[str], list[str]]:
    """Addresses in the pools' status, whose counts have to agree, and those in endpoints."""
    in_pools = []
    for pool in _items(there, f"{API}/spiderippools"):
        status = pool.get("status", {})
        allocated = json.loads(status.get("allocatedIPs") or "{}")
        if status.get("allocatedIPCount", 0) != len(allocated):
            in_pools.append(f"{pool['metadata']['name']}: {status}")
        in_pools += allocated
    endpoints = [item["status"]["current"] for item in _items(there, f"{API}/spiderendpoints")]
    nics = [nic for current in endpoints for nic in current["ips"]]
    ours = [nic[family].partition("/")[0] for nic in nics for family in ("ipv4", "ipv6") if nic.get(family)]
    return sorted(in_pools), sorted(ours)


def _items(there: Cluster, path: str) -> list[Json]:
    status, answer = there.ask(path)
    assert status == 200, f"{path}: {status} {answer}"
    return list(answer["items"])


def settle(there: Cluster, seconds: float = 60, **wanted: int) -> list[Pod]:
    """Wait until just so many pods of each app run, all ready, and just their addresses are taken."""
    found: list[Pod] = []

    def settled() -> bool:
        listed = pods(there)
        found[:] = [_pod(item) for item in listed if _ready(item)]
        counts = {app: sum(pod.app == app for pod in found) for app in wanted}
        held = {(address, pod.uid) for pod in found for address in pod.addresses}
        return counts == wanted and len(found) == len(listed) == sum(wanted.values()) and claims(there) == held

    until(there, settled, seconds, f"{wanted or 'no pods'}, and the claims of just these")
    addresses = [address for pod in found for address in pod.addresses]
    assert len(set(addresses)) == len(addresses) == 2 * len(found)
    for address in map(ip_address, addresses):
        first, last = POOLS[address.version]
        assert int(first) <= int(address) <= int(last), address
    return found


def running(there: Cluster, *apps: str, count: int = 1, seconds: float = 60) -> list[Pod]:
    """Wait until `count` pods of each app run and are ready; they, by name."""
    found: list[Pod] = []

    def run_all() -> bool:
        found[:] = sorted((_pod(item) for item in pods(there) if _ready(item)), key=lambda pod: pod.name)
        return all(sum(pod.app == app for pod in found) == count for app in apps)

    until(there, run_all, seconds, f"{count} pods of {', '.join(apps)} run")
    return [pod for pod in found if pod.app in apps]


def named(found: list[Pod], name: str) -> Pod:
    """The pod of that name."""
    (pod,) = [pod for pod in found if pod.name == name]
    return pod


def untouched(there: Cluster, before: dict[str, set[str]], seconds: float = 20) -> None:
    """Wait until the nodes have just the traces that they had."""
    deadline = time.monotonic() + seconds
    while (now := {name: traces(there, name) for name in NAMES}) != before:
        changed = {name: sorted(now[name] ^ before[name]) for name in NAMES}
        assert time.monotonic() < deadline, f"left or lost after {seconds:g} s: {changed}\n{report(there)}"
        time.sleep(_LOOK_EVERY)


def until(there: Cluster, holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something; what there is instead is in the failure."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{report(there)}"
        time.sleep(_LOOK_EVERY)


def _ready(item: Json) -> bool:
    conditions = item["status"].get("conditions", ())
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return ready and "deletionTimestamp" not in item["metadata"]


def _pod(item: Json) -> Pod:
    meta, status = item["metadata"], item["status"]
    addresses = tuple(str(each["ip"]) for each in status.get("podIPs", ()))
    return Pod(meta.get("labels", {}).get("app", ""), meta["name"], meta["uid"], item["spec"]["nodeName"], addresses)


def report(there: Cluster) -> str:
    """Pods, claims, warnings, and the ends of the logs."""
    lines = [there.kubectl("get", "pods,spideripclaims", "-A", "-o", "wide")]
    lines.append(there.kubectl("get", "events", "-A", "--field-selector=type=Warning"))
    logs = [f"{each}-{part}" for each in NAMES for part in ("multus", "agent", "kubelet")]
    logs.append(controller.NAME)
    lines += [f"{name}:\n{last_lines(there.place.lab.log(name))}" for name in logs]
    return "\n".join(lines)


def traces(there: Cluster, each: str) -> set[str]:
    """What the node's network namespace, runtime and queue have of pods: equal sets mean that nothing was left."""
    lab = there.place.lab
    seen = set()
    for kind, arguments in LOOKS:
        for line in run(["ip", "-n", lab.netns(each), *arguments]).splitlines():
            text = line.split(":")[1].strip() if kind == "link" else " ".join(line.split())
            if "fe80::" not in text:  # comes seconds after its link, and goes with it
                seen.add(f"{kind} {text}")
    # What Multus remembers of a DEL that failed for want of the API server it remembers for good.
    look = ("find", "/run/netns", "/var/lib/cni", "/var/lib/spidernet", "-type", "f", "-not", "-path", "*/multus/*")
    seen.update(run(node.on_node(there, each, *look)).splitlines())
    return seen


def queued(there: Cluster, each: str) -> list[str]:
    """DELs that wait for the node's agent."""
    return run(node.on_node(there, each, "find", network.AGENT_QUEUE, "-name", "*.call")).split()


def ask(there: Cluster, each: str, address: str, port: int = 8080, pod: Pod | None = None) -> str:
    """What a web server answers a process of the node, or of its pod's network: one that our socket hooks catch."""
    host = f"[{address}]" if ":" in address else address
    code = f"import urllib.request as u; print(u.urlopen('http://{host}:{port}/', timeout=5).read().decode(), end='')"
    where = [] if pod is None else ["nsenter", f"--net={_netns(there, pod)}"]
    inside = entering(cgroup(there.place.lab, each, "system"))
    return run(node.on_node(there, each, *where, "/usr/bin/python3", "-I", "-S", "-c", code), before=inside)


def inside(there: Cluster, pod: Pod, *argv: str) -> str:
    """What a program of the node says in the pod's network namespace."""
    return run(node.on_node(there, pod.node, "nsenter", f"--net={_netns(there, pod)}", *argv))


def _netns(there: Cluster, pod: Pod) -> str:
    """Path of the pod's network namespace, on its node."""
    for name in run(node.on_node(there, pod.node, "ls", "/run/netns")).split():
        listing = node.on_node(there, pod.node, "nsenter", f"--net=/run/netns/{name}", "ip", "-o", "address")
        if f" {pod.addresses[0]}/" in run(listing):
            return f"/run/netns/{name}"
    raise AssertionError(f"no network namespace on {pod.node} has {pod.addresses[0]}")
