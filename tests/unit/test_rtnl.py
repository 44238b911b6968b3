"""Hand-packed messages against pyroute2's encoding of the same, and against pyroute2's reading of them."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import AF_INET, AF_INET6
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from plugins.net import netlink, rtlink, rtroute, rtwhole
from plugins.net.netlink import Message, attribute, attributes, nested

MAC, PEER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
V4, V6 = IPv4Address("10.1.2.3"), IPv6Address("fd00::3")


def encoded(kind: type, fields: dict[str, Any], attrs: list[Any]) -> bytes:
    """pyroute2's bytes of a message body."""
    message = kind()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data[16:])


def tree(data: bytes, depth: int) -> Any:
    """Attributes without their order and flags, to `depth` levels."""
    return frozenset(
        (kind, tree(value, depth - 1) if depth and len(value) > 4 else value) for kind, value in nested(data)
    )


def same(message: Message, expected: bytes, header: int, depth: int = 0) -> None:
    assert message.body[:header] == expected[:header]
    assert tree(message.body[header:], depth) == tree(expected[header:], depth)
    assert len(message.body) == len(expected)


def test_link_set_and_delete() -> None:
    ours = rtlink.link_set(7, "x", up=True, mac=MAC, tx_queue_len=500, alias="spiderpool:a:b:c")
    theirs = encoded(
        ifinfmsg,
        {"index": 7, "flags": 1, "change": 1},
        [["IFLA_ADDRESS", "02:00:00:00:00:01"], ["IFLA_TXQLEN", 500], ["IFLA_IFALIAS", "spiderpool:a:b:c"]],
    )
    # pyroute2 ends the alias with a NUL; the kernel takes the attribute's length for the alias's.
    assert ours.body[:16] == theirs[:16]
    assert {k: v.rstrip(b"\0") for k, v in nested(ours.body[16:])} == {
        k: v.rstrip(b"\0") for k, v in nested(theirs[16:])
    }
    same(rtlink.link_delete(7, "x"), encoded(ifinfmsg, {"index": 7}, []), 16)


def test_rp_filter_of_a_link() -> None:
    message = ifinfmsg(rtlink.link_set(7, "x", rp_filter=2).body)
    assert message is not None
    inner = attributes(rtlink.link_set(7, "x", rp_filter=2).body, 16)[26]
    family = attributes(inner)[AF_INET]
    assert attributes(attributes(family)[1])[8] == struct.pack("=I", 2)


def test_veth() -> None:
    ours = rtlink.veth("vetha", MAC, 1400, 77, peer="veth0", peer_mac=PEER_MAC, peer_netns_fd=5)
    peer = {
        "attrs": [
            ["IFLA_IFNAME", "veth0"],
            ["IFLA_ADDRESS", "02:00:00:00:00:02"],
            ["IFLA_MTU", 1400],
            ["IFLA_NET_NS_FD", 5],
        ]
    }
    data = {"attrs": [["VETH_INFO_PEER", peer]]}
    theirs = encoded(
        ifinfmsg,
        {"flags": 1, "change": 1},
        [
            ["IFLA_IFNAME", "vetha"],
            ["IFLA_ADDRESS", "02:00:00:00:00:01"],
            ["IFLA_MTU", 1400],
            ["IFLA_GROUP", 77],
            ["IFLA_LINKINFO", {"attrs": [["IFLA_INFO_KIND", "veth"], ["IFLA_INFO_DATA", data]]}],
        ],
    )
    flat = {k: v.rstrip(b"\0") for k, v in nested(ours.body[16:]) if k != 18}
    assert flat == {k: v.rstrip(b"\0") for k, v in nested(theirs[16:]) if k != 18}

    def peer_of(body: bytes) -> tuple[bytes, dict[int, bytes]]:
        info = attributes(attributes(body, 16)[18])
        assert info[1].rstrip(b"\0") == b"veth"
        data = attributes(info[2])[1]
        return data[:16], {k: v.rstrip(b"\0") for k, v in nested(data[16:])}

    assert peer_of(ours.body) == peer_of(theirs)


@pytest.mark.parametrize(("address", "length"), [(V4, 32), (V6, 64)])
def test_address(address: Any, length: int) -> None:
    theirs = encoded(
        ifaddrmsg,
        {"family": netlink.family_of(address), "prefixlen": length, "index": 3},
        [["IFA_LOCAL", str(address)], ["IFA_ADDRESS", str(address)]],
    )
    same(rtlink.address_add(3, address, length, "x"), theirs, 8)


def test_address_with_broadcast() -> None:
    attrs = [["IFA_LOCAL", str(V4)], ["IFA_ADDRESS", str(V4)], ["IFA_BROADCAST", "10.1.2.255"]]
    theirs = encoded(ifaddrmsg, {"family": AF_INET, "prefixlen": 24, "index": 3}, attrs)
    same(rtlink.address_add(3, V4, 24, "x", IPv4Address("10.1.2.255")), theirs, 8)


def test_link_rename() -> None:
    theirs = encoded(ifinfmsg, {"index": 7}, [["IFLA_IFNAME", "net1"]])
    same(rtlink.link_rename(7, "net1"), theirs, 16)


@pytest.mark.parametrize("table", [100, 254, 500])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("length", [0, 17, 32])
def test_routes(table: int, family: int, length: int) -> None:
    base, gateway = (IPv4Address("10.0.0.0"), V4) if family == 4 else (IPv6Address("fd00::"), V6)
    base = base if length else type(base)(0)
    source = V4 if family == 4 else None
    route = rtroute.Route(rtroute.Prefix(base, length), table, 9, gateway, source, 0, 83, rtroute.ROUTE_UNICAST)
    attrs: list[Any] = [["RTA_GATEWAY", str(gateway)], ["RTA_OIF", 9], ["RTA_TABLE", table]]
    if length:
        attrs.append(["RTA_DST", str(base)])
    if source:
        attrs.append(["RTA_PREFSRC", str(source)])
    fields = {
        "family": netlink.family_of(base), "dst_len": length, "table": table if table < 256 else 0, "proto": 83,
        "type": 1,
    }  # fmt: skip
    for pack in (rtroute.route_add, rtroute.route_beside, rtroute.route_replace, rtroute.route_delete):
        same(pack(route), encoded(rtmsg, fields, attrs), 12)
    assert rtroute.route_beside(route).flags == 0x400, "NLM_F_CREATE alone"
    assert rtroute.parse_route(rtroute.route_add(route).body) == route


@pytest.mark.parametrize("family", [AF_INET, AF_INET6])
@pytest.mark.parametrize("mark", [0, 1])
def test_rules(family: int, mark: int) -> None:
    rule = rtroute.Rule(family, 1000, 500, mark, 0xFFFFFFFF if mark else 0, 83, True)
    attrs: list[Any] = [["FRA_PRIORITY", 1000], ["FRA_TABLE", 500], ["FRA_PROTOCOL", 83]]
    if mark:
        attrs += [["FRA_FWMARK", 1], ["FRA_FWMASK", 0xFFFFFFFF]]
    theirs = encoded(fibmsg, {"family": family, "action": 1}, attrs)
    for message in (rtroute.rule_add(rule), rtroute.rule_delete(rule)):
        same(message, theirs, 12)
    assert rtroute.parse_rule(rtroute.rule_add(rule).body) == rule


@pytest.mark.parametrize("address", [V4, V6])
def test_neighbours(address: Any) -> None:
    family = netlink.family_of(address)
    theirs = encoded(
        ndmsg,
        {"family": family, "ifindex": 4, "state": 0x80},
        [["NDA_DST", str(address)], ["NDA_LLADDR", "02:00:00:00:00:01"]],
    )
    same(rtroute.neighbour_set(4, address, MAC, "x"), theirs, 12)
    marked = rtroute.neighbour_set(4, address, MAC, "x", 83)
    assert attributes(marked.body, 12) == attributes(theirs, 12) | {12: b"S"}, "NDA_PROTOCOL of linux/neighbour.h"
    assert rtroute.parse_neighbour(marked.body) == rtroute.Neighbour(4, address, MAC, rtroute.STATE_PERMANENT, 83)
    same(
        rtroute.neighbour_delete(4, address),
        encoded(ndmsg, {"family": family, "ifindex": 4}, [["NDA_DST", str(address)]]),
        12,
    )
    found = rtroute.parse_neighbour(rtroute.neighbour_set(4, address, MAC, "x").body)
    assert found == rtroute.Neighbour(4, address, MAC, rtroute.STATE_PERMANENT)


def test_reading_what_pyroute2_packs() -> None:
    link = encoded(
        ifinfmsg,
        {"index": 7, "flags": 0x1043},
        [
            ["IFLA_IFNAME", "eth0"], ["IFLA_ADDRESS", "02:00:00:00:00:01"], ["IFLA_MTU", 1500], ["IFLA_TXQLEN", 1000],
            ["IFLA_LINK", 3], ["IFLA_IFALIAS", "name"], ["IFLA_GROUP", 9],
            ["IFLA_LINKINFO", {"attrs": [["IFLA_INFO_KIND", "macvlan"]]}],
        ],
    )  # fmt: skip
    assert rtlink.parse_link(link) == rtlink.Link(7, "eth0", 0x1043, MAC, 1500, 1000, "macvlan", 3, "name", 9)
    address = encoded(
        ifaddrmsg,
        {"family": AF_INET6, "prefixlen": 64, "index": 2, "flags": 0},
        [["IFA_ADDRESS", "fd00::3"], ["IFA_FLAGS", 0x208]],
    )
    assert rtlink.parse_address(address) == rtlink.LinkAddress(2, V6, 64, 0x208)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_round_trip(items: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, payload) for kind, payload in items)
    assert len(data) % 4 == 0
    assert list(nested(data)) == items
    assert attributes(data) == dict(items)


@given(st.binary(max_size=200))
def test_garbage_ends(data: bytes) -> None:
    attributes(data)
    list(nested(data))


@given(st.ip_addresses())
def test_any_address(address: Any) -> None:
    message = rtroute.neighbour_set(1, address, MAC, "x")
    found = rtroute.parse_neighbour(message.body)
    assert found is not None
    assert found.address == ip_address(str(address))


@pytest.mark.parametrize("address", [V4, V6])
def test_rules_for_a_sender(address: Any) -> None:
    family, length = netlink.family_of(address), address.max_prefixlen
    rule = rtroute.Rule(family, 1001, 101, 0, 0, 83, True, rtroute.host_prefix(address))
    attrs = [["FRA_SRC", str(address)], ["FRA_PRIORITY", 1001], ["FRA_TABLE", 101], ["FRA_PROTOCOL", 83]]
    theirs = encoded(fibmsg, {"family": family, "src_len": length, "action": 1, "table": 101}, attrs)
    same(rtroute.rule_add(rule), theirs, 12)
    assert rtroute.parse_rule(rtroute.rule_add(rule).body) == rule
    for extra in (["FRA_IIFNAME", "eth0"], ["FRA_OIFNAME", "eth0"]):
        assert not rtroute.parse_rule(encoded(fibmsg, {"family": family, "action": 1}, [*attrs, extra])).plain


def test_a_route_with_a_metric() -> None:
    route = rtroute.Route(rtroute.host_prefix(V4), 500, 9, None, None, 253, 83, 1, 77)
    fields = {"family": AF_INET, "dst_len": 32, "proto": 83, "scope": 253, "type": 1}
    attrs = [["RTA_DST", str(V4)], ["RTA_OIF", 9], ["RTA_PRIORITY", 77], ["RTA_TABLE", 500]]
    same(rtroute.route_add(route), encoded(rtmsg, fields, attrs), 12)
    assert rtroute.parse_route(rtroute.route_add(route).body) == route


def test_questions() -> None:
    skip = ["IFLA_EXT_MASK", 8]
    same(rtlink.link_get_index(7), encoded(ifinfmsg, {"index": 7}, [skip]), 16)
    same(rtlink.link_dump(), encoded(ifinfmsg, {}, [skip]), 16)
    same(rtlink.address_dump(3), encoded(ifaddrmsg, {}, []) + attribute(10, struct.pack("=I", 3)), 8)
    same(rtroute.route_dump(AF_INET6), encoded(rtmsg, {"family": AF_INET6}, []), 12)
    link = encoded(ifinfmsg, {"index": 7}, [["IFLA_IFNAME", "x"], ["IFLA_LINK", 3]])
    assert rtlink.parse_link(link + attribute(37, struct.pack("=i", 5))).peer_netns == 5
    assert rtlink.parse_link(link).peer_netns == -1


@pytest.mark.parametrize("address", [V4, V6])
def test_asking_for_a_route(address: Any) -> None:
    """IPv6 refuses the flag that makes IPv4 tell the real table."""
    fields = {"family": netlink.family_of(address), "dst_len": address.max_prefixlen}
    flags = {"flags": 0x1000} if address.version == 4 else {}
    same(rtroute.route_get(address), encoded(rtmsg, fields | flags, [["RTA_DST", str(address)]]), 12)


WHOLE: list[list[Any]] = [
    [["RTA_GATEWAY", "10.1.2.3"], ["RTA_OIF", 9]],
    [["RTA_OIF", 9], ["RTA_PREFSRC", "10.1.2.3"], ["RTA_PRIORITY", 100]],
    [["RTA_GATEWAY", "10.1.2.3"], ["RTA_OIF", 9], ["RTA_METRICS", {"attrs": [["RTAX_MTU", 1400]]}]],
    [
        [
            "RTA_MULTIPATH",
            [
                {"oif": 9, "hops": 1, "flags": 4, "attrs": [["RTA_GATEWAY", "10.1.2.3"]]},
                {"oif": 10, "attrs": [["RTA_GATEWAY", "10.1.2.4"]]},
            ],
        ]
    ],
]


@pytest.mark.parametrize("attrs", WHOLE)
def test_whole_routes_come_back_as_they_were(attrs: list[Any]) -> None:
    fields = {"family": AF_INET, "dst_len": 16, "proto": 3, "type": 1, "table": 254}
    body = encoded(rtmsg, fields, [["RTA_DST", "10.5.0.0"], *attrs, ["RTA_TABLE", 254]])
    route = rtwhole.parse_whole(body)
    assert route is not None
    for message in (rtwhole.whole_add(route), rtwhole.whole_delete(route)):
        same(message, body, 12)
    assert rtwhole.parse_whole(rtwhole.whole_append(route).body) == route
    assert str(route.destination) == "10.5.0.0/16"
    assert route.without(9) == (route._replace(hops=route.hops[1:]) if len(route.hops) > 1 else None)
    assert route.over(9) == route._replace(hops=route.hops[:1])
    assert route.over(11) is None


def test_a_whole_route_by_a_next_hop_object() -> None:
    fields = {"family": AF_INET6, "proto": 3, "type": 1, "table": 254}
    attrs = [["RTA_GATEWAY", "fd00::1"], ["RTA_OIF", 9]]
    route = rtwhole.parse_whole(encoded(rtmsg, fields, attrs) + attribute(30, struct.pack("=I", 5)))
    assert route is not None
    assert set(dict(nested(rtwhole.whole_add(route).body[12:]))) == {30, 15}
    assert route.is_default
    cloned = encoded(rtmsg, {**fields, "flags": 0x200}, attrs)
    assert rtwhole.parse_whole(cloned) is None
    assert rtwhole.parse_whole(encoded(rtmsg, {**fields, "table": 255, "type": 2}, attrs)) is None


ROUTE = rtroute.Route(rtroute.Prefix(V4, 32), 500, 9, V4, None, 253, 83, 1)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (rtroute.route_add(ROUTE), f"add route {V4}/32 via {V4} table 500"),
        (rtroute.route_delete(ROUTE._replace(gateway=None)), f"delete route {V4}/32 table 500"),
        (
            rtroute.rule_add(rtroute.Rule(AF_INET, 1000, 100, 1, 1, 83, True)),
            "add IPv4 rule fwmark 0x1 lookup 100 pref 1000",
        ),
        (rtroute.neighbour_set(9, V4, bytes(6), "veth0 in the pod"), f"set neighbour {V4} on veth0 in the pod"),
    ],
)
def test_failures_say_what_was_to_be_done(message: Message, said: str) -> None:
    assert str(message.what) == said
