"""A node with an uplink, the segment it is on, and pods on a macvlan, all as network namespaces made and removed here."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from plugins.cni import Call, Command
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.settings import CoordinatorSettings
from plugins.net.netns import in_netns

T = TypeVar("T")

NODE4, NODE6 = "172.31.9.2", "fd31:9::2"
ROUTER4, ROUTER6 = "172.31.9.1", "fd31:9::1"
SECOND4 = "10.77.0.1"
"""Another address of the node, on another link."""
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
    stops: list[Callable[[], None]] = field(default_factory=list)

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
    outside: str
    fd: int
    outside_fd: int
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
        "rules": [pod.ip(f, "rule") for f in ("-4", "-6")],
        "neighbours": pod.ip("neigh", "show", "nud", "permanent"),
        "filters": pod.run(filters),
        "sysctls": pod.run(sysctls),
    }


@contextmanager
def node() -> Iterator[Node]:
    """A node; everything is removed in the end."""
    name, outside = f"spt-{secrets.token_hex(4)}", f"spt-{secrets.token_hex(4)}"
    made: Node | None = None
    try:
        for namespace in (name, outside):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", outside, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name)
        for namespace, v4, v6 in ((name, NODE4, NODE6), (outside, ROUTER4, ROUTER6)):
            ip("-n", namespace, "link", "set", "eth0", "up")
            ip("-n", namespace, "address", "add", f"{v4}/24", "dev", "eth0")
            ip("-n", namespace, "address", "add", f"{v6}/64", "dev", "eth0", "nodad")
        # Another link of the node with an address, and one whose address belongs to a container network.
        for link, address in (("eth1", f"{SECOND4}/24"), ("docker0", "172.17.0.1/16")):
            ip("-n", name, "link", "add", link, "type", "bridge")
            ip("-n", name, "address", "add", address, "dev", link)
            ip("-n", name, "link", "set", link, "up")
        made = Node(
            name, outside,
            os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC),
            os.open(f"/run/netns/{outside}", os.O_RDONLY | os.O_CLOEXEC),
        )  # fmt: skip
        yield made
    finally:
        if made is not None:
            for pod in made.pods:
                for stop in reversed(pod.stops):
                    stop()
                if pod.fd >= 0:
                    os.close(pod.fd)
                ip("netns", "del", pod.name, check=False)
            os.close(made.fd)
            os.close(made.outside_fd)
        ip("netns", "del", name, check=False)
        ip("netns", "del", outside, check=False)
