"""The frames that probing sends, and what a received frame says about an address.

What is sent is packed here: a pod's ADD sends half a dozen frames of two fixed forms, for which scapy takes a quarter
of a millisecond each, half of what a probe costs beside its wait. The tests compare with scapy's encoding. What is
received is anybody's, and rare: scapy's layers dissect it. Its sending functions are not used: `srp1` takes its
interface from one table for the whole process, which knows the agent's network namespace and no pod's, and it never
matches the advertisement that answers a solicitation from `::`.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

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
)
from scapy.layers.l2 import Ether  # noqa: E402
from scapy.utils import checksum  # noqa: E402

from api.ranges import Address  # noqa: E402

# Names of vendors and of Bluetooth companies: 12 MB that serve only to print packets prettily.
scapy.data.MANUFDB.d.clear()
scapy.data.BLUETOOTH_CORE_COMPANY_IDENTIFIERS.clear()

ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
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

ND_SOLICITATION = 135
ND_ADVERTISEMENT = 136
OVERRIDE = 1 << 29
"""Flag of an advertisement: take this MAC instead of the one you know."""

BROADCAST = b"\xff" * 6
NOBODY = bytes(6)
ANYBODY = IPv4Address(0)
ALL_NODES = IPv6Address("ff02::1")
UNSPECIFIED = IPv6Address("::")
SOLICITED_NODE = int(IPv6Address("ff02::1:ff00:0"))
LINK_LOCAL = int(IPv6Address("fe80::"))

ETHERNET_FRAME = struct.Struct("!6s6sH")
ARP_PACKET = struct.Struct("!6sH6s4s6s4s")
"""`ARP_FORMAT`, operation, sender and target."""
IPV6_PACKET = struct.Struct("!IHBB16s16s")
ND_MESSAGE = struct.Struct("!BBHI16s")
"""Type, code, checksum, flags, target."""
ND_LINK_ADDRESS = struct.Struct("!BB6s")
"""Option type, length in units of eight bytes, MAC."""
SOURCE_LINK_ADDRESS = 1
TARGET_LINK_ADDRESS = 2


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The group in which whoever has `address` listens (RFC 4291 section 2.7.1)."""
    return IPv6Address(SOLICITED_NODE | int(address) & 0xFFFFFF)


def link_local(mac: str) -> IPv6Address:
    """The link-local address that follows from a NIC's MAC (RFC 4291 appendix A): nobody else's."""
    own = parse_mac(mac)
    return IPv6Address(LINK_LOCAL | int.from_bytes(bytes((own[0] ^ 2, *own[1:3], 0xFF, 0xFE, *own[3:]))))


def group_mac(group: IPv6Address) -> str:
    """The Ethernet address of an IPv6 multicast group (RFC 2464 section 7)."""
    return "33:33:" + group.packed[12:].hex(":")


def parse_mac(text: str) -> bytes:
    """The six bytes of a MAC in colon form."""
    return bytes.fromhex(text.replace(":", ""))


def conflict_probe(mac: str, target: Address) -> bytes:
    """The question whether anybody uses `target`, from a sender that claims nothing, so that nobody's cache changes.

    An ARP Probe, sender address 0.0.0.0 (RFC 5227 section 2.1.1), or the solicitation of duplicate address
    detection, from `::` (RFC 4862 section 5.4.2).
    """
    if isinstance(target, IPv4Address):
        return _arp(mac, ANYBODY, target)
    return _solicitation(mac, UNSPECIFIED, target)


def quiet_request(mac: str, target: Address) -> bytes:
    """The question for the MAC of `target`, from a sender that claims no address but what is the NIC's for certain.

    For IPv4 an ARP Probe. For IPv6 from the link-local address that follows from the MAC, and not from `::`: to a
    router that is still checking its own address a solicitation from `::` is a second claimant, and it gives the
    address up for good (RFC 4862 section 5.4.3); and the answer would go to all nodes, whose caches it overrides
    (RFC 4861 section 7.2.4).
    """
    if isinstance(target, IPv4Address):
        return _arp(mac, ANYBODY, target)
    return _solicitation(mac, link_local(mac), target)


def gateway_request(mac: str, source: Address, gateway: Address) -> bytes:
    """The question for `gateway`'s MAC, from `source`, which must be the NIC's own by now.

    Raises ValueError if the families differ.
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
    option = ND_LINK_ADDRESS.pack(TARGET_LINK_ADDRESS, 1, parse_mac(mac))
    return _discovery(mac, address, ALL_NODES, (ND_ADVERTISEMENT, OVERRIDE, address), option)


def _arp(mac: str, sender: IPv4Address, target: IPv4Address) -> bytes:
    own = parse_mac(mac)
    question = ARP_PACKET.pack(ARP_FORMAT, ARP_REQUEST, own, sender.packed, NOBODY, target.packed)
    return ETHERNET_FRAME.pack(BROADCAST, own, ETH_P_ARP) + question


def _solicitation(mac: str, source: IPv6Address, target: IPv6Address) -> bytes:
    option = b"" if source == UNSPECIFIED else ND_LINK_ADDRESS.pack(SOURCE_LINK_ADDRESS, 1, parse_mac(mac))
    return _discovery(mac, source, solicited_node(target), (ND_SOLICITATION, 0, target), option)


def _discovery(
    mac: str, source: IPv6Address, group: IPv6Address, message: tuple[int, int, IPv6Address], option: bytes
) -> bytes:
    """A neighbour discovery message (type, flags, target) to `group`."""
    kind, flags, target = message
    frame = b"".join(
        (
            ETHERNET_FRAME.pack(parse_mac(group_mac(group)), parse_mac(mac), ETH_P_IPV6),
            IPV6_PACKET.pack(6 << 28, ND_HEADER + len(option), ICMPV6, HOP_LIMIT, source.packed, group.packed),
            ND_MESSAGE.pack(kind, 0, 0, flags, target.packed),
            option,
        )
    )
    return frame[:ND_CHECKSUM] + _icmpv6_checksum(frame).to_bytes(2, "big") + frame[ND_CHECKSUM + 2 :]


def _icmpv6_checksum(frame: bytes) -> int:
    """Over the message and its pseudo header (RFC 8200 section 8.1); 0 if the frame holds the right one already."""
    addresses, message = frame[22 : ND_CHECKSUM - 2], frame[ND_CHECKSUM - 2 :]
    return int(checksum(addresses + len(message).to_bytes(4, "big") + ICMPV6.to_bytes(4, "big") + message))


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one frame says: the station at `mac` uses `address`, or, if `asking`, wants to know whether it may."""

    address: Address
    mac: str
    asking: bool

    def answers(self, target: Address, own: Collection[str], counts_askers: bool) -> bool:
        """Whether another station than those `own` uses `target`, or, if `counts_askers`, is about to take it.

        RFC 5227 section 2.1.1, RFC 4862 section 5.4.
        """
        return self.address == target and self.mac not in own and (counts_askers or not self.asking)


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
