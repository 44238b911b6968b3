"""The agent is killed after each change of an ADD in turn: a repeated ADD succeeds, DEL leaves nothing.

A real agent (IPAM, repair loop, queue; no dataplane) is called by the real executable. For each change of the ADD:
killed, another agent starts, ADD again, CHECK, DEL; and killed, DEL while there is no agent, which the executable
queues without the namespace, another agent starts. After each DEL everything is compared with what was there before:
links, addresses, rules, routes of all tables, permanent neighbours, nf_tables and sysctls.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plugins.coordinator.attachment import PROTOCOL
from plugins.coordinator.facts import read_routes, read_rules
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_ROUTE, Netlink
from plugins.net.netns import in_netns
from plugins.net.rtwhole import WholeRoute
from tests.integration.coordinator_node import SERVICE4, SERVICE6, Node, Pod, ip, node, sysctl
from tests.integration.installation import ROOT, Installation, Outcome
from tests.integration.ipam_rig import opened, pool
from tests.integration.kill_child import ORDER

FEWEST = 25
"""Changes that an ADD makes at least; with fewer, the test would have looked at something else."""


class Gallows:
    """Agents of one node, one after the other, each of which may be told to die."""

    def __init__(self, here: Node, root: Path) -> None:
        self.cni = Installation(root)
        self._here = here
        path = root / "order"
        path.write_bytes(bytes(ORDER.size))
        with path.open("r+b") as file:
            self._order = mmap.mmap(file.fileno(), ORDER.size)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(root / "notify"))
        self._notify.settimeout(20)
        program = [sys.executable, "-m", "tests.integration.kill_child", str(path)]
        self._forks = subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._pid = 0

    def start(self) -> None:
        """An agent that is ready: what was queued is done."""
        config = {
            "netns": f"/run/netns/{self._here.name}",
            "flags": self.cni.flags("--dataplane-enabled=false", "--node-name=node1"),
            "env": {"NOTIFY_SOCKET": str(self.cni.root / "notify")},
            "log": str(self.cni.root / "log"),
        }
        self._pid = self._ask(config)
        while self._notify.recv(100) != b"READY=1":
            pass

    def end(self) -> int:
        """Wait for the agent's end; its exit status."""
        pid, self._pid = self._pid, 0
        return self._ask(pid)

    def order(self, fatal: int) -> None:
        """Let the agent die with that change of an ADD; 0: live."""
        ORDER.pack_into(self._order, 0, fatal, 0)

    @property
    def done(self) -> int:
        """Changes since the last order."""
        return int(ORDER.unpack_from(self._order)[1])

    def log(self) -> str:
        return (self.cni.root / "log").read_text()

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.end()
        self._forks.communicate(timeout=5)
        self._notify.close()
        self._order.close()

    def _ask(self, question: Any) -> int:
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(question) + "\n")
        self._forks.stdin.flush()
        return int(self._forks.stdout.readline())


@contextmanager
def gallows(here: Node, root: Path) -> Iterator[Gallows]:
    made = Gallows(here, root)
    try:
        yield made
    finally:
        made.close()


def but_for(route: WholeRoute, links: set[int]) -> WholeRoute | None:
    """The route without what another plugin made of it when it gave one of the links a default route."""
    if not route.is_default or route.protocol == PROTOCOL:
        return route
    left: WholeRoute | None = route
    for index in links:
        left = left.without(index) if left is not None else None
    return left


def everything(fd: int, nic: str = "") -> dict[str, Any]:
    """All of a namespace that an ADD might change, and that does not change by itself.

    The default route of a further `nic` is left out: it goes to the NIC's table at ADD, and with the NIC after DEL.
    """

    def read() -> dict[str, Any]:
        with Netlink(NETLINK_ROUTE, 5) as kernel:
            links = sorted(rtlink.parse_link(body) for body in kernel.dump(rtlink.link_dump()))
            addresses = sorted(map(str, rtlink.parse_addresses(kernel.dump(rtlink.address_dump()))))
            neighbours = [
                neighbour
                for link in links
                for neighbour in rtroute.parse_neighbours(kernel.dump(rtroute.neighbour_dump(link.ifindex)))
                if neighbour.state & rtroute.STATE_PERMANENT
            ]
            own = {link.ifindex for link in links if link.name == nic}
            routes = sorted(repr(left) for route in read_routes(kernel) if (left := but_for(route, own)) is not None)
            rules = sorted(map(str, read_rules(kernel)))
        nft = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True, timeout=10).stdout
        return {
            "links": links, "addresses": addresses, "neighbours": sorted(map(str, neighbours)), "routes": routes,
            "rules": rules, "nft": nft.splitlines(), "sysctls": sysctls(),
        }  # fmt: skip

    return in_netns(fd, read)


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What came and what went."""
    found = {}
    for what, value in before.items():
        one, other = (list(each.items()) if isinstance(each, dict) else each for each in (value, after[what]))
        if one != other:
            found[what] = [x for x in other if x not in one], [x for x in one if x not in other]
    return found


def sysctls() -> dict[str, bytes]:
    """What links have, and what new ones get."""
    found = {}
    for version in (4, 6):
        for folder, _, names in os.walk(f"/proc/sys/net/ipv{version}/conf"):
            for name in names:
                path = f"{folder}/{name}"
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except PermissionError:
                    continue  # written only
                try:
                    found[path] = os.read(fd, 100)
                except OSError:
                    continue  # without a value, as stable_secret
                finally:
                    os.close(fd)
    return found


def settle(fd: int) -> None:
    """Wait until duplicate address detection is over, which would change what is compared; new links go without."""
    for which in ("all", "default"):
        in_netns(fd, partial(sysctl, f"ipv6/conf/{which}/accept_dad", "0"))

    def tentative() -> bool:
        with Netlink(NETLINK_ROUTE, 5) as kernel:
            found = rtlink.parse_addresses(kernel.dump(rtlink.address_dump()))
        return any(address.flags & rtlink.ADDRESS_TENTATIVE for address in found)

    end = time.monotonic() + 20
    while in_netns(fd, tentative):
        assert time.monotonic() < end, "addresses stay tentative"
        time.sleep(0.05)


def call(cni: Installation, pod: Pod, command: str, ifname: str, *, dead: bool = False) -> Outcome:
    config = {
        "cniVersion": "1.1.0", "name": "underlay", "type": "coordinator", "serviceCIDR": [SERVICE4, SERVICE6],
        "podMACPrefix": "0a:1b", "prevResult": pod.previous("1.1.0", ifname),
    }  # fmt: skip
    netns = "" if dead else f"/run/netns/{pod.name}"
    return cni.call(
        command, config, name="coordinator", netns=netns, CNI_CONTAINERID=pod.container_id, CNI_IFNAME=ifname
    )


def allocate(cni: Installation, pod: Pod, ifname: str) -> None:
    """IPAM's ADD: the claims by which the repair loop knows the pod."""
    ipam = {"type": "spiderpool", "default_ipv4_ippool": [f"{ifname}-4"], "default_ipv6_ippool": [f"{ifname}-6"]}
    config = {"cniVersion": "1.1.0", "name": "underlay", "type": "macvlan", "ipam": ipam}
    outcome = cni.call(
        "ADD", config, netns=f"/run/netns/{pod.name}", CNI_CONTAINERID=pod.container_id, CNI_IFNAME=ifname
    )
    assert sorted(ip["address"].partition("/")[0] for ip in outcome.json["ips"]) == sorted(pod.of(ifname)), outcome


def prepare(cni: Installation, pod: Pod, nics: list[str]) -> None:
    """A pool for each address."""

    async def create() -> None:
        async with opened(str(cni.root / "store.db")) as store:
            for nic in nics:
                for address in pod.of(nic):
                    v6 = ":" in address
                    subnet = f"{address.rpartition(':')[0]}:/64" if v6 else f"{address.rpartition('.')[0]}.0/24"
                    await pool(store, f"{nic}-{6 if v6 else 4}", address, subnet=subnet)

    asyncio.run(create())


def restored(here: Node, pod: Pod, nic: str) -> None:
    """The agent's repair loop, as it is shipped, knows the pod."""
    before = here.state()
    for family in ("-4", "-6"):
        here.ip(family, "route", "flush", "table", "500")
        here.ip(family, "rule", "del", "pref", "1000")
    here.ip("neigh", "del", pod.of(nic)[0], "dev", pod.node_end)
    end = time.monotonic() + 20
    while here.state() != before:
        assert time.monotonic() < end, here.state()
        time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scene", ["underlay, first NIC", "underlay, second NIC", "overlay, second NIC"])
def test_killed_after_each_change(scene: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    with node() as here, gallows(here, tmp_path) as agents:
        cni = agents.cni
        pod = here.overlay_pod() if scene.startswith("overlay") else here.pod()
        nics = ([] if pod.overlay else ["eth0"]) + ([] if "first" in scene else [here.nic(pod, 1)])
        for fd in (here.fd, pod.fd):
            settle(fd)
        prepare(cni, pod, nics)
        agents.start()
        for nic in nics:
            allocate(cni, pod, nic)
        if len(nics) == 2:
            assert call(cni, pod, "ADD", "eth0").status == 0
        nic = nics[-1]
        assert call(cni, pod, "ADD", nic).status == 0  # what an ADD does to a NIC itself stays: its MAC, sysctls
        assert call(cni, pod, "DEL", nic).status == 0
        further = nic if nic != "eth0" else ""
        before = everything(here.fd), everything(pod.fd, further)

        def left(when: str) -> None:
            assert not changed(before[0], everything(here.fd)), when
            assert not changed(before[1], everything(pod.fd, further)), when

        def add() -> Outcome:
            """As by a runtime whose plugin has just made the NIC."""
            for version in (4, 6) if further else ():
                route = f"default via {here.segment(1).gateway(version)} dev {further}".split()
                ip("-n", pod.name, f"-{version}", "route", "append", *route, check=False)
            return call(cni, pod, "ADD", nic)

        for change in range(1, 1000):
            when = f"after change {change}"
            agents.order(change)
            outcome = add()
            if outcome.status == 0:
                assert agents.done < change
                restored(here, pod, nic)
                assert call(cni, pod, "DEL", nic).status == 0
                break
            outcome.error(11, "1.1.0")
            assert agents.end() == -signal.SIGKILL
            agents.order(0)
            agents.start()
            assert add().status == 0, when
            call(cni, pod, "CHECK", nic).empty()
            call(cni, pod, "DEL", nic).empty()
            left(f"{when}, ADD again and DEL")
            agents.order(change)
            assert add().status == 1
            assert agents.end() == -signal.SIGKILL
            agents.order(0)
            call(cni, pod, "DEL", nic, dead=True).empty()
            assert len(cni.queued()) == 1
            agents.start()
            assert not changed(before[0], everything(here.fd)), f"{when}, queued DEL"
            call(cni, pod, "DEL", nic).empty()
            left(f"{when}, DEL")
        assert agents.done >= FEWEST
        left("in the end")
        assert '"level": "error"' not in agents.log()
        assert '"level": "critical"' not in agents.log()
