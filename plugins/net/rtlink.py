"""rtnetlink's links and addresses, packed by hand: what to ask, what to change, and what the kernel tells of them.

Attaching a pod is two dozen messages; a general encoder spends several times longer on packing them than the kernel on
doing them. This module and `rtroute` are the only places that know their layout (include/uapi/linux/{rtnetlink,if_link,
if_addr}.h here); the tests compare it with pyroute2's encoding of the same messages.

Families follow from the addresses. Indices are interface indices of the namespace that the socket belongs to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address
from socket import AF_INET, AF_UNSPEC
from typing import NamedTuple

from api.ranges import Address
from plugins.net.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Message,
    address_in,
    attribute,
    attributes,
    family_of,
    int_in,
    text_attribute,
    text_in,
    u32_attribute,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22

GROUP_LINKS = 1 << 0
"""Multicast group (RTMGRP_LINK) that tells of changed links."""
GROUP_IPV4_ADDRESSES = 1 << 4
GROUP_IPV6_ADDRESSES = 1 << 8
"""Multicast groups (RTMGRP_*) that tell of changed addresses."""

ETHERNET = 1
"""Hardware type (ARPHRD_ETHER in include/uapi/linux/if_arp.h)."""
FLAG_UP = 0x1
FLAG_RUNNING = 0x40
ADDRESS_DADFAILED, ADDRESS_DEPRECATED, ADDRESS_TENTATIVE, ADDRESS_PERMANENT = 0x08, 0x20, 0x40, 0x80

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK = 1, 3, 4, 5
_IFLA_TXQLEN, _IFLA_LINKINFO, _IFLA_IFALIAS = 13, 18, 20
_IFLA_AF_SPEC, _IFLA_GROUP, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 26, 27, 28, 29
_IFLA_CARRIER_DOWN_COUNT = 48
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFLA_LINK_NETNSID, _IFLA_TARGET_NETNSID, _IFA_TARGET_NETNSID = 37, 46, 10
_SKIP_STATS = 1 << 3
_IFLA_INET_CONF, _DEVCONF_RP_FILTER = 1, 8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")


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
    peer_netns: int = -1
    """The kernel's number (nsid) of the namespace that `peer` is in; -1: it is in this one, or there is none."""


class LinkState(NamedTuple):
    """What of a link tells whether frames pass it, and from whom."""

    ifindex: int
    hardware: int
    """ARPHRD_*; `ETHERNET`, for example."""
    flags: int
    mac: bytes
    losses: int
    """How often the carrier has gone, also where it was back before anybody was told."""

    @property
    def is_operational(self) -> bool:
        """Whether frames pass, as far as the kernel knows: administratively up, and with a carrier (RFC 2863)."""
        return self.flags & (FLAG_UP | FLAG_RUNNING) == FLAG_UP | FLAG_RUNNING


class LinkAddress(NamedTuple):
    """An address on a link."""

    ifindex: int
    address: Address
    length: int
    flags: int


def mac_text(mac: bytes) -> str:
    """`02:00:00:00:00:01`."""
    return mac.hex(":")


def veth(name: str, mac: bytes, mtu: int, group: int, *, peer: str, peer_mac: bytes, peer_netns_fd: int) -> Message:
    """Create the pair `name` (here, up, in `group`) and `peer` (in the other namespace, down). Fails if one exists."""
    other = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + b"".join(
        (
            text_attribute(_IFLA_IFNAME, peer),
            attribute(_IFLA_ADDRESS, peer_mac),
            u32_attribute(_IFLA_MTU, mtu),
            u32_attribute(_IFLA_NET_NS_FD, peer_netns_fd),
        )
    )
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, FLAG_UP, FLAG_UP) + b"".join(
        (
            text_attribute(_IFLA_IFNAME, name),
            attribute(_IFLA_ADDRESS, mac),
            u32_attribute(_IFLA_MTU, mtu),
            u32_attribute(_IFLA_GROUP, group),
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
        body += u32_attribute(_IFLA_TXQLEN, tx_queue_len)
    if alias is not None:
        body += attribute(_IFLA_IFALIAS, alias.encode())
    if rp_filter is not None:
        conf = attribute(_IFLA_INET_CONF, u32_attribute(_DEVCONF_RP_FILTER, rp_filter))
        body += attribute(_IFLA_AF_SPEC, attribute(AF_INET, conf))
    return Message(RTM_NEWLINK, 0, body, what)


def link_rename(index: int, name: str) -> Message:
    """Give a link, which is down, another name; fails with EEXIST if there is a link of that name."""
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0) + text_attribute(_IFLA_IFNAME, name)
    return Message(RTM_NEWLINK, 0, body, f"name link {index} {name}")


def link_delete(index: int, name: str) -> Message:
    """Delete the link `index`; `name` is for the error only. Takes tens of milliseconds (an RCU grace period)."""
    return Message(RTM_DELLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0), f"delete link {name}")


def link_get(name: str) -> Message:
    """Ask for one link by name; the kernel answers ENODEV if there is none."""
    body = (
        _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0)
        + text_attribute(_IFLA_IFNAME, name)
        + u32_attribute(_IFLA_EXT_MASK, _SKIP_STATS)
    )
    return Message(RTM_GETLINK, 0, body, f"look up link {name}")


def link_get_index(index: int) -> Message:
    """Ask for one link by index; the kernel answers ENODEV if there is none."""
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0) + u32_attribute(_IFLA_EXT_MASK, _SKIP_STATS)
    return Message(RTM_GETLINK, 0, body, f"look up link {index}")


def link_dump(kind: str = "", netns: int = -1) -> Message:
    """Ask for all links, or for those of `kind`; in the namespace that a link's `peer_netns` tells, or the socket's."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + u32_attribute(_IFLA_EXT_MASK, _SKIP_STATS)
    if netns >= 0:
        body += u32_attribute(_IFLA_TARGET_NETNSID, netns)
    if kind:
        body += attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode()))
    return Message(RTM_GETLINK, NLM_F_DUMP, body, f"list {kind} links" if kind else "list links")


def parse_link(body: bytes) -> Link:
    """An RTM_NEWLINK."""
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    found = attributes(body, 16)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    return Link(
        ifindex=index,
        name=text_in(found.get(_IFLA_IFNAME, b"")),
        flags=flags,
        mac=found.get(_IFLA_ADDRESS, b""),
        mtu=int_in(found.get(_IFLA_MTU)),
        tx_queue_len=int_in(found.get(_IFLA_TXQLEN)),
        kind=text_in(info.get(_INFO_KIND, b"")),
        peer=int_in(found.get(_IFLA_LINK)),
        alias=text_in(found.get(_IFLA_IFALIAS, b"")),
        group=int_in(found.get(_IFLA_GROUP)),
        peer_netns=int_in(found[_IFLA_LINK_NETNSID]) if _IFLA_LINK_NETNSID in found else -1,
    )


def parse_rp_filter(body: bytes) -> int:
    """The link's own `net.ipv4.conf.*.rp_filter` in an RTM_NEWLINK; 0 if it tells none."""
    of_ipv4 = attributes(attributes(body, 16).get(_IFLA_AF_SPEC, b"")).get(AF_INET, b"")
    values = attributes(of_ipv4).get(_IFLA_INET_CONF, b"")
    return int_in(values[4 * (_DEVCONF_RP_FILTER - 1) :])


def parse_link_state(body: bytes) -> LinkState | None:
    """An RTM_NEWLINK; None if it is about the link as a port of a bridge, which comes in the same group."""
    family, hardware, index, flags, _ = _IFINFO.unpack_from(body)
    if family != AF_UNSPEC:
        return None
    found = attributes(body, 16)
    mac, losses = found.get(_IFLA_ADDRESS, b""), int_in(found.get(_IFLA_CARRIER_DOWN_COUNT))
    return LinkState(index, hardware, flags, mac, losses)


def address_add(index: int, address: Address, length: int, where: str, broadcast: IPv4Address | None = None) -> Message:
    """Put `address` on a link; fails if it is there."""
    packed = address.packed
    body = _IFADDR.pack(family_of(address), length, 0, 0, index)
    body += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    if broadcast is not None:
        body += attribute(_IFA_BROADCAST, broadcast.packed)
    return Message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body, f"add address {address}/{length} to {where}")


def address_dump(netns: int = -1) -> Message:
    """Ask for all addresses, IPv4 first; in the namespace that a link's `peer_netns` tells, else in the socket's."""
    body = _IFADDR.pack(AF_UNSPEC, 0, 0, 0, 0)
    if netns >= 0:
        body += u32_attribute(_IFA_TARGET_NETNSID, netns)
    return Message(RTM_GETADDR, NLM_F_DUMP, body, "list addresses")


def parse_address(body: bytes) -> LinkAddress | None:
    """An RTM_NEWADDR or RTM_DELADDR; None if it is of another family than IP."""
    _, length, flags, _, index = _IFADDR.unpack_from(body)
    found = attributes(body, 8)
    address = address_in(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS))
    if address is None:
        return None
    return LinkAddress(index, address, length, int_in(found.get(_IFA_FLAGS)) or flags)


def parse_addresses(bodies: Iterable[bytes]) -> list[LinkAddress]:
    """Several RTM_NEWADDR."""
    return [found for found in map(parse_address, bodies) if found is not None]
