"""What IPAM asks of a pod's network namespace, and of the NIC in it."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from array import array

from api.ranges import Address
from plugins.errors import CheckFailedError, IOFailureError
from plugins.ipam.concurrency import uninterrupted
from plugins.net import rtlink
from plugins.net.netlink import NETLINK_ROUTE, Netlink
from plugins.net.netns import enter, run_in_thread

_DEADLINE = 5.0
"""Seconds for the kernel's answer, which takes 0.2 ms unless many links are being changed."""

SYSFS = "/sys"
_PCI_ADDRESS = re.compile(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_SIOCETHTOOL = 0x8946
_ETHTOOL_GDRVINFO = 0x3
_DRVINFO_SIZE, _BUS_INFO = 196, 4 + 32 + 32 + 32
"""struct ethtool_drvinfo: cmd, driver, version, fw_version, bus_info and more. include/uapi/linux/ethtool.h."""


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


async def master_addresses(netns_fd: int, ifname: str, sysfs: str = SYSFS) -> frozenset[Address]:
    """The addresses of the physical function (SR-IOV) whose virtual function the NIC is.

    The NIC is in the pod's network namespace, its physical function in ours. Raises CheckFailedError if there is no
    such NIC, IOFailureError if it is no virtual function or its physical function has no NIC here.
    """

    def read_bus() -> str:
        enter(netns_fd)
        return pci_address(ifname)

    def read() -> frozenset[Address]:
        master = physical_function(sysfs, bus, ifname)
        index = socket.if_nametoindex(master)
        with Netlink(NETLINK_ROUTE, _DEADLINE) as kernel:
            found = rtlink.parse_addresses(kernel.dump(rtlink.address_dump()))
        return frozenset(address.address for address in found if address.ifindex == index)

    try:
        bus = await uninterrupted(run_in_thread(read_bus))  # the descriptor is the caller's
        return await run_in_thread(read)
    except OSError as error:
        raise IOFailureError(
            "match_master_subnet: the NIC's physical function (SR-IOV) cannot be found", f"{ifname}: {error}"
        ) from error


def pci_address(ifname: str) -> str:
    """The bus address that the driver of a NIC in this namespace tells, as `ethtool -i` shows it. Raises OSError."""
    answer = array("B", bytes(_DRVINFO_SIZE))
    struct.pack_into("=I", answer, 0, _ETHTOOL_GDRVINFO)
    request = struct.pack("16sP16x", ifname.encode(), answer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    text = answer.tobytes()[_BUS_INFO : _BUS_INFO + 32]
    return text.partition(b"\0")[0].decode(errors="replace")


def physical_function(sysfs: str, bus: str, ifname: str) -> str:
    """Name of the NIC of the physical function behind the virtual function at PCI address `bus`. Raises OSError."""
    if not _PCI_ADDRESS.fullmatch(bus):
        raise OSError(f"{ifname} is no PCI device ({bus or 'no bus address'})")
    folder = f"{sysfs}/bus/pci/devices/{bus}/physfn"
    try:
        names = sorted(os.listdir(f"{folder}/net"))
    except FileNotFoundError:
        raise OSError(f"{ifname} at {bus} is no virtual function, or its physical function has no NIC here") from None
    if not names:
        raise OSError(f"the physical function of {ifname} at {bus} has no NIC here")
    return names[0]


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
