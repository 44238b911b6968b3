"""What created pods get by annotations: networks and resources, or a denial."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from msgspec.structs import replace

from api.injection import NO_DEMAND, Demand, concerned, inject
from api.multusconfig import MultusConfig
from api.validate.verdict import Denial
from tests.unit.test_api_multusconfig import NETWORK, POOLS, RDMA, stored

NETWORKS = "k8s.v1.cni.cncf.io/networks"
DEFAULT = "v1.multus-cni.io/default-network"


def config(name: str, spec: dict[str, Any], namespace: str = "net", **annotations: str) -> MultusConfig:
    made = stored(spec, annotations)
    return replace(made, metadata=replace(made.metadata, name=name, namespace=namespace))


def macvlan(master: str, resource: str = "", **members: Any) -> dict[str, Any]:
    return {
        "cniType": "macvlan",
        "macvlan": {"master": [master], "rdmaResourceName": resource, "ippools": POOLS, **members},
    }


def pod(*containers: dict[str, Any], **annotations: str) -> dict[str, Any]:
    return {
        "metadata": {"generateName": "p-", **({"annotations": annotations} if annotations else {})},
        "spec": {"containers": list(containers or ({"name": "c"},))},
    }


def injected(
    before: dict[str, Any],
    *configs: MultusConfig,
    demand: Demand = NO_DEMAND,
    namespace: dict[str, str] | None = None,
) -> dict[str, Any]:
    result = inject(copy.deepcopy(before), "web", namespace or {}, configs, demand, installation="spiderpool")
    assert not isinstance(result, Denial), result
    return result


def denied(before: dict[str, Any], *configs: MultusConfig, demand: Demand = NO_DEMAND) -> str:
    result = inject(copy.deepcopy(before), "web", {}, configs, demand)
    assert isinstance(result, Denial)
    assert result.reason == "Forbidden"
    return result.detail


def networks(made: dict[str, Any]) -> str | None:
    found = made["metadata"].get("annotations", {}).get(NETWORKS)
    assert found is None or isinstance(found, str)
    return found


def resources(made: dict[str, Any], number: int = 0) -> Any:
    return made["spec"]["containers"][number].get("resources")


def test_pods_without_annotations_stay_as_they_are() -> None:
    plain = pod()
    assert injected(plain, config("a", macvlan("eth1"), **{RDMA: "g"})) == plain
    assert not concerned(plain, {}, Demand(master_nics=True))
    assert concerned(pod(**{NETWORK: "g"}), {}, NO_DEMAND)
    assert concerned(plain, {NETWORK: "g"}, NO_DEMAND)
    assert concerned(pod(**{NETWORKS: "a"}), {}, Demand(sub_eni="r"))
    assert not concerned(pod(**{NETWORKS: "a"}), {}, NO_DEMAND)


@pytest.mark.upstream("H00001")
def test_networks_in_the_order_of_their_masters_and_resources_once() -> None:
    group = {RDMA: "gpu"}
    configs = [
        config("z", macvlan("eth1", "spidernet.io/a"), **group),
        config("b", macvlan("eth2", "spidernet.io/b"), **group),
        config("a", macvlan("eth2", "spidernet.io/b"), "other", **group),
        config("bonded", macvlan("x", "spidernet.io/c", bond={"name": "aaa", "mode": 1}) | {}, **group),
        config("sriov", {"cniType": "sriov", "sriov": {"resourceName": "aab/x", "ippools": POOLS}}, **group),
        config("ib", {"cniType": "ipoib", "ipoib": {"master": "ib0", "ippools": POOLS}}, **group),
        config("elsewhere", macvlan("eth0", "spidernet.io/no"), **{RDMA: "other"}),
    ]
    bonded = configs[3].spec.macvlan
    assert bonded is not None
    configs[3] = replace(configs[3], spec=replace(configs[3].spec, macvlan=replace(bonded, master=["x", "y"])))
    first = {"name": "c", "resources": {"limits": {"cpu": "1"}}}
    second = {"name": "d", "resources": {"limits": {"spidernet.io/a": "2"}}}
    made = injected(pod(first, second, **{RDMA: "gpu", NETWORKS: "overwritten"}), *configs)
    assert networks(made) == "net/ib,net/bonded,net/sriov,net/z,net/b,other/a"
    assert resources(made) == {
        "limits": {"cpu": "1", "spidernet.io/c": "1", "aab/x": "1", "spidernet.io/b": "1"},
    }
    assert resources(made, 1) == second["resources"]


@pytest.mark.upstream("H00001")
def test_the_definitions_names_are_injected() -> None:
    renamed = config("a", macvlan("eth1"), **{NETWORK: "g", "multus.spidernet.io/cr-name": "real"})
    assert networks(injected(pod(**{NETWORK: "g"}), renamed)) == "net/real"


def test_the_pods_annotation_goes_before_its_namespaces_and_rdma_before_network() -> None:
    one = config("one", macvlan("a"), **{NETWORK: "g1"})
    two = config("two", macvlan("b"), **{NETWORK: "g2"})
    rdma = config("rdma", macvlan("c", "r"), **{RDMA: "g1"})
    assert networks(injected(pod(), one, two, namespace={NETWORK: "g1"})) == "net/one"
    assert networks(injected(pod(**{NETWORK: "g2"}), one, two, namespace={NETWORK: "g1"})) == "net/two"
    assert networks(injected(pod(**{NETWORK: "g2"}), two, rdma, namespace={RDMA: "g1"})) == "net/rdma"


def test_network_injection_needs_no_resource() -> None:
    made = injected(pod(**{NETWORK: "g"}), config("a", macvlan("eth1"), **{NETWORK: "g"}))
    assert networks(made) == "net/a"
    assert resources(made) is None


def test_pods_on_their_nodes_network_are_left_alone() -> None:
    before = pod(**{NETWORK: "g"})
    before["spec"]["hostNetwork"] = True
    assert injected(before) == before
    assert injected({"metadata": {}, "spec": {}}) == {"metadata": {}, "spec": {}}


def test_denials() -> None:
    assert denied(pod(**{RDMA: "g"})) == f"no spidermultusconfigs with annotation: {RDMA}:g found"
    assert denied(pod(**{RDMA: "g"}), config("a", macvlan("e", "r"), **{NETWORK: "g"})).startswith("no spidermultus")
    bare = config("a", macvlan("e"), **{RDMA: "g"})
    assert denied(pod(**{RDMA: "g"}), bare) == "rdmaResourceName can not empty for spidermultusconfig net/a"
    poor = config("a", {"cniType": "macvlan", "macvlan": {"master": ["e"], "rdmaResourceName": "r"}}, **{NETWORK: "g"})
    assert denied(pod(**{NETWORK: "g"}), poor) == "no any ippools configured for spidermultusconfig net/a"
    custom = config("a", {}, **{NETWORK: "g"})
    assert denied(pod(**{NETWORK: "g"}), custom) == "RDMA resource injection does not support cniType: custom"
    broken = config("a", {"cniType": "macvlan"}, **{NETWORK: "g"})
    assert denied(pod(**{NETWORK: "g"}), broken) == "macvlan config is nil"


NICS = Demand(master_nics=True)


@pytest.mark.upstream("M00036", "M00037")
@pytest.mark.parametrize(
    "value",
    [
        "one, net/two@net2 ,net/none",
        '[{"name":"one"},{"name":"two","namespace":"net","interface":"net2"}]',
        '[\n  {\n    "name": "one"\n  },\n  {\n    "name": "two",\n    "namespace": "net"\n  }\n]',
    ],
)
def test_places_at_master_nics(value: str) -> None:
    one = config("one", macvlan("eth1"), "web")
    two = config("two", {"cniType": "ipoib", "ipoib": {"master": "ib0"}})
    made = injected(pod(**{NETWORKS: value}), one, two, demand=NICS)
    amounts = {"spidernet.io/eth1-nic": "1", "spidernet.io/ib0-nic": "1"}
    assert resources(made) == {"limits": amounts, "requests": amounts}


def test_each_master_counts_once_and_what_a_container_names_stays() -> None:
    shared = [config(name, macvlan("eth1"), "web") for name in ("a", "b")]
    assert resources(injected(pod(**{NETWORKS: "a,b"}), *shared, demand=NICS))["limits"] == {
        "spidernet.io/eth1-nic": "1"
    }
    before = pod(
        {"name": "c"}, {"name": "d", "resources": {"requests": {"spidernet.io/eth1-nic": "1"}}}, **{NETWORKS: "a"}
    )
    assert injected(before, *shared, demand=NICS) == before
    sriov = config("s", {"cniType": "sriov", "sriov": {"resourceName": "r"}}, "web")
    assert resources(injected(pod(**{NETWORKS: "s"}), sriov, demand=NICS)) is None
    assert resources(injected(pod(**{NETWORKS: "a"}), *shared)) is None


def test_networks_are_found_by_the_definitions_name() -> None:
    renamed = config("a", macvlan("eth1"), "web", **{"multus.spidernet.io/cr-name": "real"})
    assert resources(injected(pod(**{NETWORKS: "real"}), renamed, demand=NICS)) is not None
    assert resources(injected(pod(**{NETWORKS: "a"}), renamed, demand=NICS)) is None


def test_where_a_default_network_without_a_namespace_is_looked_for() -> None:
    home, installed = config("d", macvlan("eth1"), "web"), config("d", macvlan("eth2"), "spiderpool")
    assert "spidernet.io/eth1-nic" in resources(injected(pod(**{DEFAULT: "d"}), home, installed, demand=NICS))["limits"]
    assert "spidernet.io/eth2-nic" in resources(injected(pod(**{DEFAULT: "d"}), installed, demand=NICS))["limits"]
    assert resources(injected(pod(**{DEFAULT: "web/d"}), installed, demand=NICS)) is None


def test_injected_networks_count_too() -> None:
    member = config("a", macvlan("eth1"), **{NETWORK: "g"})
    assert "spidernet.io/eth1-nic" in resources(injected(pod(**{NETWORK: "g"}), member, demand=NICS))["limits"]


def test_malformed_selections_are_denied_where_they_are_read() -> None:
    before = pod(**{NETWORKS: '[{"name":'})
    assert injected(before) == before
    assert NETWORKS in denied(before, demand=NICS)


@pytest.mark.upstream("E00021")
def test_places_at_masters_and_for_sub_interfaces_go_together() -> None:
    auto = config("a", {"cniType": "vlan", "vlan": {"master": ["eth0"], "vlanMode": "auto"}}, "web")
    demand = Demand(master_nics=True, sub_eni="spidernet.io/sub-eni")
    made = injected(pod(**{NETWORKS: "a,b"}), auto, config("b", macvlan("eth1"), "web"), demand=demand)
    amounts = {"spidernet.io/eth0-nic": "1", "spidernet.io/eth1-nic": "1", "spidernet.io/sub-eni": "1"}
    assert resources(made) == {"limits": amounts, "requests": amounts}


@pytest.mark.upstream("E00020")
def test_places_for_sub_interfaces_are_counted() -> None:
    def vlan(name: str, mode: str) -> MultusConfig:
        return config(name, {"cniType": "vlan", "vlan": {"master": ["eth0"], "vlanMode": mode}}, "web")

    configs = [vlan("a", "auto"), vlan("b", "auto"), vlan("c", "manual")]
    demand = Demand(sub_eni="spidernet.io/sub-eni")
    made = injected(pod(**{NETWORKS: "a,b,c", DEFAULT: "a"}), *configs, demand=demand)
    amounts = {"spidernet.io/sub-eni": "2"}
    assert resources(made) == {"limits": amounts, "requests": amounts}
    assert resources(injected(pod(**{NETWORKS: "c"}), *configs, demand=demand)) is None
