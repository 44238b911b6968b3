"""The CNI configuration that a SpiderMultusConfig makes: text for text as upstream's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.netconf import config_text, network_of
from api.validate.multusconfig import spec_problems
from tests.unit.test_api_multusconfig import CUSTOM, stored

COORD = '{"txQueueLen":0,"tunePodRoutes":true,"mode":"auto","type":"coordinator"}'
P4 = {"ipv4": ["p4"]}
IPAM = '"ipam":{"type":"spiderpool"}'
IPAM4 = '"ipam":{"type":"spiderpool","default_ipv4_ippool":["p4"]}'
BOND = {"name": "bond0", "mode": 1, "options": "primary=ens1"}


def chain(name: str, *plugins: str, version: str = "0.3.1") -> str:
    return f'{{"cniVersion":"{version}","name":"{name}","plugins":[{",".join(plugins)}]}}'


def text(spec: dict[str, Any], **annotations: str) -> str | None:
    config = stored(spec, annotations)
    assert spec_problems(config) == []
    return config_text(config)


SAMPLES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (
        {"cniType": "macvlan", "macvlan": {"master": ["eth0"], "vlanID": 0, "ippools": P4}},
        ('{"type":"macvlan","master":"eth0","mode":"bridge","mtu":0,' + IPAM4 + "}", COORD),
    ),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["ens1", "ens2"], "bond": BOND, "vlanID": 100}},
        (
            (
                '{"vlanID":100,"type":"ifacer","interfaces":["ens1","ens2"],'
                '"bond":{"name":"bond0","mode":1,"options":"primary=ens1"}}'
            ),
            '{"type":"macvlan","master":"bond0.100","mode":"bridge","mtu":0,' + IPAM + "}",
            COORD,
        ),
    ),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["eth0"], "vlanID": 7, "mtu": 1400}},
        (
            '{"vlanID":7,"type":"ifacer","interfaces":["eth0"]}',
            '{"type":"macvlan","master":"eth0.7","mode":"bridge","mtu":1400,' + IPAM + "}",
            COORD,
        ),
    ),
    (
        {"cniType": "ipvlan", "ipvlan": {"master": ["eth0"], "mtu": 1300}},
        ('{"type":"ipvlan","master":"eth0","mtu":1300,' + IPAM + "}", COORD),
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["eth0"], "vlanID": 100, "ippools": {"ipv4": ["vlan100-v4"]}}},
        (
            (
                '{"type":"vlan","master":"eth0","vlanMode":"manual","vlanId":100,"mtu":0,'
                '"ipam":{"type":"spiderpool","default_ipv4_ippool":["vlan100-v4"]}}'
            ),
            COORD,
        ),
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["a", "b"], "vlanMode": "auto", "bond": {"name": "b0", "mode": 6}}},
        (
            '{"type":"ifacer","interfaces":["a","b"],"bond":{"name":"b0","mode":6,"options":""}}',
            '{"type":"vlan","master":"b0","vlanMode":"auto","mtu":0,' + IPAM + "}",
            COORD,
        ),
    ),
    (
        {
            "cniType": "sriov",
            "sriov": {"resourceName": "r", "rdmaIsolation": True, "mtu": 8000, "ippools": {"ipv4": ["gpu1-net11"]}},
        },
        (
            (
                '{"vlan":0,"min_tx_rate":0,"max_tx_rate":0,"type":"sriov",'
                '"ipam":{"type":"spiderpool","default_ipv4_ippool":["gpu1-net11"]}}'
            ),
            '{"type":"rdma"}',
            COORD,
            '{"type":"tuning","mtu":8000}',
        ),
    ),
    (
        {
            "cniType": "sriov",
            "sriov": {
                "resourceName": "r",
                "vlanID": 3,
                "minTxRateMbps": 100,
                "maxTxRateMbps": 1000,
                "ippools": {"ipv4": ["p4"], "ipv6": ["p6"], "matchMasterSubnet": True},
            },
            "chainCNIJsonData": ['{"type":"sbr"}'],
        },
        (
            (
                '{"vlan":3,"min_tx_rate":100,"max_tx_rate":1000,"type":"sriov","ipam":{"type":"spiderpool",'
                '"default_ipv4_ippool":["p4"],"default_ipv6_ippool":["p6"],"match_master_subnet":true}}'
            ),
            '{"type":"sbr"}',
            COORD,
        ),
    ),
    (
        {"cniType": "ib-sriov", "ibsriov": {"resourceName": "r"}},
        (
            '{"type":"ib-sriov","pkey":"","link_state":"enable","rdmaIsolation":true,"ibKubernetesEnabled":false,'
            + IPAM
            + "}",
            COORD,
        ),
    ),
    ({"cniType": "ipoib", "ipoib": {"master": "ibs2"}}, ('{"type":"ipoib","master":"ibs2",' + IPAM + "}", COORD)),
    (
        {"cniType": "ovs", "ovs": {"bridge": "br1", "trunk": [{"minID": 1, "maxID": 10}], "ippools": P4}},
        ('{"vlan":0,"type":"ovs","bridge":"br1",' + IPAM4 + ',"trunk":[{"minID":1,"maxID":10}]}', COORD),
    ),
    (
        {"cniType": "ovs", "ovs": {"bridge": "br1", "vlan": 9, "deviceID": "0000:00:1f.6", "trunk": [{"id": 20}]}},
        ('{"vlan":9,"type":"ovs","bridge":"br1","deviceID":"0000:00:1f.6",' + IPAM + ',"trunk":[{"id":20}]}', COORD),
    ),
    (
        {"cniType": "macvlan", "disableIPAM": True, "macvlan": {"master": ["eth0"], "ippools": P4}},
        ('{"type":"macvlan","master":"eth0","mode":"bridge","mtu":0}', COORD),
    ),
    (
        {"cniType": "macvlan", "enableCoordinator": False, "macvlan": {"master": ["eth0"]}},
        ('{"type":"macvlan","master":"eth0","mode":"bridge","mtu":0,' + IPAM + "}",),
    ),
    (
        {
            "cniType": "ipvlan",
            "ipvlan": {"master": ["e"]},
            "chainCNIJsonData": ['{"type":"sbr"}', '{"z":1,"type":"t<"}'],
        },
        (
            '{"type":"ipvlan","master":"e","mtu":0,' + IPAM + "}",
            '{"type":"sbr"}',
            '{"type":"t\\u003c","z":1}',
            COORD,
        ),
    ),
]


@pytest.mark.upstream(
    *("M00001", "M00002", "M00003", "M00006", "M00017", "M00021", "M00033", "M00034", "M00035", "M00038", "M00039")
)
@pytest.mark.parametrize(("spec", "plugins"), SAMPLES)
def test_samples(spec: dict[str, Any], plugins: tuple[str, ...]) -> None:
    found = text(spec)
    assert found == chain("net", *plugins)
    msgspec.json.decode(found)


@pytest.mark.upstream("M00010", "M00012")
def test_annotations_name_the_definition_the_configuration_and_the_version() -> None:
    spec = {"cniType": "ipvlan", "enableCoordinator": False, "ipvlan": {"master": ["e"]}}
    plugin = '{"type":"ipvlan","master":"e","mtu":0,' + IPAM + "}"
    named = {"multus.spidernet.io/cr-name": "other"}
    assert text(spec, **named) == chain("other", plugin)
    assert network_of(stored(spec, named)).metadata.name == "other"
    further = {"cni.spidernet.io/cniconfig-name": "inner", "multus.spidernet.io/cni-version": "1.0.0"}
    assert text(spec, **named, **further) == chain("inner", plugin, version="1.0.0")


@pytest.mark.upstream("M00004", "M00019")
def test_custom_configurations_are_taken_as_they_are() -> None:
    odd = '{ "cniVersion":"0.3.1", "name":"x",\n "plugins":[{"type":"loopback"}] }'
    assert text({"cniType": "custom", "customCNI": odd}) == odd
    assert text({}) is None
    assert stored({}).spec.custom_cni == CUSTOM["customCNI"]
    assert network_of(stored({})).spec.config is None


@pytest.mark.upstream("M00022", "M00026")
def test_everything_the_coordinator_may_be_told() -> None:
    everything = {
        "mode": "disabled",
        "podCIDRType": "none",
        "hijackCIDR": ["169.254.25.10", "169.254.0.0/16"],
        "policyRoutes": [{"dst": "10.200.0.5", "gw": "172.30.40.1"}],
        "podMACPrefix": "0a:1b",
        "tunePodRoutes": False,
        "podDefaultRouteNIC": "net1",
        "hostRuleTable": 600,
        "podRPFilter": 2,
        "txQueueLen": 1000,
        "vethLinkAddress": "169.254.100.1",
        "vethMTU": 1400,
    }

    def coordinator(block: dict[str, Any]) -> str:
        found = text({"cniType": "ipvlan", "ipvlan": {"master": ["e"]}, "coordinator": block})
        assert found is not None
        return found[found.index("},{") + 2 : -2]

    assert coordinator(everything) == (
        '{"txQueueLen":1000,"vethLinkAddress":"169.254.100.1","vethMTU":1400,"tunePodRoutes":false,'
        '"podMACPrefix":"0a:1b","mode":"disable","type":"coordinator","podDefaultRouteNic":"net1","podRPFilter":2,'
        '"hijackCIDR":["169.254.25.10/32","169.254.0.0/16"],'
        '"policyRoutes":[{"dst":"10.200.0.5/32","gw":"172.30.40.1"}]}'
    )
    assert '"podRPFilter":-1' in coordinator({"podRPFilter": -1})
    assert '"podRPFilter":0' in coordinator({"podCIDRType": "cluster"})
    assert coordinator({}) == COORD


@pytest.mark.upstream("M00003")
@pytest.mark.parametrize(
    ("spec", "resource"),
    [
        ({"cniType": "sriov", "sriov": {"resourceName": "spidernet.io/a"}}, "spidernet.io/a"),
        ({"cniType": "ib-sriov", "ibsriov": {"resourceName": "spidernet.io/ib"}}, "spidernet.io/ib"),
        ({"cniType": "ovs", "ovs": {"bridge": "br1", "deviceID": "0000:00:1f.6"}}, "ovs-cni.network.kubevirt.io/br1"),
        ({"cniType": "ovs", "ovs": {"bridge": "br1"}}, None),
        ({"cniType": "macvlan", "macvlan": {"master": ["a"], "rdmaResourceName": "r"}}, None),
    ],
)
def test_the_definition_names_the_device_plugins_resource(spec: dict[str, Any], resource: str | None) -> None:
    annotations = {"kubectl.kubernetes.io/last-applied-configuration": "{}", "a": "b"}
    found = network_of(stored(spec, annotations))
    expected = annotations | ({"k8s.v1.cni.cncf.io/resourceName": resource} if resource else {})
    assert found.metadata.annotations == expected
    (owner,) = found.metadata.owner_references
    assert (owner.kind, owner.name, owner.controller, owner.block_owner_deletion) == (
        "SpiderMultusConfig",
        "net",
        True,
        True,
    )
    assert found.metadata.labels == {}


def test_the_documented_example() -> None:
    spec = {
        "cniType": "macvlan",
        "macvlan": {
            "master": ["ens224", "ens225"],
            "bond": {"name": "bond0", "mode": 1, "options": "primary=ens224;miimon=100"},
            "vlanID": 40,
            "mtu": 1400,
            "ippools": {"ipv4": ["web-v4"], "ipv6": ["web-v6"]},
        },
        "coordinator": {
            "mode": "underlay",
            "hijackCIDR": ["169.254.0.0/16"],
            "podDefaultRouteNIC": "net1",
            "vethMTU": 1400,
        },
        "chainCNIJsonData": ['{"type":"sbr"}'],
    }
    annotations = {"multus.spidernet.io/cni-version": "0.4.0", "cni.spidernet.io/cniconfig-name": "web-underlay"}
    assert text(spec, **annotations) == chain(
        "web-underlay",
        '{"vlanID":40,"type":"ifacer","interfaces":["ens224","ens225"],'
        '"bond":{"name":"bond0","mode":1,"options":"primary=ens224;miimon=100"}}',
        '{"type":"macvlan","master":"bond0.40","mode":"bridge","mtu":1400,"ipam":{"type":"spiderpool",'
        '"default_ipv4_ippool":["web-v4"],"default_ipv6_ippool":["web-v6"]}}',
        '{"type":"sbr"}',
        '{"txQueueLen":0,"vethMTU":1400,"tunePodRoutes":true,"mode":"underlay","type":"coordinator",'
        '"podDefaultRouteNic":"net1","hijackCIDR":["169.254.0.0/16"]}',
        version="0.4.0",
    )
