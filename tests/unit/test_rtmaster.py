"""Messages about VLANs and bonds against pyroute2's encoding of the same, and what the kernel's answers are read as."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from plugins.net import rtlink, rtmaster
from plugins.net.netlink import Message, attribute, attributes

NESTED: dict[int, Any] = {18: {2: {}}, 26: {10: {}}}
"""Which attributes hold attributes: IFLA_LINKINFO's IFLA_INFO_DATA, IFLA_AF_SPEC's AF_INET6."""


def tree(data: bytes, inside: Mapping[int, Any]) -> dict[int, Any]:
    """Attributes without their order, flags and the NUL that ends a text."""
    return {
        kind: tree(value, inside[kind]) if kind in inside else value.rstrip(b"\0")
        for kind, value in attributes(data).items()
    }


def compare(ours: Message, fields: dict[str, int], attrs: list[Any]) -> None:
    theirs = ifinfmsg()
    for name, value in fields.items():
        theirs[name] = value
    theirs["attrs"] = attrs
    theirs.encode()
    expected = bytes(theirs.data[16:])
    assert ours.body[:16] == expected[:16]
    assert tree(ours.body[16:], NESTED) == tree(expected[16:], NESTED)


def kind(name: str, *data: Any) -> list[Any]:
    attrs: list[Any] = [["IFLA_INFO_KIND", name]]
    if data:
        attrs.append(["IFLA_INFO_DATA", {"attrs": list(data)}])
    return ["IFLA_LINKINFO", {"attrs": attrs}]


def test_vlan() -> None:
    tags = [["IFLA_VLAN_ID", 4094], ["IFLA_VLAN_PROTOCOL", 0x8100]]
    attrs = [["IFLA_IFNAME", "eth0.4094"], ["IFLA_GROUP", 7], ["IFLA_LINK", 3], kind("vlan", *tags)]
    compare(rtmaster.vlan("eth0.4094", 3, 4094, 7), {}, attrs)
    compare(rtmaster.vlan("eth0.4094", 3, 4094, 7, 1400), {}, [*attrs, ["IFLA_MTU", 1400]])
    elsewhere = [*attrs, ["IFLA_ADDRESS", "02:00:00:00:00:01"], ["IFLA_NET_NS_FD", 9]]
    ours = rtmaster.vlan("eth0.4094", 3, 4094, 7, mac=bytes.fromhex("020000000001"), netns_fd=9)
    compare(ours, {}, elsewhere)
    assert rtmaster.vlan("v", 3, 1, 7).flags == 0x600, "it must not be there"


def test_changes() -> None:
    compare(rtmaster.set_up(5, "x"), {"index": 5, "flags": 1, "change": 1}, [])
    compare(rtmaster.set_down(5, "x"), {"index": 5, "flags": 0, "change": 1}, [])
    compare(rtmaster.set_master(5, 9, "x"), {"index": 5}, [["IFLA_MASTER", 9]])
    compare(rtmaster.set_mtu(5, "x", 9000), {"index": 5}, [["IFLA_MTU", 9000]])
    options = attribute(3, struct.pack("=I", 100))
    compare(rtmaster.bond_set(5, options, "x"), {"index": 5}, [kind("bond", ["IFLA_BOND_MIIMON", 100])])
    compare(rtmaster.remove_by_name("x"), {}, [["IFLA_IFNAME", "x"]])


def test_no_own_ipv6() -> None:
    message = rtmaster.no_own_ipv6(5, "x")
    assert tree(message.body[16:], {26: {10: {}}}) == {26: {10: {8: b"\x01"}}}


def test_probe() -> None:
    ours = rtmaster.probe_below("p", 5, 7)
    told = tree(ours.body[16:], NESTED)
    assert told[18][2] == {1: b"\x08", 2: b"\x01"}  # MACVLAN_MODE_PASSTHRU, MACVLAN_FLAG_NOPROMISC
    assert (told[5], told[18][1]) == (b"\x05", b"macvlan")


def answer(attrs: list[Any], **fields: int) -> bytes:
    message = ifinfmsg()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attrs
    message.encode()
    return bytes(message.data[16:])


def test_what_the_kernel_tells() -> None:
    tags = [["IFLA_VLAN_ID", 100], ["IFLA_VLAN_PROTOCOL", 0x88A8]]
    body = answer([["IFLA_IFNAME", "v"], ["IFLA_LINK", 3], kind("vlan", *tags)], index=8, flags=1)
    found = rtmaster.parse_master(body)
    assert (found.vlan_id, found.vlan_protocol, found.master) == (100, 0x88A8, 0)
    assert (found.link.name, found.link.peer, found.link.flags & rtlink.FLAG_UP) == ("v", 3, 1)
    bonded = rtmaster.parse_master(answer([["IFLA_IFNAME", "e"], ["IFLA_MASTER", 9], kind("dummy")], index=8))
    assert (bonded.master, bonded.vlan_id, bonded.vlan_protocol, bonded.data) == (9, 0, 0, {})
    bond = rtmaster.parse_master(answer([["IFLA_IFNAME", "b"], kind("bond", ["IFLA_BOND_MODE", 4])], index=8))
    assert bond.data[rtmaster.BOND_MODE][0] == 4


@pytest.mark.parametrize("vlan_id", [1, 256, 4094])
def test_a_vlan_id_survives(vlan_id: int) -> None:
    assert rtmaster.parse_master(rtmaster.vlan("v", 3, vlan_id, 7).body).vlan_id == vlan_id
