"""The framed protocol between the CNI executable and the agent; `plugins/shim/PROTOCOL.md` is the contract.

Written on raw non-blocking sockets: asyncio's streams and transports read with recv() and would silently drop the
file descriptor that carries the pod's network namespace.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from plugins.errors import InvalidEnvironmentError

MAGIC = b"SPD1"
HEADER = struct.Struct("!4sII")
MAX_ENV = 128 << 10
"""Bytes of environment in one request."""
MAX_STDIN = 1 << 20
"""Bytes of standard input in one request."""
MAX_REPLY = 1 << 20
"""Bytes of one reply's body."""
_CHUNK = 64 << 10
_ANCILLARY = socket.CMSG_SPACE(struct.calcsize("i"))


class Status(IntEnum):
    """What a reply says about the call."""

    DONE = 0
    """Executed; the body is the result."""
    FAILED = 1
    """Refused or failed; the body is a CNI error object."""
    BUSY = 75
    """Not executed; the body tells why in plain text. (EX_TEMPFAIL of sysexits.h.)"""
    STOPPING = 76
    """Not executed, or rolled back, because this agent ends; its successor may execute it."""


class FrameError(Exception):
    """What arrived is not a request of this protocol."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it travelled, nothing of it checked yet."""

    env: bytes
    stdin: bytes


def decode_header(header: bytes) -> tuple[int, int]:
    """Lengths of environment and standard input. Raises FrameError."""
    magic, env_size, stdin_size = HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError(f"the frame starts with {magic!r}, not {MAGIC!r}")
    if env_size > MAX_ENV or stdin_size > MAX_STDIN:
        raise FrameError(
            f"{env_size} bytes of environment (limit {MAX_ENV}), {stdin_size} of input (limit {MAX_STDIN})"
        )
    return env_size, stdin_size


def decode_frame(frame: bytes) -> Request:
    """A whole request frame, as queue files hold it. Raises FrameError."""
    if len(frame) < HEADER.size:
        raise FrameError(f"{len(frame)} bytes are not even a header")
    env_size, stdin_size = decode_header(frame[: HEADER.size])
    if len(frame) != HEADER.size + env_size + stdin_size:
        raise FrameError(f"{len(frame)} bytes, the header announces {HEADER.size + env_size + stdin_size}")
    split = HEADER.size + env_size
    return Request(frame[HEADER.size : split], frame[split:])


def encode_frame(env: Mapping[str, str], stdin: bytes) -> bytes:
    """The frame of a request."""
    packed = b"".join(f"{key}={value}\0".encode() for key, value in env.items())
    return HEADER.pack(MAGIC, len(packed), len(stdin)) + packed + stdin


def encode_reply(status: Status, body: bytes) -> bytes:
    """The frame of a reply."""
    return HEADER.pack(MAGIC, status, len(body)) + body


def decode_env(env: bytes) -> dict[str, str]:
    """The variables of a request. Raises InvalidEnvironmentError for one that is not UTF-8."""
    result: dict[str, str] = {}
    for entry in env.split(b"\0"):
        name, separator, value = entry.partition(b"=")
        if not separator:
            continue
        try:
            result[name.decode()] = value.decode()
        except UnicodeDecodeError as error:
            shown = name.decode(errors="backslashreplace")[:40]
            raise InvalidEnvironmentError(f"{shown} is not UTF-8", f"byte {error.start} is {value[:80]!r}") from None
    return result


async def _wait(connection: socket.socket, reading: bool) -> None:
    """Until `connection` is readable (or else writable)."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    watch, unwatch = (loop.add_reader, loop.remove_reader) if reading else (loop.add_writer, loop.remove_writer)
    watch(connection, wake)
    try:
        await ready
    finally:
        unwatch(connection)


async def receive_request(connection: socket.socket, fds: list[int]) -> Request:
    """One request; descriptors that come with it are appended to `fds`, which the caller closes also on failure.

    The usual request is in the socket's buffer already and costs one system call and no turn of the event loop.
    Raises FrameError, EOFError, OSError.
    """
    data = bytearray()
    expected = 0
    while not expected or len(data) < expected:
        want = max(_CHUNK, expected - len(data))
        try:
            chunk, ancillary, flags, _ = connection.recvmsg(want, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await _wait(connection, reading=True)
            continue
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.extend(struct.unpack(f"{len(payload) // 4}i", payload))
        if flags & socket.MSG_CTRUNC or len(fds) > 1:
            raise FrameError("more than one file descriptor came with the request")
        if not chunk:
            raise EOFError(f"the peer closed after {len(data)} bytes")
        data += chunk
        if not expected and len(data) >= HEADER.size:
            env_size, stdin_size = decode_header(bytes(data[: HEADER.size]))
            expected = HEADER.size + env_size + stdin_size
    return decode_frame(bytes(data))


async def send_reply(connection: socket.socket, reply: bytes) -> None:
    """Send all of `reply`. Raises OSError when the peer is gone."""
    view = memoryview(reply)
    while view:
        try:
            view = view[connection.send(view, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await _wait(connection, reading=False)


def hung_up(connection: socket.socket) -> bool:
    """Whether the peer, which keeps its side open until it has the reply, has closed it."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end (SO_PEERCRED, unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def close_all(fds: list[int]) -> None:
    """Close descriptors that came with a request."""
    while fds:
        os.close(fds.pop())
