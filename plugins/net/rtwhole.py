"""Routes with everything that the kernel tells of them, so that they can be put into another table and back.

`rtroute` knows what our own routes need. Routes that other plugins have made carry more (metrics, onlink, several next
hops, encapsulation), which must survive a move: their attributes are kept as they came. Layout:
include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6
from typing import NamedTuple

from api.ranges import Address
from plugins.net.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Words,
    address_in,
    attribute,
    int_in,
    nested,
    u32_attribute,
)
from plugins.net.rtroute import RTM_DELROUTE, RTM_NEWROUTE, Prefix

_NLM_F_APPEND = 0x800
_TABLE_LOCAL = 255
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_MULTIPATH = 1, 4, 5, 6, 9
_RTA_VIA, _RTA_ENCAP_TYPE, _RTA_ENCAP, _RTA_NH_ID, _RTA_TABLE = 18, 21, 22, 30, 15
_RTA_PREFSRC, _RTA_METRICS, _RTA_FLOW, _RTA_PREF = 7, 8, 11, 20
_OF_HOP = (_RTA_GATEWAY, _RTA_VIA, _RTA_ENCAP_TYPE, _RTA_ENCAP)
_KEPT = (_RTA_DST, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_FLOW, _RTA_PREF)
"""The others are counters, or the kernel's own account of how the route is."""
_ONLINK = 4
_CLONED = 0x200

_RTMSG = struct.Struct("=BBBBBBBBI")
_RTNEXTHOP = struct.Struct("=HBBi")


class Hop(NamedTuple):
    """One next hop."""

    ifindex: int
    gateway: Address | None
    flags: int
    weight: int
    """One less than the weight that people write."""
    attributes: bytes
    """Gateway, via and encapsulation, packed."""


class WholeRoute(NamedTuple):
    """A route. Everything else than the named members is in `attributes`."""

    family: int
    destination: Prefix
    table: int
    protocol: int
    scope: int
    type: int
    priority: int
    tos: int
    nexthop_id: int
    """Of a next-hop object, which then stands for the hops; 0: none."""
    hops: tuple[Hop, ...]
    attributes: bytes
    """What is not of a hop, packed: destination and priority among them."""

    def __str__(self) -> str:
        via = ", ".join(str(hop.gateway or f"link {hop.ifindex}") for hop in self.hops)
        return f"route {self.destination}{f' via {via}' if via else ''} table {self.table}"

    @property
    def is_default(self) -> bool:
        """Whether it goes everywhere."""
        return self.destination.length == 0

    def over(self, ifindex: int) -> WholeRoute | None:
        """The route with only its hops over the link `ifindex`; None if it has none there."""
        return self._with(tuple(hop for hop in self.hops if hop.ifindex == ifindex))

    def without(self, ifindex: int) -> WholeRoute | None:
        """The route without its hops over the link `ifindex`; None if no hop is left."""
        return self._with(tuple(hop for hop in self.hops if hop.ifindex != ifindex))

    def _with(self, hops: tuple[Hop, ...]) -> WholeRoute | None:
        if not hops:
            return None
        return self if hops == self.hops else self._replace(hops=hops, nexthop_id=0)


def parse_whole(body: bytes) -> WholeRoute | None:
    """An RTM_NEWROUTE; None for what the kernel itself keeps: for one destination only, or in the table `local`."""
    family, length, _, tos, table, protocol, scope, kind, flags = _RTMSG.unpack_from(body)
    if flags & _CLONED or table == _TABLE_LOCAL or family not in (AF_INET, AF_INET6):
        return None
    parts = dict(nested(body[12:]))
    if _RTA_MULTIPATH in parts:
        hops = tuple(_parse_hops(parts[_RTA_MULTIPATH]))
    elif _RTA_OIF in parts:
        packed = b"".join(attribute(kind, parts[kind]) for kind in _OF_HOP if kind in parts)
        hops = (Hop(int_in(parts[_RTA_OIF]), address_in(parts.get(_RTA_GATEWAY)), flags & _ONLINK, 0, packed),)
    else:
        hops = ()
    zero = address_in(bytes(4 if family == AF_INET else 16))
    assert zero is not None  # noqa: S101 (both lengths are an address's)
    return WholeRoute(
        family=family,
        destination=Prefix(address_in(parts.get(_RTA_DST)) or zero, length),
        table=int_in(parts.get(_RTA_TABLE)) or table,
        protocol=protocol,
        scope=scope,
        type=kind,
        priority=int_in(parts.get(_RTA_PRIORITY)),
        tos=tos,
        nexthop_id=int_in(parts.get(_RTA_NH_ID)),
        hops=hops,
        attributes=b"".join(attribute(kind, parts[kind]) for kind in _KEPT if kind in parts),
    )


def _parse_hops(data: bytes) -> list[Hop]:
    found: list[Hop] = []
    offset = 0
    while offset + 8 <= len(data):
        size, flags, weight, index = _RTNEXTHOP.unpack_from(data, offset)
        if size < 8:
            break
        parts = dict(nested(data[offset + 8 : offset + size]))
        packed = b"".join(attribute(kind, parts[kind]) for kind in _OF_HOP if kind in parts)
        found.append(Hop(index, address_in(parts.get(_RTA_GATEWAY)), flags & _ONLINK, weight, packed))
        offset += (size + 3) & ~3
    return found


def _pack(route: WholeRoute) -> bytes:
    single = len(route.hops) == 1 and not route.nexthop_id
    body = _RTMSG.pack(
        route.family,
        route.destination.length,
        0,
        route.tos,
        route.table if route.table < 256 else 0,
        route.protocol,
        route.scope,
        route.type,
        route.hops[0].flags if single else 0,
    )
    body += route.attributes
    if route.nexthop_id:
        body += u32_attribute(_RTA_NH_ID, route.nexthop_id)
    elif single:
        body += u32_attribute(_RTA_OIF, route.hops[0].ifindex) + route.hops[0].attributes
    elif route.hops:
        body += attribute(
            _RTA_MULTIPATH,
            b"".join(
                _RTNEXTHOP.pack(8 + len(hop.attributes), hop.flags, hop.weight, hop.ifindex) + hop.attributes
                for hop in route.hops
            ),
        )
    return body + u32_attribute(_RTA_TABLE, route.table)


def whole_add(route: WholeRoute) -> Message:
    """Add `route`; fails with EEXIST if its table has one to the same destination with the same metric."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, _pack(route), Words(("add", route)))


def whole_append(route: WholeRoute) -> Message:
    """Add `route` behind those to the same destination (IPv4), or as a further next hop of theirs (IPv6)."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | _NLM_F_APPEND, _pack(route), Words(("append", route)))


def whole_prepend(route: WholeRoute) -> Message:
    """Add `route` before those to the same destination (IPv4), or as a further next hop of theirs (IPv6)."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE, _pack(route), Words(("prepend", route)))


def whole_delete(route: WholeRoute) -> Message:
    """Delete the very `route`."""
    return Message(RTM_DELROUTE, 0, _pack(route), Words(("delete", route)))
