"""What the vlan plugin takes of configurations, gives to NICs, and finds to differ."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from api.claim import Claim, ClaimSpec, Provided
from api.meta import ObjectMeta
from plugins.cni import Result, ResultInterface, ResultIP, ResultRoute
from plugins.coordinator.attachment import LINK_GROUP
from plugins.errors import InvalidConfigError, ProviderError
from plugins.net import rtroute
from plugins.net.rtlink import FLAG_UP, Link
from plugins.net.rtmaster import MasterLink
from plugins.net.rtwhole import parse_whole
from plugins.vlan.config import VlanConfig, parse_config, require_our_ipam
from plugins.vlan.plan import (
    Scene,
    Wish,
    addresses_of,
    assigned,
    differences,
    is_ours,
    result_of,
    routes_of,
    temporary_name,
)

OURS: dict[str, Any] = {"master": "eth1", "ipam": {"type": "spiderpool"}}
GIVEN = Result(
    ips=(ResultIP("10.0.0.5/24", "10.0.0.1"), ResultIP("fd00::5/64", "fd00::1")),
    routes=(ResultRoute("10.9.0.0/16", "10.0.0.9"), ResultRoute("0.0.0.0/0", "10.0.0.1"), ResultRoute("::/0")),
)


@pytest.mark.parametrize(
    ("members", "parsed"),
    [
        ({"vlanId": 100}, VlanConfig("eth1", 100)),
        ({"vlanId": 0, "vlanMode": "manual", "mtu": 0}, VlanConfig("eth1", 0)),
        ({}, VlanConfig("eth1", None)),
        ({"vlanMode": "auto", "mtu": 1400}, VlanConfig("eth1", None, 1400)),
        ({"vlanMode": "", "vlanId": None, "linkInContainer": False}, VlanConfig("eth1", None)),
        ({"vlanId": 4094, "linkInContainer": True}, VlanConfig("eth1", 4094, 0, True)),
        ({"vlanId": 1, "dns": {"search": ["a"]}, "x-unknown": 1}, VlanConfig("eth1", 1, dns={"search": ["a"]})),
    ],
)
def test_configurations(members: dict[str, Any], parsed: VlanConfig) -> None:
    assert parse_config({**OURS, **members}) == parsed


@pytest.mark.parametrize(
    ("members", "msg", "details"),
    [
        ({"master": None}, '"master" field is required', "master: "),
        ({"master": ""}, '"master" field is required', "master: "),
        ({"master": 7}, "invalid master", "master: 7"),
        ({"master": "a/b"}, "invalid master", "master: 'a/b'"),
        ({"vlanId": 4095}, "invalid vlanId", "vlanId: 4095, allowed: an integer from 0 to 4094"),
        ({"vlanId": -1}, "invalid vlanId", "vlanId: -1"),
        ({"vlanId": True}, "invalid vlanId", "vlanId: True"),
        ({"vlanId": "100"}, "invalid vlanId", "vlanId: '100'"),
        ({"vlanId": 7, "vlanMode": "auto"}, "invalid vlanId", "the provider chooses it"),
        ({"vlanMode": "manual"}, "invalid vlanId", "vlanId: is missing"),
        ({"vlanMode": "x"}, "invalid vlanMode", "vlanMode: 'x', allowed: 'manual', 'auto'"),
        ({"vlanId": 7, "mtu": -1}, "invalid mtu", "mtu: -1"),
        ({"vlanId": 7, "mtu": "x"}, "invalid mtu", "mtu: 'x'"),
        ({"vlanId": 7, "linkInContainer": "yes"}, "invalid linkInContainer", "allowed: true, false"),
        ({"linkInContainer": True}, "invalid linkInContainer", "the provider chooses the VLAN"),
        ({"vlanId": 7, "dns": []}, "invalid dns", "allowed: an object"),
        ({"vlanId": 7, "ipam": {}}, "invalid ipam.type", "ipam.type: is missing, allowed: 'spiderpool'"),
        ({"vlanId": 7, "ipam": None}, "invalid ipam.type", "is missing"),
        (
            {"vlanId": 7, "ipam": {"type": "dhcp"}},
            "this vlan plugin serves",
            "ipam.type: 'dhcp', allowed: 'spiderpool'",
        ),
    ],
)
def test_configurations_that_are_refused(members: dict[str, Any], msg: str, details: str) -> None:
    with pytest.raises(InvalidConfigError) as raised:
        parse_config({**OURS, **members})
    assert raised.value.msg.startswith(msg)
    assert details in raised.value.details


@pytest.mark.parametrize("netconf", [{}, {"ipam": None}, {"ipam": {}}, {"ipam": {"type": "spiderpool"}}, {"ipam": 7}])
def test_a_deletion_asks_only_whose_the_addresses_are(netconf: dict[str, Any]) -> None:
    require_our_ipam(netconf)


def test_temporary_names() -> None:
    name = temporary_name("c1", "eth0")
    assert name == temporary_name("c1", "eth0")
    assert len(name) == 15
    assert len({name, temporary_name("c2", "eth0"), temporary_name("c1", "net1")}) == 3


def claim(address: str, mac: str = "", vlan: int | None = None, *, asked: bool = True) -> Claim:
    told = Provided(subnet="10.0.0.0/24", parent_mac="02:00:00:00:00:01", mac=mac, vlan=vlan) if asked else None
    spec = ClaimSpec(address=address, ip_version=4, pool="p", provided=told)
    return Claim(metadata=ObjectMeta(name=address), spec=spec)


def test_what_the_provider_gave() -> None:
    mac = bytes.fromhex("fa163e0000aa")
    assert assigned([claim("10.0.0.5", "fa:16:3e:00:00:AA", 100)]) == (100, mac)
    both = [claim("10.0.0.5", "fa:16:3e:00:00:AA", 0), claim("fd00::5", "fa:16:3e:00:00:aa")]
    assert assigned(both) == (0, mac)


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ([], "no VLAN was given"),
        ([claim("10.0.0.5", asked=False)], "10.0.0.5: the provider is asked for pods"),
        ([claim("10.0.0.5")], "no VLAN was given"),
        ([claim("10.0.0.5", "fa:16:3e:00:00:aa", 1), claim("fd00::5")], "no VLAN was given"),
        (
            [claim("10.0.0.5", "fa:16:3e:00:00:aa", 1), claim("fd00::5", "fa:16:3e:00:00:aa", 2)],
            "10.0.0.5: VLAN 1, fa:16:3e:00:00:aa, fd00::5: VLAN 2, fa:16:3e:00:00:aa",
        ),
    ],
)
def test_what_the_provider_must_not_give(claims: list[Claim], text: str) -> None:
    with pytest.raises(ProviderError) as raised:
        assigned(claims)
    assert text in str(raised.value)


def route(destination: str, gateway: str, scope: int = 0, ifindex: int = 9) -> rtroute.Route:
    address, _, length = destination.partition("/")
    prefix = rtroute.Prefix(ip_address(address), int(length))
    return rtroute.Route(prefix, 254, ifindex, ip_address(gateway) if gateway else None, None, scope, 3, 1)


def test_addresses_and_routes() -> None:
    assert [str(address) for address in addresses_of(GIVEN)] == ["10.0.0.5/24", "fd00::5/64"]
    assert routes_of(GIVEN, 9) == [
        route("10.9.0.0/16", "10.0.0.9"),
        route("0.0.0.0/0", "10.0.0.1"),
        route("::/0", "fd00::1"),
    ]
    twice = replace(GIVEN, routes=(ResultRoute("10.9.0.0/16", "10.0.0.9"), ResultRoute("10.9.0.7/16", "10.0.0.9")))
    assert routes_of(twice, 9) == [route("10.9.0.0/16", "10.0.0.9")]
    alone = Result(ips=(ResultIP("10.0.0.5/24"),), routes=(ResultRoute("10.9.0.0/16"), ResultRoute("fd09::/64")))
    assert routes_of(alone, 9) == [route("10.9.0.0/16", "", rtroute.SCOPE_LINK), route("fd09::/64", "")]
    with pytest.raises(InvalidConfigError, match=r"routes\[1\]"):
        routes_of(replace(GIVEN, routes=(ResultRoute("::/0"), ResultRoute("x"))), 9)


def test_the_result() -> None:
    result = result_of(GIVEN, "eth0", "02:00:00:00:00:09", "/run/netns/x", {"search": ["a"]})
    assert [ip.interface for ip in result.ips] == [0, 0]
    assert result.interfaces == (ResultInterface("eth0", "02:00:00:00:00:09", "/run/netns/x"),)
    assert (result.routes, result.dns) == (GIVEN.routes, {"search": ["a"]})


NIC = Link(9, "eth0", FLAG_UP, bytes.fromhex("020000000009"), 1400, 1000, "vlan", 3, "", LINK_GROUP, 0)
MASTER = Link(3, "eth1", FLAG_UP, bytes(6), 1500, 1000, "", 0, "", 0)


def vlan_link(link: Link, vlan_id: int = 100) -> MasterLink:
    return MasterLink(link, 0, {1: vlan_id.to_bytes(2, "little")} if link.kind == "vlan" else {})


def test_whose_links_are_ours() -> None:
    assert is_ours(NIC)
    assert not is_ours(NIC._replace(group=0))
    assert not is_ours(NIC._replace(kind="macvlan"))


@pytest.mark.parametrize(
    ("nic", "master", "found"),
    [
        (vlan_link(NIC), MASTER, []),
        (vlan_link(NIC, 101), MASTER, ["eth0: VLAN 101, not 100"]),
        (vlan_link(NIC._replace(peer=4)), MASTER, ["eth0: a VLAN of link 4, not of eth1, which is 3"]),
        (vlan_link(NIC._replace(mtu=1500, flags=0)), MASTER, ["eth0: MTU 1500, not 1400", "eth0: is down"]),
        (vlan_link(NIC._replace(mac=bytes(6))), MASTER, ["eth0: MAC address 00:00:00:00:00:00, not 02:00:00:00:00:09"]),
        (vlan_link(NIC._replace(kind="")), MASTER, ["eth0: a physical link, not a VLAN"]),
        (None, None, ["master eth1: Link not found", "eth0: Link not found"]),
    ],
)
def test_what_differs(nic: MasterLink | None, master: Link | None, found: list[str]) -> None:
    wish = Wish("eth0", "spv0", VlanConfig("eth1", 100, 1400), 100)
    plain, default = (
        parse_whole(rtroute.route_add(route(d, g)).body)
        for d, g in (("10.9.0.0/16", "10.0.0.9"), ("0.0.0.0/0", "10.0.0.1"))
    )
    assert plain is not None
    assert default is not None
    other = default.hops[0]._replace(ifindex=8, gateway=ip_address("10.8.0.1"))
    moved = default._replace(table=101, hops=(other, *default.hops))
    previous = result_of(GIVEN, "eth0", "02:00:00:00:00:09", "/run/netns/x", {})
    assert differences(wish, previous, Scene(nic, master, [plain, moved])) == found
    if nic is not None and not found:
        missing = differences(wish, previous, Scene(nic, master, [moved]))
        assert missing == ["route 10.9.0.0/16 via 10.0.0.9: is missing"]
