"""The socket filter: only frames that can decide a question wake the agent.

Every new pod would otherwise dissect the whole segment's broadcasts. The filter is classic BPF, replaced atomically by
the kernel whenever the set of questions of a NIC changes. It is composed of blocks that jump only inside themselves
and end in a return, so no jump grows with the number of questions.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from api.ranges import Address
from plugins.coordinator.probe.frames import (
    ARP_REPLY,
    ARP_REQUEST,
    ETH_P_ARP,
    ETH_P_IP,
    ETH_P_IPV6,
    HOP_LIMIT,
    ICMPV6,
    ND_ADVERTISEMENT,
    ND_SOLICITATION,
)
from plugins.net.rtlink import ETHERNET

SO_ATTACH_FILTER = 26

# Opcodes (include/uapi/linux/bpf_common.h).
LOAD_WORD = 0x20
LOAD_HALF = 0x28
LOAD_BYTE = 0x30
AND = 0x54
JUMP = 0x05
JUMP_EQUAL = 0x15
RETURN = 0x06

# Ancillary loads (SKF_AD_OFF in include/uapi/linux/filter.h): the kernel takes a VLAN tag out of the frame.
VLAN_TAG = 0xFFFFF000 + 44
VLAN_TAG_PRESENT = 0xFFFFF000 + 48
VLAN_ID = 0x0FFF

# Offsets from the start of the Ethernet frame.
ETHERNET_SOURCE = 6
ETHERNET_TYPE = 12
ARP_FORMAT = 14
ARP_LENGTHS = 18
ARP_OPERATION = 20
ARP_SENDER_MAC = 22
ARP_SENDER = 28
ARP_TARGET = 38
IPV6_NEXT_HEADER = 20
IPV6_HOP_LIMIT = 21
IPV6_SOURCE = 22
ND_TYPE_AND_CODE = 54
ND_TARGET = 62

INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter."""
Instruction = tuple[int, int, int, int]
"""Opcode, instructions to skip if true, if false, operand."""
Program = list[Instruction]

ACCEPT: Program = [(RETURN, 0, 0, 0xFFFF)]
REJECT: Program = [(RETURN, 0, 0, 0)]


def build_filter(own: bytes, users: Iterable[Address], takers: Iterable[Address]) -> Program:
    """Accept what shows somebody else using an address of `users`, or about to take one of `takers`.

    `own` is the NIC's MAC: frames of its own that a switch or a bridge in hairpin mode returns are rejected, and so are
    those with the tag of a VLAN, which a trunk port delivers though they belong to another segment.
    """
    users4, users6 = _by_family(users)
    takers4, takers6 = _by_family(takers)
    return [
        (LOAD_WORD, 0, 0, VLAN_TAG_PRESENT),
        *_when(1, [(LOAD_WORD, 0, 0, VLAN_TAG), (AND, 0, 0, VLAN_ID), (JUMP_EQUAL, 1, 0, 0), *REJECT]),
        *_reject_mac(ETHERNET_SOURCE, own),
        (LOAD_HALF, 0, 0, ETHERNET_TYPE),
        *_when(ETH_P_ARP, _arp(own, users4, takers4)),
        *_when(ETH_P_IPV6, _discovery(users6, takers6)),
        *REJECT,
    ]


def attach_filter(receiver: socket.socket, program: Program) -> None:
    """Make `program` the filter of `receiver`, at once for every frame from now on. Raises OSError."""
    code = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*instruction) for instruction in program))
    receiver.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    )


def _by_family(addresses: Iterable[Address]) -> tuple[list[IPv4Address], list[IPv6Address]]:
    families: tuple[list[IPv4Address], list[IPv6Address]] = ([], [])
    for address in addresses:
        if isinstance(address, IPv4Address):
            families[0].append(address)
        else:
            families[1].append(address)
    return families


def _when(value: int, block: Program) -> Program:
    """Run `block` if the accumulator is `value`; a block that does not return goes on behind it."""
    return [(JUMP_EQUAL, 1, 0, value), (JUMP, 0, 0, len(block)), *block]


def _require(load: int, offset: int, value: int) -> Program:
    """Reject the frame unless `value` stands at `offset`."""
    return [(load, 0, 0, offset), (JUMP_EQUAL, 1, 0, value), *REJECT]


def _reject_mac(offset: int, mac: bytes) -> Program:
    high, low = struct.unpack("!IH", mac)
    return [
        (LOAD_WORD, 0, 0, offset),
        (JUMP_EQUAL, 0, 3, high),
        (LOAD_HALF, 0, 0, offset + 4),
        (JUMP_EQUAL, 0, 1, low),
        *REJECT,
    ]


def _accept_ipv4(offset: int, addresses: Iterable[IPv4Address]) -> Program:
    program: Program = [(LOAD_WORD, 0, 0, offset)]
    for address in addresses:
        program += [(JUMP_EQUAL, 0, 1, int(address)), *ACCEPT]
    return program


def _accept_ipv6(offset: int, addresses: Iterable[IPv6Address]) -> Program:
    program: Program = []
    for address in addresses:
        for number, word in enumerate(struct.unpack("!4I", address.packed)):
            program += [(LOAD_WORD, 0, 0, offset + 4 * number), (JUMP_EQUAL, 0, 7 - 2 * number, word)]
        program += ACCEPT
    return program


def _arp(own: bytes, users: list[IPv4Address], takers: list[IPv4Address]) -> Program:
    used = _accept_ipv4(ARP_SENDER, users)
    return [
        *_require(LOAD_WORD, ARP_FORMAT, ETHERNET << 16 | ETH_P_IP),
        *_require(LOAD_HALF, ARP_LENGTHS, 6 << 8 | 4),
        *_reject_mac(ARP_SENDER_MAC, own),
        (LOAD_HALF, 0, 0, ARP_OPERATION),
        *_when(ARP_REPLY, [*used, *REJECT]),
        *_when(
            ARP_REQUEST,
            [*used, *_require(LOAD_WORD, ARP_SENDER, 0), *_accept_ipv4(ARP_TARGET, takers), *REJECT],
        ),
        *REJECT,
    ]


def _discovery(users: list[IPv6Address], takers: list[IPv6Address]) -> Program:
    from_nobody = [line for word in range(4) for line in _require(LOAD_WORD, IPV6_SOURCE + 4 * word, 0)]
    return [
        *_require(LOAD_BYTE, IPV6_NEXT_HEADER, ICMPV6),
        *_require(LOAD_BYTE, IPV6_HOP_LIMIT, HOP_LIMIT),
        (LOAD_HALF, 0, 0, ND_TYPE_AND_CODE),
        *_when(ND_ADVERTISEMENT << 8, [*_accept_ipv6(ND_TARGET, users), *REJECT]),
        *_when(ND_SOLICITATION << 8, [*from_nobody, *_accept_ipv6(ND_TARGET, takers), *REJECT]),
        *REJECT,
    ]
