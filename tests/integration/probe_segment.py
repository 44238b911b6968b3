"""A segment for probing tests: a bridge in a network namespace of its own, and hosts in theirs, by veth."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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
