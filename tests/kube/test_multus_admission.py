"""SpiderMultusConfigs, SpiderCoordinators and pods as users of the API server see them: the real controller."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from lab.kube.cluster import Cluster
from tests.kube.controller_rig import API, Replica, Requests, controllers, eventually

NADS = "/apis/k8s.cni.cncf.io/v1"
NETWORK = "cni.spidernet.io/network-resource-inject"
RDMA = "cni.spidernet.io/rdma-resource-inject"
CR_NAME = "multus.spidernet.io/cr-name"
MACVLAN = {"cniType": "macvlan", "macvlan": {"master": ["eth1"], "ippools": {"ipv4": ["p4"]}}}
RDMA_MACVLAN = MACVLAN | {"macvlan": {**MACVLAN["macvlan"], "rdmaResourceName": "spidernet.io/rdma-a"}}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def controller(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with controllers(kube, tmp_path_factory.mktemp("controller")) as launch:
        cni = str(tmp_path_factory.mktemp("cni"))
        replica = launch("multus", "--injection-enabled=true", "--coordinator-cni-directory", cni)
        eventually(30, lambda: replica.probe() == 200, "the controller is ready")
        bad = document("SpiderCoordinator", "probe", {})
        path = f"{API}/spidercoordinators?dryRun=All"
        eventually(20, lambda: Requests(kube)("POST", path, bad)[0] == 422, "the webhook is asked")
        yield replica


@pytest.fixture
def ask(kube: Cluster, controller: Replica) -> Requests:
    return Requests(kube)


@pytest.fixture
def namespace(kube: Cluster) -> Iterator[str]:
    name = f"n-{secrets.token_hex(4)}"
    kube.kubectl("create", "namespace", name)
    kube.kubectl("create", "serviceaccount", "own", "-n", name)
    yield name
    kube.kubectl("delete", "namespace", name, "--wait=false")


def document(kind: str, name: str, spec: object, **annotations: str) -> dict[str, Any]:
    metadata = {"name": name, "annotations": annotations}
    return {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": kind, "metadata": metadata, "spec": spec}


def smc(ask: Requests, namespace: str, name: str, spec: object, **annotations: str) -> tuple[int, dict[str, Any]]:
    path = f"{API}/namespaces/{namespace}/spidermultusconfigs"
    return ask("POST", path, document("SpiderMultusConfig", name, spec, **annotations))


def pod(ask: Requests, namespace: str, **annotations: str) -> tuple[int, dict[str, Any]]:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "p-", "annotations": annotations},
        "spec": {"serviceAccountName": "own", "containers": [{"name": "c", "image": "lab.invalid/x"}]},
    }
    return ask("POST", f"/api/v1/namespaces/{namespace}/pods", body)


def test_what_is_stored(ask: Requests, namespace: str) -> None:
    status, stored = smc(ask, namespace, "net", MACVLAN, **{NETWORK: "g"})
    assert status == 201, stored
    assert stored["metadata"]["labels"] == {NETWORK: "g"}
    assert stored["spec"] == {
        "cniType": "macvlan",
        "enableCoordinator": True,
        "disableIPAM": False,
        "chainCNIJsonData": [],
        "macvlan": {
            "master": ["eth1"],
            "mtu": 0,
            "vlanID": 0,
            "rdmaResourceName": "",
            "ippools": {"ipv4": ["p4"], "matchMasterSubnet": False},
        },
        "coordinator": {
            "mode": "auto",
            "tunePodRoutes": True,
            "hostRuleTable": 500,
            "podRPFilter": 0,
            "txQueueLen": 0,
            "vethLinkAddress": "",
            "podMACPrefix": "",
            "podDefaultRouteNIC": "",
        },
    }
    made = f"{NADS}/namespaces/{namespace}/network-attachment-definitions/net"
    eventually(5, lambda: ask("GET", made)[0] == 200, "the network is made")


@pytest.mark.upstream(
    *("M00005", "M00011", "M00013", "M00015", "M00020", "M00023", "M00024", "M00025"),
    *("M00027", "M00028", "M00030", "M00031", "M00032", "M00040"),
)
@pytest.mark.parametrize(
    ("spec", "annotations", "text"),
    [
        ({"cniType": "macvlan"}, {}, "spec.macvlanConfig: Required value: no spec.macvlanConfig specified"),
        (
            {"cniType": "macvlan", "macvlan": {"master": ["a", "b"]}},
            {},
            "the bond property is nil with multiple Interfaces",
        ),
        (
            MACVLAN | {"ipvlan": {"master": ["a"]}},
            {},
            "spec.cniType: Forbidden: the cniType macvlan only supports spec.macvlanConfig, please remove other CNI",
        ),
        ({"customCNI": "{"}, {}, "customCniConfig isn't a valid JSON encoding"),
        (MACVLAN, {CR_NAME: "Big_Name"}, "invalid custom net-attach-def resource name"),
        (MACVLAN, {CR_NAME: ""}, "invalid custom net-attach-def resource name"),
        (MACVLAN, {"multus.spidernet.io/cni-version": "2"}, "unsupported CNI version 2"),
        (MACVLAN | {"coordinator": {"podRPFilter": 14}}, {}, "podRPFilter: Unsupported value: 14"),
        (MACVLAN | {"coordinator": {"podMACPrefix": "01:02"}}, {}, "not a unicast MAC"),
        (MACVLAN, {RDMA: "g"}, "rdmaResourceName can not empty for spidermultusconfig"),
        ({"cniType": "sriov", "sriov": {"resourceName": "a/b"}}, {NETWORK: "g"}, "no any ippools configured"),
        ({"cniType": "ovs", "ovs": {"bridge": "b"}}, {RDMA: "g"}, "does not support RDMA resource"),
        (
            {"cniType": "vlan", "vlan": {"master": ["a"], "vlanMode": "auto", "vlanID": 3}},
            {},
            "vlanId must not be specified when vlanMode is auto",
        ),
    ],
)
def test_refused(ask: Requests, namespace: str, spec: object, annotations: dict[str, str], text: str) -> None:
    status, answer = smc(ask, namespace, "net", spec, **annotations)
    assert (status, answer["reason"]) == (422, "Invalid")
    assert text in answer["message"]


@pytest.mark.upstream("M00010", "M00011")
def test_names_are_nobody_elses_and_stay(ask: Requests, namespace: str) -> None:
    assert smc(ask, namespace, "one", MACVLAN, **{CR_NAME: "shared"})[0] == 201
    made = f"{NADS}/namespaces/{namespace}/network-attachment-definitions/shared"
    eventually(5, lambda: ask("GET", made)[0] == 200, "the network is made")
    status, answer = smc(ask, namespace, "two", MACVLAN, **{CR_NAME: "shared"})
    assert status == 422
    text = f"the net-attach-def {namespace}/shared already exists and is managed by SpiderMultusConfig {namespace}/one."
    assert text in answer["message"]
    path = f"{API}/namespaces/{namespace}/spidermultusconfigs/one"
    patch = {"metadata": {"annotations": {CR_NAME: "other"}}}
    status, answer = ask("PATCH", path, patch, "application/merge-patch+json")
    assert status == 422
    assert (
        "it's unsupported to change customized Multus net-attach-def resource name from 'shared' to 'other'"
        in (answer["message"])
    )
    patch = {"metadata": {"annotations": {"mine": "x"}}}
    assert ask("PATCH", path, patch, "application/merge-patch+json")[0] == 200


@pytest.mark.upstream("H00001")
def test_pods_get_networks_and_resources(ask: Requests, namespace: str) -> None:
    for name, spec in (("b", RDMA_MACVLAN), ("a", RDMA_MACVLAN)):
        assert smc(ask, namespace, name, spec, **{RDMA: f"gpu-{namespace}"})[0] == 201
    status, made = pod(ask, namespace, **{RDMA: f"gpu-{namespace}", "k8s.v1.cni.cncf.io/networks": "x"})
    assert status == 201, made
    assert made["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == f"{namespace}/a,{namespace}/b"
    assert made["spec"]["containers"][0]["resources"]["limits"] == {"spidernet.io/rdma-a": "1"}

    group = f"net-{namespace}"
    assert smc(ask, namespace, "c", MACVLAN, **{NETWORK: group, CR_NAME: "real"})[0] == 201
    patch = {"metadata": {"annotations": {NETWORK: group}}}
    ask("PATCH", f"/api/v1/namespaces/{namespace}", patch, "application/merge-patch+json")

    def by_namespace() -> object:
        return pod(ask, namespace)[1]["metadata"].get("annotations") == {
            "k8s.v1.cni.cncf.io/networks": f"{namespace}/real"
        }

    eventually(5, by_namespace, "the namespace's annotation counts")


@pytest.mark.upstream("H00001")
def test_pods_of_unknown_groups_are_denied(ask: Requests, namespace: str) -> None:
    status, answer = pod(ask, namespace, **{RDMA: "nobody"})
    assert status == 403
    assert f"no spidermultusconfigs with annotation: {RDMA}:nobody found" in answer["message"]
    assert pod(ask, namespace)[0] == 201
    excluded = "kube-system"
    status, answer = pod(ask, excluded, **{RDMA: "nobody"})
    assert "no spidermultusconfigs" not in answer.get("message", "")


def test_coordinators(ask: Requests) -> None:
    path = f"{API}/spidercoordinators"
    spec = {
        "podCIDRType": "none",
        "hijackCIDR": ["169.254.25.10"],
        "policyRoutes": [{"dst": "10.0.0.5", "gw": "10.0.0.1"}],
    }
    for wrong, text in (
        ({"podMACPrefix": "0b:1b"}, 'spec.podMACPrefix: Invalid value: "0b:1b": not a unicast MAC'),
        ({"podCIDRType": None}, 'spec.podCIDRType: Unsupported value: ""'),
        ({"hijackCIDR": ["x"]}, 'spec.extraCIDR[0]: Invalid value: "x"'),
    ):
        status, answer = ask("POST", path, document("SpiderCoordinator", "default", spec | wrong))
        assert (status, answer["reason"]) == (422, "Invalid")
        assert text in answer["message"]
    status, stored = ask("POST", path, document("SpiderCoordinator", "default", spec))
    assert status == 201, stored
    assert stored["metadata"]["finalizers"] == ["spiderpool.spidernet.io"]
    assert stored["spec"]["hijackCIDR"] == ["169.254.25.10/32"]
    assert stored["spec"]["policyRoutes"] == [{"dst": "10.0.0.5/32", "gw": "10.0.0.1"}]
    assert (stored["spec"]["vethMTU"], stored["spec"]["vethLinkAddress"]) == (1500, "")

    def phase() -> object:
        return ask("GET", f"{path}/default")[1].get("status", {}).get("phase") == "Synced"

    eventually(10, phase, "the leader finds the networks out")
    assert ask("DELETE", f"{path}/default")[0] == 200
    eventually(10, lambda: ask("GET", f"{path}/default")[0] == 404, "the leader lets it go")
