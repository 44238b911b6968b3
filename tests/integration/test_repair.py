"""What somebody takes away from pods on their node comes back, by the repair loop: real namespaces, real packets."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from agent.repair import RepairLoop
from api.claim import Claim, ClaimSpec, Workload, claim_name
from api.meta import ObjectMeta
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.news import open_news
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import CheckFailedError
from plugins.net.netlink import Netlink
from tests.integration.coordinator_node import (
    NODE4,
    NODE6,
    SECOND4,
    Node,
    Pod,
    batch,
    ip,
    node,
    sysctl,
    tcp,
)

LONG = 1000.0
"""Seconds between two comparisons of all where only news may lead to a repair."""
Body = Callable[[Coordinator, RepairLoop], Awaitable[None]]


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with node() as made:
        yield made


@pytest.fixture
def pod(here: Node) -> Iterator[Pod]:
    made = here.pod()
    yield made
    here.delete(made)


def claims_of(pods: Iterable[Pod]) -> list[Claim]:
    found = []
    for pod in pods:
        for nic in ({} if pod.overlay else {"eth0": pod.addresses}) | pod.further:
            for address in pod.of(nic):
                spec = ClaimSpec(
                    address=address, ip_version=6 if ":" in address else 4, pool="p", container_id=pod.container_id,
                    nic=nic, netns=f"/run/netns/{pod.name}", netns_inode=os.fstat(pod.fd).st_ino,
                    workload=Workload(namespace="ns", name=pod.name),
                )  # fmt: skip
                found.append(Claim(metadata=ObjectMeta(name=claim_name(ip_address(address))), spec=spec))
    return found


def repairing(here: Node, body: Body, *pods: Pod, interval: float = LONG, gather: float = 0.02) -> None:
    """Run `body` beside a repair loop that knows the claims of `pods`."""
    settings = CoordinatorSettings(repair_interval=interval, repair_gather=gather)

    async def main(coordinator: Coordinator) -> None:
        async def ready() -> None: ...

        loop = RepairLoop(coordinator, settings, lambda: claims_of(pods), ready)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(loop.run())
            try:
                await body(coordinator, loop)
            finally:
                task.cancel()

    here.on(main, settings)


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return
        assert time.monotonic() < end, "not within the time"
        await asyncio.sleep(0.02)


async def whole(coordinator: Coordinator, pod: Pod, ifname: str = "eth0", **config: Any) -> bool:
    try:
        await coordinator.check(pod.call("CHECK", ifname=ifname, **config))
    except CheckFailedError:
        return False
    return True


def repairs(kind: str) -> float:
    return REGISTRY.get_sample_value("spiderpool_agent_repairs_total", {"kind": kind}) or 0.0


DAMAGE = [
    (["rule del pref 1000", "-6 rule del pref 1000"], "rule"),
    (["route flush table 500"], "route"),
    (["-6 route flush table 500"], "route"),
    (["rule del pref 1000", "-6 rule del pref 1000", "route flush table 500", "-6 route flush table 500"], "rule"),
    (["route del {v4} table 500"], "route"),
    (["neigh del {v4} dev {link}"], "neighbour"),
    (["neigh flush dev {link} nud permanent"], "neighbour"),
    (["neigh replace {v6} lladdr 02:00:00:00:00:09 dev {link} nud permanent"], "neighbour"),
    (["link set {link} down"], "link"),
    (["link set {link} down", "link set {link} up"], "route"),
    (["link set {link} address 02:00:00:00:00:10"], "node_address"),
    (["route add {v4} dev eth2 table 500"], "stale"),
    (["route add blackhole {v4} table 500"], "stale"),
]


ACROSS = [(commands, kind, False) for commands, kind in DAMAGE if kind != "node_address"]
"""What can be repaired without the pod's namespace, which only a claim names."""


@pytest.mark.parametrize(("commands", "kind", "claimed"), [*((*damage, True) for damage in DAMAGE), *ACROSS])
def test_what_is_taken_away_comes_back(
    here: Node, pod: Pod, commands: list[str], kind: str, claimed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Told by the kernel, and at the next start; also where another IPAM gave the address, and there is no claim."""

    def damage() -> None:
        for command in commands:
            here.ip(*command.format(v4=pod.v4, v6=pod.v6, link=pod.host_link).split())

    here.add(pod)
    before = here.state()
    known = repairs(kind)

    async def told(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        damage()
        assert not await whole(coordinator, pod) or kind == "stale"
        await until(lambda: whole(coordinator, pod))
        await until(lambda: here.state() == before or kind == "node_address")

        await until(lambda: repairs(kind) > known)

    pods = (pod,) if claimed else ()
    repairing(here, told, *pods)
    assert "restored for" in caplog.text
    assert tcp(here.fd, pod.fd, pod.v4)
    assert tcp(pod.fd, here.fd, NODE6) == pod.v6
    damage()

    async def found(coordinator: Coordinator, _: RepairLoop) -> None:
        await until(lambda: whole(coordinator, pod))
        await until(lambda: here.state() == before or kind == "node_address")

    repairing(here, found, *pods)


def test_two_pods_without_claims_and_other_tables(here: Node) -> None:
    """Each has its routes in the table that its configuration named, as long as anything is left there."""
    pods = [here.pod(), here.pod()]
    here.add(pods[0])
    here.add(pods[1], hostRuleTable=501)

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: {pod.container_id for pod in pods} <= loop._known.keys())
        here.ip("route", "flush", "table", "501")
        here.ip("-6", "route", "flush", "table", "501")
        here.ip("rule", "del", "pref", "1000")
        here.ip("rule", "del", "pref", "1000")
        await until(lambda: whole(coordinator, pods[0]))
        await until(lambda: whole(coordinator, pods[1], hostRuleTable=501))

    repairing(here, body)
    for pod in pods:
        assert tcp(here.fd, pod.fd, pod.v4)
        here.delete(pod)
    assert "lookup 50" not in here.ip("rule")


@pytest.mark.parametrize("mode", ["underlay", "overlay"])
def test_further_nics(here: Node, mode: str) -> None:
    pod = here.overlay_pod() if mode == "overlay" else here.pod()
    net1 = here.nic(pod, 1)
    if mode == "underlay":
        here.add(pod)
    here.add(pod, net1)
    before = here.state()

    def damage() -> None:
        for family in ("-4", "-6"):
            here.ip(family, "route", "flush", "table", "500")
            here.ip(family, "rule", "del", "pref", "1000")
        here.ip("neigh", "flush", "dev", pod.node_end, "nud", "permanent")

    async def told(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        damage()
        assert not await whole(coordinator, pod, net1)
        await until(lambda: whole(coordinator, pod, net1))
        await until(lambda: here.state() == before)

    repairing(here, told, pod)
    damage()

    async def found(coordinator: Coordinator, _: RepairLoop) -> None:
        await until(lambda: whole(coordinator, pod, net1))
        await until(lambda: here.state() == before)

    repairing(here, found, pod)
    for address in pod.of(net1):
        assert tcp(here.fd, pod.fd, address)
        assert tcp(pod.fd, here.fd, NODE6 if ":" in address else NODE4, source=address) == address
    here.delete(pod, net1)
    if mode == "underlay":
        here.delete(pod)


def test_a_nic_that_was_deleted_without_its_namespace_stays_so(here: Node) -> None:
    """The pod still tells that it was attached, and its claim is there until IPAM's DEL, which comes next."""
    pod = here.overlay_pod()
    net1 = here.nic(pod, 1)
    before = here.state()

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await coordinator.add(pod.call(ifname=net1))
        await until(lambda: pod.container_id in loop._known)
        await coordinator.delete(pod.call("DEL", fd=None, ifname=net1))
        assert here.state() == before
        await until(lambda: pod.container_id not in loop._known)
        loop._next_full = 0.0
        here.ip("link", "add", "type", "veth")  # news
        await until(lambda: loop._next_full > 0)
        here.ip("link", "delete", "veth0")
        assert here.state() == before
        await coordinator.add(pod.call(ifname=net1))
        here.ip("route", "flush", "table", "500")
        await until(lambda: whole(coordinator, pod, net1))
        await coordinator.delete(pod.call("DEL", ifname=net1))

    repairing(here, body, pod)
    assert here.state() == before


def make_anew(here: Node, pod: Pod) -> None:
    """The link of an overlay, as `Node.overlay_pod` makes it."""
    ip("-n", pod.name, "link", "add", "eth0", "type", "veth", "peer", "name", pod.overlay, "netns", here.name)
    here.ip("link", "set", pod.overlay, "address", "ee:ee:ee:ee:ee:ee", "up")
    pod.ip("link", "set", "eth0", "up")
    for address in pod.addresses:
        length, extra = (128, ["nodad"]) if ":" in address else (32, [])
        pod.ip("address", "add", f"{address}/{length}", "dev", "eth0", *extra)


def test_the_overlay_makes_its_link_anew(here: Node) -> None:
    """With it go the routes on the node and in the pod; those by which pod and node reach each other come back."""
    pod = here.overlay_pod()
    net1 = here.nic(pod, 1)
    here.add(pod, net1)

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        here.ip("link", "delete", pod.overlay)
        await until(lambda: pod.container_id in loop._cut_off)
        assert REGISTRY.get_sample_value("spiderpool_agent_pods_cut_off") == 1
        make_anew(here, pod)
        await until(lambda: pod.container_id not in loop._cut_off)
        for address in pod.of(net1):
            await until(lambda address=address: f"{address} dev {pod.overlay}" in routes())  # type: ignore[misc]
        await until(lambda: f"{NODE4} dev eth0" in pod.ip("route", "show", "table", "101"))

    def routes() -> str:
        return ip("-n", here.name, "route", "show", "table", "500", check=False) + ip(
            "-n", here.name, "-6", "route", "show", "table", "500", check=False
        )

    repairing(here, body, pod)
    for address in pod.of(net1):
        assert tcp(here.fd, pod.fd, address)
    here.delete(pod, net1)


@pytest.mark.parametrize("mode", ["underlay", "overlay"])
def test_addresses_of_the_node_that_come_and_go(here: Node, mode: str) -> None:
    """A virtual IP address: pods reach it by the node while it is there, and by the network when it is not."""
    pod = here.overlay_pod() if mode == "overlay" else here.pod()
    net1 = here.nic(pod, 1)
    if mode == "underlay":
        here.add(pod)
    here.add(pod, net1)
    new = ("10.77.0.9", "fd77::9")

    def tables() -> str:
        main = [pod.ip(f, "route", "show", "table", "main") for f in ("-4", "-6")]
        return "".join(main + [pod.ip(f, "route", "show", "table", "101") for f in ("-4", "-6")]) + pod.ip("neigh")

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        before = here.state(), tables()
        for address in new:
            here.ip("address", "add", f"{address}/{64 if ':' in address else 24}", "dev", "eth2", "nodad")
            await until(lambda address=address: tables().count(f"{address} dev {pod.lead}") == 3)  # type: ignore[misc]
            source = pod.v6 if ":" in address else pod.v4
            assert await asyncio.to_thread(tcp, pod.fd, here.fd, address) == source
            further = next(a for a in pod.of(net1) if (":" in a) == (":" in address))
            assert await asyncio.to_thread(tcp, pod.fd, here.fd, address, further) == further
        for address in new:
            here.ip("address", "del", f"{address}/{64 if ':' in address else 24}", "dev", "eth2")
            await until(lambda address=address: address not in tables())  # type: ignore[misc]
        assert here.state() == before[0]
        await whole(coordinator, pod, net1)

    repairing(here, body, pod)
    here.delete(pod, net1)
    if mode == "underlay":
        here.delete(pod)


def test_the_address_by_which_services_are_reached_goes() -> None:
    with node() as here:
        pod = here.pod()
        here.add(pod)
        assert f"10.96.0.0/12 via {NODE4} dev veth0" in pod.ip("route")

        async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
            await until(lambda: pod.container_id in loop._known)
            here.ip("address", "add", "172.31.9.3/32", "dev", "eth0")
            here.ip("address", "del", f"{NODE4}/24", "dev", "eth0")
            await until(lambda: NODE4 not in pod.ip("route"))
            assert await whole(coordinator, pod)

        repairing(here, body, pod)
        assert NODE4 not in pod.ip("route") + pod.ip("route", "show", "table", "100") + pod.ip("neigh")
        assert "10.96.0.0/12 via 10.88.0.1 dev veth0" in pod.ip("route")
        assert "default via 10.88.0.1 dev veth0" in pod.ip("route", "show", "table", "100")
        for address in ("172.31.9.3", SECOND4):
            assert tcp(pod.fd, here.fd, address) == pod.v4
        here.delete(pod)


def test_news_are_lost(here: Node, pod: Pod, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """More is told than the socket holds: all pods are looked at."""
    here.add(pod)
    caplog.set_level("DEBUG", "agent.repair")

    def narrow(timeout: float) -> Netlink:
        news = open_news(timeout)
        with socket.socket(fileno=os.dup(news.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        return news

    monkeypatch.setattr("agent.repair.open_news", narrow)

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        lines = [f"address {how} 172.18.0.{i}/32 dev docker0" for how in ("add", "del") for i in range(200)]
        lines.append(f"neigh del {pod.v4} dev {pod.host_link}")
        batch(here.name, lines)
        await until(lambda: whole(coordinator, pod))

    repairing(here, body, pod)
    assert "news of changes were lost" in caplog.text


def lines_of(here: Node) -> list[str]:
    """The node's state in lines, sorted: rules of one priority come in the order in which they were added."""
    state = here.state()
    return sorted(line for text in [*state["500"], *state["rules"], state["neighbours"]] for line in text.splitlines())


def test_what_is_not_ours_stays(here: Node, pod: Pod) -> None:
    here.add(pod)
    lines = [
        "rule add from 198.18.0.1 lookup 700 pref 1000",
        "route add 198.18.0.0/24 dev eth2 table 500",
        "route add 198.18.1.1 dev eth2 table 500",
        "route add 198.18.1.2 dev eth2 table 700 proto 83",
        f"neigh replace {pod.v4} lladdr 02:00:00:00:00:77 dev eth2 nud permanent",
        f"neigh replace 198.18.0.9 lladdr 02:00:00:00:00:78 dev {pod.host_link} nud permanent",
    ]
    batch(here.name, lines)
    before = lines_of(here)

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        here.ip("neigh", "del", pod.v6, "dev", pod.host_link)
        here.ip("rule", "del", "pref", "1000", "lookup", "500")
        await until(lambda: whole(coordinator, pod))
        await until(lambda: lines_of(here) == before)

    try:
        repairing(here, body, pod)
    finally:
        here.ip("rule", "del", "from", "198.18.0.1", "lookup", "700")
        here.ip("route", "flush", "table", "700")
        batch(here.name, ["route del 198.18.0.0/24 table 500", "route del 198.18.1.1 table 500"])
        batch(here.name, [f"neigh del {pod.v4} dev eth2"])


def test_the_earlier_owner_of_an_address_gets_nothing(here: Node) -> None:
    """Its container died, its DEL is still to come, and another pod has its address: as its claim says."""
    old = here.pod()
    here.add(old)
    old.ip("link", "set", "eth0", "down")
    new = here.pod(*old.addresses)
    here.add(new)
    before = here.state()

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: {old.container_id, new.container_id} <= loop._known.keys())
        assert here.state() == before
        for family in ("-4", "-6"):
            here.ip(family, "route", "flush", "table", "500")
        here.ip("link", "set", old.host_link, "down")
        await until(lambda: whole(coordinator, new))
        loop._next_full = 0.0
        here.ip("link", "set", old.host_link, "down")
        await until(lambda: loop._next_full > 0)
        assert old.host_link not in here.ip("route", "show", "table", "500")

    repairing(here, body, new)
    assert tcp(here.fd, new.fd, new.v4)
    here.delete(old)
    here.check(new)
    here.delete(new)


def test_beside_additions_and_deletions(here: Node) -> None:
    """The loop and the plugin do not get into each other's way."""
    pods = [here.pod() for _ in range(12)]
    before = here.state()

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        stop = asyncio.Event()

        async def disturb() -> None:
            while not stop.is_set():
                ip("-n", here.name, "rule", "del", "pref", "1000", check=False)
                ip("-n", here.name, "route", "flush", "table", "500", check=False)
                await asyncio.sleep(0.05)

        disturbing = asyncio.create_task(disturb())
        for _ in range(3):
            await asyncio.gather(*(coordinator.add(pod.call()) for pod in pods))
            await asyncio.gather(*(coordinator.delete(pod.call("DEL", fd=None)) for pod in pods[:6]))
            await asyncio.gather(*(coordinator.delete(pod.call("DEL")) for pod in pods))
        await asyncio.gather(*(coordinator.add(pod.call()) for pod in pods))
        stop.set()
        await disturbing
        for pod in pods:
            await until(lambda pod=pod: whole(coordinator, pod))  # type: ignore[misc]
        await asyncio.gather(*(coordinator.delete(pod.call("DEL")) for pod in pods))
        await until(lambda: not loop._known)
        assert here.state() == before

    repairing(here, body, *pods)
    assert here.state() == before


def test_who_takes_away_again_and_again_is_not_fought(here: Node, pod: Pod) -> None:
    here.add(pod)

    async def body(_: Coordinator, loop: RepairLoop) -> None:
        await until(lambda: pod.container_id in loop._known)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            ip("-n", here.name, "route", "del", pod.v4, "table", "500", check=False)
            await asyncio.sleep(0.01)
        took = time.monotonic() - began
        count = loop._restraints[pod.container_id].times
        assert 2 <= count <= math.log2(took / 0.02) + 1

    repairing(here, body, pod)


def test_udev_sets_rp_filter(here: Node, pod: Pod) -> None:
    """As systemd-udevd does with what sysctl.d says of new links, after the ADD."""
    here.add(pod)

    async def body(coordinator: Coordinator, loop: RepairLoop) -> None:
        path = f"ipv4/conf/{pod.host_link}/rp_filter"
        file = Path("/proc/sys/net", path)
        await until(lambda: pod.container_id in loop._known)
        sysctl(path, "2")
        await until(lambda: file.read_text().strip() == "0")

    repairing(here, body, pod)


def test_news_of_others_wake_nobody(here: Node) -> None:
    news = here.run(lambda: open_news(5))
    try:
        others = [
            "route add 198.18.7.0/24 dev eth2",
            "route del 198.18.7.0/24 dev eth2",
            "-6 route add 2001:db8:77::/64 dev eth2",
            "-6 route del 2001:db8:77::/64 dev eth2",
            "neigh replace 198.18.7.1 lladdr 02:00:00:00:00:09 dev docker0 nud stale",
        ]
        for each in others:
            here.ip(*each.split())
        assert not list(news.pending())
        ours = [
            ("route add 198.18.7.0/24 dev eth2 proto 83", 24),
            ("route del 198.18.7.0/24 dev eth2", 25),
            ("-6 route add 2001:db8:77::/64 dev eth2 table 500", 24),
            ("-6 route del 2001:db8:77::/64 dev eth2 table 500", 25),
            ("neigh replace 198.18.7.1 lladdr 02:00:00:00:00:09 dev docker0 nud permanent", 28),
            ("neigh del 198.18.7.1 dev docker0", 29),
            ("rule add lookup 999 pref 5", 32),
            ("rule del pref 5", 33),
        ]
        for each, kind in ours:
            here.ip(*each.split())
            assert [told for told, _ in news.pending()] == [kind], each
    finally:
        news.close()
