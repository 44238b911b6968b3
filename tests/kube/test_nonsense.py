"""Objects that got in before there was a webhook, or even a schema, break nothing but themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.meta import GROUP, VERSION
from lab.kube.cluster import CRDS, Cluster
from tests.kube.conftest import running
from tests.kube.controller_rig import API, POOLS, SUBNETS, Json, Requests, eventually
from tests.kube.outage_rig import CORE, POOL, SUBNET, furnish, site

CLAIMS, ENDPOINTS, RESERVED = "spideripclaims", "spiderendpoints", "spiderreservedips"
CONFIGS, COORDINATORS = "spidermultusconfigs", "spidercoordinators"
KINDS = {
    POOLS: "SpiderIPPool",
    SUBNETS: "SpiderSubnet",
    RESERVED: "SpiderReservedIP",
    CLAIMS: "SpiderIPClaim",
    ENDPOINTS: "SpiderEndpoint",
    CONFIGS: "SpiderMultusConfig",
    COORDINATORS: "SpiderCoordinator",
}
NAMESPACED = (ENDPOINTS, CONFIGS)
ON_NODE = {"ipam.spidernet.io/node": "node1"}
ON_POOL = {"ipam.spidernet.io/pool": POOL, **ON_NODE}


def broken(plural: str) -> list[Any]:
    """Contents that break the types of any kind."""
    member = "status" if plural == ENDPOINTS else "spec"
    return [
        {member: "text"},
        {member: ["list"]},
        {member: {"subnet": 5, "ips": "no list", "ipVersion": "four", "address": {}, "cniType": 7, "current": 1}},
        {member: {"ips": [None, 5], "podAffinity": "all", "mode": [], "workload": "me", "macvlan": 1}, "status": 3},
        {},
    ]


def fake_claim(address: str, **spec: Any) -> Json:
    return {"labels": ON_POOL, "spec": {"address": address, "ipVersion": 4, "pool": POOL, "podUID": "u", **spec}}


def valid(plural: str) -> list[Any]:
    """Contents that a schema lets through, and that make no sense."""
    quarantine = {"reason": "", "mac": "", "until": "9999-12-31T23:59:59Z"}
    contents: dict[str, list[Any]] = {
        POOLS: [
            {"spec": {"subnet": "nonsense"}},
            {"spec": {"subnet": "10.72.0.0/24", "ips": ["10.72.0.9-10.72.0.1", "x", ""], "excludeIPs": ["-"]}},
            {"spec": {"subnet": "10.73.0.0/24", "ips": ["10.99.0.1"], "gateway": "gw", "default": True}},
            {
                "spec": {
                    "subnet": "10.74.0.0/24",
                    "ipVersion": 6,
                    "ips": ["10.74.0.1"],
                    "podAffinity": {"matchExpressions": [{"key": "a b", "operator": "Like", "values": []}]},
                    "default": True,
                }
            },
            {
                "spec": {
                    "subnet": "10.76.0.0/24",
                    "ips": ["10.76.0.1"],
                    "gateway": "no address",
                    "routes": [{"dst": "x", "gw": "y"}],
                    "default": True,
                }
            },
            {"spec": {"subnet": "10.75.0.0/24", "ips": ["10.75.0.1"]}, "status": {"allocatedIPs": "{nonsense"}},
            {
                "labels": {"ipam.spidernet.io/owner-spider-subnet": "nowhere", "ipam.spidernet.io/ip-version": "IPv9"},
                "annotations": {"ipam.spidernet.io/ippool-ip-number": "many"},
                "spec": {"subnet": "10.71.0.0/24", "podAffinity": {"matchLabels": {}}},
            },
        ],
        SUBNETS: [
            {"spec": {"subnet": "nonsense", "ips": ["10.0.0.1"]}},
            {"spec": {"subnet": "10.77.0.0/24", "ips": ["z-a", "10.78.0.1"], "gateway": "gw"}},
            {"spec": {"subnet": "10.79.0.0/24"}, "status": {"controlledIPPools": "[nonsense"}},
        ],
        RESERVED: [
            {"spec": {"ips": ["nonsense", "10.0.0.9-10.0.0.1"]}},
            {"spec": {"ipVersion": 6, "ips": ["10.0.0.1"]}},
        ],
        CLAIMS: [
            # In quarantine for ever, or of containers that only their agent knows: nobody takes these away.
            fake_claim("nonsense", state="Quarantined", quarantine=quarantine),
            fake_claim("fd00::1", state="Quarantined", quarantine=quarantine),
            fake_claim("10.70.0.300", podUID="", containerID="c", nic="eth0", node="node1", setSize=2),
            fake_claim("10.70.0.10", state="Quarantined", quarantine=quarantine),
            fake_claim("", podUID="", containerID="d", node="node1", workload={"namespace": "A B", "name": "../x"}),
            fake_claim("nowhere", pool="no such pool/at all", workload={"namespace": "A B", "name": "../x"}),
            {"labels": ON_NODE, "spec": {"address": "", "ipVersion": 6, "pool": "", "netns": "/", "setSize": -5}},
        ],
        ENDPOINTS: [
            {
                "status": {
                    "current": {"uid": "u", "node": "node1", "ips": [{"interface": "", "ipv4": "x", "ipv4Pool": "y"}]},
                    "ownerControllerType": "Pod",
                    "ownerControllerName": "p",
                }
            }
        ],
        CONFIGS: [
            {"spec": {"cniType": "macvlan"}},
            {"spec": {"cniType": "custom", "customCNI": "{nonsense"}},
            {"spec": {"cniType": "vlan", "vlan": {"master": ["a b", ""], "vlanID": 1}}},
            {"spec": {"cniType": "macvlan", "macvlan": {"master": ["eth0"], "ippools": {"ipv4": ["", "../x"]}}}},
        ],
        COORDINATORS: [{"spec": {"mode": "underlay", "hijackCIDR": ["nonsense"], "podMACPrefix": "zz"}}],
    }
    return contents[plural]


def loosen(cluster: Cluster) -> None:
    """Our definitions as somebody may have had them who wanted no trouble with schemas."""
    documents = []
    for path in sorted(Path(CRDS).glob("*.yaml")):
        document = yaml.safe_load(path.read_text())
        for version in document["spec"]["versions"]:
            version["schema"] = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
            version["subresources"] = {}  # so that status is stored with the rest
        documents.append(document)
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=text)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", "-", stdin=text)


def collection(plural: str) -> str:
    return f"{API}/namespaces/default/{plural}" if plural in NAMESPACED else f"{API}/{plural}"


def store(ask: Requests, plural: str, name: str, content: Json) -> None:
    labels, notes = content.pop("labels", {}), content.pop("annotations", {})
    metadata = {"name": name, "labels": labels, "annotations": notes}
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KINDS[plural], "metadata": metadata, **content}

    def stored() -> bool:
        status, answer = ask("POST", collection(plural), body)
        assert status in (201, 404, 429), answer
        return status == 201

    eventually(20, stored, f"{plural} {name} is stored")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster that is full of nonsense."""
    with running(crds=False) as there:
        loosen(there)
        ask = Requests(there)
        for plural in KINDS:
            for i, content in enumerate(broken(plural)):
                store(ask, plural, f"broken{i}", content)
            if plural == CLAIMS:
                store(ask, plural, "10.70.0.11", {"spec": "text"})
            for i, content in enumerate(valid(plural)):
                store(ask, plural, f"valid{i}", content)
        there.apply_crds()
        yield there


def ready_condition(ask: Requests, plural: str, name: str) -> Json:
    conditions = (ask("GET", f"{API}/{plural}/{name}")[1].get("status") or {}).get("conditions") or [{}]
    return next((each for each in conditions if each.get("type") == "Ready"), {})


def test_everything_else_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    with site(cluster, tmp_path, "--ipam-partial-grace=0.5") as there:
        first = there.launch("one")
        there.ready(first)
        eventually(20, lambda: there.holder() == "one", "it leads")
        furnish(there)
        ask = there.ask

        # Agents give addresses, of the good pool and of none that is nonsense, and take them back.
        pods = [there.pod(f"p{n}", f"node{n % 2 + 1}") for n in range(6)]
        given = {there.add(pod) for pod in pods}
        assert len(given) == 6
        assert all(address.startswith("10.70.0.") for address in given)
        assert not given & {"10.70.0.10", "10.70.0.11"}, "somebody's claim is on it"
        lost = there.pod("lost", "node1")
        address = there.add(lost)
        there.delete(lost)
        eventually(20, lambda: there.free(address), "the address of a pod that is gone was reclaimed")

        # So do the leader's duties.
        there.application("app")
        eventually(20, lambda: there.has_pool("app"), "an automatic pool was made")
        there.network("lan")
        eventually(10, lambda: ready_condition(ask, POOLS, POOL).get("status") == "True", "the good pool is ready")
        eventually(10, lambda: ready_condition(ask, SUBNETS, SUBNET).get("status") == "True", "the good subnet is")

        # Nonsense says so itself.
        for i in (0, 1, 2, 3, 4):
            eventually(
                10,
                lambda i=i: ready_condition(ask, POOLS, f"valid{i}").get("status") == "False",  # type: ignore[misc]
                f"pool valid{i} is said to be unusable",
            )
        for name in ("valid0", "valid1"):
            eventually(
                10,
                lambda name=name: ready_condition(ask, SUBNETS, name).get("status") == "False",  # type: ignore[misc]
                f"subnet {name} is said to be unusable",
            )
        for plural in (POOLS, CLAIMS):
            found = [line for line in first.lines("it cannot be read") if KINDS[plural] in line["message"]]
            assert found, f"{plural} that cannot be read are named in the log"

        # Who names a pool that is nonsense, or has a claim that is, is told, and nobody else suffers.
        eventually(20, lambda: described(cluster, "valid0"), "an event tells of a configuration")

        # It can be removed, and nobody hangs on to it.
        for plural in KINDS:
            for i in range(len(broken(plural))):
                path = f"{collection(plural)}/broken{i}"
                status, answer = ask("DELETE", path)
                assert status == 200, (path, answer)
                eventually(20, lambda path=path: ask("GET", path)[0] == 404, path)  # type: ignore[misc]
        for i in range(len(valid(POOLS))):
            ask("DELETE", f"{API}/{POOLS}/valid{i}")
        ask.merge(POOLS, POOL, {"spec": {"ips": ["10.70.0.10-10.70.0.20"]}})
        taken = {there.add(there.pod(f"last{n}", "node2")) for n in range(3)}
        assert len(taken) == 3

        # Nobody died, nobody spins.
        there.alive(first)
        busy = [cpu_seconds(process.pid) for process in (first.process, *(a.process for a in there.agents.values()))]
        began = time.monotonic()
        eventually(4, lambda: time.monotonic() - began > 2, "time passes")
        after = [cpu_seconds(process.pid) for process in (first.process, *(a.process for a in there.agents.values()))]
        print(f"CPU seconds within two seconds: {[round(b - a, 2) for a, b in zip(busy, after, strict=True)]}")
        assert all(b - a < 1 for a, b in zip(busy, after, strict=True))
        assert not [line for line in first.lines("") if line["level"] == "critical"]
        assert ask("GET", f"{CORE}/nodes/node1")[0] == 200


def described(cluster: Cluster, name: str) -> bool:
    return "InvalidConfiguration" in cluster.kubectl("describe", "spidermultusconfig", name)


def cpu_seconds(pid: int) -> float:
    """What the process has used of a CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
