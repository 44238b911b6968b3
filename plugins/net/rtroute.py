"""rtnetlink's routes, rules and neighbours, packed by hand; see `rtlink` for why.

Layouts: include/uapi/linux/{rtnetlink,fib_rules,neighbour}.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_UNSPEC
from typing import NamedTuple

from api.ranges import Address
from plugins.net.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    Words,
    address_in,
    attribute,
    attributes,
    family_of,
    int_in,
    u32_attribute,
)

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

TABLE_MAIN = 254
SCOPE_UNIVERSE = 0
SCOPE_LINK = 253
SCOPE_ANY = 255
"""RT_SCOPE_NOWHERE: in a deletion, whatever its scope."""
ROUTE_UNICAST = 1
ROUTE_LOCAL = 2
STATE_PERMANENT = 0x80

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_LOOKUP_TABLE = 0x1000
_FRA_SRC, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_FWMARK = 2, 3, 6, 10
_FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME, _FRA_PROTOCOL = 15, 16, 17, 21
_TO_TABLE = 1
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX, _NDA_PROTOCOL = 1, 2, 8, 12

_RTMSG = struct.Struct("=BBBBBBBBI")
_RULE = _RTMSG
_NDMSG = struct.Struct("=BxxxiHBB")


class Prefix(NamedTuple):
    """A destination: an address and how many of its bits count; the rest are zero."""

    address: Address
    length: int

    def __str__(self) -> str:
        return f"{self.address}/{self.length}"


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
    priority: int = 0
    """Its metric; 0: the kernel's default (0 for IPv4, 1024 for IPv6)."""

    def __str__(self) -> str:
        via = f" via {self.gateway}" if self.gateway else ""
        return f"route {self.destination}{via} table {self.table}"


class Rule(NamedTuple):
    """A policy rule that looks a table up for all packets, for those with a mark, or for those of a sender."""

    family: int
    priority: int
    table: int
    mark: int
    mask: int
    protocol: int
    plain: bool
    """It selects by nothing but the mark and the source: no destination, no interface."""
    source: Prefix | None = None

    def __str__(self) -> str:
        who = f" from {self.source}" if self.source is not None else ""
        mark = f" fwmark {self.mark:#x}" if self.mark else ""
        return f"IPv{4 if self.family == AF_INET else 6} rule{who}{mark} lookup {self.table} pref {self.priority}"


class Neighbour(NamedTuple):
    """A neighbour entry."""

    ifindex: int
    address: Address
    mac: bytes
    state: int
    protocol: int = 0
    """Its origin; 0: nobody has told."""


def host_prefix(address: Address) -> Prefix:
    """`address` alone: /32 or /128."""
    return Prefix(address, address.max_prefixlen)


def _route(route: Route) -> bytes:
    destination, table, index, gateway, source, scope, protocol, kind, priority = route
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
        body += u32_attribute(_RTA_OIF, index)
    if priority:
        body += u32_attribute(_RTA_PRIORITY, priority)
    return body + u32_attribute(_RTA_TABLE, table)


def route_add(route: Route) -> Message:
    """Add `route`; fails with EEXIST if its table has one to the same destination."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _route(route), Words(("add", route)))


def route_beside(route: Route) -> Message:
    """Add `route` to those that its table has to the same destination: IPv4 before them, IPv6 as a further next hop.

    Fails with EEXIST if the very same is there.
    """
    return Message(RTM_NEWROUTE, NLM_F_CREATE, _route(route), Words(("add", route)))


def route_replace(route: Route) -> Message:
    """Add `route`, in place of the one that its table has to the same destination."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route), Words(("set", route)))


def route_delete(route: Route) -> Message:
    """Delete the route that matches `route` in everything given."""
    return Message(RTM_DELROUTE, 0, _route(route), Words(("delete", route)))


def route_get(destination: Address) -> Message:
    """Ask which route a packet of the host's own to `destination` would take; the answer tells its real table."""
    # IPv6 tells the real table unasked, and refuses the flag that IPv4 wants for it.
    flags = _LOOKUP_TABLE if destination.version == 4 else 0
    body = _RTMSG.pack(family_of(destination), destination.max_prefixlen, 0, 0, 0, 0, 0, 0, flags)
    return Message(
        RTM_GETROUTE, 0, body + attribute(_RTA_DST, destination.packed), Words(("look up the route to", destination))
    )


def route_dump(family: int, table: int = 0) -> Message:
    """Ask for the routes of one table, or of all (0). The answer is ENOENT if the table was never used."""
    body = _RTMSG.pack(family, 0, 0, 0, table if table < 256 else 0, 0, 0, 0, 0)
    if table:
        body += u32_attribute(_RTA_TABLE, table)
    return Message(RTM_GETROUTE, NLM_F_DUMP, body, f"list the routes of table {table}" if table else "list routes")


def parse_route(body: bytes) -> Route:
    """An RTM_NEWROUTE."""
    family, length, _, _, table, protocol, scope, kind, _ = _RTMSG.unpack_from(body)
    found = attributes(body, 12)
    return Route(
        destination=Prefix(address_in(found.get(_RTA_DST)) or _zero(family), length),
        table=int_in(found.get(_RTA_TABLE)) or table,
        ifindex=int_in(found.get(_RTA_OIF)),
        gateway=address_in(found.get(_RTA_GATEWAY)),
        source=address_in(found.get(_RTA_PREFSRC)),
        scope=scope,
        protocol=protocol,
        type=kind,
        priority=int_in(found.get(_RTA_PRIORITY)),
    )


def _rule(rule: Rule) -> bytes:
    length = rule.source.length if rule.source is not None else 0
    body = _RULE.pack(rule.family, 0, length, 0, rule.table if rule.table < 256 else 0, 0, 0, _TO_TABLE, 0)
    if rule.source is not None:
        body += attribute(_FRA_SRC, rule.source.address.packed)
    body += u32_attribute(_FRA_PRIORITY, rule.priority) + u32_attribute(_FRA_TABLE, rule.table)
    body += attribute(_FRA_PROTOCOL, bytes((rule.protocol,)))
    if rule.mark:
        body += u32_attribute(_FRA_FWMARK, rule.mark) + u32_attribute(_FRA_FWMASK, rule.mask)
    return body


def rule_add(rule: Rule) -> Message:
    """Add `rule`; fails with EEXIST if it is there."""
    return Message(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _rule(rule), Words(("add", rule)))


def rule_delete(rule: Rule) -> Message:
    """Delete `rule`; fails with ENOENT if there is none."""
    return Message(RTM_DELRULE, 0, _rule(rule), Words(("delete", rule)))


def rule_dump(family: int) -> Message:
    """Ask for all rules of a family."""
    return Message(RTM_GETRULE, NLM_F_DUMP, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "list rules")


def parse_rule(body: bytes) -> Rule:
    """An RTM_NEWRULE."""
    family, dst, src, _, table, _, _, action, _ = _RULE.unpack_from(body)
    found = attributes(body, 12)
    source = address_in(found.get(_FRA_SRC))
    return Rule(
        family=family,
        priority=int_in(found.get(_FRA_PRIORITY)),
        table=int_in(found.get(_FRA_TABLE)) or table,
        mark=int_in(found.get(_FRA_FWMARK)),
        mask=int_in(found.get(_FRA_FWMASK)),
        protocol=found.get(_FRA_PROTOCOL, b"\0")[0],
        plain=not dst and action == _TO_TABLE and not found.keys() & {_FRA_IIFNAME, _FRA_OIFNAME},
        source=Prefix(source, src) if source is not None else None,
    )


def neighbour_set(index: int, address: Address, mac: bytes, where: str, protocol: int = 0) -> Message:
    """Make `address` a permanent neighbour on a link, in place of what was known of it there."""
    body = _NDMSG.pack(family_of(address), index, STATE_PERMANENT, 0, 0)
    body += attribute(_NDA_DST, address.packed) + attribute(_NDA_LLADDR, mac)
    if protocol:
        body += attribute(_NDA_PROTOCOL, bytes((protocol,)))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, Words(("set neighbour", address, "on", where)))


def neighbour_delete(index: int, address: Address) -> Message:
    """Forget `address` on a link; fails with ENOENT if it is not known there."""
    body = _NDMSG.pack(family_of(address), index, 0, 0, 0) + attribute(_NDA_DST, address.packed)
    return Message(RTM_DELNEIGH, 0, body, Words(("forget neighbour", address, "on link", index)))


def neighbour_dump(index: int) -> Message:
    """Ask for the neighbours on one link."""
    body = _NDMSG.pack(AF_UNSPEC, 0, 0, 0, 0) + u32_attribute(_NDA_IFINDEX, index)
    return Message(RTM_GETNEIGH, NLM_F_DUMP, body, f"list the neighbours on link {index}")


def parse_neighbour(body: bytes) -> Neighbour | None:
    """An RTM_NEWNEIGH; None if it is of another family than IP."""
    _, index, state, _, _ = _NDMSG.unpack_from(body)
    found = attributes(body, 12)
    address = address_in(found.get(_NDA_DST))
    if address is None:
        return None
    return Neighbour(index, address, found.get(_NDA_LLADDR, b""), state, found.get(_NDA_PROTOCOL, b"\0")[0])


def parse_neighbours(bodies: Iterable[bytes]) -> list[Neighbour]:
    """Several RTM_NEWNEIGH."""
    return [found for found in map(parse_neighbour, bodies) if found is not None]


def _zero(family: int) -> Address:
    return IPv4Address(0) if family == AF_INET else IPv6Address(0)
