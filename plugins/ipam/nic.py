"""The addresses on a pod's NIC, as the kernel says them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

from plugins.errors import CheckFailedError, IOFailureError
from plugins.net.netns import in_netns

RTM_NEWADDR, RTM_GETADDR = 20, 22
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP = 0x1 | 0x300
IFA_ADDRESS, IFA_LOCAL = 1, 2
HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence, port (struct nlmsghdr)."""
ADDRESS = struct.Struct("=BBBBI")
"""Family, prefix length, flags, scope, interface index (struct ifaddrmsg)."""
ATTRIBUTE = struct.Struct("=HH")
_DEADLINE = 5.0


def addresses_of(netns_fd: int, ifname: str) -> set[str]:
    """Addresses with prefix length on the NIC; blocks for about 0.2 ms.

    Raises CheckFailedError if there is no such NIC, IOFailureError. Source: rtnetlink(7).
    """
    try:
        return in_netns(netns_fd, lambda: _addresses(ifname))
    except OSError as error:
        raise IOFailureError("the NIC's addresses cannot be read", f"{ifname}: {error.strerror}") from error


def leave_duplicates_to_us(netns_fd: int, ifname: str) -> None:
    """Keep the kernel from asking what our probe asks: whether an IPv6 address is a duplicate.

    Duplicate address detection (RFC 4862 section 5.4) leaves an address tentative for one to two seconds, and the
    standard plugins wait for that. Our probe puts the same question before the address is on the NIC. To be called
    before the NIC is up: with the link-local address, which follows from the MAC, the kernel begins at once. Blocks
    for about 0.2 ms. Raises OSError; FileNotFoundError where IPv6 is switched off.
    """

    def write() -> None:
        with open(f"/proc/sys/net/ipv6/conf/{ifname}/accept_dad", "w") as switch:
            switch.write("0")

    in_netns(netns_fd, write)


def _addresses(ifname: str) -> set[str]:
    try:
        index = socket.if_nametoindex(ifname)
    except OSError:
        raise CheckFailedError("the NIC is not there", f"{ifname} in the pod's network namespace") from None
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.settimeout(_DEADLINE)
        kernel.send(
            HEADER.pack(HEADER.size + ADDRESS.size, RTM_GETADDR, NLM_F_REQUEST_DUMP, 1, 0) + bytes(ADDRESS.size)
        )
        return {text for owner, text in _dump(kernel) if owner == index}


def _dump(kernel: socket.socket) -> Iterator[tuple[int, str]]:
    while True:
        data = kernel.recv(1 << 16)
        offset = 0
        while offset < len(data):
            length, kind, *_ = HEADER.unpack_from(data, offset)
            body = data[offset + HEADER.size : offset + length]
            if kind == NLMSG_DONE:
                return
            if kind == NLMSG_ERROR:
                code = -struct.unpack_from("=i", body)[0]
                raise OSError(code, os.strerror(code))
            if kind == RTM_NEWADDR:
                yield _parse(body)
            offset += (length + 3) & ~3


def _parse(body: bytes) -> tuple[int, str]:
    """Interface index and address; the local one, where a point-to-point link has two."""
    _, prefix, _, _, index = ADDRESS.unpack_from(body)
    found: dict[int, bytes] = {}
    offset = ADDRESS.size
    while offset + ATTRIBUTE.size <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if length < ATTRIBUTE.size:
            break
        found[kind] = body[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    raw = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS) or b""
    return index, f"{ip_address(raw)}/{prefix}" if raw else ""
