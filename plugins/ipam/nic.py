"""What IPAM asks of a pod's network namespace, and of the NIC in it."""

from __future__ import annotations

import os
import socket

from api.ranges import Address
from plugins.errors import CheckFailedError, IOFailureError
from plugins.ipam.concurrency import uninterrupted
from plugins.net import rtlink
from plugins.net.netlink import NETLINK_ROUTE, Netlink
from plugins.net.netns import enter, run_in_thread

_DEADLINE = 5.0
"""Seconds for the kernel's answer, which takes 0.2 ms unless many links are being changed."""


def namespace_lives(path: str, inode: int) -> bool:
    """Whether the namespace with this inode is still there, at the path where the runtime had put it."""
    try:
        return bool(path) and os.stat(path).st_ino == inode
    except (OSError, ValueError):
        return False


async def addresses_of(netns_fd: int, ifname: str) -> set[Address]:
    """The addresses on the NIC. Raises CheckFailedError if there is no such NIC, IOFailureError."""

    def read() -> set[Address]:
        enter(netns_fd)
        try:
            index = socket.if_nametoindex(ifname)
        except OSError:
            raise CheckFailedError("the NIC is not there", f"{ifname} in the pod's network namespace") from None
        with Netlink(NETLINK_ROUTE, _DEADLINE) as kernel:
            found = rtlink.parse_addresses(kernel.dump(rtlink.address_dump()))
        return {address.address for address in found if address.ifindex == index}

    try:
        return await uninterrupted(run_in_thread(read))  # the descriptor is the caller's and open as long as it waits
    except OSError as error:
        raise IOFailureError("the NIC's addresses cannot be read", f"{ifname}: {error.strerror}") from error


async def leave_duplicates_to_us(netns_fd: int, ifname: str) -> None:
    """Keep the kernel from asking what our probe asks: whether an IPv6 address is a duplicate.

    Duplicate address detection (RFC 4862 section 5.4) leaves an address tentative for one to two seconds, and the
    standard plugins wait for that. Our probe puts the same question before the address is on the NIC. To be called
    before the NIC is up: with the link-local address, which follows from the MAC, the kernel begins at once.
    Raises OSError; FileNotFoundError where IPv6 is switched off.
    """

    def write() -> None:
        enter(netns_fd)
        with open(f"/proc/sys/net/ipv6/conf/{ifname}/accept_dad", "w") as switch:
            switch.write("0")

    await uninterrupted(run_in_thread(write))
