"""A node with an uplink, its router, a place behind the node, and pods on a macvlan, all as network namespaces.

far ── eth2 [node] eth0 ── segment ── eth0 [router]
                              └── eth0 (macvlan on the node's eth0) [pod]
            [node] seg1 ── further segment ── eth0 [outside 1]
                              └── net1 (macvlan on the node's seg1) [pod]

A pod of an overlay has instead of the macvlan eth0 one end of a veth pair as Calico leaves it: addresses /32 and /128,
a link-local gateway, the node's end `cali…`.
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
TABLES = ("main", "99", "100", "101", "102", "103")

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


def batch(namespace: str, lines: list[str], *options: str) -> str:
    """As `ip`, several of them."""
    argv, text = ["ip", "-n", namespace, *options, "-batch", "-"], "\n".join(lines)
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise AssertionError(f"ip -n {namespace}: {text}\n{done.stderr}")
    return done.stdout


def add_address(namespace: str, address: str, link: str, *, whole: bool = False) -> None:
    """Put an address on a link: /24 or /64, or alone in its network."""
    v6 = ":" in address
    length = (128 if v6 else 32) if whole else (64 if v6 else 24)
    ip("-n", namespace, "address", "add", f"{address}/{length}", "dev", link, *(["nodad"] if v6 else []))


@dataclass
class Pod:
    name: str
    container_id: str
    addresses: list[str]
    fd: int = -1
    further: dict[str, list[str]] = field(default_factory=dict)
    """Addresses of further NICs, by name."""
    seats: dict[str, Segment] = field(default_factory=dict)
    """The segments that its NICs are on, by name."""
    overlay: str = ""
    """Name of the node's end of eth0, in a pod of an overlay."""

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

    @property
    def lead(self) -> str:
        """The link that leads to the node."""
        return "eth0" if self.overlay else "veth0"

    @property
    def node_end(self) -> str:
        """The node's end of it."""
        return self.overlay or self.host_link

    def of(self, ifname: str) -> list[str]:
        """The addresses of a NIC."""
        return self.addresses if ifname == "eth0" else self.further[ifname]

    def previous(self, version: str = "1.0.0", ifname: str = "eth0") -> dict[str, Any]:
        return {
            "cniVersion": version,
            "interfaces": [
                {"name": ifname, "sandbox": f"/run/netns/{self.name}", "mtu": 1500, "x-own": {"kept": True}}
            ],
            "ips": [{"address": f"{a}/{64 if ':' in a else 24}", "interface": 0} for a in self.of(ifname)],
            "routes": [{"dst": "0.0.0.0/0", "mtu": 1400}],
            "dns": {},
            "x-unknown": ["kept", 1],
        }

    def call(self, command: Command = "ADD", *, fd: int | None = -1, ifname: str = "eth0", **config: Any) -> Call:
        version = config.pop("cniVersion", "1.1.0")
        netconf: dict[str, Any] = {
            "cniVersion": version, "name": "underlay", "type": "coordinator",
            "serviceCIDR": [SERVICE4, SERVICE6],
            "prevResult": self.previous(version, ifname if ifname in self.further else "eth0"), **config,
        }  # fmt: skip
        return Call(
            plugin="coordinator", command=command, container_id=self.container_id, netns=f"/run/netns/{self.name}",
            netns_fd=self.fd if fd == -1 else fd, ifname=ifname, args={}, path="", config=netconf, cni_version=version,
        )  # fmt: skip


@dataclass
class Segment:
    """A network of NICs: a namespace at its other end, which is its router and has addresses behind it.

    Number 0 is the one of the node's own address and of pods' first NICs.
    """

    number: int
    name: str
    """Of the namespace."""
    fd: int
    master: str
    """The node's link to it."""
    link: str = "eth0"
    """The namespace's."""

    def address(self, version: int, number: int) -> str:
        third = 9 if self.number == 0 else 20 + self.number
        return f"172.31.{third}.{number}" if version == 4 else f"fd31:{third}::{number}"

    def gateway(self, version: int) -> str:
        return self.address(version, 1)

    def behind(self, version: int) -> str:
        """Somebody whom only this segment's router knows; that of number 0 seems to be in the network of number 1."""
        if self.number == 0:
            return "172.31.21.200" if version == 4 else "fd31:21::200"
        return f"203.0.113.{self.number}" if version == 4 else f"2001:db8:{20 + self.number}::7"

    def equip(self) -> None:
        """Give the namespace its addresses, and set its link up."""
        for version in (4, 6):
            add_address(self.name, self.gateway(version), self.link)
            add_address(self.name, self.behind(version), "lo", whole=True)
        ip("-n", self.name, "link", "set", self.link, "up")


@dataclass
class Node:
    name: str
    router: str
    far: str
    fd: int
    router_fd: int
    far_fd: int
    pods: list[Pod] = field(default_factory=list)
    segments: dict[int, Segment] = field(default_factory=dict)

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

    def add(self, pod: Pod, ifname: str = "eth0", **config: Any) -> Mapping[str, Any]:
        return self.on(lambda c: c.add(pod.call(ifname=ifname, **config)))

    def delete(self, pod: Pod, ifname: str = "eth0", fd: int | None = -1, **config: Any) -> None:
        self.on(lambda c: c.delete(pod.call("DEL", fd=fd, ifname=ifname, **config)))

    def check(self, pod: Pod, ifname: str = "eth0", **config: Any) -> None:
        self.on(lambda c: c.check(pod.call("CHECK", ifname=ifname, **config)))

    def segment(self, number: int) -> Segment:
        """The further segment of that number."""
        if number not in self.segments:
            name = f"spt-{secrets.token_hex(4)}"
            ip("netns", "add", name)
            fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            made = self.segments[number] = Segment(number, name, fd, f"seg{number}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", made.master, "netns", self.name)
            made.equip()
            ip("-n", self.name, "link", "set", made.master, "up")
            self.lead_from_far(made)
        return self.segments[number]

    def nic(self, pod: Pod, number: int, versions: str = "46", name: str = "") -> str:
        """A further NIC of `pod` on the segment of that number, as the CNI plugin of its kind leaves it; its name."""
        segment, name = self.segment(number), name or f"net{number}"
        last = self.pods.index(pod) + 10
        pod.further[name] = [segment.address(int(version), last) for version in versions]
        self._attach(pod, segment, name, pod.further[name])
        return name

    def lay_out_far(self) -> None:
        """Make the link to `far`, with addresses and routes on both sides."""
        ip("-n", self.far, "link", "add", "eth0", "type", "veth", "peer", "name", "eth2", "netns", self.name)
        for namespace, link, addresses in (
            (self.name, "eth2", (SECOND4, SECOND6)),
            (self.far, "eth0", ("10.77.0.2", "fd77::2")),
        ):
            ip("-n", namespace, "link", "set", link, "up")
            for address in addresses:
                add_address(namespace, address, link)
        for address in (FAR4, FAR6):
            add_address(self.far, address, "eth0", whole=True)
        self.ip("route", "add", FAR4, "via", "10.77.0.2")
        self.ip("-6", "route", "add", FAR6, "via", "fd77::2")

    def lead_from_far(self, segment: Segment) -> None:
        """Let `far` send to the pods of a segment by way of the node."""
        for version, length, gateway in ((4, 24, SECOND4), (6, 64, SECOND6)):
            ip("-n", self.far, f"-{version}", "route", "add", f"{segment.address(version, 0)}/{length}", "via", gateway)

    def link(self, pod: Pod, segment: Segment, name: str) -> None:
        """Give the pod a NIC on a segment, down and without addresses."""
        kind = "type macvlan mode bridge"
        orders = [f"link add tmp0 link {segment.master} {kind}", f"link set tmp0 netns {pod.name} name {name}"]
        batch(self.name, orders)

    def _attach(self, pod: Pod, segment: Segment, name: str, addresses: list[str]) -> None:
        pod.seats[name] = segment
        self.link(pod, segment, name)
        lines = [f"link set {name} up"]
        for address in addresses:
            v6 = ":" in address
            family, length, extra = (6, 64, "nodad") if v6 else (4, 24, "")
            lines.append(f"address add {address}/{length} dev {name} {extra}")
            # As the CNI plugins do: of IPv4's default routes the last one is the first.
            how = "append" if v6 else "prepend"
            lines.append(f"route {how} default via {segment.gateway(family)} dev {name}")
        batch(pod.name, lines)

    def _new_pod(self, addresses: list[str], container_id: str) -> Pod:
        name = f"spt-{secrets.token_hex(4)}"
        ip("netns", "add", name)
        pod = Pod(name, container_id or secrets.token_hex(32), addresses)
        self.pods.append(pod)
        pod.fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        pod.ip("link", "set", "lo", "up")
        return pod

    def overlay_pod(self, versions: str = "46") -> Pod:
        """A namespace with an eth0 as Calico leaves it."""
        number = len(self.pods) + 10
        addresses = [f"10.244.0.{number}" if version == "4" else f"fd10:244::{number}" for version in versions]
        pod = self._new_pod(addresses, "")
        pod.overlay = f"cali{secrets.token_hex(5)}"
        pod.ip("link", "add", "eth0", "type", "veth", "peer", "name", pod.overlay, "netns", self.name)
        for path, value in ((f"ipv4/conf/{pod.overlay}/proxy_arp", "1"), (f"ipv6/conf/{pod.overlay}/accept_dad", "0")):
            self.run(partial(sysctl, path, value))
        here, there = [f"link set {pod.overlay} address ee:ee:ee:ee:ee:ee up"], ["link set eth0 up"]
        for address in addresses:
            v6 = ":" in address
            length, gateway = (128, "fe80::ecee:eeff:feee:eeee") if v6 else (32, "169.254.1.1")
            there.append(f"address add {address}/{length} dev eth0 {'nodad' if v6 else ''}")
            here.append(f"route add {address}/{length} dev {pod.overlay}")
            if not v6:
                there.append(f"route add {gateway} dev eth0 scope link")
            there.append(f"route add default via {gateway} dev eth0")
        batch(self.name, here)
        batch(pod.name, there)
        return pod

    def pod(self, *addresses: str, container_id: str = "") -> Pod:
        """A namespace with an eth0 on segment 0 as the CNI plugin of its kind leaves it."""
        number = len(self.pods) + 10
        pod = self._new_pod(list(addresses or (f"172.31.9.{number}", f"fd31:9::{number}")), container_id)
        self._attach(pod, self.segments[0], "eth0", pod.addresses)
        return pod

    def remove(self, pod: Pod) -> None:
        """End the pod. Its links go at once, not when the kernel gets to it."""
        if pod.overlay:
            self.ip("link", "delete", pod.overlay)
        os.close(pod.fd)
        pod.fd = -1
        ip("netns", "delete", pod.name)

    def left(self) -> str:
        """What there is on the node of any pod; nothing if all were deleted."""
        routes = "route show table all proto 83"
        asked = [routes, "rule show lookup 500", "neigh show nud permanent", "link show type veth group 1397770564"]
        told = [batch(self.name, asked, family) for family in FAMILIES]
        return "".join(told)

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
            *(ip("-n", pod.name, "route", "show", "table", t, check=False) for t in TABLES),
            # Without an order: the next hops of one IPv6 route have none that means anything.
            *(sorted(ip("-n", pod.name, "-6", "route", "show", "table", t, check=False).splitlines()) for t in TABLES),
        ],
        "rules": [pod.ip(family, "rule") for family in FAMILIES],
        "neighbours": pod.ip("neigh", "show", "nud", "permanent"),
        "filters": pod.run(filters),
        "sysctls": pod.run(sysctls),
    }


def sysctl(path: str, value: str) -> None:
    with open(f"/proc/sys/net/{path}", "w") as file:
        file.write(value)


def _lay_out(made: Node) -> None:
    name = made.name
    ip("-n", made.router, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name)
    made.segments[0].equip()
    for address in (FIRST4, NODE4, NODE6):
        add_address(name, address, "eth0")
    made.ip("link", "set", "eth0", "up")
    made.lay_out_far()
    made.lead_from_far(made.segments[0])
    # A link of the node whose address belongs to a container network, so that pods do not look for it on the node.
    batch(name, ["link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0", "link set docker0 up"])
    for family in ("ipv4", "ipv6"):
        made.run(partial(sysctl, f"{family}/conf/all/forwarding", "1"))


@contextmanager
def node() -> Iterator[Node]:
    """A node that forwards; everything is removed in the end."""
    with namespaces(3) as (names, fds):
        segments = {0: Segment(0, names[1], fds[1], "eth0")}
        made = Node(names[0], names[1], names[2], fds[0], fds[1], fds[2], segments=segments)
        try:
            _lay_out(made)
            yield made
        finally:
            further = [segment for segment in made.segments.values() if segment.number]
            living = [(pod.name, pod.fd) for pod in made.pods if pod.fd >= 0]
            for name, fd in (*living, *((segment.name, segment.fd) for segment in further)):
                os.close(fd)
                ip("netns", "del", name, check=False)


@contextmanager
def namespaces(count: int) -> Iterator[tuple[list[str], list[int]]]:
    """Network namespaces with lo up: their names and descriptors."""
    names = [f"spt-{secrets.token_hex(4)}" for _ in range(count)]
    fds: list[int] = []
    try:
        for name in names:
            ip("netns", "add", name)
            fds.append(os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC))
            ip("-n", name, "link", "set", "lo", "up")
        yield names, fds
    finally:
        for fd in fds:
            os.close(fd)
        for name in names:
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
