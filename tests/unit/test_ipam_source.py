"""Who says which pools a NIC gets: the order of the sources, and mistakes in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from api import annotations as notes
from api.annotations import NicSubnets, PoolNames
from api.claim import Controller
from api.core import Namespace, Pod
from api.meta import ObjectMeta
from plugins.errors import InvalidConfigError
from plugins.ipam.config import IpamConfig
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import Source, network_of, source_of

CONFIG = IpamConfig(ipv4_pools=("conf4",), ipv6_pools=("conf6",), clean_gateway=True)
DEPLOYMENT = Controller(api_version="apps/v1", kind="Deployment", name="web", uid="u1")
ORPHAN = Controller(api_version="v1", kind="Pod", name="web-1", uid="u2")
KRUISE = Controller(api_version="apps.kruise.io/v1alpha1", kind="CloneSet", name="web", uid="u3")
SETTINGS = IpamSettings()


def facts(
    said: Mapping[str, object] | None = None,
    *,
    of_namespace: Mapping[str, object] | None = None,
    top: Controller = DEPLOYMENT,
) -> PodFacts:
    def texts(values: Mapping[str, object] | None) -> dict[str, str]:
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in (values or {}).items()}

    return PodFacts(
        pod=Pod(metadata=ObjectMeta(name="web-1", namespace="shop", annotations=texts(said))),
        namespace=Namespace(metadata=ObjectMeta(name="shop", annotations=texts(of_namespace))),
        controller=top,
        static="",
        node_labels={},
    )


def of(
    said: Mapping[str, object] | None = None,
    *,
    nic: str = "eth0",
    config: IpamConfig = CONFIG,
    settings: IpamSettings = SETTINGS,
    **more: Any,
) -> Source:
    return source_of(config, nic, facts(said, **more), settings)


SAID: dict[str, object] = {
    notes.SUBNETS: [{"interface": "eth0", "ipv4": ["s1"]}, {"interface": "net1", "ipv6": ["s2"]}],
    notes.SUBNET: {"ipv4": ["s3"]},
    notes.IPPOOLS: [{"interface": "eth0", "ipv4": ["a"]}, {"interface": "net1", "ipv6": ["b"], "cleangateway": True}],
    notes.IPPOOL: {"ipv4": ["c"]},
}
OF_NAMESPACE: dict[str, object] = {notes.NAMESPACE_IPV4: ["d"], notes.NAMESPACE_IPV6: ["e"]}


@pytest.mark.upstream("A00004", "A00005", "A00006")
def test_the_first_source_that_says_anything_is_the_only_one() -> None:
    said = dict(SAID)
    found = []
    for key in (notes.SUBNETS, notes.SUBNET, notes.IPPOOLS, notes.IPPOOL):
        source = of(said, of_namespace=OF_NAMESPACE)
        assert source.what == key
        found.append(source.subnets or source.pools)
        del said[key]
    assert found == [NicSubnets("eth0", "s1"), NicSubnets("eth0", "s3"), PoolNames(("a",)), PoolNames(("c",))]
    assert of(of_namespace=OF_NAMESPACE).pools == PoolNames(("d",), ("e",))
    assert of(of_namespace={notes.NAMESPACE_IPV6: ["e"]}).pools == PoolNames((), ("e",))
    assert of(of_namespace={notes.NAMESPACE_IPV4: []}).pools == PoolNames(("conf4",), ("conf6",))
    nothing = of(config=IpamConfig())
    assert (nothing.pools, nothing.subnets) == (PoolNames(), None)
    assert "spec.default" in nothing.what


def test_without_a_pod_the_configuration_speaks() -> None:
    source = source_of(CONFIG, "eth0", None, SETTINGS)
    assert (source.pools, source.clean_gateway, source.routes) == (PoolNames(("conf4",), ("conf6",)), True, ())


def test_clean_gateway_is_the_configurations_but_for_ippools() -> None:
    assert of({notes.IPPOOL: SAID[notes.IPPOOL]}).clean_gateway
    assert of(of_namespace=OF_NAMESPACE).clean_gateway
    assert not of({notes.IPPOOLS: SAID[notes.IPPOOLS]}).clean_gateway
    assert of({notes.IPPOOLS: SAID[notes.IPPOOLS]}, nic="net1", config=IpamConfig()).clean_gateway


def test_routes_come_with_every_source() -> None:
    route = {notes.ROUTES: [{"dst": "10.0.0.0/8", "gw": "10.6.0.1"}]}
    assert [r.dst for r in of(route).routes] == ["10.0.0.0/8"]
    assert [r.dst for r in of({**SAID, **route}).routes] == ["10.0.0.0/8"]


@pytest.mark.upstream("A00013")
@pytest.mark.parametrize("key", [notes.IPPOOLS, notes.SUBNETS])
def test_every_nic_must_be_listed(key: str) -> None:
    with pytest.raises(InvalidConfigError, match=r"wrong input.*interface net2 must be specified"):
        of({key: SAID[key]}, nic="net2")


def test_one_subnet_is_about_one_nic_and_the_others_go_on() -> None:
    said = {notes.SUBNET: SAID[notes.SUBNET]}
    assert of(said, nic="net1").pools == PoolNames(("conf4",), ("conf6",))
    on_net1: dict[str, object] = {notes.SUBNET: {"interface": "net1", "ipv4": ["s"]}}
    assert of(on_net1, nic="net1").subnets == NicSubnets("net1", "s")
    assert of(on_net1).subnets is None


NAMELESS = {notes.IPPOOLS: [{"ipv4": ["a"]}, {"ipv4": ["b"], "cleangateway": True}, {"ipv6": ["c"]}]}


@pytest.mark.parametrize(("nic", "names"), [("eth0", ("a",)), ("net1", ("b",)), ("data", ())])
def test_items_without_names_stand_for_nics_in_order(nic: str, names: tuple[str, ...]) -> None:
    said = {**NAMELESS, notes.NETWORKS: "x/one,x/two@data"}
    source = of(said, nic=nic)
    assert source.pools == PoolNames(names, () if names else ("c",))
    assert source.clean_gateway == (nic == "net1")


@pytest.mark.parametrize(
    ("networks", "nic", "problem"),
    [
        ("x/one", "net2", "neither eth0 nor that of a network"),
        ("x/one,x/two,x/three", "net3", "net3 is the pod's NIC number 4, and there are 3 items"),
        ("x//one", "net1", "invalid format of annotation k8s.v1.cni.cncf.io/networks"),
    ],
)
def test_a_nic_without_an_item(networks: str, nic: str, problem: str) -> None:
    with pytest.raises(InvalidConfigError, match=problem):
        of({**NAMELESS, notes.NETWORKS: networks}, nic=nic)


@pytest.mark.upstream("I00023", "I00024")
def test_automatic_pools_need_the_feature_and_a_controller() -> None:
    said = {notes.SUBNET: SAID[notes.SUBNET]}
    with pytest.raises(
        InvalidConfigError, match=r"it's invalid to use 'ipam.spidernet.io/subnet' annotation when Auto"
    ):
        of(said, settings=IpamSettings(enable_auto_pools=False))
    with pytest.raises(InvalidConfigError, match="SpiderSubnet feature doesn't support no-controller pod"):
        of(said, top=ORPHAN)
    assert of(said, top=ORPHAN, settings=IpamSettings(enable_spider_subnet=False)).pools == CONFIG.pools


@pytest.mark.parametrize("number", [None, "+5"])
def test_third_parties_need_a_fixed_number(number: str | None) -> None:
    said = {notes.SUBNET: SAID[notes.SUBNET]} | ({notes.IP_NUMBER: number} if number else {})
    with pytest.raises(InvalidConfigError, match="only supports fixed auto-created IPPool IP Number"):
        of(said, top=KRUISE)
    assert of({**said, notes.IP_NUMBER: "5"}, top=KRUISE).subnets == NicSubnets("eth0", "s3")


@pytest.mark.upstream("A00003")
@pytest.mark.parametrize("key", [notes.IPPOOL, notes.IPPOOLS, notes.ROUTES, notes.SUBNET, notes.SUBNETS])
def test_a_malformed_annotation_fails_the_nic(key: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"wrong input: invalid format of annotation {key}"):
        of({key: "{"})
    with pytest.raises(InvalidConfigError, match="default-ipv4-ippool"):
        of(of_namespace={notes.NAMESPACE_IPV4: "pool"})


@pytest.mark.parametrize(
    ("nic", "said", "cluster", "name", "problem"),
    [
        ("eth0", {notes.DEFAULT_NETWORK: "macvlan"}, "x/default", "kube-system/macvlan", ""),
        ("eth0", {notes.DEFAULT_NETWORK: "net/macvlan"}, "", "net/macvlan", ""),
        ("eth0", {}, "x/default", "x/default", ""),
        ("eth0", {}, "", "", "no cluster network is set"),
        ("net1", {notes.NETWORKS: "one"}, "x/default", "shop/one", ""),
        ("data", {notes.NETWORKS: "one,k/two@data"}, "", "k/two", ""),
        ("net2", {notes.NETWORKS: "one"}, "x/default", "", "has no network for net2"),
        ("net1", {notes.NETWORKS: "[{"}, "", "", "invalid format of annotation"),
    ],
)
def test_the_nics_network(nic: str, said: dict[str, object], cluster: str, name: str, problem: str) -> None:
    found, told = network_of(nic, facts(said), IpamSettings(multus_cluster_network=cluster))
    assert found == name
    if not name:
        assert problem in told
