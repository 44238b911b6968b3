"""One manifest of every kind as users apply it, through a real API server and the whole controller: what is stored,
what the controllers make of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lab.kube.cluster import NETWORKS, Cluster
from tests.kube.conftest import running
from tests.kube.controller_rig import (
    API,
    POOLS,
    RESERVED,
    SUBNETS,
    Json,
    Replica,
    Requests,
    controllers,
    eventually,
    manifest,
)

HOME = "spiderpool"
SHOP = "web"
COORDINATORS, CONFIGS = "spidercoordinators", f"namespaces/{HOME}/spidermultusconfigs"
PATHS = {
    "SpiderSubnet": SUBNETS,
    "SpiderIPPool": POOLS,
    "SpiderReservedIP": RESERVED,
    "SpiderCoordinator": COORDINATORS,
    "SpiderMultusConfig": CONFIGS,
    "SpiderEndpoint": f"namespaces/{SHOP}/spiderendpoints",
}

SUBNET = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderSubnet
metadata: {name: office-v4}
spec:
  subnet: 172.30.40.0/24
  ips: [172.30.40.10-172.30.40.150, 172.30.40.151-172.30.40.200]
  excludeIPs: [172.30.40.199]
  gateway: 172.30.40.1
  routes: [{dst: 10.90.0.0/16, gw: 172.30.40.2}]
"""
POOL = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: web-v4}
spec:
  subnet: 172.30.40.0/24
  ips: [172.30.40.120, 172.30.40.10-172.30.40.60, 172.30.40.61-172.30.40.99]
  excludeIPs: [172.30.40.50-172.30.40.54]
  podAffinity:
    matchExpressions: [{key: tier, operator: In, values: [web, edge]}]
  namespaceAffinity: {matchLabels: {team: shop}}
  namespaceName: [web]
  nodeAffinity: {matchLabels: {zone: a}}
  nodeName: [node-1, node-2]
  multusName: [macvlan-web, web/macvlan-lab]
  default: false
  disable: false
"""
POOL_V6 = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: web-v6}
spec: {subnet: "fd00:40::/64", ips: ["fd00:40::10-fd00:40::4f"], gateway: "fd00:40::1"}
"""
PRINTERS = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderReservedIP
metadata: {name: printers}
spec: {ips: [172.30.40.11, 172.30.40.90-172.30.40.95]}
"""
COORDINATOR = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderCoordinator
metadata: {name: default}
spec:
  mode: auto
  podCIDRType: auto
  hijackCIDR: [169.254.25.10, 169.254.0.0/16]
  policyRoutes: [{dst: 10.200.0.5, gw: 172.30.40.1}]
  podMACPrefix: "0a:1b"
  podDefaultRouteNIC: eth0
  vethLinkAddress: 169.254.100.1
"""
CONFIG = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderMultusConfig
metadata:
  name: macvlan-web
  namespace: spiderpool
  annotations:
    multus.spidernet.io/cni-version: 0.4.0
    cni.spidernet.io/cniconfig-name: web-underlay
    cni.spidernet.io/network-resource-inject: web-net
spec:
  cniType: macvlan
  enableCoordinator: true
  disableIPAM: false
  macvlan:
    master: [ens224, ens225]
    bond: {name: bond0, mode: 1, options: "primary=ens224;miimon=100"}
    vlanID: 40
    mtu: 1400
    rdmaResourceName: ""
    ippools: {ipv4: [web-v4], ipv6: [web-v6]}
  coordinator: {mode: underlay, hijackCIDR: [169.254.0.0/16], podDefaultRouteNIC: net1, vethMTU: 1400}
  chainCNIJsonData: ['{"type":"sbr"}']
"""
ENDPOINT = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderEndpoint
metadata: {name: front-7c9d8-x2lqp, namespace: web, finalizers: [spiderpool.spidernet.io]}
status:
  ownerControllerType: Deployment
  ownerControllerName: front
  current:
    uid: 0b7f7a52-9a1e-4c39-8a60-7f2f0a5d1c11
    node: node-1
    ips:
      - interface: eth0
        ipv4: 172.30.40.10/24
        ipv4Pool: web-v4
        ipv4Gateway: 172.30.40.1
        ipv6: fd00:40::10/64
        ipv6Pool: web-v6
        ipv6Gateway: "fd00:40::1"
        cleanGateway: false
        vlan: 0
        routes: [{dst: 10.90.0.0/16, gw: 172.30.40.2}]
      - {interface: "", ipv4: 172.31.0.7/24, ipv4Pool: storage-v4, vlan: 7, mac: "02:4a:00:00:00:07"}
"""
NETWORK_TEXT = (
    '{"cniVersion":"0.4.0","name":"web-underlay","plugins":['
    '{"vlanID":40,"type":"ifacer","interfaces":["ens224","ens225"],'
    '"bond":{"name":"bond0","mode":1,"options":"primary=ens224;miimon=100"}},'
    '{"type":"macvlan","master":"bond0.40","mode":"bridge","mtu":1400,"ipam":{"type":"spiderpool",'
    '"default_ipv4_ippool":["web-v4"],"default_ipv6_ippool":["web-v6"]}},'
    '{"type":"sbr"},'
    '{"txQueueLen":0,"vethMTU":1400,"tunePodRoutes":true,"mode":"underlay","type":"coordinator",'
    '"podDefaultRouteNic":"net1","hijackCIDR":["169.254.0.0/16"]}]}'
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as there:
        there.kubectl("apply", "--server-side", "-f", NETWORKS)
        for name in (HOME, SHOP):
            there.kubectl("create", "namespace", name)
        stored_before(Requests(there))
        yield there


OLD: dict[str, Json] = {
    "old": {"subnet": "10.60.0.0/24", "ips": ["10.60.0.9"], "vlan": 12, "gateway": None, "routes": None},
    "broken": {"subnet": "10.61.0.0/24", "ips": ["10.61.0.9"], "ipVersion": 5},
}
"""Pools of a time when the kind had another schema, or none."""


def stored_before(ask: Requests) -> None:
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{POOLS}.spiderpool.spidernet.io"
    definition = ask("GET", path)[1]
    schema: Json = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = schema["properties"]["spec"]
    schema["properties"]["spec"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    assert ask("PUT", path, definition)[0] == 200
    probe = manifest(POOLS, "probe", **OLD["broken"])
    eventually(10, lambda: ask("POST", f"{API}/{POOLS}?dryRun=All", probe)[0] == 201, "the schema is lax")
    for name, content in OLD.items():
        assert ask("POST", f"{API}/{POOLS}", manifest(POOLS, name, **content))[0] == 201
    definition = ask("GET", path)[1]
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = spec
    assert ask("PUT", path, definition)[0] == 200
    eventually(10, lambda: "vlan" not in ask("GET", f"{API}/{POOLS}/old")[1]["spec"], "the schema is strict")


@pytest.fixture(scope="module")
def controller(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """The controller, in a cluster where the accepted manifests have been applied."""
    directory = tmp_path_factory.mktemp("cni")
    (directory / "10-flannel.conflist").write_text('{"name": "flannel", "plugins": []}')
    requests = Requests(cluster)
    with controllers(cluster, tmp_path_factory.mktemp("controller")) as launch:
        # The claims of this module are nobody's.
        replica = launch("examples", "--reclaim-enabled=false", f"--coordinator-cni-directory={directory}")
        eventually(20, lambda: replica.probe() == 200, "the controller is ready")
        wrong, path = manifest(POOLS, "probe", subnet="nonsense"), f"{API}/{POOLS}?dryRun=All"
        eventually(10, lambda: requests("POST", path, wrong)[0] == 422, "the webhook is asked")
        requests("POST", "/api/v1/namespaces/kube-system/configmaps", KUBEADM)
        for text in (SUBNET, POOL, POOL_V6, PRINTERS, COORDINATOR, CONFIG, ENDPOINT):
            status, answer = created(requests, yaml.safe_load(text))
            assert status == 201, answer
        assert requests("POST", f"/apis/apps/v1/namespaces/{SHOP}/deployments", DEPLOYMENT)[0] == 201
        yield replica


@pytest.fixture
def ask(cluster: Cluster, controller: Replica) -> Requests:
    return Requests(cluster)


KUBEADM: Json = {
    "metadata": {"name": "kubeadm-config"},
    "data": {
        "ClusterConfiguration": "networking:\n  podSubnet: 10.244.0.0/16,fd00:10:244::/56\n"
        "  serviceSubnet: 10.96.0.0/12\n"
    },
}
DEPLOYMENT: Json = {
    "metadata": {"name": "shop"},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "shop"}},
        "template": {
            "metadata": {
                "labels": {"app": "shop"},
                "annotations": {
                    "ipam.spidernet.io/subnet": '{"ipv4":["office-v4"]}',
                    "ipam.spidernet.io/ippool-ip-number": "+1",
                },
            },
            "spec": {"containers": [{"name": "c", "image": "lab.invalid/none:1"}]},
        },
    },
}


def created(ask: Requests, body: Json) -> tuple[int, Json]:
    return ask("POST", f"{API}/{PATHS[body['kind']]}", body)


def stored(ask: Requests, plural: str, name: str) -> Json:
    """The object without what every API server adds."""
    status, answer = ask("GET", f"{API}/{plural}/{name}")
    assert status == 200, answer
    for member in ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields"):
        del answer["metadata"][member]
    return answer


def owned_by_the_subnet(ask: Requests) -> list[Json]:
    uid = ask("GET", f"{API}/{SUBNETS}/office-v4")[1]["metadata"]["uid"]
    kind = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderSubnet", "name": "office-v4"}
    return [kind | {"uid": uid, "controller": True, "blockOwnerDeletion": True}]


def automatic(ask: Requests) -> str:
    """Name of the Deployment's pool."""
    uid: str = ask("GET", f"/apis/apps/v1/namespaces/{SHOP}/deployments/shop")[1]["metadata"]["uid"]
    name = f"auto4-shop-eth0-{uid.rpartition('-')[2][:5]}"
    eventually(
        20,
        lambda: ask("GET", f"{API}/{POOLS}/{name}")[1].get("spec", {}).get("ips"),
        f"{name} has addresses",
    )
    return name


class TestAccepted:
    def test_subnet(self, ask: Requests) -> None:
        pool = automatic(ask)
        given = {
            pool: {"ips": ["172.30.40.50-172.30.40.52"], "application": "apps_v1_Deployment_web_shop"},
            "web-v4": {"ips": ["172.30.40.10-172.30.40.49", "172.30.40.55-172.30.40.99", "172.30.40.120"]},
        }
        eventually(
            10,
            lambda: stored(ask, SUBNETS, "office-v4").get("status", {}).get("allocatedIPCount") == 89,
            "the ledger is complete",
        )
        found = stored(ask, SUBNETS, "office-v4")
        assert found["metadata"] == {
            "name": "office-v4",
            "finalizers": ["spiderpool.spidernet.io"],
            "labels": {"ipam.spidernet.io/subnet-cidr": "172-30-40-0-24"},
        }
        assert found["spec"] == {
            **yaml.safe_load(SUBNET)["spec"],
            "ipVersion": 4,
            "ips": ["172.30.40.10-172.30.40.200"],
        }
        status = found["status"]
        assert (status["totalIPCount"], status["allocatedIPCount"]) == (190, 89)
        assert json.loads(status["controlledIPPools"]) == given
        assert list(json.loads(status["controlledIPPools"])) == sorted(given)

    def test_pool(self, ask: Requests) -> None:
        eventually(10, lambda: "allocatedIPCount" in stored(ask, POOLS, "web-v4").get("status", {}), "a status")
        found = stored(ask, POOLS, "web-v4")
        found["metadata"].pop("annotations", None)  # the mark that claims are authoritative, once there was one
        assert found["metadata"] == {
            "name": "web-v4",
            "finalizers": ["spiderpool.spidernet.io"],
            "labels": {
                "ipam.spidernet.io/ippool-cidr": "172-30-40-0-24",
                "ipam.spidernet.io/owner-spider-subnet": "office-v4",
            },
            "ownerReferences": owned_by_the_subnet(ask),
        }
        assert found["spec"] == {
            **yaml.safe_load(POOL)["spec"],
            "ipVersion": 4,
            "ips": ["172.30.40.10-172.30.40.99", "172.30.40.120"],
            "gateway": "172.30.40.1",
            "routes": [{"dst": "10.90.0.0/16", "gw": "172.30.40.2"}],
        }
        assert (found["status"]["totalIPCount"], found["status"]["allocatedIPCount"]) == (86, 0)
        assert "allocatedIPs" not in found["status"]

    def test_minimal_pool(self, ask: Requests) -> None:
        found = stored(ask, POOLS, "web-v6")
        assert found["metadata"]["labels"] == {"ipam.spidernet.io/ippool-cidr": "fd00-40---64"}
        assert "ownerReferences" not in found["metadata"]
        assert found["spec"] == {**yaml.safe_load(POOL_V6)["spec"], "ipVersion": 6, "default": False, "disable": False}

    def test_automatic_pool(self, ask: Requests) -> None:
        found = stored(ask, POOLS, automatic(ask))
        uid = ask("GET", f"/apis/apps/v1/namespaces/{SHOP}/deployments/shop")[1]["metadata"]["uid"]
        metadata = found["metadata"]
        metadata["annotations"].pop("ipam.spidernet.io/claims", None)  # the status's room adds it a moment later
        assert metadata == {
            "name": automatic(ask),
            "annotations": {"ipam.spidernet.io/ippool-ip-number": "+1"},
            "finalizers": ["spiderpool.spidernet.io"],
            "labels": {
                "ipam.spidernet.io/interface": "eth0",
                "ipam.spidernet.io/ip-version": "IPv4",
                "ipam.spidernet.io/ippool-cidr": "172-30-40-0-24",
                "ipam.spidernet.io/ippool-reclaim": "true",
                "ipam.spidernet.io/owner-application-gv": "apps_v1",
                "ipam.spidernet.io/owner-application-kind": "Deployment",
                "ipam.spidernet.io/owner-application-name": "shop",
                "ipam.spidernet.io/owner-application-namespace": "web",
                "ipam.spidernet.io/owner-application-uid": uid,
                "ipam.spidernet.io/owner-spider-subnet": "office-v4",
            },
            "ownerReferences": owned_by_the_subnet(ask),
        }
        assert found["spec"] == {
            "ipVersion": 4,
            "subnet": "172.30.40.0/24",
            "gateway": "172.30.40.1",
            "routes": [{"dst": "10.90.0.0/16", "gw": "172.30.40.2"}],
            "ips": ["172.30.40.50-172.30.40.52"],
            "podAffinity": {
                "matchLabels": {
                    "ipam.spidernet.io/app-api-group": "apps",
                    "ipam.spidernet.io/app-api-version": "v1",
                    "ipam.spidernet.io/app-kind": "Deployment",
                    "ipam.spidernet.io/app-name": "shop",
                    "ipam.spidernet.io/app-namespace": "web",
                }
            },
            "default": False,
            "disable": False,
        }

    def test_reserved_addresses(self, ask: Requests) -> None:
        found = stored(ask, RESERVED, "printers")
        assert found["metadata"] == {"name": "printers"}
        assert found["spec"] == {"ipVersion": 4, "ips": ["172.30.40.11", "172.30.40.90-172.30.40.95"]}
        assert "status" not in found

    def test_coordinator(self, ask: Requests) -> None:
        eventually(10, lambda: "status" in stored(ask, COORDINATORS, "default"), "a status")
        found = stored(ask, COORDINATORS, "default")
        assert found["metadata"] == {"name": "default", "finalizers": ["spiderpool.spidernet.io"]}
        assert found["spec"] == {
            **yaml.safe_load(COORDINATOR)["spec"],
            "hijackCIDR": ["169.254.25.10/32", "169.254.0.0/16"],
            "policyRoutes": [{"dst": "10.200.0.5/32", "gw": "172.30.40.1"}],
            "tunePodRoutes": True,
            "hostRuleTable": 500,
            "podRPFilter": 0,
            "txQueueLen": 0,
            "vethMTU": 1500,
        }
        (services,) = ask("GET", "/apis/networking.k8s.io/v1/servicecidrs")[1]["items"]
        assert found["status"] == {
            "phase": "Synced",
            "overlayPodCIDR": ["10.244.0.0/16", "fd00:10:244::/56"],
            "serviceCIDR": services["spec"]["cidrs"],
        }

    def test_multus_config(self, ask: Requests) -> None:
        found, sent = stored(ask, CONFIGS, "macvlan-web"), yaml.safe_load(CONFIG)
        assert found["metadata"] == {
            **sent["metadata"],
            "labels": {"cni.spidernet.io/network-resource-inject": "web-net"},
        }
        sent["spec"]["macvlan"]["ippools"]["matchMasterSubnet"] = False
        sent["spec"]["coordinator"] |= {
            "hostRuleTable": 500,
            "podRPFilter": 0,
            "tunePodRoutes": True,
            "txQueueLen": 0,
            "podMACPrefix": "",
            "vethLinkAddress": "",
        }
        assert found["spec"] == sent["spec"]

    def test_network(self, ask: Requests) -> None:
        path = f"/apis/k8s.cni.cncf.io/v1/namespaces/{HOME}/network-attachment-definitions/macvlan-web"
        eventually(10, lambda: ask("GET", path)[0] == 200, "the definition")
        found = ask("GET", path)[1]
        assert found["metadata"]["annotations"] == yaml.safe_load(CONFIG)["metadata"]["annotations"]
        assert "labels" not in found["metadata"]
        (owner,) = found["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["controller"]) == ("SpiderMultusConfig", "macvlan-web", True)
        assert found["spec"]["config"] == NETWORK_TEXT

    def test_endpoint(self, ask: Requests) -> None:
        found = stored(ask, PATHS["SpiderEndpoint"], "front-7c9d8-x2lqp")
        assert found == yaml.safe_load(ENDPOINT)

    @pytest.mark.parametrize(
        "spec",
        [
            {"cniType": "ipvlan", "ipvlan": {"master": ["ens224"], "ippools": {"ipv4": ["web-v4"]}}},
            {"cniType": "vlan", "vlan": {"master": ["ens224"], "vlanMode": "manual", "vlanID": 100}},
            {"cniType": "vlan", "vlan": {"master": ["ens224"], "vlanMode": "auto"}},
            {
                "cniType": "sriov",
                "sriov": {
                    "resourceName": "spidernet.io/sriov-a",
                    "vlanID": 0,
                    "mtu": 8000,
                    "minTxRateMbps": 100,
                    "maxTxRateMbps": 1000,
                    "rdmaIsolation": True,
                    "ippools": {"ipv4": ["web-v4"], "matchMasterSubnet": True},
                },
            },
            {
                "cniType": "ib-sriov",
                "ibsriov": {
                    "resourceName": "spidernet.io/ib-a",
                    "pkey": "0x12",
                    "linkState": "enable",
                    "rdmaIsolation": True,
                    "enableIbKubernetes": False,
                },
            },
            {"cniType": "ipoib", "ipoib": {"master": "ibs2", "ippools": {"ipv4": ["web-v4"]}}},
            {"cniType": "ovs", "ovs": {"bridge": "br1", "vlan": 0, "trunk": [{"minID": 1, "maxID": 10}, {"id": 20}]}},
            {"cniType": "custom", "customCNI": '{"cniVersion":"0.3.1","name":"x","plugins":[{"type":"loopback"}]}'},
            {},
            None,
        ],
        ids=["ipvlan", "vlan", "vlan-auto", "sriov", "ib-sriov", "ipoib", "ovs", "custom", "empty", "none"],
    )
    def test_other_networks(self, ask: Requests, spec: Json | None) -> None:
        body: Json = {**yaml.safe_load(CONFIG), "metadata": {"name": "shape"}, "spec": spec}
        if spec is None:
            del body["spec"]
        status, answer = created(ask, body)
        assert status == 201, answer
        try:
            kept = answer["spec"]
            assert kept["cniType"] == (spec or {}).get("cniType", "custom")
            for member, value in (spec or {}).items():
                assert contains(kept[member], value), (kept[member], value)
            path = f"/apis/k8s.cni.cncf.io/v1/namespaces/{HOME}/network-attachment-definitions/shape"
            eventually(10, lambda: ask("GET", path)[0] == 200, "the definition")
            assert ("config" in ask("GET", path)[1]["spec"]) == bool(spec)
        finally:
            ask("DELETE", f"{API}/{CONFIGS}/shape")
            ask("DELETE", path)


def contains(whole: Any, part: Any) -> bool:
    """Whether nothing of `part` was changed or dropped."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return bool(whole == part)


def pool(**spec: object) -> Json:
    return manifest(POOLS, "new", subnet="172.30.40.0/24") | {"spec": {"subnet": "172.30.40.0/24", **spec}}


def changed(text: str, **spec: object) -> Json:
    """A new object like that of a manifest, with some members changed; None takes one away."""
    body: Json = yaml.safe_load(text)
    body["metadata"] = {"name": "new"}
    for name, value in spec.items():
        if value is None:
            body["spec"].pop(name, None)
        else:
            body["spec"][name] = value
    return body


def manifest_without_spec(text: str) -> Json:
    body = changed(text)
    del body["spec"]
    return body


MASTERS = {"master": ["a", "b"]}
REFUSED: list[tuple[str, Json, int, str, str]] = [
    (
        "unformatted",
        pool(subnet="172.30.40.5/24"),
        422,
        "spec.subnet",
        "unformatted subnet 172.30.40.5/24, please change it to 172.30.40.0/24",
    ),
    (
        "wider",
        pool(subnet="172.30.0.0/16"),
        422,
        "spec.subnet",
        "which 'spec.subnet' is 172.30.40.0/24",
    ),
    (
        "overlap",
        pool(ips=["172.30.40.99-172.30.40.110"]),
        422,
        "spec.ips",
        "overlap with IPPool web-v4 in IP ranges [172.30.40.10-172.30.40.99]",
    ),
    (
        "gateway",
        pool(ips=["172.30.40.1-172.30.40.5"], gateway="172.30.40.1"),
        422,
        "spec.ips[0]",
        "conflicts with 'spec.gateway'",
    ),
    (
        "default route",
        pool(routes=[{"dst": "0.0.0.0/0", "gw": "172.30.40.2"}]),
        422,
        "spec.routes[0].dst",
        "please specify 'spec.gateway'",
    ),
    ("affinity", pool(podAffinity={}), 422, "spec.podAffinity", "empty podAffinity is invalid for SpiderIPPool"),
    ("reserved", manifest(RESERVED, "new", ips=[]), 422, "spec.ipVersion", "is not generated correctly"),
    ("no type", changed(COORDINATOR, podCIDRType=None), 422, "spec.podCIDRType", 'Unsupported value: ""'),
    ("no coordinator", manifest_without_spec(COORDINATOR), 422, "spec.podCIDRType", 'Unsupported value: ""'),
    ("multicast", changed(COORDINATOR, podMACPrefix="0b:1b"), 422, "spec.podMACPrefix", "not a unicast MAC"),
    (
        "two masters",
        changed(CONFIG, macvlan=MASTERS),
        422,
        "spec.macvlanConfig",
        "the bond property is nil with multiple Interfaces",
    ),
    (
        "two blocks",
        changed(CONFIG, ipvlan={"master": ["a"]}),
        422,
        "spec.cniType",
        "the cniType macvlan only supports spec.macvlanConfig, please remove other CNI configs",
    ),
    (
        "bond without mode",
        changed(CONFIG, macvlan={**MASTERS, "bond": {"name": "bond0"}}),
        422,
        "spec.macvlan.bond.mode",
        "Required value",
    ),
]


class TestServerSideApply:
    def apply(self, ask: Requests, manager: str, **spec: object) -> Json:
        body = manifest(POOLS, "applied", subnet="10.62.0.0/24", **spec)
        path = f"{API}/{POOLS}/applied?fieldManager={manager}&force=true"
        status, answer = ask("PATCH", path, body, "application/apply-patch+yaml")
        assert status in (200, 201), answer
        return answer

    def test_the_same_again_changes_nothing(self, ask: Requests) -> None:
        try:
            first = self.apply(ask, "one", ips=["10.62.0.9", "10.62.0.8"])
            again = self.apply(ask, "one", ips=["10.62.0.9", "10.62.0.8"])
            assert first["spec"]["ips"] == again["spec"]["ips"] == ["10.62.0.8-10.62.0.9"]
            assert first["metadata"]["generation"] == again["metadata"]["generation"]
        finally:
            ask.remove(POOLS, "applied")

    @pytest.mark.parametrize("member", ["podAffinity", "namespaceAffinity", "nodeAffinity"])
    def test_a_selector_is_replaced_and_not_merged(self, ask: Requests, member: str) -> None:
        try:
            self.apply(ask, "one", **{member: {"matchLabels": {"app": "one"}}})
            answer = self.apply(ask, "two", **{member: {"matchLabels": {"tier": "two"}}})
            assert answer["spec"][member] == {"matchLabels": {"tier": "two"}}
        finally:
            ask.remove(POOLS, "applied")


class TestStoredBefore:
    """Objects from before our definitions; what is wrong with one can be mended, and does not spoil the others."""

    def test_unknown_members_and_nulls(self, ask: Requests) -> None:
        assert ask("GET", f"{API}/{POOLS}/old")[1]["spec"] == {
            "subnet": "10.60.0.0/24",
            "ips": ["10.60.0.9"],
            "default": False,
            "disable": False,
        }
        status, answer = ask.merge(POOLS, "old", {"spec": {"ips": ["10.60.0.9", "10.60.0.8"]}})
        assert status == 200, answer
        assert answer["metadata"]["finalizers"] == ["spiderpool.spidernet.io"]
        assert (answer["spec"]["ipVersion"], answer["spec"]["ips"]) == (4, ["10.60.0.8-10.60.0.9"])

    def test_one_that_breaks_its_schema(self, ask: Requests) -> None:
        status, answer = ask.merge(POOLS, "broken", {"spec": {"ipVersion": 4, "ips": ["10.61.0.9", "10.61.0.8"]}})
        assert status == 200, answer
        assert answer["spec"]["ips"] == ["10.61.0.8-10.61.0.9"]


class TestRefused:
    @pytest.mark.parametrize(
        ("body", "code", "field", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
    )
    def test_creation(self, ask: Requests, body: Json, code: int, field: str, text: str) -> None:
        status, answer = created(ask, body)
        assert (status, answer["code"], answer["reason"]) == (code, code, "Invalid"), answer
        assert any(cause["field"] == field and text in cause["message"] for cause in answer["details"]["causes"]), (
            answer
        )
        if field != "spec.macvlan.bond.mode":  # which the schema refuses
            singular = PATHS[body["kind"]].rpartition("/")[2].removesuffix("s")
            assert answer["message"].startswith(
                f'admission webhook "{singular}.spiderpool.spidernet.io" denied the request: '
                f'{body["kind"]}.spiderpool.spidernet.io "new" is invalid: '
            )

    def test_a_name_that_is_taken(self, ask: Requests) -> None:
        status, answer = created(ask, yaml.safe_load(POOL))
        assert (status, answer["reason"]) == (409, "AlreadyExists")

    def test_excluded_addresses_are_free_for_others(self, ask: Requests) -> None:
        automatic(ask)  # has .50 to .52
        status, answer = created(ask, pool(ips=["172.30.40.53-172.30.40.54"]))
        try:
            assert status == 201, answer
        finally:
            ask.remove(POOLS, "new")

    def test_an_address_in_use(self, ask: Requests) -> None:
        workload = {"namespace": SHOP, "name": "front-7c9d8-x2lqp"}
        spec = {"address": "172.30.40.10", "ipVersion": 4, "pool": "web-v4", "podUID": "u", "nic": "eth0"}
        claim = {
            "apiVersion": "spiderpool.spidernet.io/v2beta1",
            "kind": "SpiderIPClaim",
            "metadata": {"name": "172.30.40.10", "labels": {"ipam.spidernet.io/pool": "web-v4"}},
            "spec": {**spec, "state": "Allocated", "workload": workload},
        }
        assert ask("POST", f"{API}/spideripclaims", claim)[0] == 201
        try:
            status, answer = ask.merge(POOLS, "web-v4", {"spec": {"ips": ["172.30.40.11-172.30.40.99"]}})
            assert (status, answer["reason"]) == (422, "Invalid"), answer
            (cause,) = answer["details"]["causes"]
            assert (cause["field"], cause["reason"]) == ("spec.ips", "FieldValueForbidden")
            assert (
                "remove an IP address 172.30.40.10 that is being used by Pod web/front-7c9d8-x2lqp" in cause["message"]
            )
        finally:
            ask("DELETE", f"{API}/spideripclaims/172.30.40.10")

    def test_a_subnet_elsewhere(self, ask: Requests) -> None:
        status, answer = ask.merge(SUBNETS, "office-v4", {"spec": {"ips": ["172.30.41.1"]}})
        assert status == 422, answer
        assert any(cause["field"] == "spec.ips[0]" for cause in answer["details"]["causes"]), answer


def test_metrics_have_the_names_that_upstream_documents(ask: Requests, controller: Replica) -> None:
    automatic(ask)
    subnet, pool = '{SpiderSubnet="office-v4"}', '{SpiderIPPool="web-v4"}'
    wanted = {
        "spiderpool_total_subnet_counts": 1,
        f"spiderpool_debug_subnet_total_ip_counts{subnet}": 190,
        f"spiderpool_debug_subnet_available_ip_counts{subnet}": 101,
        f"spiderpool_debug_subnet_ippool_counts{subnet}": 2,
        "spiderpool_total_ippool_counts": len(ask("GET", f"{API}/{POOLS}")[1]["items"]),
        f"spiderpool_debug_ippool_total_ip_counts{pool}": 86,
        f"spiderpool_debug_ippool_available_ip_counts{pool}": 86,
        "spiderpool_ip_gc_counts_total": 0,
        "spiderpool_ip_gc_failure_counts_total": 0,
        "spiderpool_ipam_release_update_ippool_conflict_counts_total": 0,
    }
    eventually(10, lambda: wanted.items() <= controller.exported().items(), f"{wanted}")
