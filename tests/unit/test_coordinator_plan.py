"""What an attachment consists of."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.cni import check_ifname
from plugins.coordinator.attachment import Attachment, alias_parts, is_our_alias
from plugins.coordinator.config import CoordinatorConfig, parse_config
from plugins.coordinator.plan import (
    Plan,
    PodNic,
    Way,
    counts_as_host_link,
    make_plan,
    pod_mac,
    resolve_mode,
)
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import InvalidConfigError, WiringError

SERVICES = {"serviceCIDR": ["10.96.0.0/12", "fd00:96::/112"]}


def config(**members: Any) -> CoordinatorConfig:
    return parse_config(members, CoordinatorSettings())


def nic(*addresses: str) -> PodNic:
    return PodNic("eth0", 2, bytes(6), 1000, tuple(map(ip_address, addresses)))


def plan(addresses: list[str], hosts: list[str], **members: Any) -> Plan:
    return make_plan(config(**members), nic(*addresses), [ip_address(h) for h in hosts])


def routes(decided: Plan) -> list[str]:
    return [
        str(r.destination)
        + (f" via {r.gateway}" if r.gateway else "")
        + (f" src {r.source}" if r.source else "")
        + f" table {r.table}"
        for r in decided.veth_routes
    ]


def test_dual_stack() -> None:
    decided = plan(["172.16.0.9", "fd00::9"], ["172.16.0.2", "10.0.0.1", "fd00::2"], **SERVICES)
    assert routes(decided) == [
        "172.16.0.2/32 src 172.16.0.9 table 254",
        "10.0.0.1/32 src 172.16.0.9 table 254",
        "fd00::2/128 table 254",
        "10.96.0.0/12 via 172.16.0.2 src 172.16.0.9 table 254",
        "fd00:96::/112 via fd00::2 table 254",
        "0.0.0.0/0 via 172.16.0.2 src 172.16.0.9 table 100",
        "::/0 via fd00::2 table 100",
    ]
    assert len(decided.pod_rules) == len(decided.nic.host_rules) == 2
    assert ("ipv6/conf/all/disable_ipv6", "0") in decided.nic.sysctls


def test_single_stack_leaves_the_other_family_alone() -> None:
    four = plan(
        ["172.16.0.9"], ["172.16.0.2", "fd00::2"], **SERVICES, policyRoutes=[{"dst": "fd01::/64", "gw": "fd00::1"}]
    )
    assert not any(":" in text for text in routes(four))
    assert four.nic_routes == ()
    assert len(four.pod_rules) == len(four.nic.host_rules) == 1
    assert not any("ipv6" in path for path, _ in four.nic.sysctls)
    six = plan(["fd00::9"], ["172.16.0.2", "fd00::2"], **SERVICES, vethLinkAddress="169.254.100.1")
    assert all(":" in text for text in routes(six))
    assert six.veth_address is None


def test_a_node_without_an_address_of_a_family() -> None:
    decided = plan(["172.16.0.9", "fd00::9"], ["172.16.0.2"], **SERVICES)
    assert [str(p) for p in decided.unreached] == ["fd00:96::/112"]
    assert len(decided.pod_rules) == 1
    assert len(decided.nic.host_rules) == 2, "the node may still forward to the pod"


def test_what_cannot_be() -> None:
    with pytest.raises(WiringError, match="no usable"):
        plan([], ["172.16.0.2"])
    with pytest.raises(InvalidConfigError, match="vethMTU: 1279"):
        plan(["fd00::9"], ["fd00::2"], vethMTU=1279)
    assert plan(["172.16.0.9"], ["172.16.0.2"], vethMTU=1279).veth_mtu == 1279


@pytest.mark.parametrize(
    ("address", "expected"), [("172.16.0.9", "0a1bac100009"), ("fd00::1:203", "0a1b00010203")]
)  # fmt: skip
def test_mac(address: str, expected: str) -> None:
    assert pod_mac(b"\x0a\x1b", ip_address(address)) == bytes.fromhex(expected)
    assert pod_mac(b"", ip_address(address)) is None


def test_an_ipvlan_cannot_have_a_mac_of_its_own() -> None:
    ipvlan = replace(nic("172.16.0.9"), kind="ipvlan")
    assert make_plan(config(), ipvlan, []).nic.pod_mac is None
    with pytest.raises(InvalidConfigError, match="podMACPrefix: eth0 is an ipvlan"):
        make_plan(config(podMACPrefix="0a:1b"), ipvlan, [])


def test_what_is_as_wanted_is_not_set() -> None:
    wanted = plan(["172.16.0.9"], ["172.16.0.2"], podMACPrefix="0a:1b", txQueueLen=1000)
    assert wanted.nic.tx_queue_len is None
    same = PodNic("eth0", 2, bytes.fromhex("0a1bac100009"), 5, nic("172.16.0.9").addresses)
    again = make_plan(config(podMACPrefix="0a:1b", txQueueLen=1000), same, [])
    assert again.nic.pod_mac is None
    assert again.nic.tx_queue_len == 1000


@pytest.mark.parametrize("value", [-1, 0, 1, 2])
def test_reverse_path_filter(value: int) -> None:
    decided = plan(["172.16.0.9"], ["172.16.0.2"], podRPFilter=value)
    written = {path: v for path, v in decided.nic.sysctls if "rp_filter" in path}
    assert written == ({} if value < 0 else {f"ipv4/conf/{n}/rp_filter": str(value) for n in ("all", "eth0")})
    assert decided.veth_rp_filter == (0 if value == 0 else 2)


@pytest.mark.parametrize(
    ("mode", "ifname", "has_veth", "expected"),
    [
        ("auto", "eth0", False, Way("underlay", True)),
        ("auto", "eth0", True, Way("underlay", True)),
        ("auto", "net1", True, Way("underlay")),
        ("auto", "net1", False, Way("overlay")),
        ("underlay", "eth0", False, Way("underlay", True)),
        ("underlay", "net1", True, Way("underlay")),
        ("underlay", "net1", False, "in underlay mode.*veth0 was not created by previous interface"),
        ("overlay", "net1", False, Way("overlay")),
        ("overlay", "eth0", False, "in overlay mode.*first interface named eth0"),
        ("overlay", "net1", True, "in overlay mode.*veth0 of underlay mode exists"),
        ("disable", "net1", True, Way("disable")),
        ("disabled", "eth0", False, Way("disable")),
    ],
)
def test_modes(mode: str, ifname: str, has_veth: bool, expected: Way | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(InvalidConfigError, match=expected):
            resolve_mode(config(mode=mode), ifname, has_veth)
    else:
        assert resolve_mode(config(mode=mode), ifname, has_veth) == expected


@pytest.mark.parametrize(
    ("name", "counts"),
    [("eth0", True), ("bond0.7", True), ("lo", False), ("lo1", True), ("veth123", False), ("docker0", False),
     ("kube-ipvs0", False), ("cilium_host", False), ("br-lan", True), ("xdocker", True)],
)  # fmt: skip
def test_whose_addresses_are_the_nodes(name: str, counts: bool) -> None:
    assert counts_as_host_link(name) == counts


CONTAINER_ID = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,252}", fullmatch=True)


@given(CONTAINER_ID, st.from_regex(r"[a-z][a-z0-9.]{0,14}", fullmatch=True), CONTAINER_ID)
def test_names_fit_and_tell_whose_they_are(container_id: str, ifname: str, network: str) -> None:
    attachment = Attachment(container_id, ifname, network)
    check_ifname(attachment.host_link)
    assert len(attachment.alias.encode()) <= 255
    assert is_our_alias(attachment.alias)
    assert alias_parts(attachment.alias)[1] == ifname


def test_link_names() -> None:
    assert Attachment("0123456789abcdef" * 4, "eth0", "n").host_link == "veth0123456789a"
    assert Attachment("short", "eth0", "n").host_link == "vethshort"
    assert Attachment("web-frontend-1", "eth0", "n").host_link != Attachment("web-frontend-2", "eth0", "n").host_link
    assert not is_our_alias("somebody's link")
    assert alias_parts("spiderpool:only") == ("", "", "")
