"""rtnetlink's VLAN and bond links, packed by hand as in `rtlink`: what to ask and change, and what the kernel tells.

Layouts: include/uapi/linux/{if_link,if_vlan}.h. What the options of a bond are is `plugins.ifacer.options`' business;
here they are attributes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from socket import AF_INET6, AF_UNSPEC
from typing import NamedTuple

from plugins.net import rtlink
from plugins.net.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    attribute,
    attributes,
    int_in,
    text_attribute,
    text_in,
    u32_attribute,
)

PROTOCOL_8021Q = 0x8100

BOND_MODE = 1
"""IFLA_BOND_MODE."""

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_AF_SPEC, _IFLA_GROUP, _IFLA_NET_NS_FD = 18, 26, 27, 28
_INFO_KIND, _INFO_DATA = 1, 2
_VLAN_ID, _VLAN_PROTOCOL = 1, 5
_MACVLAN_MODE, _MACVLAN_FLAGS = 1, 2
_MODE_PASSTHRU, _FLAG_NOPROMISC = 8, 1
_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE = 8, 1

_IFINFO = struct.Struct("=BxHiII")
_U16 = struct.Struct("=H")
_BE16 = struct.Struct("!H")


class MasterLink(NamedTuple):
    """A link of the node, with what tells whether it is the master that is wanted."""

    link: rtlink.Link
    """`peer` is the parent of a VLAN."""
    master: int
    """Index of the bond or bridge that it belongs to; 0: none."""
    data: Mapping[int, bytes]
    """What its kind tells (IFLA_INFO_DATA), by attribute."""

    @property
    def vlan_id(self) -> int:
        """Of a VLAN; 0 for other links."""
        return int(_U16.unpack(self.data[_VLAN_ID])[0]) if self.link.kind == "vlan" else 0

    @property
    def vlan_protocol(self) -> int:
        """Ethertype of a VLAN's tags; 0 for other links."""
        return int(_BE16.unpack(self.data[_VLAN_PROTOCOL])[0]) if self.link.kind == "vlan" else 0


def parse_master(body: bytes) -> MasterLink:
    """An RTM_NEWLINK."""
    found = attributes(body, 16)
    info = attributes(found.get(_IFLA_LINKINFO, b""))
    kind = text_in(info.get(_INFO_KIND, b""))
    return MasterLink(
        link=rtlink.parse_link(body),
        master=int_in(found.get(_IFLA_MASTER)),
        data=attributes(info.get(_INFO_DATA, b"")) if kind in ("vlan", "bond") else {},
    )


def vlan(
    name: str, parent: int, vlan_id: int, group: int, mtu: int = 0, *, mac: bytes | None = None, netns_fd: int = -1
) -> Message:
    """Create the VLAN `vlan_id` of the link `parent`, down and in `group`; without `mtu` and `mac` it has its parent's.

    With `netns_fd` it comes into being in that namespace. Fails with EEXIST if there is a link of that name (the kernel
    looks in the socket's namespace too), or the parent has that VLAN, be it in another namespace.
    """
    data = attribute(_VLAN_ID, _U16.pack(vlan_id)) + attribute(_VLAN_PROTOCOL, _BE16.pack(PROTOCOL_8021Q))
    more = u32_attribute(_IFLA_LINK, parent) + (u32_attribute(_IFLA_MTU, mtu) if mtu else b"")
    if mac is not None:
        more += attribute(_IFLA_ADDRESS, mac)
    if netns_fd >= 0:
        more += u32_attribute(_IFLA_NET_NS_FD, netns_fd)
    return _create(name, "vlan", group, more, data, what=f"create VLAN {name}")


def bond(name: str, options: bytes, group: int, mtu: int) -> Message:
    """Create a bond, down and in `group`; `options` are its IFLA_BOND_* attributes. Fails with EEXIST."""
    return _create(name, "bond", group, u32_attribute(_IFLA_MTU, mtu), options, what=f"create bond {name}")


def bond_set(index: int, options: bytes, what: str) -> Message:
    """Change options of a bond."""
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0)
    body += attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, b"bond") + attribute(_INFO_DATA, options))
    return Message(rtlink.RTM_NEWLINK, 0, body, what)


def probe_below(name: str, parent: int, group: int) -> Message:
    """Create a macvlan that wants `parent` for itself alone, and drops what the parent receives while it exists.

    EINVAL: the parent has macvlans already; EBUSY: ipvlans, or it belongs to a bridge or bond. Its macvlans and ipvlans
    live in pods' namespaces, and nothing that one may ask in the node's tells of them.
    """
    data = u32_attribute(_MACVLAN_MODE, _MODE_PASSTHRU) + attribute(_MACVLAN_FLAGS, _U16.pack(_FLAG_NOPROMISC))
    what = f"look for links below link {parent}"
    return _create(name, "macvlan", group, u32_attribute(_IFLA_LINK, parent), data, what=what)


def _create(name: str, kind: str, group: int, more: bytes, data: bytes, *, what: str) -> Message:
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name) + u32_attribute(_IFLA_GROUP, group)
    body += more + attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode()) + attribute(_INFO_DATA, data))
    return Message(rtlink.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, what)


def set_up(index: int, name: str) -> Message:
    """Set a link up."""
    return Message(
        rtlink.RTM_NEWLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, index, rtlink.FLAG_UP, rtlink.FLAG_UP), f"set up {name}"
    )


def remove_by_name(name: str) -> Message:
    """Delete the link of that name; fails with ENODEV if there is none."""
    body = _IFINFO.pack(AF_UNSPEC, 0, 0, 0, 0) + text_attribute(_IFLA_IFNAME, name)
    return Message(rtlink.RTM_DELLINK, 0, body, f"delete link {name}")


def set_down(index: int, name: str) -> Message:
    """Set a link down."""
    return Message(rtlink.RTM_NEWLINK, 0, _IFINFO.pack(AF_UNSPEC, 0, index, 0, rtlink.FLAG_UP), f"set down {name}")


def set_master(index: int, master: int, what: str) -> Message:
    """Put a link into a bond, or out of it with `master` 0."""
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0) + u32_attribute(_IFLA_MASTER, master)
    return Message(rtlink.RTM_NEWLINK, 0, body, what)


def set_mtu(index: int, name: str, mtu: int) -> Message:
    """Change the MTU, in bytes."""
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0) + u32_attribute(_IFLA_MTU, mtu)
    return Message(rtlink.RTM_NEWLINK, 0, body, f"set the MTU of {name} to {mtu}")


def no_own_ipv6(index: int, name: str) -> Message:
    """Keep IPv6 from giving a link addresses of its own making. EAFNOSUPPORT: it has no IPv6 anyway."""
    inet6 = attribute(AF_INET6, attribute(_INET6_ADDR_GEN_MODE, bytes((_GEN_MODE_NONE,))))
    body = _IFINFO.pack(AF_UNSPEC, 0, index, 0, 0) + attribute(_IFLA_AF_SPEC, inet6)
    return Message(rtlink.RTM_NEWLINK, 0, body, f"keep IPv6 addresses off {name}")
