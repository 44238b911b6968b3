"""The process inside a lab's pod, node or outside host: answers everybody who calls, and calls others when told to.

Run as `python -I -S actor.py NAME CGROUP_PROCS CONTROL_SOCKET PORT`, already inside its network namespace. It enters
the cgroup before it opens a socket, since the kernel's socket hooks follow the cgroup in which a socket was made; it
then serves TCP and UDP, IPv4 and IPv6, on PORT: every line or datagram is answered by a JSON line that says who
answers and whom it sees. `ready` on standard output tells that all sockets are open.

CONTROL_SOCKET takes one JSON request a line and answers each with one JSON line: a dict with `error` if it failed. A
request names `op`, one of the functions in OPERATIONS, and its arguments. This file is standard library only and
imports nothing of the lab: the interpreter starts without site packages in a fraction of the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

LINE_LIMIT = 64 * 1024
"""Bytes of the longest line or datagram that is read."""

Where = list[Any]
"""`[address, port]`, as JSON has it."""

_held: dict[str, socket.socket] = {}
"""Connections that stay open between requests, by the name that the request gave them."""


def where(address: Any) -> Where:
    """The first two members of a socket address, a v4-mapped one as the kernel gives it."""
    return [address[0], address[1]]


def answer(name: str, peer: Any, local: Any) -> bytes:
    """What a server says: its name, whom it sees, and under which address it was reached."""
    return json.dumps({"name": name, "peer": where(peer), "local": where(local)}).encode() + b"\n"


def serve_connection(name: str, connection: socket.socket, peer: Any) -> None:
    """Answer each line of one TCP connection until the other side closes it."""
    with connection, contextlib.suppress(OSError), connection.makefile("rb") as lines:
        local = connection.getsockname()
        while lines.readline(LINE_LIMIT):
            connection.sendall(answer(name, peer, local))


def serve_tcp(name: str, listener: socket.socket) -> None:
    """Accept connections for ever."""
    while True:
        connection, peer = listener.accept()
        start(serve_connection, name, connection, peer)


def serve_udp(name: str, listener: socket.socket) -> None:
    """Answer datagrams for ever."""
    while True:
        _, peer = listener.recvfrom(LINE_LIMIT)
        with contextlib.suppress(OSError):  # the asker may be gone, or its route
            listener.sendto(answer(name, peer, listener.getsockname()), peer)


def listen(family: int, kind: int, port: int) -> socket.socket:
    """A wildcard socket of one family only, so that no IPv4 peer arrives at the IPv6 one."""
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))  # the wildcard of either family
    if kind == socket.SOCK_STREAM:
        listener.listen(64)
    return listener


def dial(to: Where, timeout: float, kind: int) -> socket.socket:
    """A connected socket; the address' own family, so `::ffff:…` is an IPv6 socket."""
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    dialled = socket.socket(family, kind)
    try:
        dialled.settimeout(timeout)
        dialled.connect((to[0], to[1]))
    except BaseException:
        dialled.close()
        raise
    return dialled


def exchange(connection: socket.socket) -> dict[str, Any]:
    """One line there and one back on a TCP connection, or one datagram each way; milliseconds."""
    begin = time.perf_counter()
    connection.sendall(b"who is there?\n")
    reply = b""
    while not reply.endswith(b"\n"):
        part = connection.recv(LINE_LIMIT)
        if not part:
            raise ConnectionResetError("closed by the other side")
        reply += part
    return {
        "answer": json.loads(reply),
        "milliseconds": (time.perf_counter() - begin) * 1000,
        "peer": where(connection.getpeername()),
        "local": where(connection.getsockname()),
    }


def op_tcp(to: Where, timeout: float) -> dict[str, Any]:
    """Connect, ask, close."""
    begin = time.perf_counter()
    with dial(to, timeout, socket.SOCK_STREAM) as connection:
        connected = (time.perf_counter() - begin) * 1000
        return {**exchange(connection), "connect": connected}


def op_udp(to: Where, timeout: float) -> dict[str, Any]:
    """Ask by one datagram from a connected socket."""
    with dial(to, timeout, socket.SOCK_DGRAM) as connection:
        return exchange(connection)


def op_udp_unconnected(to: Where, timeout: float) -> dict[str, Any]:
    """Ask by one datagram from an unconnected socket, as resolvers do; `peer` is whom the answer names as sender."""
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(timeout)
        begin = time.perf_counter()
        sender.sendto(b"who is there?\n", (to[0], to[1]))
        reply, peer = sender.recvfrom(LINE_LIMIT)
        return {
            "answer": json.loads(reply),
            "milliseconds": (time.perf_counter() - begin) * 1000,
            "peer": where(peer),
            "local": where(sender.getsockname()),
        }


def op_hold(name: str, to: Where, timeout: float) -> dict[str, Any]:
    """Open a TCP connection that stays open under `name`."""
    op_drop(name)
    _held[name] = dial(to, timeout, socket.SOCK_STREAM)
    return exchange(_held[name])


def op_use(name: str) -> dict[str, Any]:
    """Ask on a connection that is held."""
    return exchange(_held[name])


def op_drop(name: str) -> dict[str, Any]:
    """Close a held connection, if there is one of that name."""
    connection = _held.pop(name, None)
    if connection is not None:
        connection.close()
    return {}


OPERATIONS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "tcp": op_tcp,
    "udp": op_udp,
    "udp_unconnected": op_udp_unconnected,
    "hold": op_hold,
    "use": op_use,
    "drop": op_drop,
}


def serve_control(connection: socket.socket) -> None:
    """Do what the requests of one controller say."""
    with connection, contextlib.suppress(BrokenPipeError), connection.makefile("rwb") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                reply = OPERATIONS[request.pop("op")](**request)
            except (OSError, KeyError, ValueError, TypeError) as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(reply).encode() + b"\n")
            lines.flush()


def start(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in a thread that does not keep the process alive."""
    threading.Thread(target=work, args=arguments, daemon=True).start()


def main(name: str, cgroup_procs: str, control: str, port: str) -> None:
    """Serve until the process is ended."""
    with open(cgroup_procs, "w") as procs:
        procs.write("0")
    for family in (socket.AF_INET, socket.AF_INET6):
        start(serve_tcp, name, listen(family, socket.SOCK_STREAM, int(port)))
        start(serve_udp, name, listen(family, socket.SOCK_DGRAM, int(port)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as controller:
        controller.bind(control)
        os.chmod(control, 0o600)
        controller.listen(16)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = controller.accept()
            start(serve_control, connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
