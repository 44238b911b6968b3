"""A netlink socket that takes many messages in one system call.

The kernel works a batch off in order and goes on after an error, so a failure in the middle says nothing about what
follows it. Every error is reported, whether an acknowledgement was asked for or not (`netlink_rcv_skb` in
net/netlink/af_netlink.c); so only the last message of a batch asks for one: it tells that the batch is done, and
nothing that failed can be missed, for a lost report makes the socket fail with ENOBUFS. That saves one system call
and one wake-up for each message that went well.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from api.ranges import Address

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSGERR_ATTR_MSG = 1

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_U32_ATTRIBUTE = struct.Struct("=HHI")
_U32 = struct.Struct("=I")
_PAD = (b"", b"\0\0\0", b"\0\0", b"\0")
_RECEIVE_BUFFER = 1 << 20
_SEND_BUFFER = 1 << 21
"""A batch is sent whole, and the usual 208 kB end at the 1,300th address of a node. Memory is taken when it is used."""
_DUMP_TRIES = 5


class Words(tuple[object, ...]):
    """A text that is put together when somebody asks for it. Most are not: only failures are told."""

    __slots__ = ()

    def __str__(self) -> str:
        return " ".join(map(str, self))


class Message(NamedTuple):
    """One request, without its sequence number."""

    type: int
    flags: int
    body: bytes
    what: str | Words
    """For people: what it does to what."""


class Failure(NamedTuple):
    """What the kernel said to one message of a batch."""

    position: int
    what: str
    code: int
    """errno."""
    reason: str
    """The kernel's own words (extended acknowledgement), or empty."""

    def __str__(self) -> str:
        text = os.strerror(self.code)
        return f"{self.what}: {self.reason} ({text})" if self.reason else f"{self.what}: {text}"


class Reply(NamedTuple):
    """One message that answers a request."""

    position: int
    """Which message of the batch it answers."""
    type: int
    body: bytes


class Exchange(NamedTuple):
    """How a batch went."""

    failures: list[Failure]
    replies: list[Reply]


class NetlinkTimeoutError(OSError):
    """The kernel did not answer in time; nothing is known about what it did."""


class BatchError(OSError):
    """The kernel refused messages of a batch in which none may fail."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__(failures[0].code, "; ".join(map(str, failures)))
        self.failures = tuple(failures)


def attribute(kind: int, payload: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    size = len(payload)
    return _ATTRIBUTE.pack(size + 4, kind) + payload + _PAD[size & 3]


def u32_attribute(kind: int, value: int) -> bytes:
    """An attribute with a number in the machine's byte order."""
    return _U32_ATTRIBUTE.pack(8, kind, value)


def text_attribute(kind: int, value: str) -> bytes:
    """An attribute with a NUL-terminated text."""
    return attribute(kind, value.encode() + b"\0")


def int_in(data: bytes | None) -> int:
    """The number in an attribute; 0 if there is none."""
    return int(_U32.unpack_from(data)[0]) if data else 0


def text_in(data: bytes) -> str:
    """The text in an attribute."""
    return data.rstrip(b"\0").decode(errors="replace")


def address_in(packed: bytes | None) -> Address | None:
    """The IP address in an attribute; None if there is none, or one of another family."""
    if packed is None:
        return None
    if len(packed) == 4:
        return IPv4Address(packed)
    return IPv6Address(packed) if len(packed) == 16 else None


def family_of(address: Address) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `offset` on; the nested flag is taken off the types, the last of a type wins."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + size]
        offset += (size + 3) & ~3
    return found


def nested(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in `data` in their order, for lists in which types repeat."""
    offset = 0
    while offset + 4 <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + size]
        offset += (size + 3) & ~3


class Netlink:
    """A netlink socket of the namespace of the thread that opens it. One user at a time."""

    def __init__(self, protocol: int, timeout: float, groups: int = 0) -> None:
        """Open and bind. `timeout` in seconds bounds every wait for the kernel. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            if protocol == NETLINK_ROUTE:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
            # SO_RCVTIMEO and not settimeout(): the latter costs a poll(2) before every receive.
            interval = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
            self._socket.bind((0, groups))
        except OSError:
            self._socket.close()
            raise
        self._sequence = 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close; may be called twice."""
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, messages: Sequence[Message], final: int = -1) -> Exchange:
        """Send a batch and read until its `final` message is answered; failures are returned, not raised.

        `final` is an index into `messages`; nfnetlink's batches end in a message that is never answered. A dump may
        only be the final message. Raises NetlinkTimeoutError, and OSError if the socket fails (ENOBUFS: a report was
        lost); then the state of the batch is unknown and the socket must be closed.
        """
        if not messages:
            return Exchange([], [])
        final %= len(messages)
        first = self._sequence + 1
        self._sequence += len(messages)
        parts: list[bytes] = []
        for sequence, (kind, flags, body, _) in enumerate(messages, first):
            if sequence - first == final:
                flags |= NLM_F_ACK  # noqa: PLW2901 -- the one that tells that all is done
            parts.append(_HEADER.pack(16 + len(body), kind, flags | NLM_F_REQUEST, sequence, 0))
            parts.append(body)
        self._socket.send(b"".join(parts))
        failures: list[Failure] = []
        replies: list[Reply] = []
        opening_failed = False
        for kind, flags, sequence, body in self._receive():
            index = sequence - first
            if index < 0 or index >= len(messages):
                continue  # an answer to a batch that was given up
            if kind == _NLMSG_ERROR:
                failure = _failure(index, messages[index].what, flags, body)
                if failure is not None:
                    failures.append(failure)
                # A batch that nfnetlink will not even begin gets this one answer.
                opening_failed = final not in (index, len(messages) - 1) and index == 0 and failure is not None
            elif kind == _NLMSG_DONE:
                code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                if code > 0:
                    failures.append(Failure(index, str(messages[index].what), code, ""))
            else:
                replies.append(Reply(index, kind, body))
                if flags & NLM_F_DUMP_INTR:
                    failures.append(Failure(index, str(messages[index].what), errno.EINTR, "changed while it was read"))
                continue
            if index == final or opening_failed:
                break
        return Exchange(failures, replies)

    def request(self, messages: Sequence[Message]) -> list[Reply]:
        """As `exchange`, for batches in which nothing may fail. Raises BatchError as well."""
        failures, replies = self.exchange(messages)
        if failures:
            raise BatchError(failures)
        return replies

    def dump(self, message: Message) -> list[bytes]:
        """The bodies of a dump, read again (a few times) when it changed meanwhile. Raises as `request`."""
        for _ in range(_DUMP_TRIES - 1):
            failures, replies = self.exchange((message,))
            if not failures:
                return [reply.body for reply in replies]
            if any(failure.code != errno.EINTR for failure in failures):
                raise BatchError(failures)
        return [reply.body for reply in self.request((message,))]

    def pending(self) -> Iterator[tuple[int, bytes]]:
        """Notifications (type, body) that have arrived already; never waits.

        Raises OSError (ENOBUFS: some were lost).
        """
        while True:
            try:
                data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            for kind, _, _, body in _split(data):
                yield kind, body

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                raise NetlinkTimeoutError(
                    errno.ETIMEDOUT, "the kernel did not answer a netlink request in time"
                ) from None
            yield from _split(data)


def _split(data: bytes) -> Iterable[tuple[int, int, int, bytes]]:
    offset, end = 0, len(data)
    while offset + 16 <= end:
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if size < 16:
            return
        yield kind, flags, sequence, data[offset + 16 : offset + size]
        offset += (size + 3) & ~3


def _failure(index: int, what: str | Words, flags: int, body: bytes) -> Failure | None:
    """NLMSG_ERROR as a Failure, None if it only acknowledges (include/uapi/linux/netlink.h, struct nlmsgerr)."""
    (code,) = struct.unpack_from("=i", body)
    if code == 0:
        return None
    reason = ""
    if flags & _NLM_F_ACK_TLVS:
        (size,) = struct.unpack_from("=I", body, 4)
        offset = 20 if flags & _NLM_F_CAPPED else 4 + ((size + 3) & ~3)
        reason = attributes(body, offset).get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    return Failure(index, str(what), -code, reason)
