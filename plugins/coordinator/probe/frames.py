"""The frames that probing sends, and what a received frame says about an address.

Only scapy's layers are used, to build and to dissect. Its sending functions are not: `srp1` takes its interface from
one table for the whole process, which knows the agent's network namespace and no pod's, and it never matches the
advertisement that answers a solicitation from `::`. So every field that scapy could fill in from its own idea of
interfaces and routes is given here.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import scapy.data
from scapy.config import conf

# Importing the IPv6 layer would read the node's whole routing tables, which nothing here looks at.
conf.route_autoload = False
conf.route6_autoload = False

from scapy.layers.inet6 import (  # noqa: E402 - only after its configuration
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether  # noqa: E402
from scapy.utils import checksum  # noqa: E402

from api.ranges import Address  # noqa: E402

# Names of vendors and of Bluetooth companies: 12 MB that serve only to print packets prettily.
scapy.data.MANUFDB.d.clear()
scapy.data.BLUETOOTH_CORE_COMPANY_IDENTIFIERS.clear()

ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
ARPHRD_ETHER = 1
ARP_SIZE = 28
ARP_FORMAT = bytes.fromhex("0001 0800 06 04")
"""Hardware and protocol type, and the lengths of their addresses: IPv4 over Ethernet."""
ARP_REQUEST = 1
ARP_REPLY = 2
ICMPV6 = 58
HOP_LIMIT = 255
"""Neighbour discovery's proof that a packet crossed no router (RFC 4861 section 7.1)."""
ETHERNET_HEADER = 14
IPV6_HEADER = 40
ND_CHECKSUM = 56
"""Offset in the Ethernet frame."""
ND_HEADER = 24
"""Bytes of a solicitation or advertisement before its options."""

BROADCAST = "ff:ff:ff:ff:ff:ff"
NOBODY = "00:00:00:00:00:00"
ALL_NODES = IPv6Address("ff02::1")
UNSPECIFIED = IPv6Address("::")
SOLICITED_NODE = int(IPv6Address("ff02::1:ff00:0"))


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The group in which whoever has `address` listens (RFC 4291 section 2.7.1)."""
    return IPv6Address(SOLICITED_NODE | int(address) & 0xFFFFFF)


def group_mac(group: IPv6Address) -> str:
    """The Ethernet address of an IPv6 multicast group (RFC 2464 section 7)."""
    return "33:33:" + group.packed[12:].hex(":")


def conflict_probe(mac: str, target: Address) -> bytes:
    """The question whether anybody uses `target`, from a sender that claims nothing, so that nobody's cache changes.

    An ARP Probe, sender address 0.0.0.0 (RFC 5227 section 2.1.1), or the solicitation of duplicate address
    detection, from `::` (RFC 4862 section 5.4.2).
    """
    if isinstance(target, IPv4Address):
        return _arp(mac, IPv4Address(0), target)
    return _solicitation(mac, UNSPECIFIED, target)


def gateway_request(mac: str, source: Address, gateway: Address) -> bytes:
    """The question for `gateway`'s MAC, from `source`, which must be the NIC's own by now.

    IPv6 asks from `source` as well, and not from `::`: to a router that is still checking its own address, a
    solicitation from `::` is a second claimant, and it gives the address up for good (RFC 4862 section 5.4.3). Raises
    ValueError if the families differ.
    """
    if isinstance(gateway, IPv4Address) and isinstance(source, IPv4Address):
        return _arp(mac, source, gateway)
    if isinstance(gateway, IPv6Address) and isinstance(source, IPv6Address):
        return _solicitation(mac, source, gateway)
    raise ValueError(f"gateway {gateway} and source {source} are of different families")


def announcement(mac: str, address: Address) -> bytes:
    """The statement that `address` is at `mac`, for those who remember another MAC, and for the switches.

    A gratuitous ARP in the form of a request, which updates more implementations' caches than a reply does (RFC 5227
    section 3), or an unsolicited advertisement that overrides (RFC 4861 section 7.2.6).
    """
    if isinstance(address, IPv4Address):
        return _arp(mac, address, address)
    message = ICMPv6ND_NA(tgt=str(address), R=0, S=0, O=1, cksum=0)
    return _discovery(mac, address, ALL_NODES, message, ICMPv6NDOptDstLLAddr(lladdr=mac))


def _arp(mac: str, sender: IPv4Address, target: IPv4Address) -> bytes:
    return _wire(
        Ether(src=mac, dst=BROADCAST, type=ETH_P_ARP),
        ARP(
            hwtype=ARPHRD_ETHER,
            ptype=ETH_P_IP,
            hwlen=6,
            plen=4,
            op=ARP_REQUEST,
            hwsrc=mac,
            psrc=str(sender),
            hwdst=NOBODY,
            pdst=str(target),
        ),
    )


def _solicitation(mac: str, source: IPv6Address, target: IPv6Address) -> bytes:
    message = ICMPv6ND_NS(tgt=str(target), cksum=0)
    options = [] if source == UNSPECIFIED else [ICMPv6NDOptSrcLLAddr(lladdr=mac)]
    return _discovery(mac, source, solicited_node(target), message, *options)


def _discovery(mac: str, source: IPv6Address, group: IPv6Address, *message: ICMPv6ND_NS | ICMPv6ND_NA) -> bytes:
    """A neighbour discovery message to `group`. Its checksum is put in last: scapy would build layers to take it."""
    frame = _wire(
        Ether(src=mac, dst=group_mac(group), type=ETH_P_IPV6),
        IPv6(src=str(source), dst=str(group), nh=ICMPV6, hlim=HOP_LIMIT),
        *message,
    )
    return frame[:ND_CHECKSUM] + _icmpv6_checksum(frame).to_bytes(2, "big") + frame[ND_CHECKSUM + 2 :]


def _icmpv6_checksum(frame: bytes) -> int:
    """Over the message and its pseudo header (RFC 8200 section 8.1); 0 if the frame holds the right one already."""
    addresses, message = frame[22 : ND_CHECKSUM - 2], frame[ND_CHECKSUM - 2 :]
    return int(checksum(addresses + len(message).to_bytes(4, "big") + ICMPV6.to_bytes(4, "big") + message))


def _wire(*layers: Ether | ARP | IPv6 | ICMPv6ND_NS | ICMPv6ND_NA) -> bytes:
    """The bytes of `layers`, each inside the one before.

    `explicit` tells scapy that no field holds a generator to be expanded, which saves nearly half of its time.
    """
    for layer in layers:
        layer.explicit = 1
    for outer, inner in pairwise(layers):
        outer.add_payload(inner)
    return bytes(layers[0])


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one frame says: the station at `mac` uses `address`, or, if `asking`, wants to know whether it may."""

    address: Address
    mac: str
    asking: bool

    def answers(self, target: Address, own: str, counts_askers: bool) -> bool:
        """Whether another station than `own` uses `target`, or, if `counts_askers`, is about to take it.

        RFC 5227 section 2.1.1, RFC 4862 section 5.4.
        """
        return self.address == target and self.mac != own and (counts_askers or not self.asking)


def sighting(frame: bytes) -> Sighting | None:
    """What `frame` says, or None if it says nothing or breaks a rule of its protocol. Never raises."""
    kind = int.from_bytes(frame[12:ETHERNET_HEADER], "big")
    if kind == ETH_P_ARP and _is_ethernet_arp(frame):
        return _arp_sighting(Ether(frame))
    if kind == ETH_P_IPV6 and _is_valid_discovery(frame):
        return _discovery_sighting(Ether(frame))
    return None


def _is_ethernet_arp(frame: bytes) -> bool:
    """Whether an ARP frame is about IPv4 over Ethernet; scapy reads the addresses by the lengths that it names."""
    return len(frame) >= ETHERNET_HEADER + ARP_SIZE and frame[14:20] == ARP_FORMAT


def _arp_sighting(packet: Ether) -> Sighting | None:
    arp = packet.payload
    sender = IPv4Address(arp.psrc)
    if int(sender):
        return Sighting(sender, arp.hwsrc, asking=False) if arp.op in (ARP_REQUEST, ARP_REPLY) else None
    return Sighting(IPv4Address(arp.pdst), arp.hwsrc, asking=True) if arp.op == ARP_REQUEST else None


def _is_valid_discovery(frame: bytes) -> bool:
    """Whether the lengths of an IPv6 frame are those of a solicitation or advertisement, before scapy follows them."""
    start = ETHERNET_HEADER + IPV6_HEADER
    if len(frame) < start or frame[14] >> 4 != 6 or frame[20] != ICMPV6:
        return False
    end = start + int.from_bytes(frame[18:20], "big")
    if end < start + ND_HEADER or end > len(frame):
        return False
    option = start + ND_HEADER
    while option < end:
        size = 8 * frame[option + 1] if option + 1 < end else 0
        if not size or option + size > end:
            return False
        option += size
    return True


def _discovery_sighting(packet: Ether) -> Sighting | None:
    """The validity checks that both messages share (RFC 4861 sections 7.1.1 and 7.1.2), then those of each."""
    ip = packet.payload
    message = ip.payload
    wrong = _icmpv6_checksum(packet.original[: ETHERNET_HEADER + IPV6_HEADER + ip.plen])
    if ip.hlim != HOP_LIMIT or wrong or not isinstance(message, ICMPv6ND_NA | ICMPv6ND_NS) or message.code:
        return None
    target, destination = IPv6Address(message.tgt), IPv6Address(ip.dst)
    if target.is_multicast:
        return None
    if isinstance(message, ICMPv6ND_NA):
        if destination.is_multicast and message.S:
            return None
        option = message.getlayer(ICMPv6NDOptDstLLAddr)
        return Sighting(target, option.lladdr if option and option.len == 1 else packet.src, asking=False)
    # A solicitation that has a source address only looks for the target; from `::` it is about to take it.
    detects = IPv6Address(ip.src) == UNSPECIFIED and destination == solicited_node(target)
    if not detects or message.haslayer(ICMPv6NDOptSrcLLAddr):
        return None
    return Sighting(target, packet.src, asking=True)


def parse_mac(text: str) -> bytes:
    """The six bytes of a MAC in colon form."""
    return bytes.fromhex(text.replace(":", ""))
