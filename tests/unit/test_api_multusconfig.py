"""SpiderMultusConfig: what is stored of a manifest, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import yaml
from msgspec.structs import replace

from api.coordinator import Coordinator
from api.manifest import parse
from api.meta import ObjectMeta, OwnerReference, encode
from api.multusconfig import MultusConfig
from api.nad import NetworkAttachmentDefinition
from api.validate import Surroundings, defaulted, errors
from api.validate.multusconfig import created_multus_config_errors, updated_multus_config_errors
from api.validate.multusdefaults import default_multus_config

RDMA = "cni.spidernet.io/rdma-resource-inject"
NETWORK = "cni.spidernet.io/network-resource-inject"
POOLS = {"ipv4": ["p4"]}
OK = {"cniType": "macvlan", "macvlan": {"master": ["eth0"]}}


def manifest(spec: dict[str, Any] | None, **annotations: str) -> dict[str, Any]:
    metadata = {"name": "net", "namespace": "web", "annotations": annotations}
    whole = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderMultusConfig", "metadata": metadata}
    return whole if spec is None else whole | {"spec": spec}


def stored(spec: dict[str, Any] | None, annotations: dict[str, str] | None = None) -> MultusConfig:
    """As an API server with our schema and our webhook stores it."""
    (entry,) = parse(yaml.safe_dump(manifest(spec, **(annotations or {}))).encode())
    assert entry.errors == ()
    assert isinstance(entry.resource, MultusConfig)
    return default_multus_config(entry.resource)


def unchecked(spec: dict[str, Any], annotations: dict[str, str] | None = None) -> MultusConfig:
    """As it is where the schema did not look."""
    return default_multus_config(msgspec.convert(manifest(spec, **(annotations or {})), MultusConfig))


def schema_errors(spec: dict[str, Any]) -> list[str]:
    (entry,) = parse(yaml.safe_dump(manifest(spec)).encode())
    return [str(error) for error in entry.errors]


def refusal(config: MultusConfig, existing: NetworkAttachmentDefinition | None = None) -> str:
    found = created_multus_config_errors(config, existing)
    assert len(found) <= 1, "the first failure alone is reported"
    return str(found[0]) if found else ""


def network(owner: str, kind: str = "SpiderMultusConfig") -> NetworkAttachmentDefinition:
    reference = OwnerReference(api_version="v1", kind=kind, name=owner, uid="u", controller=True)
    return NetworkAttachmentDefinition(metadata=ObjectMeta(name="net", namespace="web", owner_references=[reference]))


COORDINATOR = {
    "mode": "auto",
    "tunePodRoutes": True,
    "hostRuleTable": 500,
    "podRPFilter": 0,
    "txQueueLen": 0,
    "vethLinkAddress": "",
    "podMACPrefix": "",
    "podDefaultRouteNIC": "",
}
HEAD: dict[str, Any] = {
    "enableCoordinator": True,
    "disableIPAM": False,
    "chainCNIJsonData": [],
    "coordinator": COORDINATOR,
}
MATCH = {"matchMasterSubnet": False}

DEFAULTED: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (
        OK,
        HEAD
        | {
            "cniType": "macvlan",
            "macvlan": {"master": ["eth0"], "mtu": 0, "vlanID": 0, "rdmaResourceName": "", "ippools": MATCH},
        },
    ),
    (
        {"cniType": "ipvlan", "ipvlan": {"master": ["a", "b"], "bond": {"name": "b0", "mode": 1}, "ippools": POOLS}},
        HEAD
        | {
            "cniType": "ipvlan",
            "ipvlan": {
                "master": ["a", "b"],
                "mtu": 0,
                "vlanID": 0,
                "bond": {"name": "b0", "mode": 1, "options": ""},
                "rdmaResourceName": "",
                "ippools": POOLS | MATCH,
            },
        },
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["eth0"], "vlanMode": "auto"}},
        HEAD
        | {
            "cniType": "vlan",
            "vlan": {"master": ["eth0"], "mtu": 0, "rdmaResourceName": "", "ippools": MATCH, "vlanMode": "auto"},
        },
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["eth0"]}},
        HEAD
        | {
            "cniType": "vlan",
            "vlan": {
                "master": ["eth0"],
                "mtu": 0,
                "vlanID": 0,
                "rdmaResourceName": "",
                "ippools": MATCH,
                "vlanMode": "manual",
            },
        },
    ),
    (
        {"cniType": "sriov", "sriov": {"resourceName": "x/y"}, "coordinator": {"mode": "underlay", "vethMTU": 1400}},
        HEAD
        | {
            "cniType": "sriov",
            "coordinator": COORDINATOR | {"mode": "underlay", "vethMTU": 1400},
            "sriov": {
                "resourceName": "x/y",
                "vlanID": 0,
                "mtu": 0,
                "minTxRateMbps": 0,
                "maxTxRateMbps": 0,
                "rdmaIsolation": False,
                "ippools": MATCH,
            },
        },
    ),
    (
        {"cniType": "ib-sriov", "ibsriov": {"resourceName": "x/y"}},
        HEAD
        | {
            "cniType": "ib-sriov",
            "ibsriov": {
                "resourceName": "x/y",
                "pkey": "",
                "linkState": "enable",
                "rdmaIsolation": True,
                "enableIbKubernetes": False,
                "ippools": MATCH,
            },
        },
    ),
    (
        {"cniType": "ipoib", "ipoib": {"master": "ibs2"}},
        HEAD | {"cniType": "ipoib", "ipoib": {"master": "ibs2", "ippools": MATCH}},
    ),
    (
        {"cniType": "ovs", "ovs": {"bridge": "br1"}},
        HEAD | {"cniType": "ovs", "ovs": {"bridge": "br1", "vlan": 0, "deviceID": "", "ippools": MATCH}},
    ),
]
CUSTOM = {
    "cniType": "custom",
    "enableCoordinator": False,
    "disableIPAM": False,
    "chainCNIJsonData": [],
    "customCNI": "",
}


@pytest.mark.parametrize(("spec", "expected"), [*DEFAULTED, ({}, CUSTOM), ({"coordinator": {}}, CUSTOM)])
def test_what_is_stored(spec: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    config = stored(spec)
    assert msgspec.json.decode(encode(config))["spec"] == expected
    assert refusal(config) == ""
    assert default_multus_config(config) == config, "defaulting what is stored changes nothing"
    assert msgspec.json.decode(encode(unchecked(spec or {})))["spec"] == expected, "with and without the schema's"


@pytest.mark.upstream("M00019")
def test_an_empty_specification_is_a_custom_one() -> None:
    assert refusal(stored({})) == refusal(stored(None)) == ""
    assert stored(None).spec.cni_type == "custom"


def test_inject_annotations_are_copied_to_labels() -> None:
    config = stored(OK, {NETWORK: "g", "other": "x"})
    assert config.metadata.labels == {NETWORK: "g"}


def test_the_documented_example_is_accepted() -> None:
    spec = {
        "cniType": "macvlan",
        "enableCoordinator": True,
        "disableIPAM": False,
        "macvlan": {
            "master": ["ens224", "ens225"],
            "bond": {"name": "bond0", "mode": 1, "options": "primary=ens224;miimon=100"},
            "vlanID": 40,
            "mtu": 1400,
            "rdmaResourceName": "",
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
    annotations = {
        "multus.spidernet.io/cni-version": "0.4.0",
        "cni.spidernet.io/cniconfig-name": "web-underlay",
        NETWORK: "web-net",
    }
    assert refusal(stored(spec, annotations)) == ""


BOTH = {"name": "b", "mode": 1}
REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"cniType": "macvlan"}, {}, "spec.macvlanConfig: Required value: no spec.macvlanConfig specified"),
    ({"cniType": "ipvlan"}, {}, "spec.ipvlanConfig: Required value"),
    ({"cniType": "vlan"}, {}, "spec.vlan: Required value"),
    ({"cniType": "sriov"}, {}, "spec.sriovConfig: Required value"),
    ({"cniType": "ib-sriov"}, {}, "spec.ibsriovConfig: Required value"),
    ({"cniType": "ipoib"}, {}, "spec.ipoibConfig: Required value"),
    ({"cniType": "ovs"}, {}, "spec.ovsConfig: Required value"),
    (
        OK | {"ipvlan": {"master": ["a"]}},
        {},
        "spec.cniType: Forbidden: the cniType macvlan only supports spec.macvlanConfig, please remove",
    ),
    (OK | {"customCNI": ""}, {}, "please remove other CNI configs"),
    (
        {"macvlan": {"master": ["a"]}},
        {},
        "spec.cniType: Forbidden: the cniType custom only supports spec.customCniTypeConfig",
    ),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["a"]}, "ovs": {"bridge": "b"}},
        {},
        "spec.cniType: Forbidden: the cniType macvlan only supports",
    ),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["a", "b"]}},
        {},
        "spec.macvlanConfig: Invalid value: ",
    ),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["a", "b"]}, "ovs": {"bridge": "b"}},
        {},
        "the bond property is nil with multiple Interfaces",
    ),
    ({"cniType": "macvlan", "macvlan": {"master": []}}, {}, "master can't be empty"),
    ({"cniType": "ipvlan", "ipvlan": {"master": [""]}}, {}, "spec.ipvlanConfig: Invalid value: "),
    (
        {"cniType": "ipvlan", "ipvlan": {"master": ["a", "b"], "bond": {"name": "", "mode": 1}}},
        {},
        "bond name can't be empty",
    ),
    (
        {"cniType": "ipvlan", "ipvlan": {"master": ["a"], "ippools": {"matchMasterSubnet": True}}},
        {},
        "MatchMasterSubnet feature is not supported for ipvlan",
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["a"], "ippools": {"matchMasterSubnet": True}}},
        {},
        "spec.vlan: Invalid value: ",
    ),
    (
        {"cniType": "vlan", "vlan": {"master": ["a"], "vlanMode": "auto", "vlanID": 5}},
        {},
        "vlanId must not be specified when vlanMode is auto",
    ),
    (
        {"cniType": "sriov", "sriov": {"resourceName": "r", "minTxRateMbps": 2, "maxTxRateMbps": 1}},
        {},
        "spec.sriovConfig: Invalid value: 2: minTxRateMbps must be less than maxTxRateMbps",
    ),
    ({"cniType": "sriov", "sriov": {"resourceName": "r", "minTxRateMbps": 2}}, {}, "minTxRateMbps must be less"),
    (
        {"cniType": "sriov", "sriov": {}},
        {},
        "spec.sriovConfig: Required value: no spec.sriovConfig[resourceName] specified",
    ),
    ({"cniType": "ib-sriov", "ibsriov": {}}, {}, "no spec.ibsriovConfig[resourceName] specified"),
    ({"cniType": "ipoib", "ipoib": {}}, {}, "no spec.ipoibConfig[master] specified"),
    (
        {"cniType": "ovs", "ovs": {"bridge": "b", "vlan": 4095}},
        {},
        "spec.ovsConfig: Invalid value: 4095: invalid vlanId 4095, please make sure vlanId in range [0,4094]",
    ),
    (
        {"cniType": "ovs", "ovs": {"bridge": "b", "trunk": [{"id": 1}, {"minID": 9, "maxID": 3}]}},
        {},
        "minID is greater than maxID in trunk parameter",
    ),
    ({"cniType": "ovs", "ovs": {"bridge": "b", "trunk": [{"maxID": 3}]}}, {}, "incorrect trunk minID parameter"),
    ({"customCNI": "{"}, {}, "spec.customCniTypeConfig: Forbidden: customCniConfig isn't a valid JSON encoding"),
    (OK | {"chainCNIJsonData": ['{"type":"sbr"}', "{"]}, {}, "spec.chainCNIJsonData: Forbidden: invalid {: "),
    (OK | {"chainCNIJsonData": ['{"mtu":1}']}, {}, "missing 'type'"),
    (OK | {"chainCNIJsonData": ['["sbr"]']}, {}, "spec.chainCNIJsonData: Forbidden: invalid"),
    (OK, {"multus.spidernet.io/cni-version": "9.9.9"}, "unsupported CNI version 9.9.9"),
    (OK, {"multus.spidernet.io/cr-name": "Net_1"}, "invalid custom net-attach-def resource name"),
    (OK, {"multus.spidernet.io/cr-name": ""}, "metadata.annotations: Invalid value: "),
    (OK, {"multus.spidernet.io/cr-name": "n" * 254}, "invalid custom net-attach-def resource name"),
    (OK | {"coordinator": {"podRPFilter": 3}}, {}, "spec.coordinator.podRPFilter: Unsupported value: 3"),
    (OK | {"coordinator": {"podMACPrefix": "0b:1b"}}, {}, "not a unicast MAC"),
    (OK | {"coordinator": {"podMACPrefix": "0a1b"}}, {}, "not a valid MAC prefix"),
    (OK, {RDMA: "g"}, "rdmaResourceName can not empty for spidermultusconfig web/net"),
    (
        {"cniType": "macvlan", "macvlan": {"master": ["a"], "rdmaResourceName": "r"}},
        {RDMA: "g"},
        "no any ippools configured for spidermultusconfig web/net",
    ),
    ({"cniType": "sriov", "sriov": {"resourceName": "r"}}, {NETWORK: "g"}, "no any ippools configured"),
    (
        {"cniType": "ovs", "ovs": {"bridge": "b"}},
        {RDMA: "g"},
        "spec.cniType: Forbidden: the cniType ovs does not support RDMA resource or network resource injected",
    ),
    ({}, {NETWORK: "g"}, "the cniType custom does not support RDMA resource or network resource injected"),
    ({"cniType": "ovs"}, {NETWORK: "g"}, "does not support RDMA resource"),
]


@pytest.mark.upstream(
    *("M00005", "M00011", "M00013", "M00015", "M00020", "M00023", "M00024", "M00025"),
    *("M00027", "M00028", "M00030", "M00031", "M00032", "M00040"),
)
@pytest.mark.parametrize(("spec", "annotations", "text"), REFUSED)
def test_refused(spec: dict[str, Any], annotations: dict[str, str], text: str) -> None:
    assert text in refusal(stored(spec, annotations))


@pytest.mark.upstream("M00027", "M00028", "M00029", "M00031", "M00032")
@pytest.mark.parametrize("key", [RDMA, NETWORK])
@pytest.mark.parametrize(
    "spec",
    [
        {"cniType": "macvlan", "macvlan": {"master": ["a"], "rdmaResourceName": "r", "ippools": POOLS}},
        {"cniType": "ipvlan", "ipvlan": {"master": ["a"], "rdmaResourceName": "r", "ippools": POOLS}},
        {"cniType": "vlan", "vlan": {"master": ["a"], "rdmaResourceName": "r", "ippools": POOLS}},
        {"cniType": "sriov", "sriov": {"resourceName": "r", "ippools": {"ipv6": ["p6"]}}},
        {"cniType": "ib-sriov", "ibsriov": {"resourceName": "r", "ippools": POOLS}},
        {"cniType": "ipoib", "ipoib": {"master": "ib0", "ippools": POOLS}},
    ],
)
def test_types_whose_resources_can_be_injected(spec: dict[str, Any], key: str) -> None:
    assert refusal(stored(spec, {key: "g"})) == ""
    assert refusal(stored(OK, {NETWORK: "g"})) == "", "networks alone need neither resource nor pools"


@pytest.mark.upstream("M00016", "M00038")
@pytest.mark.parametrize("kind", ["macvlan", "ipvlan", "vlan"])
def test_vlan_ids_and_mtus_have_a_range(kind: str) -> None:
    def spec(**members: Any) -> dict[str, Any]:
        return {"cniType": kind, kind: {"master": ["a"], **members}}

    for vlan in (0, 4094):
        assert refusal(stored(spec(vlanID=vlan))) == ""
    for vlan in (-1, 4095):
        (error,) = schema_errors(spec(vlanID=vlan))
        assert error.startswith(f"spec.{kind}.vlanID: Invalid value: {vlan}")
    (error,) = schema_errors(spec(mtu=-1))
    assert error.startswith(f"spec.{kind}.mtu: Invalid value: -1")


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"cniType": "bridge"}, "spec.cniType"),
        ({"cniType": "macvlan", "macvlan": {}}, "spec.macvlan.master"),
        ({"cniType": "macvlan", "macvlan": {"master": ["a"], "bond": {"name": "bond0"}}}, "spec.macvlan.bond.mode"),
        ({"cniType": "macvlan", "macvlan": {"master": ["a"], "bond": BOTH | {"mode": 7}}}, "spec.macvlan.bond.mode"),
        ({"cniType": "vlan", "vlan": {"master": ["a"], "vlanMode": "x"}}, "spec.vlan.vlanMode"),
        ({"cniType": "ib-sriov", "ibsriov": {"linkState": "up"}}, "spec.ibsriov.linkState"),
        ({"cniType": "ovs", "ovs": {"vlan": 1}}, "spec.ovs.bridge"),
        ({"cniType": "ovs", "ovs": {"bridge": "b", "trunk": [{"id": 4095}]}}, "spec.ovs.trunk[0].id"),
        (OK | {"coordinator": {"vethMTU": 0}}, "spec.coordinator.vethMTU"),
        (OK | {"coordinator": {"mode": "disable"}}, "spec.coordinator.mode"),
    ],
)
def test_the_schema_refuses(spec: dict[str, Any], path: str) -> None:
    (error,) = schema_errors(spec)
    assert error.startswith(f"{path}: ")


def test_a_foreign_owner_refuses_a_living_definition_only() -> None:
    config = stored(OK)
    text = "the net-attach-def web/net already exists and is managed by SpiderMultusConfig web/other."
    assert text in refusal(config, network("other"))
    assert refusal(config, network("net")) == ""
    assert refusal(config, network("other", kind="Deployment")) == ""
    going = network("other")
    times = msgspec.convert({"deletionTimestamp": "2030-01-01T00:00:00Z"}, ObjectMeta)
    going = replace(going, metadata=replace(going.metadata, deletion_timestamp=times.deletion_timestamp))
    assert refusal(config, going) == ""


@pytest.mark.upstream("M00010")
@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (None, "a", "it's unsupported to changed Multus net-attach-def 'net' to customized name 'a'"),
        ("a", "b", "it's unsupported to change customized Multus net-attach-def resource name from 'a' to 'b'"),
        ("a", None, ""),
        ("a", "a", ""),
    ],
)
def test_the_name_of_the_definition_stays(before: str | None, after: str | None, text: str) -> None:
    old, new = (
        stored(OK, {"multus.spidernet.io/cr-name": name} if name is not None else {}) for name in (before, after)
    )
    found = [str(error) for error in updated_multus_config_errors(old, new)]
    assert found == ([] if not text else found)
    assert text in "".join(found)


def test_deep_and_odd_json_is_refused_and_no_more() -> None:
    deep = "[" * 100_000
    assert "isn't a valid JSON" in refusal(stored({"customCNI": deep}))
    assert len(refusal(unchecked(OK | {"chainCNIJsonData": [deep]}))) < 1000


def test_admission_chooses_by_kind() -> None:
    raw = msgspec.convert(manifest({"cniType": "macvlan"}), MultusConfig)
    assert defaulted(raw) == stored({"cniType": "macvlan"})
    (error,) = errors(defaulted(raw), None, Surroundings())
    assert error.path == "spec.macvlanConfig"
    assert [e.path for e in errors(defaulted(raw), stored(OK), Surroundings())] == ["spec.macvlanConfig"]
    coordinator = defaulted(msgspec.convert({"metadata": {"name": "default"}}, Coordinator))
    assert [e.path for e in errors(coordinator, None, Surroundings())] == ["spec.podCIDRType"]
