"""What the tests of the vlan plugin share: a node with one wire, pods, and the plugin on a real IPAM."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from api.claim import Controller
from api.core import Namespace, Pod
from api.meta import ObjectMeta
from api.multusconfig import MultusConfig, MultusConfigSpec, VlanConfig
from plugins.cni import Call, Command
from plugins.ipam.pods import NoPods, PodFacts
from plugins.ipam.provider import Provider
from plugins.ipam.settings import IpamSettings
from plugins.net.netns import in_netns
from plugins.vlan.vlan import Vlan
from store.provider import ProviderClient, ProviderSettings
from tests.integration.fake_provider import FakeProvider
from tests.integration.ipam_rig import DEFAULTS, Trouble, call, opened, running

T = TypeVar("T")
NETWORK = "kube-system/vlan-auto"


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass
class PodNs:
    """A pod's network namespace."""

    name: str
    fd: int

    def call(self, command: Command = "ADD", *, nic: str = "eth0", v6: bool = False, **config: Any) -> Call:
        """A call for the NIC on the node's eth0, by default as VLAN 0."""
        whole: dict[str, Any] = {"type": "vlan", "master": "eth0", "vlanMode": "manual", "vlanId": 0, "mtu": 0}
        whole = {key: value for key, value in (whole | config).items() if value is not None}
        families: Any = {"v6": ("v6",)} if v6 else {}
        path = f"/run/netns/{self.name}"
        return call(self.name, command, nic=nic, config=whole, netns=path, netns_fd=self.fd, **families)

    def link(self, name: str = "eth0") -> Any:
        """The link as `ip` tells it, or None."""
        told = json.loads(ip("-n", self.name, "-d", "-j", "address", "show"))
        return next((link for link in told if link["ifname"] == name), None)

    def links(self) -> list[str]:
        """All links but those that a namespace is born with."""
        told = json.loads(ip("-n", self.name, "-j", "link", "show"))
        return [link["ifname"] for link in told if link["link_type"] == "ether"]

    def routes(self, *family: str) -> list[tuple[str, str]]:
        """(destination, gateway) of the routes that have one."""
        told = json.loads(ip("-n", self.name, "-j", *family, "route", "show"))
        return [(route["dst"], route["gateway"]) for route in told if "gateway" in route]


@dataclass
class Place:
    """A node whose eth0 leads to `outside`'s."""

    node: str
    node_fd: int
    outside: str
    _pods: list[PodNs] = field(default_factory=list)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `work` by a process whose namespace is the node's."""
        return in_netns(self.node_fd, lambda: asyncio.run(work()))

    def pod(self) -> PodNs:
        """A new pod."""
        name = f"{self.node}-{len(self._pods)}"
        ip("netns", "add", name)
        pod = PodNs(name, os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC))
        self._pods.append(pod)
        return pod

    def close(self) -> None:
        """Remove everything."""
        for pod in self._pods:
            os.close(pod.fd)
        os.close(self.node_fd)
        for name in (*(pod.name for pod in self._pods), self.node, self.outside):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


@contextmanager
def place() -> Iterator[Place]:
    """A node and what is outside it; gone afterwards."""
    name = f"spt-{secrets.token_hex(3)}"
    outside = f"{name}-out"
    ip("netns", "add", name)
    made = Place(name, os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC), outside)
    try:
        ip("netns", "add", outside)
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for end in (name, outside):
            ip("-n", end, "link", "set", "lo", "up")
            ip("-n", end, "link", "set", "eth0", "up")
        yield made
    finally:
        made.close()


class Attached(NoPods):
    """Every pod of the test's calls, whose first network is the one whose VLAN the provider chooses."""

    async def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:
        said = {"v1.multus-cni.io/default-network": NETWORK}
        meta = ObjectMeta(name=name, namespace=namespace, uid=uid, annotations=said)
        owner = Controller(api_version="v1", kind="Pod", name=name, uid=uid)
        return PodFacts(Pod(metadata=meta), Namespace(metadata=ObjectMeta(name=namespace)), owner, "", {})


@asynccontextmanager
async def serving(directory: Any, settings: IpamSettings = DEFAULTS) -> AsyncIterator[tuple[Vlan, Trouble]]:
    """The plugin on an IPAM that is ready, and its store."""
    async with opened(f"{directory}/store.db") as store, running(store, settings=settings) as ipam:
        yield Vlan(ipam, has_provider=False, kernel_timeout=10, undo_deadline=5), store


@asynccontextmanager
async def provided(
    directory: Any, fake: FakeProvider, settings: IpamSettings = DEFAULTS
) -> AsyncIterator[tuple[Vlan, Trouble]]:
    """The same where the fake provider chooses VLAN and MAC address of all NICs."""
    client = ProviderClient(ProviderSettings(server_url=fake.url))
    try:
        async with opened(f"{directory}/store.db") as store:
            namespace, _, name = NETWORK.partition("/")
            spec = MultusConfigSpec(cni_type="vlan", vlan=VlanConfig(master=["lo"], vlan_mode="auto"))
            await store.create(MultusConfig(metadata=ObjectMeta(name=name, namespace=namespace), spec=spec))
            provider = Provider(store, settings, client)
            async with running(store, settings=settings, pods=Attached(), provider=provider) as ipam:
                yield Vlan(ipam, has_provider=True, kernel_timeout=10, undo_deadline=5), store
    finally:
        await client.close()
