"""SpiderCoordinator: what is stored and refused, and what the nodes' agents hand to pods."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import yaml

from api.coordinator import Coordinator, CoordinatorUnusableError, in_force, node_config
from api.manifest import parse
from api.meta import encode
from api.validate.coordinator import coordinator_errors, default_coordinator

SYNCED = {"phase": "Synced", "overlayPodCIDR": ["10.244.0.0/16"], "serviceCIDR": ["10.96.0.0/12"]}


def manifest(spec: dict[str, Any], name: str = "default") -> bytes:
    head = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderCoordinator", "metadata": {"name": name}}
    return yaml.safe_dump(head | {"spec": spec}).encode()


def stored(**spec: Any) -> Coordinator:
    (entry,) = parse(manifest(spec))
    assert entry.errors == ()
    assert isinstance(entry.resource, Coordinator)
    return default_coordinator(entry.resource)


def bare(name: str = "default", status: dict[str, Any] | None = None, **spec: Any) -> Coordinator:
    whole: dict[str, Any] = {"metadata": {"name": name}, "spec": spec}
    return msgspec.convert(whole | ({"status": status} if status else {}), Coordinator)


FULL = {
    "mode": "auto",
    "podCIDRType": "auto",
    "hijackCIDR": ["169.254.25.10", "169.254.0.0/16", "FD00::1"],
    "policyRoutes": [{"dst": "10.200.0.5", "gw": "172.30.40.1"}, {"dst": "fd00::/64", "gw": "fd00::9"}],
    "podMACPrefix": "0a:1b",
    "tunePodRoutes": True,
    "podDefaultRouteNIC": "eth0",
    "hostRuleTable": 500,
    "podRPFilter": 0,
    "txQueueLen": 0,
    "vethLinkAddress": "169.254.100.1",
    "vethMTU": 1500,
}


def test_the_documented_example_is_stored_with_whole_cidrs() -> None:
    config = stored(**FULL, enableVethLinkLocalAddress=True)
    assert coordinator_errors(config) == []
    assert config.metadata.finalizers == ["spiderpool.spidernet.io"]
    assert msgspec.json.decode(encode(config))["spec"] == FULL | {
        "hijackCIDR": ["169.254.25.10/32", "169.254.0.0/16", "fd00::1/128"],
        "policyRoutes": [{"dst": "10.200.0.5/32", "gw": "172.30.40.1"}, {"dst": "fd00::/64", "gw": "fd00::9"}],
    }
    assert default_coordinator(config) == config


def test_everything_but_the_type_has_a_default() -> None:
    expected = {
        "mode": "auto",
        "podCIDRType": "none",
        "tunePodRoutes": True,
        "hostRuleTable": 500,
        "podRPFilter": 0,
        "txQueueLen": 0,
        "vethLinkAddress": "",
        "vethMTU": 1500,
    }
    for config in (stored(podCIDRType="none"), default_coordinator(bare(podCIDRType="none"))):
        assert msgspec.json.decode(encode(config))["spec"] == expected
        assert coordinator_errors(config) == []


def test_a_terminating_one_gets_no_finalizer_back() -> None:
    document = {"metadata": {"name": "default", "deletionTimestamp": "2030-01-01T00:00:00Z"}, "spec": {}}
    gone = msgspec.convert(document, Coordinator)
    assert default_coordinator(gone).metadata.finalizers == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, 'spec.podCIDRType: Unsupported value: ""'),
    ({"podCIDRType": "auto", "hijackCIDR": ["10.0.0.0/16", "x"]}, 'spec.extraCIDR[1]: Invalid value: "x"'),
    ({"podCIDRType": "auto", "hijackCIDR": ["10.0.0.0/33"]}, "spec.extraCIDR[0]: Invalid value: "),
    ({"podCIDRType": "auto", "hijackCIDR": ["fe80::1%eth0"]}, "spec.extraCIDR[0]: Invalid value: "),
    (
        {"podCIDRType": "auto", "policyRoutes": [{"dst": "x", "gw": "10.0.0.1"}]},
        "spec.policyRoutes[0].dst: Invalid value",
    ),
    (
        {"podCIDRType": "auto", "policyRoutes": [{"dst": "10.0.0.0/8", "gw": "x"}]},
        'spec.policyRoutes[0].gw: Invalid value: "x": gw is an invalid IP address',
    ),
    (
        {"podCIDRType": "auto", "policyRoutes": [{"dst": "10.0.0.0/8", "gw": "fd00::1"}]},
        "dst and gw must use the same IP family",
    ),
    ({"podCIDRType": "auto", "podMACPrefix": "0b:1b"}, 'spec.podMACPrefix: Invalid value: "0b:1b": not a unicast MAC'),
    ({"podCIDRType": "auto", "podMACPrefix": "0a:1"}, "not a valid MAC prefix"),
    ({"podCIDRType": "auto", "podMACPrefix": "0a-1b"}, "not a valid MAC prefix"),
    ({"podCIDRType": "auto", "podMACPrefix": "+a:1b"}, "not a valid MAC prefix"),
    ({"podCIDRType": "auto", "txQueueLen": -1}, "spec.txQueueLen: Invalid value: -1: txQueueLen can't be less than 0"),
    ({"podCIDRType": "auto", "podRPFilter": 3}, "spec.podRPFilter: Unsupported value: 3"),
    ({"podCIDRType": "auto", "vethLinkAddress": "x"}, "vethLinkAddress is an invalid IP address"),
    ({"podCIDRType": "auto", "hostRuleTable": 254}, "spec.hostRuleTable: Invalid value: 254"),
]


@pytest.mark.upstream("M00023", "M00024")
@pytest.mark.parametrize(("spec", "text"), REFUSED)
def test_refused(spec: dict[str, Any], text: str) -> None:
    (error,) = coordinator_errors(stored(**spec))
    assert text in str(error)


def test_negative_filters_are_accepted() -> None:
    assert coordinator_errors(stored(podCIDRType="auto", podRPFilter=-1)) == []


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"mode": "disable"}, "spec.mode"),
        ({"podCIDRType": "flannel"}, "spec.podCIDRType"),
        ({"vethMTU": 0}, "spec.vethMTU"),
        ({"policyRoutes": [{"dst": "10.0.0.0/8"}]}, "spec.policyRoutes[0].gw"),
    ],
)
def test_the_schema_refuses(spec: dict[str, Any], path: str) -> None:
    (entry,) = parse(manifest({"podCIDRType": "auto"} | spec))
    (error,) = entry.errors
    assert str(error).startswith(f"{path}: ")


def test_the_agents_answer_has_every_member_and_no_null() -> None:
    assert node_config(bare(status={"phase": "Synced"})) == {
        "mode": "auto",
        "overlayPodCIDR": [],
        "serviceCIDR": [],
        "hijackCIDR": [],
        "policyRoutes": [],
        "podMACPrefix": "",
        "tunePodRoutes": True,
        "podDefaultRouteNIC": "",
        "vethLinkAddress": "",
        "vethMTU": 1500,
        "hostRuleTable": 500,
        "podRPFilter": 0,
        "txQueueLen": 0,
    }
    full = stored(**FULL | {"mode": "disabled", "tunePodRoutes": False, "podRPFilter": -1, "hostRuleTable": -4})
    answer = node_config(msgspec.structs.replace(full, status=bare(status=SYNCED).status), "net1")
    told = FULL | {
        "mode": "disable",
        "hijackCIDR": ["169.254.25.10/32", "169.254.0.0/16", "fd00::1/128"],
        "policyRoutes": [{"dst": "10.200.0.5/32", "gw": "172.30.40.1"}, {"dst": "fd00::/64", "gw": "fd00::9"}],
        "tunePodRoutes": False,
        "podRPFilter": -1,
        "podDefaultRouteNIC": "net1",
        "overlayPodCIDR": ["10.244.0.0/16"],
        "serviceCIDR": ["10.96.0.0/12"],
    }
    del told["podCIDRType"]
    assert answer == told


@pytest.mark.upstream("V00008")
def test_who_is_in_force() -> None:
    ready, other = bare(status=SYNCED), bare("another", status=SYNCED)
    assert in_force([other, ready]) is ready
    assert in_force([other]) is other
    assert in_force([bare("z", status=SYNCED), other]) is other
    with pytest.raises(CoordinatorUnusableError, match="coordinator config not found"):
        in_force([])
    for unready in (bare(), bare(status={"phase": "NotReady", "reason": "why"})):
        with pytest.raises(CoordinatorUnusableError, match="spidercoordinator: default no ready"):
            in_force([other, unready])
