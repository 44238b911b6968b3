"""What ifacer wants, by configuration, and what it does about what is there."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from plugins.errors import CniError, InvalidConfigError, WiringError
from plugins.ifacer.config import BondWish, VlanWish, Wish, parse_config
from plugins.ifacer.options import encode
from plugins.ifacer.plan import ALIAS, LINK_GROUP, Node, Plan, decide, is_ours, reasons_to_leave
from plugins.ifacer.record import Record, Use
from plugins.ifacer.remove import idle
from plugins.net.netlink import attribute, attributes
from plugins.net.rtlink import FLAG_UP, Link, LinkAddress
from plugins.net.rtmaster import BOND_MODE, MasterLink

BOND = {"name": "bond0", "mode": 1}


def link(name: str, index: int, **members: Any) -> Link:
    return Link(index, name, FLAG_UP, b"", 1500, 1000, "", 0, "", 0)._replace(**members)


def nic(name: str, index: int, master: int = 0, **members: Any) -> MasterLink:
    return MasterLink(link(name, index, **members), master, {})


def vlan(name: str, index: int, vlan_id: int, parent: int, **members: Any) -> MasterLink:
    data = {1: vlan_id.to_bytes(2, "little"), 5: b"\x81\x00"}
    return MasterLink(link(name, index, kind="vlan", peer=parent, **members), 0, data)


def bond(name: str, index: int, mode: int = 1, options: dict[str, Any] | None = None, **members: Any) -> MasterLink:
    data = attributes(attribute(BOND_MODE, bytes((mode,))) + encode(options or {}, {"eth1": 1, "eth2": 2}))
    return MasterLink(link(name, index, kind="bond", **members), 0, data)


def node(*there: MasterLink) -> Node:
    vlans = tuple(one for one in there if one.link.kind == "vlan")
    return Node({one.link.name: one for one in there}, vlans, {one.link.ifindex: one.link.name for one in there})


def wish(**netconf: Any) -> Wish:
    return parse_config(netconf)


def plan(want: Wish, there: Node, *, one: bool = True) -> Plan:
    return decide(want, there, one_link_per_vlan_id=one)


ETH1, ETH2 = nic("eth1", 1), nic("eth2", 2)
IN1, IN2 = nic("eth1", 1, master=9), nic("eth2", 2, master=9)
BONDED = wish(interfaces=["eth1", "eth2"], bond=BOND)
TAGGED = wish(interfaces=["eth1"], vlanID=5)
BOTH = wish(interfaces=["eth1", "eth2"], bond=BOND, vlanID=5)


@pytest.mark.parametrize(
    ("netconf", "bond_name", "vlan_name"),
    [
        ({"interfaces": ["eth1"]}, "", ""),
        ({"interfaces": ["eth1"], "vlanID": 7}, "", "eth1.7"),
        ({"interfaces": ["eth1", "eth2"], "vlanID": 7}, "", ""),
        ({"interfaces": ["eth1", "eth2"], "bond": None}, "", ""),
        ({"interfaces": ["eth1"], "bond": BOND}, "", ""),
        ({"interfaces": ["eth1", "eth2"], "bond": {}}, "sp_bond0", ""),
        ({"interfaces": ["eth1", "eth2"], "bond": BOND, "vlanID": 4094}, "bond0", "bond0.4094"),
        ({"interfaces": ["eth1", "eth2"], "bond": {"mode": "802.3ad", "options": None}, "mtu": 0}, "sp_bond0", ""),
    ],
)
def test_what_is_wanted(netconf: dict[str, Any], bond_name: str, vlan_name: str) -> None:
    found = wish(**netconf, unknown=1)
    assert (found.bond.name if found.bond else "", found.vlan.name if found.vlan else "") == (bond_name, vlan_name)
    assert found.made == tuple(filter(None, (bond_name, vlan_name)))


@pytest.mark.parametrize(
    ("netconf", "told"),
    [
        ({}, "interfaces have at least one interface"),
        ({"interfaces": []}, "interfaces have at least one interface"),
        ({"interfaces": "eth1"}, "interfaces: 'eth1', allowed: a list"),
        ({"interfaces": ["eth1", 7]}, "interfaces[1]"),
        ({"interfaces": ["a/b"]}, "interfaces[0]"),
        ({"interfaces": ["eth1", "eth1"]}, "interfaces[1]"),
        ({"interfaces": ["eth1"], "vlanID": 4095}, "vlan tag must be in range [0,4094]"),
        ({"interfaces": ["eth1"], "vlanID": -1}, "vlan tag must be in range [0,4094]"),
        ({"interfaces": ["eth1"], "vlanID": "5"}, "vlanID: '5', allowed"),
        ({"interfaces": ["eth1"], "vlanID": False}, "vlanID"),
        ({"interfaces": ["enp216s0f1np1"], "vlanID": 100}, "enp216s0f1np1.100"),
        ({"interfaces": ["eth1"], "vlanID": 5, "mtu": 67}, "mtu: '67', allowed: 0, or an integer from 68"),
        ({"interfaces": ["eth1", "eth2"], "bond": "bond0"}, "bond: 'bond0', allowed: an object"),
        ({"interfaces": ["eth1", "eth2"], "bond": {"name": "much-too-long-a-name"}}, "bond.name"),
        ({"interfaces": ["eth1", "eth2"], "bond": {"name": "eth2"}}, "bond.name"),
        ({"interfaces": ["eth1", "eth2"], "bond": {"mode": 7}}, "bond.mode: unknown bond mode"),
        ({"interfaces": ["eth1", "eth2"], "bond": {"options": {"miimon": 1}}}, "bond.options"),
        (
            {"interfaces": ["eth1", "eth2"], "bond": {"mode": 1, "options": "miimon=x"}},
            "bond.options: miimon=x, allowed",
        ),
    ],
)
def test_what_is_wrong(netconf: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfigError) as error:
        wish(**netconf)
    assert told in str(error.value)


def test_what_means_nothing_is_told() -> None:
    assert "one interface" in wish(interfaces=["eth1"], bond=BOND).ignored[0]
    assert "without bond" in wish(interfaces=["eth1", "eth2"], vlanID=5).ignored[0]
    assert "bond.options: 'x' is not" in wish(interfaces=["a", "b"], bond={"options": "x=1"}).ignored[0]


def test_new_masters() -> None:
    made = plan(BOTH, node(nic("eth1", 1, mtu=9000), nic("eth2", 2, mtu=4000)))
    assert isinstance(made.new_bond, BondWish)
    assert made.new_vlan == VlanWish("bond0.5", "bond0", 5)
    assert made.bond_mtu == 4000
    assert [one.link.name for one in made.enslave] == ["eth1", "eth2"]
    assert made.missing() == ["there is no bond bond0", "there is no VLAN bond0.5"]
    down = nic("eth1", 1, flags=0)
    assert [one.name for one in plan(TAGGED, node(down)).up] == ["eth1"]


def test_all_is_there() -> None:
    there = node(IN1, IN2, bond("bond0", 9), vlan("bond0.5", 10, 5, 9))
    assert plan(BOTH, there).missing() == []
    assert plan(TAGGED, node(ETH1, vlan("eth1.5", 10, 5, 1))).missing() == []
    assert plan(wish(interfaces=["eth1"]), node()).missing() == []


def test_down_is_set_up_from_below() -> None:
    there = node(IN1, IN2, bond("bond0", 9, flags=0), vlan("bond0.5", 10, 5, 9, flags=0))
    assert [one.name for one in plan(BOTH, there).up] == ["bond0", "bond0.5"]


OURS: dict[str, Any] = {"alias": ALIAS, "group": LINK_GROUP}


def test_a_bond_of_ours_is_brought_to_what_is_wanted() -> None:
    want = wish(interfaces=["eth1", "eth2"], bond=BOND | {"options": "miimon=50;primary=eth1"}, mtu=9000)
    there = bond("bond0", 9, 1, {"miimon": 100}, **OURS)
    todo = plan(want, node(IN1, ETH2, there))
    assert todo.options == {"miimon": (100, 50), "primary": ("", "eth1")}
    assert [one.link.name for one in todo.enslave] == ["eth2"]
    assert todo.mtus == ((there.link, 9000),)
    assert todo.missing() == [
        "bond0 has miimon 100 instead of 50",
        "bond0 has primary none instead of eth1",
        "eth2 is not in bond0",
        "bond0 has the MTU 1500 instead of 9000",
    ]


@pytest.mark.parametrize(
    ("want", "there", "told"),
    [
        (
            {"bond": {"mode": 4}},
            bond("sp_bond0", 9, 1, **OURS),
            ["mode: it has 1 (active-backup), wanted is 4 (802.3ad)"],
        ),
        (
            {"bond": {"mode": 1, "options": "min_links=2;miimon=5"}},
            bond("sp_bond0", 9, 1, {"min_links": 0, "miimon": 7}, **OURS),
            ["option min_links: it has 0, wanted is 2"],
        ),
        ({"bond": {"mode": 1}, "mtu": 1400}, bond("sp_bond0", 9, **OURS), ["mtu: it has 1500, wanted is 1400"]),
        (
            {"bond": {"mode": 0, "options": "miimon=5"}, "mtu": 9000},
            bond("sp_bond0", 9, 1, {"miimon": 7}),
            [
                "mode: ",
                "option miimon: it has 7, wanted is 5",
                "mtu: ",
                "interface eth2: it is not in the bond",
                "alone",
            ],
        ),
    ],
)
def test_a_bond_that_differs_is_refused(want: dict[str, Any], there: MasterLink, told: list[str]) -> None:
    with pytest.raises(WiringError, match="the bond sp_bond0 differs from what is wanted") as error:
        plan(wish(interfaces=["eth1", "eth2"], **want), node(IN1, ETH2, there))
    parts = error.value.details.split("; ")
    assert len(parts) == len(told)
    assert all(text in part for text, part in zip(told, parts, strict=True))


@pytest.mark.parametrize(
    ("want", "there", "told"),
    [
        (TAGGED, node(), "interfaces[0]: failed to find link eth1: Link not found"),
        (BONDED, node(ETH1), "interfaces[1]: failed to find link eth2"),
        (
            BONDED,
            node(ETH1, ETH2, nic("bond0", 9, kind="dummy")),
            "a non-bond type interface named bond0 already exists",
        ),
        (BONDED, node(ETH1, nic("eth2", 2, master=4)), "eth2 is a port of link 4"),
        (BONDED, node(IN1, nic("eth2", 2, master=4), bond("bond0", 9, **OURS)), "eth2 is a port of link 4"),
        (TAGGED, node(ETH1, nic("eth1.5", 3, kind="dummy")), "it is a dummy link"),
        (TAGGED, node(ETH1, vlan("eth1.5", 3, 6, 1)), "its VLAN id is 6"),
        (TAGGED, node(ETH1, vlan("eth1.5", 3, 5, 2)), "its parent is not eth1"),
        (TAGGED, node(ETH1, vlan("eth1.5", 3, 5, 1, peer_netns=0)), "its parent is not eth1"),
        (BOTH, node(ETH1, ETH2, vlan("bond0.5", 3, 5, 1)), "its parent is not bond0"),
        (
            TAGGED,
            node(ETH1, MasterLink(link("eth1.5", 3, kind="vlan", peer=1), 0, {1: b"\x05\0", 5: b"\x88\xa8"})),
            "its tags are of type 0x88a8, not 802.1Q",
        ),
        (replace(TAGGED, mtu=9000), node(ETH1), "mtu: 9000, eth1 has 1500"),
    ],
)
def test_what_is_in_the_way(want: Wish, there: Node, told: str) -> None:
    with pytest.raises(CniError) as error:
        plan(want, there)
    assert told in str(error.value)


def test_one_link_for_a_vlan_id() -> None:
    elsewhere, beside = vlan("eth2.5", 3, 5, 2), vlan("other", 3, 5, 1)
    text = "cannot have multiple different vlan interfaces with the same vlanId 5 on node at the same time"
    for there in (elsewhere, beside):
        with pytest.raises(WiringError, match=text):
            plan(TAGGED, node(ETH1, ETH2, there, vlan("eth1.5", 4, 5, 1)))
    assert plan(TAGGED, node(ETH1, ETH2, elsewhere), one=False).new_vlan
    with pytest.raises(WiringError, match=text):
        plan(TAGGED, node(ETH1, beside), one=False)
    # a link of a pod that came back to the node: its parent is in another namespace, whatever its number is here
    assert plan(TAGGED, node(ETH1, vlan("x", 3, 5, 1, peer_netns=2)), one=False).new_vlan


def test_nics_that_are_in_use() -> None:
    others = [
        nic("eth1", 1),
        vlan("eth1.9", 3, 9, 1),
        nic("m", 4, kind="macvlan", peer=1),
        nic("far", 5, kind="macvlan", peer=1, peer_netns=3),
        nic("w", 6, kind="veth", peer=1),
    ]
    addresses = [
        LinkAddress(1, ip_address("fe80::1"), 64, 0),
        LinkAddress(1, ip_address("10.0.0.1"), 24, 0),
        LinkAddress(2, ip_address("10.0.0.2"), 24, 0),
        LinkAddress(1, ip_address("2001:db8::1"), 64, 0),
    ]
    assert reasons_to_leave(others[0].link, others, addresses) == [
        "it has the address 10.0.0.1/24",
        "it has the address 2001:db8::1/64",
        "eth1.9 is made of it",
        "m is made of it",
    ]


def test_whose_is_it() -> None:
    assert is_ours(link("b", 1, kind="bond", **OURS))
    assert is_ours(link("b", 1, kind="vlan", group=LINK_GROUP)), "the agent died before it set the alias"
    assert not is_ours(link("b", 1, kind="bond"))
    assert not is_ours(link("b", 1, kind="bond", alias="mine", group=LINK_GROUP))
    assert not is_ours(link("b", 1, kind="veth", **OURS))


def test_what_is_idle() -> None:
    links = [
        vlan("a.1", 1, 1, 90, **OURS),
        vlan("a.2", 2, 2, 90, **OURS),
        vlan("a.3", 3, 3, 90),
        vlan("a.4", 4, 4, 90, **OURS),
        bond("b", 5, **OURS),
        vlan("b.5", 6, 5, 5, **OURS),
        nic("m", 7, kind="macvlan", peer=1),
        bond("c", 8, **OURS)._replace(master=44),
        vlan("a.6", 9, 6, 90, **OURS),
    ]
    addresses = [LinkAddress(4, ip_address("10.0.0.1"), 24, 0), LinkAddress(9, ip_address("fe80::1"), 64, 0)]
    assert [one.name for one in idle(links, addresses, {"a.2"})] == ["b.5", "a.6"]
    assert [one.name for one in idle([links[4]], [], ())] == ["b"]


def test_the_record(tmp_path: Any) -> None:
    record = Record(f"{tmp_path}/deep/er")
    assert record.used() == frozenset()
    record.remove("c1", "eth0")
    first = Use("c1", "eth0", "net", ("bond0", "bond0.5"))
    assert record.add(first)
    assert not record.add(first)
    assert record.add(Use("c" * 253, "a\tb", "net", ("eth1.5",)))
    assert record.add(Use("c1", "net1", "other", ("eth2.6",)))
    assert Record(record.folder).used() == {"bond0", "bond0.5", "eth1.5", "eth2.6"}
    record.prune("net", {("c1", "eth0")})
    assert record.used() == {"bond0", "bond0.5", "eth2.6"}
    record.remove("c1", "eth0")
    assert record.used() == {"eth2.6"}
