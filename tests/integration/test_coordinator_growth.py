"""Pods with two NICs come and go, by the executables and the agent as they are shipped: nothing grows, nothing stays.

Each pair is what a runtime does for one pod: ADD of IPAM and coordinator for either NIC, and all of it back.
"""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_interface, ip_network
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from tests.integration.coordinator_node import SERVICE4, SERVICE6, Node, Pod, batch, node
from tests.integration.installation import ROOT, Agent, Installation
from tests.integration.test_agent_plugins import claims, ctl

NICS = ("eth0", "net1")
PARALLEL = 4
BURST = 16
"""Pairs at once while warming up: pools of threads and sockets get as large as they ever do."""
SAMPLE = 20
"""Pairs between two looks at the agent."""
REPAIR = 5
"""Seconds between the repair loop's comparisons, after which it forgets pods that are gone."""
PATIENCE = 3 * REPAIR
"""Seconds for everything that is forgotten or closed late."""
PASSING = 2000
"""Objects more or less, that mean nothing: what waits for the allocator's free lists."""
POOL = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {{name: "{name}"}}
spec: {{subnet: "{subnet}", ips: ["{ips}"], gateway: "{gateway}"}}
---
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How large the agent is."""

    threads: int
    files: int
    memory: int
    """Resident, in bytes."""

    @classmethod
    def of(cls, agent: Agent) -> Size:
        """That of a running one."""
        proc = Path(f"/proc/{agent.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        memory = int(status["VmRSS"].split()[0]) << 10
        return cls(int(status["Threads"]), len(os.listdir(proc / "fd")), memory)


def objects(agent: Agent, path: Path) -> int:
    """How many objects the agent has, counted by itself."""
    path.unlink(missing_ok=True)
    agent.process.send_signal(signal.SIGUSR1)
    until(path.exists, f"not counted: {agent.log()}")
    return int(path.read_text())


def until(condition: Callable[[], bool], complaint: str = "not within the time") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


@pytest.fixture
def here() -> Iterator[Node]:
    with node() as made:
        for _ in range(BURST):
            made.nic(made.pod(), 1, name="net1")
        yield made


@pytest.fixture
def cni(here: Node, tmp_path: Path) -> Installation:
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    installed = Installation(tmp_path)
    ctl(installed, "apply", "-f", "-", stdin="".join(pools(here)))
    return installed


def pools(here: Node) -> Iterator[str]:
    for nic in NICS:
        segment = here.pods[0].seats[nic]
        for version, length in ((4, 24), (6, 64)):
            subnet = ip_network(f"{segment.address(version, 0)}/{length}")
            ips, gateway = f"{segment.address(version, 10)}-{segment.address(version, 99)}", segment.gateway(version)
            yield POOL.format(name=f"{nic}-v{version}", subnet=subnet, ips=ips, gateway=gateway)


def configs(pod: Pod, nic: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A chain's executables and configurations, the coordinator's without prevResult."""
    base = {"cniVersion": "1.0.0", "name": f"net-{nic}"}
    ipam = {"type": "spiderpool", "default_ipv4_ippool": [f"{nic}-v4"], "default_ipv6_ippool": [f"{nic}-v6"]}
    yield "spiderpool", {**base, "type": "macvlan", "ipam": ipam, "runtimeConfig": {"ips": pod.of(nic)}}
    yield "coordinator", {**base, "type": "coordinator", "serviceCIDR": [SERVICE4, SERVICE6]}


def live(cni: Installation, pod: Pod, number: int) -> None:
    """The life of one pod."""
    name, container = f"p{number}", secrets.token_hex(32)
    args = f"K8S_POD_NAMESPACE=ns;K8S_POD_NAME={name};K8S_POD_UID=uid-{number}"
    call = partial(cni.call, netns=f"/run/netns/{pod.name}", CNI_CONTAINERID=container, CNI_ARGS=args)
    for nic in NICS:
        result: dict[str, Any] = {}
        for plugin, config in configs(pod, nic):
            more = {"prevResult": result} if result else {}
            done = call("ADD", {**config, **more}, name=plugin, CNI_IFNAME=nic)
            assert done.status == 0, done
            result = done.json
        assert sorted(str(ip_interface(ip["address"]).ip) for ip in result["ips"]) == sorted(pod.of(nic))
    for nic in NICS[::-1]:
        for plugin, config in reversed([*configs(pod, nic)]):
            call("DEL", config, name=plugin, CNI_IFNAME=nic).empty()
    # The NICs stay, so the further one gets back what its own plugin leaves.
    gateway = pod.seats["net1"].gateway
    batch(pod.name, [f"route {how} default via {gateway(v)} dev net1" for v, how in ((4, "prepend"), (6, "append"))])


def come_and_go(cni: Installation, agent: Agent, pods: Sequence[Pod], pairs: int, numbers: Iterator[int]) -> list[Size]:
    """So many pairs, as many at a time as there are `pods`; the agent's size as it went."""
    free: SimpleQueue[Pod] = SimpleQueue()
    for pod in pods:
        free.put(pod)

    def one(number: int) -> None:
        pod = free.get()
        try:
            live(cni, pod, number)
        finally:
            free.put(pod)

    sizes: list[Size] = []
    with ThreadPoolExecutor(len(pods)) as runtime:
        for begin in range(0, pairs, SAMPLE):
            list(runtime.map(one, (next(numbers) for _ in range(min(SAMPLE, pairs - begin)))))
            sizes.append(Size.of(agent))
    return sizes


@pytest.mark.parametrize(
    ("warm_up", "pairs", "each", "memory"),
    [
        # What is remembered for a while is not full yet: the coordinator's last 1,024 deletions, SQLite's pages.
        pytest.param(40, 200, 8.0, 8 << 20),
        pytest.param(1000, 5000, 0.2, 2 << 20, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_nothing_grows(
    here: Node, cni: Installation, tmp_path: Path, warm_up: int, pairs: int, each: float, memory: int
) -> None:
    """`each` is the number of objects that may stay for each pair, `memory` the bytes that may be added in all."""
    before, numbers, path = here.state(), count(), tmp_path / "objects"
    flags = ("--dataplane-enabled=false", f"--coordinator-repair-interval={REPAIR}")

    def body() -> list[Size]:
        with cni.agent(*flags, module="tests.integration.counted_agent", env={"OBJECTS": str(path)}) as agent:
            come_and_go(cni, agent, here.pods, warm_up, numbers)
            had, warm = objects(agent, path), Size.of(agent)
            sizes = come_and_go(cni, agent, here.pods[:PARALLEL], pairs, numbers)
            until(lambda: objects(agent, path) < had + PASSING + each * pairs, "more objects than before")
            until(lambda: Size.of(agent).threads <= warm.threads, "more threads than before")
            until(lambda: Size.of(agent).files <= warm.files, "more files than before")
            after = Size.of(agent)
            print({"objects": (had, objects(agent, path)), "warm": warm, "after": after})
            assert after.memory - warm.memory < memory
            assert claims(cni) == []
            assert agent.stop() == 0
        assert not [line for line in agent.lines() if line["level"] in ("warning", "error", "critical")]
        return sizes

    sizes = here.run(body)
    at = [float(SAMPLE * i) for i in range(len(sizes))]
    print({"bytes_per_pair": statistics.linear_regression(at, [float(size.memory) for size in sizes]).slope})
    assert here.left() == ""
    assert here.state() == before
