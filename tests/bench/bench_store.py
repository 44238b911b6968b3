"""The store on the Kubernetes API beside the plainest client that can be, alternating, on the same API server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from api.claim import Claim
from api.meta import encode
from lab.kube.cluster import Cluster
from store.kube import KubeStore
from store.kube_paths import collection
from store.kube_settings import KubeSettings
from tests.integration.store_adapters import claim
from tests.kube.conftest import running
from tests.kube.store_rig import raw_session, stalls

ROUNDS = 5
CREATES = 1000
"""Objects that each side creates in a round: 10,000 in all, which are then listed."""
CLIENTS = 10
GETS = 1000


def rows() -> Iterator[dict[str, Any]]:
    """Creates and gets per second by 10 at a time, and a list of 10,000: time, longest turn of the loop, memory."""
    with running() as cluster:
        yield from asyncio.run(_measure(cluster))


async def _measure(cluster: Cluster) -> list[dict[str, Any]]:
    path = collection(Claim.TYPE, "")
    store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
    numbers = itertools.count()
    async with raw_session(cluster) as session:

        async def create_raw() -> None:
            headers = {"Content-Type": "application/json"}
            async with session.post(path, data=encode(claim(next(numbers))), headers=headers) as answer:
                await answer.read()
                answer.raise_for_status()

        async def create() -> None:
            await store.create(claim(next(numbers)))

        async def get_raw() -> None:
            async with session.get(f"{path}/{claim(0).metadata.name}") as answer:
                await answer.read()

        async def get() -> None:
            await store.get(Claim, claim(0).metadata.name)

        found = [
            await _rates("kube_create_rate", create, create_raw, CREATES),
            await _rates("kube_get_rate", get, get_raw, GETS),
            await _lists(store, session, path),
        ]
    await store.close()
    return found


async def _rates(
    name: str, ours: Callable[[], Awaitable[None]], raw: Callable[[], Awaitable[None]], count: int
) -> dict[str, Any]:
    values, references = [], []
    for _ in range(ROUNDS):
        references.append(await _rate(raw, count))
        values.append(await _rate(ours, count))
    return {
        "name": name,
        "value": statistics.median(values),
        "reference": statistics.median(references),
        "ratio": statistics.median(value / reference for value, reference in zip(values, references, strict=True)),
        "unit": "/s",
        "samples": ROUNDS,
        "clients": CLIENTS,
    }


async def _rate(call: Callable[[], Awaitable[None]], count: int) -> float:
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            await call()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return count / (time.perf_counter() - start)


async def _lists(store: KubeStore, session: aiohttp.ClientSession, path: str) -> dict[str, Any]:
    values: list[float] = []
    references: list[float] = []
    turns, memory = [], []
    count = 0
    for _ in range(ROUNDS):
        gc.collect()
        before = _reset_peak()
        async with stalls() as seen:
            listing = await store.list(Claim)
        memory.append((_kilobytes("VmHWM") - before) / 1024)
        del listing
        turns.append(max(seen) * 1000)
        async with timed(references):
            await _list_raw(session, path)
        async with timed(values):
            count = len((await store.list(Claim)).items)
    return {
        "name": "kube_list_10k",
        "value": statistics.median(values) * 1000,
        "reference": statistics.median(references) * 1000,
        "ratio": statistics.median(value / reference for value, reference in zip(values, references, strict=True)),
        "unit": "ms",
        "samples": ROUNDS,
        "objects": count,
        "longest_turn_ms": statistics.median(turns),
        "worst_turn_ms": max(turns),
        "peak_mb": max(memory),
    }


async def _list_raw(session: aiohttp.ClientSession, path: str) -> None:
    """The bytes alone, in one piece, which nobody decodes."""
    async with session.get(path, headers={"Accept-Encoding": "identity"}) as answer:
        await answer.read()


@asynccontextmanager
async def timed(into: list[float]) -> AsyncGenerator[None, None]:
    """Add the seconds that the context lasts to `into`."""
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def _reset_peak() -> int:
    """Let VmHWM count from here on (proc(5), clear_refs); what is used now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _kilobytes("VmRSS")


def _kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))
