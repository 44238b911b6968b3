"""What has to be done so that the wanted masters are there, or why it must not be done. Pure.

What is there and ours is brought to what is wanted as far as that harms nobody who uses it; what is there and somebody
else's is used if it is as wanted, and refused otherwise. It is never changed but for being set up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from api.ranges import Address
from plugins.errors import InvalidConfigError, WiringError
from plugins.ifacer.config import BondWish, VlanWish, Wish
from plugins.ifacer.options import MODES, OPTIONS, Value, differing, shown
from plugins.net import rtlink
from plugins.net.rtmaster import BOND_MODE, PROTOCOL_8021Q, MasterLink

LINK_GROUP: Final = 0x53504944
"""The group in which links are created, as the coordinator's are: `ip link show group 1397770564` lists all of ours."""
ALIAS: Final = "spiderpool-ifacer"
"""Alias of the links that ifacer has made."""


@dataclass(frozen=True, slots=True)
class Node:
    """The node's side: what a decision needs to know."""

    links: Mapping[str, MasterLink]
    """Those of the wanted names that exist."""
    vlans: tuple[MasterLink, ...]
    """All VLAN links of the node."""

    names: Mapping[int, str]
    """By index: of these, and of the links that they are ports of."""

    def name_of(self, index: int) -> str:
        """A link's name for people."""
        return self.names.get(index, f"link {index}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be done, in this order; nothing, if all is there."""

    up: tuple[rtlink.Link, ...] = ()
    """Links to be set up."""
    new_bond: BondWish | None = None
    bond_mtu: int = 0
    """Bytes, of the new bond."""
    bond: MasterLink | None = None
    """The bond that is there, to which the following three belong."""
    options: Mapping[str, tuple[Value, Value]] | None = None
    """Options to change: what it has, what it should have."""
    enslave: tuple[MasterLink, ...] = ()
    """NICs to put into the bond, be it new or there."""
    mtus: tuple[tuple[rtlink.Link, int], ...] = ()
    """MTUs to raise, in bytes."""
    new_vlan: VlanWish | None = None

    def missing(self) -> list[str]:
        """What is not as it should be, for CHECK."""
        found = [f"{link.name} is down" for link in self.up]
        if self.new_bond is not None:
            found.append(f"there is no bond {self.new_bond.name}")
        elif self.bond is not None:
            name = self.bond.link.name
            for option, (has, wanted) in (self.options or {}).items():
                found.append(f"{name} has {option} {shown(option, has)} instead of {shown(option, wanted)}")
            found += [f"{nic.link.name} is not in {name}" for nic in self.enslave]
        found += [f"{link.name} has the MTU {link.mtu} instead of {mtu}" for link, mtu in self.mtus]
        if self.new_vlan is not None:
            found.append(f"there is no VLAN {self.new_vlan.name}")
        return found


def is_ours(link: rtlink.Link) -> bool:
    """Whether ifacer made it: by its alias, or by its group if the agent died before the alias was set."""
    return link.kind in ("vlan", "bond") and (link.alias == ALIAS or (not link.alias and link.group == LINK_GROUP))


def decide(wish: Wish, node: Node, *, one_link_per_vlan_id: bool) -> Plan:
    """What to do for `wish`. Raises InvalidConfigError for NICs that are not there, WiringError for what is in the
    way, naming everything that differs."""
    bond = _bond(wish.bond, node, wish.mtu) if wish.bond is not None else Plan()
    return _vlan(wish.vlan, node, wish, bond, one_link_per_vlan_id) if wish.vlan is not None else bond


def _nic(name: str, wish: Wish | BondWish, node: Node) -> MasterLink:
    found = node.links.get(name)
    if found is None:
        index = wish.slaves.index(name) if isinstance(wish, BondWish) else 0
        raise InvalidConfigError(
            "an interface is not on this node", f"interfaces[{index}]: failed to find link {name}: Link not found"
        )
    return found


def _bond(wish: BondWish, node: Node, mtu: int) -> Plan:
    nics = [_nic(name, wish, node) for name in wish.slaves]
    there = node.links.get(wish.name)
    if there is None:
        for nic in nics:
            _refuse_enslaved(nic, node)
        return Plan(new_bond=wish, bond_mtu=mtu or min(nic.link.mtu for nic in nics), enslave=tuple(nics))
    link = there.link
    if link.kind != "bond":
        raise WiringError(
            f"a non-bond type interface named {link.name} already exists on the host",
            f"bond.name: {link.name} is a {link.kind or 'physical'} link",
        )
    ours = is_ours(link)
    outside = [nic for nic in nics if nic.master != link.ifindex]
    changes = differing(wish.options.given, there.data, node.name_of)
    wrong = [] if (mode := there.data[BOND_MODE][0]) == wish.mode else [_mode(mode, wish.mode)]
    wrong += [
        f"option {name}: it has {shown(name, has)}, wanted is {shown(name, wanted)}"
        for name, (has, wanted) in changes.items()
        if not (ours and OPTIONS[name].live)
    ]
    raised, mtu_wrong = _mtu(link, mtu, ours)
    wrong += mtu_wrong
    if not ours:
        wrong += [f"interface {nic.link.name}: it is not in the bond" for nic in outside]
    if wrong:
        raise WiringError(
            f"the bond {link.name} differs from what is wanted",
            "; ".join(wrong) + ("" if ours else "; it was not made by ifacer and is left alone"),
        )
    for nic in outside:
        _refuse_enslaved(nic, node)
    return Plan(
        up=_down(link),
        bond=there,
        options=changes or None,
        enslave=tuple(outside),
        mtus=((link, mtu),) if raised else (),
    )


def _mode(has: int, wanted: int) -> str:
    names = [f"{number} ({MODES[number]})" if number < len(MODES) else str(number) for number in (has, wanted)]
    return f"mode: it has {names[0]}, wanted is {names[1]}"


def _refuse_enslaved(nic: MasterLink, node: Node) -> None:
    if nic.master:
        raise WiringError(
            "an interface belongs to another link",
            f"{nic.link.name} is a port of {node.name_of(nic.master)} and is not taken away from it",
        )


def _mtu(link: rtlink.Link, wanted: int, ours: bool) -> tuple[bool, list[str]]:
    """Whether the MTU is to be raised, or what is wrong with it: lowering it would cut those who use the link."""
    if not wanted or link.mtu == wanted:
        return False, []
    if ours and link.mtu < wanted:
        return True, []
    return False, [f"mtu: it has {link.mtu}, wanted is {wanted}"]


def _vlan(wish: VlanWish, node: Node, whole: Wish, bond: Plan, one_link_per_vlan_id: bool) -> Plan:
    parent = node.links.get(wish.parent) if whole.bond is not None else _nic(wish.parent, whole, node)
    below = 0 if parent is None else parent.link.ifindex
    for other in node.vlans:
        if other.vlan_id != wish.id or other.link.name == wish.name:
            continue
        if one_link_per_vlan_id or (below and other.link.peer_netns < 0 and other.link.peer == below):
            raise WiringError(
                "cannot have multiple different vlan interfaces with the same vlanId"
                f" {wish.id} on node at the same time",
                f"vlanID: wanted is {wish.name}, and there is {other.link.name}",
            )
    bottom = bond.bond_mtu if parent is None else max((m for link, m in bond.mtus), default=parent.link.mtu)
    if whole.mtu > bottom:
        raise WiringError(
            "mtu is larger than that of the interface below", f"mtu: {whole.mtu}, {wish.parent} has {bottom}"
        )
    up = bond.up if parent is None or bond.up else _down(parent.link)
    mtus = bond.mtus
    there = node.links.get(wish.name)
    if there is not None:
        link = there.link
        wrong = _other_vlan(there, wish, below)
        raised, mtu_wrong = _mtu(link, whole.mtu, is_ours(link))
        wrong += mtu_wrong
        if wrong:
            raise WiringError(
                f"the interface {link.name} on the host is not the VLAN that is wanted",
                f"{link.name}: " + "; ".join(wrong),
            )
        up += _down(link)
        mtus += ((link, whole.mtu),) if raised else ()
    return Plan(
        up=up,
        new_bond=bond.new_bond,
        bond_mtu=bond.bond_mtu,
        bond=bond.bond,
        options=bond.options,
        enslave=bond.enslave,
        mtus=mtus,
        new_vlan=wish if there is None else None,
    )


def _other_vlan(there: MasterLink, wish: VlanWish, parent: int) -> list[str]:
    if there.link.kind != "vlan":
        return [f"it is a {there.link.kind or 'physical'} link"]
    found = []
    if there.vlan_id != wish.id:
        found.append(f"its VLAN id is {there.vlan_id}")
    if there.vlan_protocol != PROTOCOL_8021Q:
        found.append(f"its tags are of type {there.vlan_protocol:#06x}, not 802.1Q")
    if there.link.peer_netns >= 0 or there.link.peer != parent:
        found.append(f"its parent is not {wish.parent}")
    return found


def _down(link: rtlink.Link) -> tuple[rtlink.Link, ...]:
    return () if link.flags & rtlink.FLAG_UP else (link,)


def reasons_to_leave(
    nic: rtlink.Link, links: Iterable[MasterLink], addresses: Iterable[rtlink.LinkAddress]
) -> list[str]:
    """Why a NIC must not be put into a bond, which sets it down for a moment and takes its addresses off."""
    found = [
        f"it has the address {own.address}/{own.length}"
        for own in addresses
        if own.ifindex == nic.ifindex and counts(own.address)
    ]
    found += [f"{other.link.name} is made of it" for other in links if stands_on(other, nic)]
    return found


def counts(address: Address) -> bool:
    """Whether an address may be one that the node is reached by: not one that IPv6 makes for every link."""
    return address.version == 4 or not address.is_link_local


def stands_on(other: MasterLink, link: rtlink.Link) -> bool:
    """Whether `other` is a VLAN, macvlan or the like of `link`."""
    return other.link.kind != "veth" and other.link.peer_netns < 0 and other.link.peer == link.ifindex
