"""The reclaim of 10,000 leaked addresses beside plain deletions on the same API server; memory by number of claims."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import aiohttp

from api.claim import Claim
from api.meta import R, encode
from controller.caches import Caches
from controller.reclaim.reclaim import Reclaim
from controller.reclaim.settings import ReclaimSettings
from controller.room import Desk
from controller.status.pools import PoolStatusRoom
from controller.status.settings import StatusSettings
from lab.kube.cluster import Cluster
from store.kube import KubeStore
from store.kube_paths import collection
from store.kube_settings import KubeSettings
from store.port import EVERYTHING, Listing, Query
from store.recorder import Recorder
from tests.bench import bench_alloc
from tests.integration.installation import netns
from tests.kube.conftest import running
from tests.kube.reclaim_rig import new_claim, pool
from tests.kube.store_rig import raw_session

LEAKED = 10_000
PODS = 500
"""Pods that are alive, each with a claim: what a list of pods has to bring as well."""
NAMESPACES = 4
ROUNDS = 2
CLIENTS = 16
"""Deletions at a time, on both sides; as many as the reclaim's default."""
MEMORY_AT = (10_000, 50_000)
PATH = collection(Claim.TYPE, "")
_numbers = itertools.count()


def rows() -> Iterator[dict[str, Any]]:
    """Claims reclaimed per second beside raw deletions; requests for each; memory by number of claims."""
    with running() as cluster:
        yield from asyncio.run(_measure(cluster))


async def _measure(cluster: Cluster) -> list[dict[str, Any]]:
    async with raw_session(cluster, limit=0) as session:
        store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
        await pool(store, "p", "10.8.0.1-10.9.255.250", subnet="10.0.0.0/8")
        await store.close()
        return [await _rate(cluster, session), *await _memory(cluster, session)]


async def _rate(cluster: Cluster, session: aiohttp.ClientSession) -> dict[str, Any]:
    await _make_pods(session)
    values, references, requests, peaks = [], [], [], []
    for _ in range(ROUNDS):
        made = await _leak(session, LEAKED)
        references.append(await _delete_raw(session, made))
        await _leak(session, LEAKED)
        with _child(cluster, ReclaimSettings(workers=CLIENTS, rate=100_000)) as controller:
            result = controller.recv()
        values.append(LEAKED / result["seconds"])
        requests.append(result["requests"] / LEAKED)
        peaks.append(result["peak_mb"])
    return {
        "name": "reclaim_10k",
        "value": statistics.median(values),
        "reference": statistics.median(references),
        "ratio": statistics.median(value / reference for value, reference in zip(values, references, strict=True)),
        "unit": "/s",
        "samples": ROUNDS,
        "seconds": LEAKED / statistics.median(values),
        "requests_per_claim": max(requests),
        "peak_mb": max(peaks),
    }


async def _memory(cluster: Cluster, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    await asyncio.to_thread(bench_alloc.make_namespace, cluster)
    controllers, agents = [], []
    have = 0
    for count in (0, *MEMORY_AT):
        await _leak(session, count - have)
        have = count
        with _child(cluster, ReclaimSettings(enabled=False)) as controller:
            controllers.append(controller.recv()["memory_mb"])
        agents.append(await _agent_memory(cluster, session, count))
    return [
        {
            "name": f"{program}_memory_{count // 1000}k",
            "value": megabytes,
            "reference": found[0],
            "ratio": megabytes / found[0],
            "unit": "MB",
            "samples": 1,
            "kb_per_claim": (megabytes - found[0]) * 1024 / count,
        }
        for program, found in (("controller", controllers), ("agent", agents))
        for count, megabytes in zip(MEMORY_AT, found[1:], strict=True)
    ]


async def _agent_memory(cluster: Cluster, session: aiohttp.ClientSession, run: int) -> float:
    """Megabytes of an agent that allocates from the pool that all the claims are of."""
    with netns() as path, bench_alloc.agents(cluster, 1) as nodes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            ((pod, uid),) = await bench_alloc.make_pods(session, nodes, 1, run)
            await asyncio.to_thread(bench_alloc.add, nodes[0], "p", pod, uid, descriptor)
        finally:
            os.close(descriptor)
        await asyncio.sleep(3)
        return _kilobytes("VmRSS", nodes[0].agent.process.pid) / 1024


class _child:  # noqa: N801 - a context manager, called as a function
    """The rooms in a process of their own, whose memory is nobody else's."""

    def __init__(self, cluster: Cluster, settings: ReclaimSettings) -> None:
        self._here, there = multiprocessing.Pipe()
        arguments = (cluster.admin, dataclasses.asdict(settings), there)
        self._process = multiprocessing.get_context("spawn").Process(target=_controller, args=arguments)

    def __enter__(self) -> Connection:
        self._process.start()
        return self._here

    def __exit__(self, *_: object) -> None:
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Counting(KubeStore):
    """Counts its calls, and pages of lists as one more each."""

    calls: Counter[str]

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        self.calls["get"] += 1
        return await super().get(kind, name, namespace)

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        listing = await super().list(kind, query)
        self.calls["list"] += max(1, -(-len(listing.items) // 500))
        return listing

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        self.calls["delete"] += 1
        await super().delete(kind, name, namespace, uid=uid, resource_version=resource_version)


def _controller(kubeconfig: str, settings: dict[str, Any], answer: Connection) -> None:
    asyncio.run(_lead(kubeconfig, ReclaimSettings(**settings), answer))


async def _lead(kubeconfig: str, settings: ReclaimSettings, answer: Connection) -> None:
    store = await Counting.open(KubeSettings(kubeconfig=kubeconfig))
    store.calls = Counter()
    desk = Desk(store, Caches(store), Recorder(store, "spiderpool-controller"), "kube-system")
    reclaim, status = Reclaim(desk, settings), PoolStatusRoom(desk, StatusSettings())
    work = [desk.caches.run(), desk.events.run()]
    tasks = [asyncio.create_task(each) for each in work]
    await desk.caches.synced()
    store.calls.clear()
    start = time.perf_counter()
    tasks += [asyncio.create_task(reclaim.run()), asyncio.create_task(status.run())]
    claims = desk.caches.of(Claim)
    await _until(lambda: reclaim.idle and status.idle)
    if settings.enabled:
        await _until(lambda: sum(1 for _ in claims.values()) == PODS)
    seconds = time.perf_counter() - start
    if not settings.enabled:
        await asyncio.sleep(3)
    answer.send(
        {
            "seconds": seconds,
            "requests": store.calls.total(),
            "memory_mb": _kilobytes("VmRSS") / 1024,
            "peak_mb": _kilobytes("VmHWM") / 1024,
        }
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def _make_pods(session: aiohttp.ClientSession) -> None:
    names = iter(range(PODS))

    async def make() -> None:
        for i in names:
            body = {"metadata": {"name": f"p{i}"}, "spec": {"containers": [{"name": "c", "image": "none"}]}}
            async with session.post("/api/v1/namespaces/default/pods", json=body) as answer:
                assert answer.status == 201, await answer.text()
                uid = (await answer.json())["metadata"]["uid"]
            await _create(session, next(_numbers), "default", f"p{i}", uid)

    await _together(make)


async def _leak(session: aiohttp.ClientSession, count: int) -> list[str]:
    """Claims of pods that are not there; their names."""
    numbers = iter(range(count))
    made: list[str] = []

    async def make() -> None:
        for _ in numbers:
            number = next(_numbers)
            namespace = ("default", "kube-system", "kube-public", "kube-node-lease")[number % NAMESPACES]
            made.append(
                await _create(session, number, namespace, f"gone-{number}", f"8a9e8b1c-0000-4000-8000-{number:012}")
            )

    await _together(make)
    return made


async def _create(session: aiohttp.ClientSession, number: int, namespace: str, name: str, uid: str) -> str:
    address = f"10.{8 + number // 62_500}.{number // 250 % 250}.{number % 250 + 1}"
    claim = new_claim(address, namespace=namespace, name=name, uid=uid, node="worker-1.example", container="f" * 64)
    async with session.post(PATH, data=encode(claim), headers={"Content-Type": "application/json"}) as answer:
        # 409: an agent whose memory was measured has this one of the pool's addresses already
        assert answer.status in (201, 409), await answer.text()
    return claim.metadata.name


async def _delete_raw(session: aiohttp.ClientSession, names: list[str]) -> float:
    """Deletions per second by the plainest client that can be."""
    left = iter(names)
    body = json.dumps({"apiVersion": "v1", "kind": "DeleteOptions"})
    headers = {"Content-Type": "application/json"}

    async def remove() -> None:
        for name in left:
            async with session.delete(f"{PATH}/{name}", data=body, headers=headers) as answer:
                assert answer.status == 200, (answer.status, await answer.text())
                await answer.read()

    start = time.perf_counter()
    await _together(remove)
    return len(names) / (time.perf_counter() - start)


async def _together(work: Callable[[], Awaitable[None]]) -> None:
    await asyncio.gather(*(work() for _ in range(CLIENTS)))


def _kilobytes(name: str, process: int | str = "self") -> int:
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))
