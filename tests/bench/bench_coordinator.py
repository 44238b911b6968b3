"""The coordinator's ADDs of dual-stack pods with two NICs, underlay, beside `ip -batch` and `iptables-restore`.

One pod after the other, and fifty at once. Both sides have pods of their own, which are wired again in each round, in
threads of the same making; what the programs made is given to CHECK before anything counts.
Then what it costs the repair loop to compare a pod with what should be there.

    python -m tests.bench coordinator
"""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.host import Host
from plugins.coordinator.mending import Terms
from plugins.coordinator.repair import Outcome, Suspect, mend_pod, see_node
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import CheckFailedError
from tests.bench.ip_batch import FIRST, FURTHER, Programs
from tests.integration.coordinator_node import Node, Pod, batch, node

PODS = 50
WARM_UP = 4
"""Pods of either side whose single ADDs do not count."""
ROUNDS = 10
"""How often all pods are wired at once, and counted."""
PLACES = 8
"""How many pods' programs run at the same time: on two cores no other number is faster."""
NICS = (FIRST, FURTHER)
DEFAULTS = ((4, "prepend"), (6, "append"))


@dataclass(eq=False)
class Side:
    """One of the two: its pods, how it wires a NIC, and what it took."""

    pods: list[Pod]
    attach: Callable[[Pod, str], Awaitable[object]]
    spent: Callable[[], float]
    """Processor seconds so far of all that wires."""
    single: dict[str, list[float]] = field(default_factory=lambda: {nic: [] for nic in NICS})
    """Milliseconds of one ADD, by NIC."""
    shares: list[float] = field(default_factory=list)
    """Milliseconds from the start of all to a pod's second NIC."""
    totals: list[float] = field(default_factory=list)
    """Milliseconds until all pods have both."""
    cpu: list[float] = field(default_factory=list)
    """Processor milliseconds for one pod, the mean of a round."""
    looks: list[float] = field(default_factory=list)
    """Processor milliseconds of the repair loop's comparison of one pod, the mean of a round."""

    async def one(self, pod: Pod) -> list[float]:
        """Wire a pod: milliseconds of each NIC."""
        took: list[float] = []
        for nic in NICS:
            begin = time.perf_counter()
            await self.attach(pod, nic)
            took.append((time.perf_counter() - begin) * 1000)
        return took

    async def at_once(self) -> tuple[list[float], float, float]:
        """Wire all pods that start at once: milliseconds of each, of all, and of a processor for one."""
        begin, before = time.perf_counter(), self.spent()

        async def start(pod: Pod) -> float:
            for nic in NICS:
                await self.attach(pod, nic)
            return (time.perf_counter() - begin) * 1000

        shares = await asyncio.gather(*map(start, self.pods))
        return shares, max(shares), (self.spent() - before) * 1000 / len(self.pods)


def spent_by_children() -> float:
    """Processor seconds of the programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sides(here: Node, coordinator: Coordinator, folder: Path) -> tuple[Side, Side]:
    """Ours and the programs, with pods that have NICs and nothing of a coordinator."""

    def new_pod() -> Pod:
        pod = here.pod()
        here.nic(pod, 1, name=FURTHER)
        return pod

    ours, theirs = ([new_pod() for _ in range(PODS)] for _ in range(2))
    programs = {pod.name: Programs(here, pod, folder) for pod in theirs}
    gate = asyncio.Semaphore(PLACES)

    async def attach(pod: Pod, nic: str) -> None:
        async with gate:
            await programs[pod.name].attach(nic)

    return (
        Side(ours, lambda pod, nic: coordinator.add(pod.call(ifname=nic)), time.process_time),
        Side(theirs, attach, spent_by_children),
    )


async def remove(coordinator: Coordinator, pods: Sequence[Pod]) -> None:
    """Unwire pods, whoever wired them: what the programs make can be told as the coordinator's.

    NICs stay here, so the further ones get back the default routes with which their own plugin leaves them.
    """
    for nic in reversed(NICS):
        await asyncio.gather(*(coordinator.delete(pod.call("DEL", ifname=nic)) for pod in pods))
    for pod in pods:
        gateway = pod.seats[FURTHER].gateway
        batch(pod.name, [f"route {how} default via {gateway(v)} dev {FURTHER}" for v, how in DEFAULTS])


async def prove(coordinator: Coordinator, pod: Pod) -> None:
    """Let CHECK look at what the programs made. Raises RuntimeError if it misses more than our marks."""
    for nic in NICS:
        try:
            await coordinator.check(pod.call("CHECK", ifname=nic))
        except CheckFailedError as error:
            if any("nf_tables" not in found for found in (error.details or "").split("; ")):
                raise RuntimeError(f"the programs do something else than the coordinator: {error.details}") from None


async def look_over(coordinator: Coordinator, pods: Sequence[Pod]) -> float:
    """Compare all pods as the repair loop does: processor milliseconds for each. Raises RuntimeError if one lacks
    something."""
    settings, begin = await coordinator.defaults(), time.process_time()
    view, pairs = await coordinator.on_node(lambda host: see_node(host, {settings.host_rule_table}))
    terms = Terms({}, view.tags, settings.host_rule_table, settings.pod_default_cni_nic, settings.kernel_timeout)
    for pod in pods:
        suspect = Suspect(pod.container_id, pairs[pod.container_id], frozenset())

        def work(host: Host, _: frozenset[str], suspect: Suspect = suspect, fd: int = pod.fd) -> Outcome:
            return mend_pod(host, suspect, fd, view, terms)

        outcome = await coordinator.undisturbed(pod.container_id, work)
        if outcome is None or outcome.done or outcome.failures or outcome.known is None:
            raise RuntimeError(f"{pod.name} is not as its ADDs left it: {outcome}")
    return (time.process_time() - begin) * 1000 / len(pods)


async def measure(here: Node, folder: Path) -> tuple[Side, Side]:
    """Both sides, having wired their pods in turn."""
    coordinator = Coordinator(CoordinatorSettings())
    try:
        both = ours, theirs = sides(here, coordinator, folder)
        # The sysctls that an ADD sets stay behind: the programs need not.
        for pod in theirs.pods:
            for nic in NICS:
                await coordinator.add(pod.call(ifname=nic))
        await remove(coordinator, theirs.pods)
        for turn in range(PODS):
            for side in both if turn % 2 else both[::-1]:
                took = await side.one(side.pods[turn])
                if turn >= WARM_UP:
                    for nic, one in zip(NICS, took, strict=True):
                        side.single[nic].append(one)
        await prove(coordinator, theirs.pods[0])
        for turn in range(ROUNDS + 1):
            await remove(coordinator, ours.pods + theirs.pods)
            for side in both if turn % 2 else both[::-1]:
                shares, total, cpu = await side.at_once()
                if turn:
                    side.shares += shares
                    side.totals.append(total)
                    side.cpu.append(cpu)
        await prove(coordinator, theirs.pods[-1])
        ours.looks += [await look_over(coordinator, ours.pods) for _ in range(ROUNDS)]
        return both
    finally:
        await coordinator.close()


def percentile(samples: list[float], share: float) -> float:
    """The sample below which `share` of all lie."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """One row; `value` and `reference` are medians."""
    value, reference = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "value": value,
        "reference": reference,
        "ratio": value / reference,
        "unit": "ms",
        "samples": len(ours),
        "p99": percentile(ours, 0.99),
        "reference_p99": percentile(theirs, 0.99),
    }


def rows() -> Iterator[dict[str, Any]]:
    """The rows of this suite."""
    with node() as here, tempfile.TemporaryDirectory(prefix="spt-bench-") as folder:
        ours, theirs = here.run(lambda: asyncio.run(measure(here, Path(folder))))
    yield row("coordinator_add_vs_ip_batch", ours.single[FIRST], theirs.single[FIRST])
    yield row("coordinator_further_vs_ip_batch", ours.single[FURTHER], theirs.single[FURTHER])
    yield row("coordinator_50pods_vs_ip_batch", ours.shares, theirs.shares) | {
        "all": statistics.median(ours.totals),
        "reference_all": statistics.median(theirs.totals),
        "cpu": statistics.median(ours.cpu),
        "reference_cpu": statistics.median(theirs.cpu),
    }
    yield {
        "name": "repair_cpu_ms",
        "value": statistics.median(ours.looks),
        "reference": None,
        "ratio": None,
        "unit": "ms",
        "samples": len(ours.looks),
    }


if __name__ == "__main__":
    json.dump(list(rows()), sys.stdout, indent=1)
