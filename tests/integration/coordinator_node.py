"""A node with an uplink, its router, a place behind the node, and pods on a macvlan, all as network namespaces.

far ── eth2 [node] eth0 ── segment ── eth0 [router]
                              └── eth0 (macvlan on the node's eth0) [pod]
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from plugins.cni import Call, Command
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.settings import CoordinatorSettings
from plugins.net.netns import in_netns

T = TypeVar("T")
FAMILIES = ("-4", "-6")

NODE4, NODE6 = "172.31.9.2", "fd31:9::2"
ROUTER4, ROUTER6 = "172.31.9.1", "fd31:9::1"
SECOND4, SECOND6 = "10.77.0.1", "fd77::1"
"""Further addresses of the node, on its link to `far`."""
FIRST4 = "10.88.0.1"
"""The node's first address in the kernel's order, and not the one from which it sends to its pods."""
FAR4, FAR6 = "198.51.100.7", "2001:db8:7::7"
"""Somebody behind the node, whose address is not the node's."""
SERVICE4, SERVICE6 = "10.96.0.0/12", "fd00:96::/112"


def ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, check=False)
    if check and done.returncode:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr}")
    return done.stdout


@dataclass
class Pod:
    name: str
    container_id: str
    addresses: list[str]
    fd: int = -1

    @property
    def v4(self) -> str:
        return next(a for a in self.addresses if "." in a)

    @property
    def v6(self) -> str:
        return next(a for a in self.addresses if ":" in a)

    @property
    def host_link(self) -> str:
        return f"veth{self.container_id[:11]}"

    def ip(self, *words: str) -> str:
        return ip("-n", self.name, *words)

    def run(self, work: Callable[[], T]) -> T:
        return in_netns(self.fd, work)

    def previous(self, version: str = "1.0.0") -> dict[str, Any]:
        return {
            "cniVersion": version,
            "interfaces": [
                {"name": "eth0", "sandbox": f"/run/netns/{self.name}", "mtu": 1500, "x-own": {"kept": True}}
            ],
            "ips": [{"address": f"{a}/{64 if ':' in a else 24}", "interface": 0} for a in self.addresses],
            "routes": [{"dst": "0.0.0.0/0", "mtu": 1400}],
            "dns": {},
            "x-unknown": ["kept", 1],
        }

    def call(self, command: Command = "ADD", *, fd: int | None = -1, ifname: str = "eth0", **config: Any) -> Call:
        version = config.pop("cniVersion", "1.1.0")
        netconf: dict[str, Any] = {
            "cniVersion": version, "name": "underlay", "type": "coordinator",
            "serviceCIDR": [SERVICE4, SERVICE6], "prevResult": self.previous(version), **config,
        }  # fmt: skip
        return Call(
            plugin="coordinator", command=command, container_id=self.container_id, netns=f"/run/netns/{self.name}",
            netns_fd=self.fd if fd == -1 else fd, ifname=ifname, args={}, path="", config=netconf, cni_version=version,
        )  # fmt: skip


@dataclass
class Node:
    name: str
    router: str
    far: str
    fd: int
    router_fd: int
    far_fd: int
    pods: list[Pod] = field(default_factory=list)

    def ip(self, *words: str) -> str:
        return ip("-n", self.name, *words)

    def run(self, work: Callable[[], T]) -> T:
        return in_netns(self.fd, work)

    def on(
        self,
        body: Callable[[Coordinator], Awaitable[T]],
        settings: CoordinatorSettings | None = None,
        **arguments: Any,
    ) -> T:
        """Run `body` with a coordinator of this node, in an event loop of this node."""

        async def main() -> T:
            coordinator = Coordinator(settings or CoordinatorSettings(), **arguments)
            try:
                return await body(coordinator)
            finally:
                await coordinator.close()

        return self.run(lambda: asyncio.run(main()))

    def add(self, pod: Pod, **config: Any) -> Mapping[str, Any]:
        return self.on(lambda c: c.add(pod.call(**config)))

    def delete(self, pod: Pod, fd: int | None = -1, **config: Any) -> None:
        self.on(lambda c: c.delete(pod.call("DEL", fd=fd, **config)))

    def check(self, pod: Pod, **config: Any) -> None:
        self.on(lambda c: c.check(pod.call("CHECK", **config)))

    def pod(self, *addresses: str, container_id: str = "") -> Pod:
        """A namespace with a macvlan eth0 as the macvlan CNI plugin leaves it."""
        number = len(self.pods) + 10
        name = f"spt-{secrets.token_hex(4)}"
        ip("netns", "add", name)
        pod = Pod(
            name, container_id or secrets.token_hex(32), list(addresses or (f"172.31.9.{number}", f"fd31:9::{number}"))
        )
        self.pods.append(pod)
        pod.fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        pod.ip("link", "set", "lo", "up")
        ip("-n", self.name, "link", "add", "tmp0", "link", "eth0", "type", "macvlan", "mode", "bridge")
        ip("-n", self.name, "link", "set", "tmp0", "netns", name, "name", "eth0")
        pod.ip("link", "set", "eth0", "up")
        for address in pod.addresses:
            extra = ["nodad"] if ":" in address else []
            pod.ip("address", "add", f"{address}/{64 if ':' in address else 24}", "dev", "eth0", *extra)
        if any("." in a for a in pod.addresses):
            pod.ip("route", "add", "default", "via", ROUTER4)
        if any(":" in a for a in pod.addresses):
            pod.ip("-6", "route", "add", "default", "via", ROUTER6)
        return pod

    def state(self) -> dict[str, Any]:
        """Everything on the node that an attachment may change."""
        return {
            "links": sorted((x["ifname"], x.get("ifalias", "")) for x in json.loads(self.ip("-j", "link"))),
            "routes": sorted(
                self.ip(family, "route", "show", "table", "all", "proto", "83") for family in ("-4", "-6")
            ),
            "500": [
                ip("-n", self.name, family, "route", "show", "table", "500", check=False) for family in ("-4", "-6")
            ],
            "rules": [self.ip(family, "rule") for family in ("-4", "-6")],
            "neighbours": self.ip("neigh", "show", "nud", "permanent"),
        }


def pod_state(pod: Pod) -> dict[str, Any]:
    """Everything in the pod that an attachment may change."""
    links = json.loads(pod.ip("-j", "link"))

    def filters() -> str:
        return subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True, timeout=10).stdout

    def sysctls() -> list[str]:
        paths = ("ipv4/conf/all/rp_filter", "ipv4/conf/eth0/rp_filter", "ipv6/conf/all/disable_ipv6")
        return [open(f"/proc/sys/net/{path}").read() for path in paths]

    return {
        "links": [(x["ifname"], x["address"], x.get("txqlen")) for x in links],
        "routes": [
            ip("-n", pod.name, f, "route", "show", "table", t, check=False)
            for f in ("-4", "-6")
            for t in ("main", "100", "101")
        ],
        "rules": [pod.ip(family, "rule") for family in FAMILIES],
        "neighbours": pod.ip("neigh", "show", "nud", "permanent"),
        "filters": pod.run(filters),
        "sysctls": pod.run(sysctls),
    }


def sysctl(path: str, value: str) -> None:
    with open(f"/proc/sys/net/{path}", "w") as file:
        file.write(value)


def _lay_out(name: str, router: str, far: str) -> None:
    for namespace in (name, router, far):
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
    ip("-n", router, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("-n", far, "link", "add", "eth0", "type", "veth", "peer", "name", "eth2", "netns", name)
    for namespace, link, addresses in (
        (name, "eth0", (f"{FIRST4}/24", f"{NODE4}/24", f"{NODE6}/64")),
        (name, "eth2", (f"{SECOND4}/24", f"{SECOND6}/64")),
        (router, "eth0", (f"{ROUTER4}/24", f"{ROUTER6}/64")),
        (far, "eth0", ("10.77.0.2/24", "fd77::2/64", f"{FAR4}/32", f"{FAR6}/128")),
    ):
        ip("-n", namespace, "link", "set", link, "up")
        for address in addresses:
            ip("-n", namespace, "address", "add", address, "dev", link, *(["nodad"] if ":" in address else []))
    for family, network, gateway, back, through in (
        ("-4", "172.31.9.0/24", SECOND4, FAR4, "10.77.0.2"),
        ("-6", "fd31:9::/64", SECOND6, FAR6, "fd77::2"),
    ):
        ip("-n", far, family, "route", "add", network, "via", gateway)
        ip("-n", name, family, "route", "add", back, "via", through)
    # A link of the node whose address belongs to a container network, so that pods do not look for it on the node.
    ip("-n", name, "link", "add", "docker0", "type", "bridge")
    ip("-n", name, "address", "add", "172.17.0.1/16", "dev", "docker0")
    ip("-n", name, "link", "set", "docker0", "up")


@contextmanager
def node() -> Iterator[Node]:
    """A node that forwards; everything is removed in the end."""
    names = [f"spt-{secrets.token_hex(4)}" for _ in range(3)]
    fds: list[int] = []
    pods: list[Pod] = []
    try:
        _lay_out(*names)
        fds += (os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in names)
        made = Node(names[0], names[1], names[2], fds[0], fds[1], fds[2], pods)
        for family in ("ipv4", "ipv6"):
            made.run(partial(sysctl, f"{family}/conf/all/forwarding", "1"))
        yield made
    finally:
        for fd in (*fds, *(pod.fd for pod in pods if pod.fd >= 0)):
            os.close(fd)
        for name in (*(pod.name for pod in pods), *names):
            ip("netns", "del", name, check=False)


def _socket(fd: int, kind: int, address: str, protocol: int = 0) -> socket.socket:
    """A socket born in the namespace `fd`; waits five seconds at most."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = in_netns(fd, lambda: socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))
    made.settimeout(WAIT)
    return made


WAIT = 5.0
"""Seconds for an answer that is due."""
SHORT = 0.3
"""Seconds for an answer that must not come."""


def tcp(client: int, server: int, target: str, source: str = "", wait: float = WAIT) -> str:
    """Connect from namespace to namespace, exchange a line; whom the server saw. Raises OSError."""
    with _socket(server, socket.SOCK_STREAM, target) as listener, _socket(client, socket.SOCK_STREAM, target) as caller:
        listener.bind((target, 0))
        listener.listen()
        caller.settimeout(wait)
        if source:
            caller.bind((source, 0))
        caller.connect((target, listener.getsockname()[1]))
        accepted, peer = listener.accept()
        with accepted:
            accepted.settimeout(WAIT)
            caller.sendall(b"question")
            assert accepted.recv(100) == b"question"
            accepted.sendall(b"answer")
            assert caller.recv(100) == b"answer"
        return str(peer[0])


def udp(client: int, server: int, target: str, source: str = "", wait: float = WAIT) -> str:
    """As `tcp`, a datagram each way."""
    with _socket(server, socket.SOCK_DGRAM, target) as listener, _socket(client, socket.SOCK_DGRAM, target) as caller:
        listener.bind((target, 0))
        caller.settimeout(wait)
        if source:
            caller.bind((source, 0))
        caller.connect((target, listener.getsockname()[1]))
        caller.send(b"question")
        listener.settimeout(wait)
        data, peer = listener.recvfrom(100)
        assert data == b"question"
        listener.sendto(b"answer", peer)
        assert caller.recv(100) == b"answer"
        return str(peer[0])


def ping(client: int, target: str, source: str = "", wait: float = WAIT) -> None:
    """An echo request and its reply. Raises OSError (TimeoutError: no reply)."""
    v6 = ":" in target
    protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    with _socket(client, socket.SOCK_RAW, target, protocol) as caller:
        caller.settimeout(wait)
        if source:
            caller.bind((source, 0))
        token = secrets.token_bytes(8)
        head = bytes((128 if v6 else 8, 0)) + b"\0\0"
        packet = head + token
        if not v6:
            total = sum(int.from_bytes(packet[i : i + 2], "big") for i in range(0, len(packet), 2))
            total = (total & 0xFFFF) + (total >> 16)
            packet = head[:2] + (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big") + token
        caller.sendto(packet, (target, 0))
        while True:
            data = caller.recv(2000)
            reply = data if v6 else data[20:]
            if reply[0] == (129 if v6 else 0) and reply[4:12] == token:
                return
