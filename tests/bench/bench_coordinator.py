"""The coordinator's underlay ADD of a dual-stack pod against `ip -batch` and `iptables-restore` doing the same.

The reference gets everything that the coordinator has to find out (addresses, indices, MACs) for nothing, is started
inside the right namespaces (no `ip netns exec`), and its commands are written before the clock starts.

    python -m tests.bench coordinator
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.settings import CoordinatorSettings
from plugins.net.netns import in_netns
from tests.integration.coordinator_node import NODE4, NODE6, SECOND4, SERVICE4, SERVICE6, Node, Pod, node

PAIRS = 40
WARM_UP = 4
MARKS = """*mangle
-A PREROUTING -i veth0 -m conntrack --ctstate NEW -j MARK --set-xmark 0x1
-A PREROUTING -m mark --mark 0x1 -j CONNMARK --save-mark
-A OUTPUT -j CONNMARK --restore-mark
COMMIT
"""
REPLY_RULE = "rule add fwmark 0x1 lookup 100 pref 1000\n"
POD_MAC, NODE_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"


def node_batch(pod: Pod) -> str:
    """What the coordinator does on the node; the rule that all pods share is there already."""
    link = pod.host_link
    peer = f"veth0 address {POD_MAC} mtu 1500 netns {pod.name}"
    lines = [
        f"link add {link} address {NODE_MAC} mtu 1500 type veth peer name {peer}",
        f"link set {link} up alias spiderpool:{pod.container_id}:eth0:underlay",
    ]
    for address, length in ((pod.v4, 32), (pod.v6, 128)):
        lines += [
            f"route replace {address}/{length} dev {link} table 500",
            f"neigh replace {address} lladdr {POD_MAC} dev {link} nud permanent",
        ]
    return "\n".join(lines) + "\n"


def pod_batch(pod: Pod) -> str:
    """What the coordinator does in the pod, but for the IPv6 rule."""
    lines = ["link set veth0 up"]
    for address, length in ((NODE4, 32), (SECOND4, 32), (NODE6, 128)):
        source = f" src {pod.v4}" if length == 32 else ""
        lines += [
            f"neigh replace {address} lladdr {NODE_MAC} dev veth0 nud permanent",
            f"route add {address}/{length} dev veth0{source}",
            f"route add {address}/{length} dev veth0{source} table 101",
        ]
    for gateway, service, everything in ((NODE4, SERVICE4, "0.0.0.0/0"), (NODE6, SERVICE6, "::/0")):
        source = f" src {pod.v4}" if gateway == NODE4 else ""
        lines += [
            f"route add {service} via {gateway} dev veth0{source}",
            f"route add {everything} via {gateway} dev veth0{source} table 100",
        ]
    return "\n".join([*lines, REPLY_RULE])


def spawn(fd: int, argv: list[str], text: str) -> None:
    """Run a program in a namespace."""
    done = in_netns(
        fd,
        lambda: subprocess.run(
            argv, input=text, text=True, capture_output=True, close_fds=False, timeout=10, check=False
        ),
    )
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr}")


def by_programs(here: Node, pod: Pod) -> float:
    """Milliseconds of the reference."""
    first, second = node_batch(pod), pod_batch(pod)
    begin = time.perf_counter()
    spawn(here.fd, ["ip", "-batch", "-"], first)
    spawn(pod.fd, ["ip", "-batch", "-"], second)
    spawn(pod.fd, ["ip", "-6", "-batch", "-"], REPLY_RULE)
    spawn(pod.fd, ["iptables-restore"], MARKS)
    spawn(pod.fd, ["ip6tables-restore"], MARKS)
    return (time.perf_counter() - begin) * 1000


async def by_us(coordinator: Coordinator, pod: Pod) -> float:
    """Milliseconds of our ADD, the hand-over to its thread and back included."""
    call = pod.call()
    begin = time.perf_counter()
    await coordinator.add(call)
    return (time.perf_counter() - begin) * 1000


def percentile(samples: list[float], share: float) -> float:
    """The sample below which `share` of all lie."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def rows() -> list[dict[str, Any]]:
    """Measure; `value` and `reference` are medians."""
    ours: list[float] = []
    theirs: list[float] = []
    with node() as here:

        async def alternate() -> None:
            coordinator = Coordinator(CoordinatorSettings())
            try:
                for round_ in range(WARM_UP + PAIRS):
                    order = ("us", "programs") if round_ % 2 else ("programs", "us")
                    for who in order:
                        pod = here.pod()
                        took = await by_us(coordinator, pod) if who == "us" else by_programs(here, pod)
                        if round_ >= WARM_UP:
                            (ours if who == "us" else theirs).append(took)
            finally:
                await coordinator.close()

        here.run(lambda: asyncio.run(alternate()))
    value, reference = statistics.median(ours), statistics.median(theirs)
    return [
        {
            "name": "coordinator_add_vs_ip_batch",
            "value": value,
            "reference": reference,
            "ratio": value / reference,
            "unit": "ms",
            "samples": len(ours),
            "p99": percentile(ours, 0.99),
            "reference_p99": percentile(theirs, 0.99),
        }
    ]


if __name__ == "__main__":
    json.dump(rows(), sys.stdout, indent=1)
