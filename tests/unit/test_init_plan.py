"""spiderpool-init: what the chart's variables amount to, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.coordinator import Coordinator
from api.multusconfig import MultusConfig
from api.pool import Pool
from api.subnet import Subnet
from controller.init.plan import InitError, first_plugin, plan

BASE = {
    "SPIDERPOOL_NAMESPACE": '"spiderpool"',
    "SPIDERPOOL_CONTROLLER_NAME": "spiderpool-controller",
    "SPIDERPOOL_AGENT_NAME": "spiderpool-agent",
    "SPIDERPOOL_INIT_ENABLE_MULTUS_CONFIG": "false",
}
FULL = BASE | {
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_NAME": "default",
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_TUNE_POD_ROUTES": '"true"',
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_POD_CIDR_TYPE": "auto",
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_HIJACK_CIDR": '["169.254.0.0/16", \\"10.0.0.1\\"]',
    "SPIDERPOOL_INIT_DEFAULT_COORDINATOR_POLICY_ROUTES": '[{\\"dst\\":\\"10.2.0.1\\",\\"gw\\":\\"10.1.0.1\\"}]',
    "SPIDERPOOL_INIT_DEFAULT_IPV4_SUBNET_NAME": "v4s",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_NAME": "v4p",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_SUBNET": '"172.18.0.0/16"',
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_GATEWAY": "172.18.0.1",
    "SPIDERPOOL_INIT_DEFAULT_IPV4_IPPOOL_IPRANGES": '["172.18.0.2-172.18.0.9","172.18.1.1"]',
    "SPIDERPOOL_INIT_DEFAULT_IPV6_IPPOOL_NAME": "v6p",
    "SPIDERPOOL_INIT_DEFAULT_IPV6_IPPOOL_SUBNET": "fd00::/64",
    "SPIDERPOOL_INIT_ENABLE_MULTUS_CONFIG": "true",
    "SPIDERPOOL_INIT_DEFAULT_CNI_NAME": "k8s-pod-network",
}


def test_nothing_asked_for() -> None:
    made = plan(BASE)
    assert (made.namespace, made.controller, made.objects) == ("spiderpool", "spiderpool-controller", ())
    assert made.ready_file == "/etc/spiderpool/ready"


def test_everything() -> None:
    coordinator, subnet, v4, v6, multus = plan(FULL).objects
    assert isinstance(coordinator, Coordinator)
    assert coordinator.metadata.name == "default"
    spec = coordinator.spec
    assert (spec.mode, spec.pod_cidr_type, spec.tune_pod_routes, spec.veth_mtu) == ("auto", "auto", True, 1500)
    assert spec.hijack_cidr == ["169.254.0.0/16", "10.0.0.1/32"]
    assert [(route.dst, route.gw) for route in spec.policy_routes or ()] == [("10.2.0.1/32", "10.1.0.1")]
    assert isinstance(subnet, Subnet)
    assert isinstance(v4, Pool)
    assert isinstance(v6, Pool)
    for made in (subnet, v4):
        assert (made.spec.subnet, made.spec.gateway) == ("172.18.0.0/16", "172.18.0.1")
        assert made.spec.ips == ["172.18.0.2-172.18.0.9", "172.18.1.1"]
    assert (v4.spec.default, v6.spec.default, v6.spec.ips, v6.spec.gateway) == (True, True, None, None)
    assert isinstance(multus, MultusConfig)
    assert (multus.metadata.name, multus.metadata.namespace) == ("calico", "spiderpool")
    assert multus.metadata.annotations == {"multus.spidernet.io/cr-name": "k8s-pod-network"}
    assert (multus.spec.cni_type, multus.spec.enable_coordinator) == ("custom", False)


I = "SPIDERPOOL_INIT_"  # noqa: E741


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SPIDERPOOL_AGENT_NAME": '""'}, "SPIDERPOOL_AGENT_NAME: must not be empty"),
        ({f"{I}ENABLE_MULTUS_CONFIG": ""}, "ENABLE_MULTUS_CONFIG: '' is neither true nor false"),
        ({f"{I}ENABLE_MULTUS_CONFIG": "yes"}, "ENABLE_MULTUS_CONFIG: 'yes' is neither"),
        ({f"{I}DEFAULT_COORDINATOR_TUNE_POD_ROUTES": ""}, "TUNE_POD_ROUTES: '' is neither"),
        ({f"{I}DEFAULT_COORDINATOR_VETH_MTU": "0"}, "VETH_MTU: '0' is not an integer above 0"),
        ({f"{I}DEFAULT_COORDINATOR_HIJACK_CIDR": "[10.0.0.0/33]"}, "HIJACK_CIDR: '10.0.0.0/33' is neither"),
        ({f"{I}DEFAULT_COORDINATOR_POLICY_ROUTES": "[{]"}, "POLICY_ROUTES: it is not JSON"),
        ({f"{I}DEFAULT_COORDINATOR_POLICY_ROUTES": '[{"dst":"x","gw":"10.0.0.1"}]'}, "POLICY_ROUTES[0].dst: 'x'"),
        ({f"{I}DEFAULT_COORDINATOR_POLICY_ROUTES": '[{"dst":"10.0.0.1"}]'}, "POLICY_ROUTES[0].gw: None"),
        ({f"{I}DEFAULT_IPV6_IPPOOL_NAME": "v4p"}, "IPV6_IPPOOL_NAME: 'v4p' is the name for IPv4 too"),
        ({f"{I}DEFAULT_IPV4_IPPOOL_SUBNET": ""}, "IPV4_IPPOOL_SUBNET: '' is not an IPv4 CIDR"),
        ({f"{I}DEFAULT_IPV4_IPPOOL_SUBNET": "172.18.0.0"}, "IPV4_IPPOOL_SUBNET"),
        ({f"{I}DEFAULT_IPV6_IPPOOL_SUBNET": "10.0.0.0/8"}, "IPV6_IPPOOL_SUBNET: '10.0.0.0/8' is not an IPv6 CIDR"),
        ({f"{I}DEFAULT_IPV4_IPPOOL_GATEWAY": "fd00::1"}, "IPV4_IPPOOL_GATEWAY: 'fd00::1'"),
        ({f"{I}DEFAULT_IPV4_IPPOOL_IPRANGES": "[172.18.0.9-172.18.0.2]"}, "IPV4_IPPOOL_IPRANGES"),
        ({f"{I}DEFAULT_CNI_DIR": "/nowhere"}, "DEFAULT_CNI_DIR: '/nowhere' is not a folder"),
    ],
)
def test_mistakes(change: dict[str, str], message: str) -> None:
    with pytest.raises(InitError) as caught:
        plan(FULL | change)
    assert message in str(caught.value)


def test_without_a_name_the_coordinators_variables_are_not_read() -> None:
    assert plan(BASE | {f"{I}DEFAULT_COORDINATOR_VETH_MTU": "x"}).objects == ()


def _multus_of(tmp_path: Path, document: object) -> MultusConfig:
    (tmp_path / "00-multus.conf").write_text("{}")
    (tmp_path / "10-net.conflist").write_text(json.dumps(document))
    given = BASE | {f"{I}ENABLE_MULTUS_CONFIG": "true", f"{I}DEFAULT_CNI_DIR": str(tmp_path)}
    (made,) = plan(given).objects
    assert isinstance(made, MultusConfig)
    return made


def test_the_nodes_first_configuration(tmp_path: Path) -> None:
    made = _multus_of(tmp_path, {"name": "net", "plugins": [{"type": "macvlan", "master": "eth0"}]})
    assert (made.metadata.name, made.spec.cni_type) == ("net", "macvlan")
    assert made.spec.macvlan is not None
    assert made.spec.macvlan.master == ["eth0"]
    made = _multus_of(tmp_path, {"name": "net", "type": "flannel"})
    assert (made.metadata.name, made.spec.cni_type) == ("net", "custom")


def test_no_configuration_on_the_node(tmp_path: Path) -> None:
    given = BASE | {f"{I}ENABLE_MULTUS_CONFIG": "true", f"{I}DEFAULT_CNI_DIR": str(tmp_path)}
    (made,) = plan(given).objects
    assert made.metadata.name == "default"
    assert first_plugin(str(tmp_path)) == {}


def test_a_malformed_configuration_on_the_node(tmp_path: Path) -> None:
    (tmp_path / "10-net.conf").write_text("{")
    with pytest.raises(InitError, match="DEFAULT_CNI_DIR"):
        plan(BASE | {f"{I}ENABLE_MULTUS_CONFIG": "true", f"{I}DEFAULT_CNI_DIR": str(tmp_path)})
