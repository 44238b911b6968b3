"""What probing a free address costs beyond its configured wait: one pod, and fifty at once, both families each.

The pods' NICs are macvlans of one node, on a bridge with a second node, as the main plugin makes them. Then a thousand
probes of every kind of neighbour, eight at once, with how many answers were wrong; and what a look at an address in use
costs in CPU.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from plugins.coordinator.probe import NicProbe, Prober, ProbeSettings
from tests.integration.probe_segment import ip, segment
from tests.integration.probe_thousand import thousand

PODS = 50
SINGLE_ROUNDS = 40
PARALLEL_ROUNDS = 12
SETTINGS = ProbeSettings()
WITHIN = 0.005
"""Seconds beyond the wait that a free address may take."""
V4, V6 = int(IPv4Address("10.9.1.0")), int(IPv6Address("fd00:9::1:0"))


@contextmanager
def pods(count: int) -> Iterator[list[int]]:
    """Network namespaces with a macvlan `eth0` each, on one segment; their file descriptors."""
    with segment() as lan, ExitStack() as stack:
        lan.add_host("10.9.0.5/16", "fd00:9::5/64")
        node = lan.add_host()
        opened = []
        for number in range(count):
            netns = f"{lan.name}-m{number}"
            ip("netns", "add", netns)
            stack.callback(ip, "netns", "delete", netns)
            node.ip("link", "add", "eth0", "link", "eth0", "netns", netns, "type", "macvlan", "mode", "bridge")
            opened.append(os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, opened[-1])
        yield opened


async def extra(nic: NicProbe, number: int) -> float:
    """Milliseconds beyond the wait for a pod's two free addresses, asked for at once."""
    began = time.perf_counter()
    found = await asyncio.gather(nic.conflict(IPv4Address(V4 + number)), nic.conflict(IPv6Address(V6 + number)))
    elapsed = time.perf_counter() - began
    if any(found):
        raise RuntimeError(f"a free address was found in use: {found}")
    return (elapsed - SETTINGS.wait) * 1e3


async def measure(netns: list[int], parallel: int, rounds: int) -> list[float]:
    """The figures of `rounds` rounds of `parallel` pods that start together, each with its NIC opened anew."""
    prober = Prober(SETTINGS)
    figures: list[float] = []
    try:
        for turn in range(rounds):
            async with AsyncNics(prober, netns[:parallel]) as nics:
                numbers = range(turn * parallel, (turn + 1) * parallel)
                figures += await asyncio.gather(*(extra(*pair) for pair in zip(nics, numbers, strict=True)))
    finally:
        await prober.close()
    return figures


async def look(netns: list[int]) -> list[float]:
    """CPU milliseconds of this process for each address that is asked about again, both families of a NIC at once."""
    prober = Prober(SETTINGS)
    figures: list[float] = []
    try:
        for number, fd in enumerate(netns):
            began = time.process_time()
            async with await prober.open_used(fd, "eth0") as nic:
                await asyncio.gather(nic.rival(IPv4Address(V4 + number)), nic.rival(IPv6Address(V6 + number)))
            figures.append((time.process_time() - began) * 1e3 / 2)
    finally:
        await prober.close()
    return figures


class AsyncNics:
    """The opened NICs of several pods."""

    def __init__(self, prober: Prober, netns: list[int]) -> None:
        self._prober = prober
        self._netns = netns
        self._nics: list[NicProbe] = []

    async def __aenter__(self) -> list[NicProbe]:
        self._nics = await asyncio.gather(*(self._prober.open(fd, "eth0") for fd in self._netns))
        return self._nics

    async def __aexit__(self, *_: object) -> None:
        for nic in self._nics:
            nic.close()


def row(name: str, figures: list[float]) -> dict[str, Any]:
    """One row: the median and the 99th percentile."""
    return {
        "name": name,
        "value": statistics.median(figures),
        "reference": None,
        "ratio": None,
        "unit": "ms",
        "samples": len(figures),
        "p99": statistics.quantiles(figures, n=100, method="inclusive")[98],
    }


def rows() -> Iterator[dict[str, Any]]:
    """The rows of this suite."""
    with pods(PODS) as netns:
        yield row("probe_free_extra_ms", asyncio.run(measure(netns, 1, SINGLE_ROUNDS)))
        yield row("probe_free_extra_x50_ms", asyncio.run(measure(netns, PODS, PARALLEL_ROUNDS)))
        yield row("recheck_cpu_ms", asyncio.run(look(netns)))
    count = thousand(SETTINGS, parallel=8, least=0.01, most=0.06)
    extra = row("probe_thousand_extra_ms", [1e3 * seconds for seconds in count.extra])
    within = sum(abs(seconds) <= WITHIN for seconds in count.extra) / len(count.extra)
    yield extra | {
        "within_5_ms": within,
        "misses": len(count.misses),
        "false_alarms": len(count.false_alarms),
        "unknown": len(count.unknown),
        "not_judged": count.too_late,
    }
