"""What rtnetlink tells unasked: a socket that hears of changes which may concern pods, and of as little else as can be.

A node that routes for many tells of thousands of neighbours and routes in a second. What of it can be told by fixed
offsets is dropped by the kernel before anybody wakes up. Layouts: include/uapi/linux/{rtnetlink,neighbour,netconf}.h.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from api.ranges import Address
from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, alias_parts
from plugins.coordinator.plan import usable
from plugins.coordinator.probe.filter import JUMP_EQUAL, LOAD_BYTE, REJECT, RETURN, Program, attach_filter
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_ROUTE, Netlink, attributes, int_in

RTM_NEWNETCONF: Final = 80
GROUPS: Final = (
    rtlink.GROUP_LINKS
    | rtlink.GROUP_IPV4_ADDRESSES
    | rtlink.GROUP_IPV6_ADDRESSES
    | 1 << 2  # RTNLGRP_NEIGH
    | 1 << 6  # RTNLGRP_IPV4_ROUTE
    | 1 << 10  # RTNLGRP_IPV6_ROUTE
    | 1 << 7  # RTNLGRP_IPV4_RULE
    | 1 << 18  # RTNLGRP_IPV6_RULE
    | 1 << 23  # RTNLGRP_IPV4_NETCONF
)
PAIRS: Final = ("veth", "netkit")
"""Kinds of links by which a pod may be joined to its node."""

_COMPAT: Final = 252
"""RT_TABLE_COMPAT: what the one byte of a table says whose number is greater than 255."""
_NETCONFA_IFINDEX, _NETCONFA_RP_FILTER = 1, 3
_JUMP_ANY_BIT: Final = 0x45
_LOW: Final = 0 if sys.byteorder == "little" else 1
"""Where the low byte of a 16-bit number in the machine's order is."""
_TYPE, _TABLE, _ORIGIN, _STATE = 4 + _LOW, 16 + 4, 16 + 5, 16 + 8 + _LOW
_ALL: Final = (RETURN, 0, 0, 0xFFFFFFFF)

FILTER: Final[Program] = [
    (LOAD_BYTE, 0, 0, _TYPE),
    (JUMP_EQUAL, 3, 0, rtroute.RTM_NEWROUTE),
    (JUMP_EQUAL, 2, 0, rtroute.RTM_DELROUTE),
    (JUMP_EQUAL, 5, 0, rtroute.RTM_NEWNEIGH),
    _ALL,
    (LOAD_BYTE, 0, 0, _TABLE),
    (JUMP_EQUAL, 4, 0, _COMPAT),
    (LOAD_BYTE, 0, 0, _ORIGIN),
    (JUMP_EQUAL, 2, 3, PROTOCOL),
    (LOAD_BYTE, 0, 0, _STATE),
    (_JUMP_ANY_BIT, 0, 1, rtroute.STATE_PERMANENT),
    _ALL,
    *REJECT,
]
"""Of routes only ours and those in tables beyond 255, of new neighbours only permanent ones; everything else."""


def open_news(timeout: float) -> Netlink:
    """A socket in the calling thread's namespace whose `pending` gives the news. Raises OSError."""
    news = Netlink(NETLINK_ROUTE, timeout, GROUPS)
    try:
        with socket.socket(fileno=os.dup(news.fileno())) as same:
            attach_filter(same, FILTER)
    except BaseException:
        news.close()
        raise
    return news


@dataclass(frozen=True, slots=True)
class Known:
    """A pod as it was when it was looked at last."""

    container_id: str
    ifindex: int
    """The node's end of its link to the node."""
    node_mac: bytes
    """Of that end."""
    pod_mac: bytes
    """Of the pod's end: what the neighbours on the node's end have."""
    is_ours: bool
    """Whether the coordinator has made the link."""
    addresses: frozenset[Address]
    """To which the node's routes lead over it."""
    tags: frozenset[int]
    """The metrics of these routes."""


@dataclass(slots=True)
class Concern:
    """What there is to look at, gathered from news."""

    everything: bool = False
    """News were lost, or the time for a full comparison has come."""
    rules: bool = False
    addresses_of_node: bool = False
    """An address came or went on some link of the node."""
    links: set[int] = field(default_factory=set)
    """Indices of links that are of pods, or may be."""
    addresses: set[Address] = field(default_factory=set)
    """Addresses that pods have, or may have."""
    has_new_pair: bool = False
    """A link came up by which a pod may be joined that was cut off."""

    def __bool__(self) -> bool:
        return bool(
            self.everything or self.rules or self.addresses_of_node or self.links or self.addresses or self.has_new_pair
        )


def concern(
    news: Iterable[tuple[int, bytes]], links: Mapping[int, Known], addresses: Mapping[Address, Known]
) -> Concern:
    """What follows from `news` (message type, body) where pods are known by link and by address.

    What the plugin's own ADD and DEL tell comes here too. Of known pods only that counts which is not as it was left;
    a link of ours, or a route, that nobody knows of yet is looked at once, and its pod known from then on.
    """
    found = Concern()
    for kind, body in news:
        if kind in (rtlink.RTM_NEWLINK, rtlink.RTM_DELLINK):
            _link(found, kind, rtlink.parse_link(body), links)
        elif kind in (rtlink.RTM_NEWADDR, rtlink.RTM_DELADDR):
            on_link = rtlink.parse_address(body)
            found.addresses_of_node |= on_link is not None and usable(on_link.address)
        elif kind in (rtroute.RTM_NEWROUTE, rtroute.RTM_DELROUTE):
            _route(found, kind, rtroute.parse_route(body), addresses)
        elif kind == rtroute.RTM_DELRULE:
            found.rules |= rtroute.parse_rule(body).protocol == PROTOCOL
        elif kind in (rtroute.RTM_NEWNEIGH, rtroute.RTM_DELNEIGH):
            neighbour = rtroute.parse_neighbour(body)
            known = addresses.get(neighbour.address) if neighbour is not None else None
            if neighbour is not None and known is not None:
                is_there = neighbour.ifindex == known.ifindex
                is_right = is_there and neighbour.mac == known.pod_mac
                if is_there if kind == rtroute.RTM_DELNEIGH else not is_right:
                    found.addresses.add(neighbour.address)
        elif kind == RTM_NEWNETCONF:
            index, rp_filter = _netconf(body)
            if index in links and links[index].is_ours and rp_filter:
                found.links.add(index)
    return found


def _link(found: Concern, kind: int, link: rtlink.Link, links: Mapping[int, Known]) -> None:
    known = links.get(link.ifindex)
    is_up = bool(link.flags & rtlink.FLAG_UP)
    if known is not None:
        # One that is up again has lost its IPv4 routes, of which the kernel tells nothing.
        if kind == rtlink.RTM_DELLINK or not is_up or link.mac != known.node_mac:
            found.links.add(link.ifindex)
    elif kind == rtlink.RTM_NEWLINK and link.kind in PAIRS:
        found.has_new_pair |= is_up
        if link.group == LINK_GROUP and alias_parts(link.alias)[0]:
            found.links.add(link.ifindex)


def _route(found: Concern, kind: int, route: rtroute.Route, addresses: Mapping[Address, Known]) -> None:
    address = route.destination.address
    if route.destination.length != address.max_prefixlen:
        return
    is_ours, is_new, known = route.protocol == PROTOCOL, kind == rtroute.RTM_NEWROUTE, addresses.get(address)
    if known is None:
        if is_ours:
            found.addresses.add(address)
    elif is_new != (is_ours and route.ifindex == known.ifindex):
        found.addresses.add(address)


def _netconf(body: bytes) -> tuple[int, int]:
    """Interface index (negative: all, or the default) and rp_filter of an RTM_NEWNETCONF; 0 where it tells none."""
    parts = attributes(body, 4)
    index = parts.get(_NETCONFA_IFINDEX)
    return struct.unpack("=i", index)[0] if index else 0, int_in(parts.get(_NETCONFA_RP_FILTER))
