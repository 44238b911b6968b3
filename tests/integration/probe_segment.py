"""A segment for probing tests: a bridge in a network namespace of its own, and hosts in theirs, by veth."""

from __future__ import annotations

import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Self

from plugins.net.netns import in_netns


def ip(*words: str) -> None:
    """Run one `ip` command; CalledProcessError with its message if it fails."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """A network namespace with the NIC `eth0` on the segment."""

    netns: str
    fd: int
    mac: str

    def ip(self, *words: str) -> None:
        """`ip` inside this host."""
        ip("-n", self.netns, *words)

    def sysctl(self, *settings: str) -> None:
        """Set `name=value`s inside this host."""
        subprocess.run(["ip", "netns", "exec", self.netns, "sysctl", "-qw", *settings], check=True)


@dataclass
class Segment:
    """A bridge that hosts are plugged into."""

    name: str
    hosts: list[Host] = field(default_factory=list)

    def port(self, host: Host) -> str:
        """The bridge's port of `host`, inside the segment's namespace."""
        return f"p{self.hosts.index(host)}"

    def ip(self, *words: str) -> None:
        """`ip` inside the segment's namespace."""
        ip("-n", self.name, *words)

    def add_host(self, *addresses: str, up: bool = True) -> Host:
        """A host with `addresses` (CIDR form), which it may use at once."""
        number = len(self.hosts)
        netns = f"{self.name}-{number}"
        mac = f"02:5b:00:00:00:{number:02x}"
        ip("netns", "add", netns)
        fd = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
        host = Host(netns, fd, mac)
        self.hosts.append(host)
        self.ip("link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", netns)
        self.ip("link", "set", f"p{number}", "master", "br0", "up")
        host.ip("link", "set", "eth0", "address", mac)
        for address in addresses:
            host.ip("address", "add", address, "dev", "eth0", *(("nodad",) if ":" in address else ()))
        if up:
            host.ip("link", "set", "eth0", "up")
        return host


@contextmanager
def segment() -> Iterator[Segment]:
    """A segment that is gone afterwards, with everything in it."""
    lan = Segment(f"spt-{secrets.token_hex(3)}")
    ip("netns", "add", lan.name)
    try:
        lan.ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        lan.ip("link", "set", "br0", "up")
        yield lan
    finally:
        for host in lan.hosts:
            os.close(host.fd)
            ip("netns", "delete", host.netns)
        ip("netns", "delete", lan.name)


class Answering(Thread):
    """A station in `host`'s namespace that answers frames as `respond` says; a context manager.

    `respond` gets every frame that arrives and returns pairs of seconds to wait and a frame to send, or nothing.
    `heard` is set by the first frame for which it returned something.
    """

    def __init__(self, host: Host, respond: Callable[[bytes], list[tuple[float, bytes]]]) -> None:
        super().__init__(name="answering")
        self._respond = respond
        self._socket = in_netns(host.fd, raw_socket)
        self._wake, self._end = os.pipe()
        self.heard = Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        self.join()
        self._socket.close()
        os.close(self._wake)

    def run(self) -> None:
        due: list[tuple[float, bytes]] = []
        while True:
            wait = max(0.0, due[0][0] - time.monotonic()) if due else None
            ready, _, _ = select.select([self._socket.fileno(), self._wake], [], [], wait)
            if self._wake in ready:
                return
            if self._socket.fileno() in ready:
                answers = self._respond(self._socket.recv(2048))
                due = sorted([*due, *((time.monotonic() + delay, frame) for delay, frame in answers)])
                if answers:
                    self.heard.set()
            while due and due[0][0] <= time.monotonic():
                self._socket.send(due.pop(0)[1])


def raw_socket() -> socket.socket:
    """Everything that arrives at eth0, and nothing that leaves it."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    packets.setsockopt(263, 23, 1)
    packets.bind(("eth0", 3))
    return packets
