"""Upstream's cases that need a pod with a network of its own: on the lab's kubelets, by our controller and agents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_address

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.kube import controller, image
from lab.kube.cluster import Cluster
from lab.kube.components import CONTROLLERS
from lab.layout import NODE_ADDRESS, LabError
from lab.nodes import METRICS_PORT, http_get
from tests.kube.node_rig import API, NAMES, Json, Pod, ask, claims, inside, named, pods, running, until, views, workload
from tests.kube.test_server import apply, get

RANGES = {
    "web-a": ("172.20.0.0/24", "172.20.0.180-172.20.0.183", "172.20.0.1"),
    "web-b": ("fd00:20::/64", "fd00:20::180-fd00:20::183", "fd00:20::1"),
}
"""Pools beside the default ones: network, addresses, gateway."""
POOLS_OF_BOTH = {"ipam.spidernet.io/ippool": json.dumps({"ipv4": ["web-a"], "ipv6": ["web-b"]})}
STAND_IN = "apps.kruise-stand-in.example"
"""Group of kinds that stand in for OpenKruise's: without their controllers, whose pods the test makes."""


def pool(name: str, **spec: object) -> Json:
    subnet, ips, gateway = RANGES[name]
    content: Json = {"subnet": subnet, "ips": [ips], "gateway": gateway} | spec
    return {
        "apiVersion": API.removeprefix("/apis/"),
        "kind": "SpiderIPPool",
        "metadata": {"name": name},
        "spec": content,
    }


def pod(name: str, annotations: Json, *, node: str = "", ports: tuple[int, ...] = (8080,), **metadata: object) -> Json:
    """A pod with a web server for each port."""
    serve = [{"command": ["/bin/busybox", "httpd", "-f", "-p", str(port), "-h", "/www"]} for port in ports]
    common = {"image": image.WEB, "imagePullPolicy": "Never"}
    spec: Json = {
        "terminationGracePeriodSeconds": 1,
        "containers": [common | command | {"name": f"web-{port}"} for port, command in zip(ports, serve, strict=True)],
    }
    if node:
        spec["nodeName"] = node
    meta = {"name": name, "annotations": annotations, "labels": {"app": name}} | metadata
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


@pytest.fixture
def own_pools(there: Cluster) -> Iterator[None]:
    """Pools beside the default ones. They go when their pods do, by themselves: the controller lets them."""
    for name in RANGES:
        apply(there, pool(name))
    yield
    there.kubectl("delete", "pods", "--all", "--timeout=30s")
    there.kubectl("delete", "spiderippools", *RANGES, "--timeout=30s")


def assert_from(found: Pod, names: tuple[str, ...] = ("web-a", "web-b")) -> None:
    for address, name in zip(found.addresses, names, strict=True):
        first, last = map(ip_address, RANGES[name][1].split("-"))
        assert int(first) <= int(ip_address(address)) <= int(last), address


@pytest.mark.upstream("A00008")
@pytest.mark.usefixtures("own_pools")
def test_containers_of_an_annotated_pod_share_its_addresses(there: Cluster) -> None:
    apply(there, pod("two", POOLS_OF_BOTH, ports=(8080, 8081)))
    (found,) = running(there, "two")
    assert_from(found)
    assert claims(there) == {(address, found.uid) for address in found.addresses}
    for address in found.addresses:
        for port in (8080, 8081):
            assert ask(there, found.node, address, port) == "ok\n"
    views(there, [found])


@pytest.mark.upstream("D00002")
@pytest.mark.usefixtures("own_pools")
def test_changed_routes_and_gateways_are_for_new_pods(there: Cluster) -> None:
    there.kubectl("patch", "spiderippool/web-a", "--type=merge", "-p", json.dumps(_routes("198.51.100.0/24")))
    apply(there, pod("old", POOLS_OF_BOTH, node="node1"))
    (old,) = running(there, "old")
    before = _route_table(there, old)
    assert before["default"] == RANGES["web-a"][2] == before["198.51.100.0/24"]
    gateway = NODE_ADDRESS["node2"].v4
    changed = _routes("203.0.113.0/24", gateway)
    there.kubectl("patch", "spiderippool/web-a", "--type=merge", "-p", json.dumps(changed))
    # The agent hears of it by a watch.
    until(there, lambda: _knows_gateway(there, gateway), 10, "the pool has its new gateway")
    apply(there, pod("new", POOLS_OF_BOTH, node="node1"))
    (new,) = running(there, "new")
    after = _route_table(there, new)
    assert after["default"] == gateway == after["203.0.113.0/24"]
    assert "198.51.100.0/24" not in after
    assert _route_table(there, old) == before


def _routes(destination: str, gateway: str = "172.20.0.1") -> Json:
    return {"spec": {"gateway": gateway, "routes": [{"dst": destination, "gw": gateway}]}}


def _knows_gateway(there: Cluster, gateway: str) -> bool:
    return bool(there.ask(f"{API}/spiderippools/web-a")[1]["spec"]["gateway"] == gateway)


def _route_table(there: Cluster, found: Pod) -> dict[str, str]:
    """The pod's IPv4 routes by a gateway on its own NIC."""
    listed = inside(there, found, "ip", "-4", "-j", "route", "show", "dev", "eth0")
    return {route["dst"]: route["gateway"] for route in json.loads(listed) if "gateway" in route}


@pytest.fixture(scope="module")
def third_party(nodes: Cluster) -> Iterator[Callable[[str, str], Json]]:
    """Makes objects of third parties' kinds, and tells their pods' reference to them."""
    for kind in ("CloneSet", "StatefulSet"):
        plural = f"{kind.lower()}s"
        names = {"kind": kind, "plural": plural, "singular": kind.lower()}
        schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        version = {"name": "v1beta1", "served": True, "storage": True, "schema": schema}
        spec = {"group": STAND_IN, "scope": "Namespaced", "names": names, "versions": [version]}
        meta = {"name": f"{plural}.{STAND_IN}"}
        kinds = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
        apply(nodes, kinds | {"metadata": meta, "spec": spec})
    definitions = [f"crd/{kind}s.{STAND_IN}" for kind in ("cloneset", "statefulset")]
    nodes.kubectl("wait", "--for=condition=Established", *definitions, "--timeout=30s")
    # Kubernetes' garbage collector learns of new kinds every 30 s, or when it starts.
    nodes.stop(CONTROLLERS)
    nodes.start(CONTROLLERS)

    def new(kind: str, name: str) -> Json:
        document = {"apiVersion": f"{STAND_IN}/v1beta1", "kind": kind, "metadata": {"name": name}}
        plural = f"{kind.lower()}s.{STAND_IN}"
        until(nodes, partial(_applied, nodes, document), 10, f"{plural} are served")
        uid = json.loads(nodes.kubectl("get", plural, name, "-o", "json"))["metadata"]["uid"]
        kinds = {"apiVersion": f"{STAND_IN}/v1beta1", "kind": kind}
        return kinds | {"name": name, "uid": uid, "controller": True}

    yield new
    nodes.kubectl("delete", *definitions, "--timeout=30s")


def _applied(there: Cluster, document: Json) -> bool:
    try:
        apply(there, document)
    except LabError:
        return False
    return True


@pytest.mark.upstream("T00001", "T00003")
@pytest.mark.parametrize("kind", ["CloneSet", "StatefulSet"])
@pytest.mark.usefixtures("own_pools")
def test_third_parties_pods(there: Cluster, third_party: Callable[[str, str], Json], kind: str) -> None:
    """They have addresses of the pools they name, and lose them; a kind called StatefulSet is no StatefulSet."""
    owner = third_party(kind, "theirs")
    for name in ("theirs-0", "theirs-1"):
        apply(there, pod(name, POOLS_OF_BOTH, ownerReferences=[owner]))
    found = running(there, "theirs-0", "theirs-1")
    for each in found:
        assert_from(each)
    views(there, found)
    for claim in there.ask(f"{API}/spideripclaims")[1]["items"]:
        top = claim["spec"]["workload"]["controller"]
        assert (top["apiVersion"], top["kind"], top["uid"]) == (owner["apiVersion"], kind, owner["uid"])
    there.kubectl("delete", "pod", "theirs-0", "--timeout=30s")
    left = named(found, "theirs-1")
    until(there, lambda: claims(there) == {(address, left.uid) for address in left.addresses}, 20, "one pod's claims")
    there.kubectl("delete", f"{kind.lower()}s.{STAND_IN}", "theirs", "--timeout=30s")
    until(there, lambda: not pods(there) and not claims(there), 80, "nothing is left of it")
    views(there, [])


def _samples(text: str) -> dict[str, float]:
    """Sums of a metric's series by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def _agents(there: Cluster) -> dict[str, float]:
    """The agents' metrics, added up."""
    sums: dict[str, float] = {}
    for name in NAMES:
        status, text = http_get(there.place.lab, name, METRICS_PORT, "/metrics")
        assert status == 200
        for key, value in _samples(text).items():
            sums[key] = sums.get(key, 0) + value
    return sums


def _controllers(there: Cluster) -> dict[str, float]:
    status, text = controller.get(there, "/metrics", "metrics_port")
    assert status == 200
    return _samples(text)


@pytest.mark.upstream("K00001")
def test_metrics_tell_what_happened(there: Cluster) -> None:
    """Upstream's names, on which its dashboards and alerts are built."""
    agents, before = _agents(there), _controllers(there)
    apply(there, workload("StatefulSet", "db", 2))
    found = running(there, "db", count=2)
    views(there, found)
    now = _controllers(there)
    total, free = "spiderpool_debug_ippool_total_ip_counts", "spiderpool_debug_ippool_available_ip_counts"
    assert now["spiderpool_total_ippool_counts"] == len(get(there, "spiderippools")["items"])  # type: ignore[arg-type]
    assert (now[total], now[total] - now[free]) == (before[total], 2 * len(found))
    # What keeps an address for its next pod until nobody wants that one: then only the controller can free it.
    there.stop(CONTROLLERS)
    there.kubectl("delete", "pod", "db-1", "--timeout=30s")
    assert claims(there) == {(address, each.uid) for each in found for address in each.addresses}
    there.kubectl("delete", "statefulset/db", "--timeout=30s")
    stays = named(found, "db-0")
    until(there, lambda: claims(there) == {(address, stays.uid) for address in stays.addresses}, 30, "db-1's are free")
    there.start(CONTROLLERS)
    until(there, lambda: not claims(there), 30, "all addresses are free")
    after = _agents(there)
    for name in ("spiderpool_ipam_allocation", "spiderpool_ipam_release"):
        for metric in (f"{name}_counts_total", f"{name}_duration_seconds_count"):
            assert after[metric] - agents[metric] >= len(found), metric
        assert after[f"{name}_failure_counts_total"] == agents[f"{name}_failure_counts_total"]
        assert after[f"{name}_latest_duration_seconds"] > 0
    now = _controllers(there)
    assert now["spiderpool_ip_gc_counts_total"] - before["spiderpool_ip_gc_counts_total"] == 2
    assert now["spiderpool_ip_gc_failure_counts_total"] == before["spiderpool_ip_gc_failure_counts_total"]
