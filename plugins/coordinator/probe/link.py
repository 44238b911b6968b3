"""The NIC's link state, by route netlink: set it up, and be told when it goes down.

A frame that is sent while the link is down is lost without an error on many drivers, and silence is what a free
address sounds like. So the state is followed for as long as there is a question, not only looked at once.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

from plugins.coordinator.probe.frames import ARPHRD_ETHER

RTM_NEWLINK = 16
RTM_GETLINK = 18
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
NLM_F_ACK = 4
RTMGRP_LINK = 1
IFLA_ADDRESS = 1
IFF_UP = 0x1
IFF_RUNNING = 0x40

HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence, port (struct nlmsghdr)."""
IFINFO = struct.Struct("=BxHiII")
"""Family, hardware type, index, flags, change mask (struct ifinfomsg)."""
ATTRIBUTE = struct.Struct("=HH")
BUFFER = 65536
REPLY_WAIT = 2.0
"""Seconds for the kernel's answer, which is there when the request returns; only a bound."""


class Link:
    """One Ethernet NIC, seen from a netlink socket in its network namespace."""

    def __init__(self, ifname: str) -> None:
        """Subscribe to changes, then look, so that no change falls between. Call it in the NIC's namespace.

        Raises OSError, also if there is no such NIC or it is no Ethernet.
        """
        self.mac = b""
        self._flags = 0
        self._sequence = 0
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self.socket.settimeout(REPLY_WAIT)
            self.socket.bind((0, RTMGRP_LINK))
            self.index = socket.if_nametoindex(ifname)
            self._request(RTM_GETLINK, 0, 0, 0)
        except BaseException:
            self.socket.close()
            raise

    @property
    def is_operational(self) -> bool:
        """Whether frames pass, as far as the kernel knows: administratively up, and with a carrier (RFC 2863)."""
        return self._flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING

    def set_up(self) -> None:
        """Set the NIC up if it is down. Blocks for the kernel's routing lock. Raises OSError."""
        if not self._flags & IFF_UP:
            self._request(RTM_NEWLINK, NLM_F_ACK, IFF_UP, IFF_UP)
            self._request(RTM_GETLINK, 0, 0, 0)

    def read_changes(self) -> Iterator[bool]:
        """After each change of the NIC that is waiting on the nonblocking socket: whether it is operational.

        A NIC that goes away is down before. Raises OSError: ENOBUFS if changes were lost.
        """
        while True:
            try:
                data = self.socket.recv(BUFFER)
            except BlockingIOError:
                return
            for kind, _, body in _messages(data):
                if self._learn(kind, body):
                    yield self.is_operational

    def _request(self, kind: int, flags: int, state: int, mask: int) -> None:
        """Send one request and read up to its answer, learning from the changes that come before it."""
        self._sequence += 1
        body = IFINFO.pack(socket.AF_UNSPEC, 0, self.index, state, mask)
        self.socket.send(HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0) + body)
        # A change that the request itself causes is told under the same sequence, before the acknowledgement.
        final = NLMSG_ERROR if flags & NLM_F_ACK else RTM_NEWLINK
        while True:
            for answer, sequence, content in _messages(self.socket.recv(BUFFER)):
                self._learn(answer, content)
                if sequence != self._sequence or answer not in (final, NLMSG_ERROR):
                    continue
                if answer == NLMSG_ERROR and (code := -struct.unpack_from("=i", content)[0]):
                    raise OSError(code, os.strerror(code))
                return

    def _learn(self, kind: int, body: bytes) -> bool:
        """Take over what a message says about this NIC; whether it said anything."""
        if kind != RTM_NEWLINK:
            return False
        family, hardware, index, flags, _ = IFINFO.unpack_from(body)
        if family != socket.AF_UNSPEC or index != self.index:
            return False
        if hardware != ARPHRD_ETHER:
            raise OSError(errno.ENOTSUP, "not an Ethernet NIC")
        self._flags = flags
        self.mac = _attribute(body, IFLA_ADDRESS)
        return True


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence and body of each message of one read."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, _, sequence, _ = HEADER.unpack_from(data, offset)
        yield kind, sequence, data[offset + HEADER.size : offset + length]
        offset += max(length + 3 & ~3, HEADER.size)


def _attribute(body: bytes, wanted: int) -> bytes:
    """The value of a link's attribute, or nothing."""
    offset = IFINFO.size
    while offset + ATTRIBUTE.size <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if kind == wanted:
            return body[offset + ATTRIBUTE.size : offset + length]
        offset += max(length + 3 & ~3, ATTRIBUTE.size)
    return b""
