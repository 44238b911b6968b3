"""rtnetlink messages packed by hand: links, addresses, routes, rules and neighbours, and what the kernel tells of them.

Attaching a pod is two dozen messages; a general encoder spends several times longer on packing them than the kernel on
doing them. This module is the only place that knows their layout (include/uapi/linux/{rtnetlink,if_link,if_addr,
neighbour,fib_rules}.h); the tests compare it with pyroute2's encoding of the same messages.

Families follow from the addresses. Indices are interface indices of the namespace that the socket belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6, AF_UNSPEC
from typing import NamedTuple

from api.ranges import Address
from plugins.net.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Message, attribute, attributes

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

GROUP_IPV4_ADDRESSES = 1 << 4
GROUP_IPV6_ADDRESSES = 1 << 8
"""Multicast groups (RTMGRP_*) that tell of changed addresses."""

TABLE_MAIN = 254
TABLE_LOCAL = 255
SCOPE_UNIVERSE = 0
SCOPE_LINK = 253
SCOPE_ANY = 255
"""RT_SCOPE_NOWHERE: in a deletion, whatever its scope."""
ROUTE_UNICAST = 1
ROUTE_LOCAL = 2

FLAG_UP = 0x1
STATE_PERMANENT = 0x80
ADDRESS_DADFAILED, ADDRESS_DEPRECATED, ADDRESS_TENTATIVE, ADDRESS_PERMANENT = 0x08, 0x20, 0x40, 0x80

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK = 1, 3, 4, 5
_IFLA_TXQLEN, _IFLA_LINKINFO, _IFLA_IFALIAS = 13, 18, 20
_IFLA_AF_SPEC, _IFLA_GROUP, _IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 26, 27, 28, 29, 37
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_SKIP_STATS = 1 << 3
_IFLA_INET_CONF, _DEVCONF_RP_FILTER = 1, 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 7, 15
_LOOKUP_TABLE = 0x1000
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 6, 10, 15, 16, 21
_TO_TABLE = 1
_NDA_DST, _NDA_LLADDR = 1, 2

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_RULE = _RTMSG
_NDMSG = struct.Struct("=BxxxiHBB")
_U32_ATTRIBUTE = struct.Struct("=HHI")
_U32 = struct.Struct("=I")


class Prefix(NamedTuple):
    """A destination: an address and how many of its bits count; the rest are zero."""

    address: Address
    length: int

    def __str__(self) -> str:
        return f"{self.address}/{self.length}"


class Link(NamedTuple):
    """A link as the kernel describes it."""

    ifindex: int
    name: str
    flags: int
    mac: bytes
    mtu: int
    tx_queue_len: int
    kind: str
    """`veth`, `macvlan`, …; empty for a physical one."""
    peer: int
    """Index of the peer of a veth or of the master of a macvlan, in its own namespace; 0: none."""
    alias: str
    group: int


class LinkAddress(NamedTuple):
    """An address on a link."""

    ifindex: int
    address: Address
    length: int
    flags: int


class Route(NamedTuple):
    """A route. `ifindex`, `gateway`, `source`: 0 or None where it has none."""

    destination: Prefix
    table: int
    ifindex: int
    gateway: Address | None
    source: Address | None
    scope: int
    protocol: int
    type: int


class Rule(NamedTuple):
    """A policy rule that looks a table up for all packets, or for those with a mark."""

    family: int
    priority: int
    table: int
    mark: int
    mask: int
    protocol: int
    plain: bool
    """It selects by nothing but the mark: no source, no destination."""


class Neighbour(NamedTuple):
    """A neighbour entry."""

    ifindex: int
    address: Address
    mac: bytes
    state: int


def family_of(address: Address) -> int:
    """AF_INET or AF_INET6."""
    return AF_INET if address.version == 4 else AF_INET6


def host_prefix(address: Address) -> Prefix:
    """`address` alone: /32 or /128."""
    return Prefix(address, address.max_prefixlen)


def mac_text(mac: bytes) -> str:
    """`02:00:00:00:00:01`."""
    return mac.hex(":")


def _u32(kind: int, value: int) -> bytes:
    return _U32_ATTRIBUTE.pack(8, kind, value)


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


# Links


def veth(name: str, mac: bytes, mtu: int, group: int, *, peer: str, peer_mac: bytes, peer_netns_fd: int) -> Message:
    """Create the pair `name` (here, up, in `group`) and `peer` (in the other namespace, down). Fails if one exists."""
    other = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + b"".join(
        (
            _text(_IFLA_IFNAME, peer),
            attribute(_IFLA_ADDRESS, peer_mac),
            _u32(_IFLA_MTU, mtu),
            _u32(_IFLA_NET_NS_FD, peer_netns_fd),
        )
    )
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, FLAG_UP, FLAG_UP) + b"".join(
        (
            _text(_IFLA_IFNAME, name),
            attribute(_IFLA_ADDRESS, mac),
            _u32(_IFLA_MTU, mtu),
            _u32(_IFLA_GROUP, group),
            attribute(
                _IFLA_LINKINFO,
                attribute(_INFO_KIND, b"veth") + attribute(_INFO_DATA, attribute(_VETH_PEER, other)),
            ),
        )
    )
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create veth {name} with peer {peer}")


def link_set(
    index: int,
    what: str,
    *,
    up: bool = False,
    mac: bytes | None = None,
    tx_queue_len: int | None = None,
    alias: str | None = None,
    rp_filter: int | None = None,
) -> Message:
    """Change a link; what is not given stays. `rp_filter` is the link's own `net.ipv4.conf.*.rp_filter`.

    `what` names the change in an error.
    """
    body = _IFINFO.pack(AF_UNSPEC, 0, index, FLAG_UP if up else 0, FLAG_UP if up else 0)
    if mac is not None:
        body += attribute(_IFLA_ADDRESS, mac)
    if tx_queue_len is not None:
        body += _u32(_IFLA_TXQLEN, tx_queue_len)
    if alias is not None:
        body += attribute(_IFLA_IFALIAS, alias.encode())
    if rp_filter is not None:
        conf = attribute(_IFLA_INET_CONF, _u32(_DEVCONF_RP_FILTER, rp_filter))
        body += attribute(_IFLA_AF_SPEC, attribute(AF_INET, conf))
    return Message(RTM_NEWLINK, 0, body, what)


def link_delete(index: int, name: str) -> Message:
    """Delete the link `index`; `name` is for the error only. Takes tens of milliseconds (an RCU grace period)."""
    return Message(RTM_DELLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0), f"delete link {name}")


def link_get(name: str) -> Message:
    """Ask for one link by name; the kernel answers ENODEV if there is none."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + _text(_IFLA_IFNAME, name) + _u32(_IFLA_EXT_MASK, _SKIP_STATS)
    return Message(RTM_GETLINK, 0, body, f"look up link {name}")


def link_dump(kind: str) -> Message:
    """Ask for all links of `kind`."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + _u32(_IFLA_EXT_MASK, _SKIP_STATS)
    body += attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode()))
    return Message(RTM_GETLINK, NLM_F_DUMP, body, f"list {kind} links")


def parse_link(body: bytes) -> Link:
    """An RTM_NEWLINK."""
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body, 16)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    return Link(
        ifindex=index,
        name=_cstring(found.get(_IFLA_IFNAME, b"")),
        flags=flags,
        mac=found.get(_IFLA_ADDRESS, b""),
        mtu=_int(found.get(_IFLA_MTU)),
        tx_queue_len=_int(found.get(_IFLA_TXQLEN)),
        kind=_cstring(info.get(_INFO_KIND, b"")),
        peer=_int(found.get(_IFLA_LINK)),
        alias=_cstring(found.get(_IFLA_IFALIAS, b"")),
        group=_int(found.get(_IFLA_GROUP)),
    )


# Addresses


def address_add(index: int, address: Address, length: int, where: str) -> Message:
    """Put `address` on a link; fails if it is there."""
    packed = address.packed
    body = _IFADDR.pack(family_of(address), length, 0, 0, index)
    body += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return Message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body, f"add address {address}/{length} to {where}")


def address_dump() -> Message:
    """Ask for all addresses, IPv4 first."""
    return Message(RTM_GETADDR, NLM_F_DUMP, _IFADDR.pack(AF_UNSPEC, 0, 0, 0, 0), "list addresses")


def parse_address(body: bytes) -> LinkAddress | None:
    """An RTM_NEWADDR or RTM_DELADDR; None if it is of another family than IP."""
    _, length, flags, _, index = _IFADDR.unpack_from(body)
    found = attributes(body, 8)
    address = _address(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS))
    if address is None:
        return None
    return LinkAddress(index, address, length, _int(found.get(_IFA_FLAGS)) or flags)


# Routes


def _route(route: Route) -> bytes:
    destination, table, index, gateway, source, scope, protocol, kind = route
    body = _RTMSG.pack(
        family_of(destination.address),
        destination.length,
        0,
        0,
        table if table < 256 else 0,
        protocol,
        scope,
        kind,
        0,
    )
    if destination.length:
        body += attribute(_RTA_DST, destination.address.packed)
    if gateway is not None:
        body += attribute(_RTA_GATEWAY, gateway.packed)
    if source is not None:
        body += attribute(_RTA_PREFSRC, source.packed)
    if index:
        body += _u32(_RTA_OIF, index)
    return body + _u32(_RTA_TABLE, table)


def _route_text(route: Route) -> str:
    via = f" via {route.gateway}" if route.gateway else ""
    return f"route {route.destination}{via} table {route.table}"


def route_add(route: Route) -> Message:
    """Add `route`; fails with EEXIST if its table has one to the same destination."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _route(route), f"add {_route_text(route)}")


def route_replace(route: Route) -> Message:
    """Add `route`, in place of the one that its table has to the same destination."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route), f"set {_route_text(route)}")


def route_delete(route: Route) -> Message:
    """Delete the route that matches `route` in everything given."""
    return Message(RTM_DELROUTE, 0, _route(route), f"delete {_route_text(route)}")


def route_get(destination: Address) -> Message:
    """Ask which route a packet of the host's own to `destination` would take; the answer tells its real table."""
    body = _RTMSG.pack(family_of(destination), destination.max_prefixlen, 0, 0, 0, 0, 0, 0, _LOOKUP_TABLE)
    return Message(
        RTM_GETROUTE, 0, body + attribute(_RTA_DST, destination.packed), f"look up the route to {destination}"
    )


def route_dump(family: int, table: int) -> Message:
    """Ask for the routes of one table. The answer is ENOENT if the table was never used."""
    body = _RTMSG.pack(family, 0, 0, 0, table if table < 256 else 0, 0, 0, 0, 0) + _u32(_RTA_TABLE, table)
    return Message(RTM_GETROUTE, NLM_F_DUMP, body, f"list the routes of table {table}")


def parse_route(body: bytes) -> Route:
    """An RTM_NEWROUTE."""
    family, length, _, _, table, protocol, scope, kind, _ = _RTMSG.unpack_from(body)
    found = attributes(body, 12)
    return Route(
        destination=Prefix(_address(found.get(_RTA_DST)) or _zero(family), length),
        table=_int(found.get(_RTA_TABLE)) or table,
        ifindex=_int(found.get(_RTA_OIF)),
        gateway=_address(found.get(_RTA_GATEWAY)),
        source=_address(found.get(_RTA_PREFSRC)),
        scope=scope,
        protocol=protocol,
        type=kind,
    )


# Rules


def _rule(rule: Rule) -> bytes:
    body = _RULE.pack(rule.family, 0, 0, 0, rule.table if rule.table < 256 else 0, 0, 0, _TO_TABLE, 0)
    body += _u32(_FRA_PRIORITY, rule.priority) + _u32(_FRA_TABLE, rule.table)
    body += attribute(_FRA_PROTOCOL, bytes((rule.protocol,)))
    if rule.mark:
        body += _u32(_FRA_FWMARK, rule.mark) + _u32(_FRA_FWMASK, rule.mask)
    return body


def _rule_text(rule: Rule) -> str:
    mark = f" fwmark {rule.mark:#x}" if rule.mark else ""
    return f"IPv{4 if rule.family == AF_INET else 6} rule{mark} lookup {rule.table} pref {rule.priority}"


def rule_add(rule: Rule) -> Message:
    """Add `rule`; fails with EEXIST if it is there."""
    return Message(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _rule(rule), f"add {_rule_text(rule)}")


def rule_delete(rule: Rule) -> Message:
    """Delete `rule`; fails with ENOENT if there is none."""
    return Message(RTM_DELRULE, 0, _rule(rule), f"delete {_rule_text(rule)}")


def rule_dump(family: int) -> Message:
    """Ask for all rules of a family."""
    return Message(RTM_GETRULE, NLM_F_DUMP, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "list rules")


def parse_rule(body: bytes) -> Rule:
    """An RTM_NEWRULE."""
    family, dst, src, _, table, _, _, action, _ = _RULE.unpack_from(body)
    found = attributes(body, 12)
    return Rule(
        family=family,
        priority=_int(found.get(_FRA_PRIORITY)),
        table=_int(found.get(_FRA_TABLE)) or table,
        mark=_int(found.get(_FRA_FWMARK)),
        mask=_int(found.get(_FRA_FWMASK)),
        protocol=found.get(_FRA_PROTOCOL, b"\0")[0],
        plain=not dst and not src and action == _TO_TABLE,
    )


# Neighbours


def neighbour_set(index: int, address: Address, mac: bytes, where: str) -> Message:
    """Make `address` a permanent neighbour on a link, in place of what was known of it there."""
    body = _NDMSG.pack(family_of(address), index, STATE_PERMANENT, 0, 0)
    body += attribute(_NDA_DST, address.packed) + attribute(_NDA_LLADDR, mac)
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"set neighbour {address} on {where}")


def neighbour_delete(index: int, address: Address) -> Message:
    """Forget `address` on a link; fails with ENOENT if it is not known there."""
    body = _NDMSG.pack(family_of(address), index, 0, 0, 0) + attribute(_NDA_DST, address.packed)
    return Message(RTM_DELNEIGH, 0, body, f"forget neighbour {address} on link {index}")


def neighbour_dump(index: int) -> Message:
    """Ask for the neighbours on one link."""
    ifindex_filter = 8  # NDA_IFINDEX
    body = _NDMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + _u32(ifindex_filter, index)
    return Message(RTM_GETNEIGH, NLM_F_DUMP, body, f"list the neighbours on link {index}")


def parse_neighbour(body: bytes) -> Neighbour | None:
    """An RTM_NEWNEIGH; None if it is of another family than IP."""
    _, index, state, _, _ = _NDMSG.unpack_from(body)
    found = attributes(body, 12)
    address = _address(found.get(_NDA_DST))
    return None if address is None else Neighbour(index, address, found.get(_NDA_LLADDR, b""), state)


# Decoding


def parse_addresses(bodies: Iterable[bytes]) -> list[LinkAddress]:
    """Several RTM_NEWADDR."""
    return [found for found in map(parse_address, bodies) if found is not None]


def parse_neighbours(bodies: Iterable[bytes]) -> list[Neighbour]:
    """Several RTM_NEWNEIGH."""
    return [found for found in map(parse_neighbour, bodies) if found is not None]


def _address(packed: bytes | None) -> Address | None:
    if packed is None:
        return None
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else None


def _zero(family: int) -> Address:
    return IPv4Address(0) if family == AF_INET else IPv6Address(0)


def _int(data: bytes | None) -> int:
    return int(_U32.unpack_from(data)[0]) if data else 0


def _cstring(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
