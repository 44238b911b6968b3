"""Watches a link of the segment: who sends what to whom, as it is on the wire."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from lab.process import in_netns

ETH_P_ALL = 0x0003
ETHERTYPE_IPV4, ETHERTYPE_IPV6 = 0x0800, 0x86DD
TRANSPORT = {6: "tcp", 17: "udp"}


class Packet(NamedTuple):
    """One TCP segment or UDP datagram on the wire."""

    transport: str
    source: str
    source_port: int
    target: str
    target_port: int

    def __str__(self) -> str:
        return f"{joined(self.source, self.source_port)} → {joined(self.target, self.target_port)}"


def joined(address: str, port: int) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def decode(frame: bytes) -> Packet | None:
    """The packet in an Ethernet frame; None for everything but unfragmented TCP and UDP (RFC 791, RFC 8200)."""
    ethertype = int.from_bytes(frame[12:14], "big")
    packet = frame[14:]
    if ethertype == ETHERTYPE_IPV4 and len(packet) >= 20:
        protocol, source, target = packet[9], str(IPv4Address(packet[12:16])), str(IPv4Address(packet[16:20]))
        segment = packet[(packet[0] & 0x0F) * 4 :]
    elif ethertype == ETHERTYPE_IPV6 and len(packet) >= 40:
        protocol, source, target = packet[6], str(IPv6Address(packet[8:24])), str(IPv6Address(packet[24:40]))
        segment = packet[40:]
    else:
        return None
    if protocol not in TRANSPORT or len(segment) < 4:
        return None
    ports = int.from_bytes(segment[:2], "big"), int.from_bytes(segment[2:4], "big")
    return Packet(TRANSPORT[protocol], source, ports[0], target, ports[1])


class Capture:
    """What passed since the capture began. A frame is seen when it is sent, so there is nothing to wait for."""

    def __init__(self, tap: socket.socket) -> None:
        self._tap = tap
        self._seen: list[Packet] = []

    def packets(self) -> list[Packet]:
        """All TCP and UDP packets so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = decode(self._tap.recv(65535, socket.MSG_DONTWAIT))
                if packet is not None:
                    self._seen.append(packet)
        return list(self._seen)


@contextlib.contextmanager
def capturing(netns: str, link: str) -> Iterator[Capture]:
    """Watch `link` in the network namespace at `netns`. Raises OSError."""

    def tap() -> socket.socket:
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)

    with in_netns(netns, tap) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        opened.bind((link, ETH_P_ALL))
        yield Capture(opened)
