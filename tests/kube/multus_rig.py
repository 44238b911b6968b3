"""The rooms for SpiderMultusConfigs and the SpiderCoordinator beside a real API server."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from api.event import Event
from api.meta import Resource
from api.multusconfig import MultusConfig
from api.nad import NetworkAttachmentDefinition
from controller.caches import Caches
from controller.coordinator.room import CoordinatorRoom
from controller.coordinator.settings import CoordinatorStatusSettings
from controller.multus.room import MultusRoom
from controller.multus.settings import MultusSettings
from controller.room import Desk, Room
from lab.kube.cluster import Cluster
from store.errors import NotFoundError, NotServedError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Query
from store.recorder import Recorder

T = TypeVar("T")
R = TypeVar("R", bound=Resource)
WAIT = 20.0
"""Seconds within which what must come about does, unless a test says less."""


@dataclass
class World:
    """One test's namespace, and a store that sees all of the cluster."""

    cluster: Cluster
    store: KubeStore
    namespace: str

    async def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return await asyncio.to_thread(self.cluster.kubectl, *arguments, stdin=stdin)

    async def config(self, name: str, spec: dict[str, Any] | None = None, **annotations: str) -> MultusConfig:
        """A new SpiderMultusConfig."""
        metadata = {"name": name, "namespace": self.namespace, "annotations": annotations}
        return await self.store.create(msgspec.convert({"metadata": metadata, "spec": spec or {}}, MultusConfig))

    async def network(self, name: str) -> NetworkAttachmentDefinition | None:
        """The NetworkAttachmentDefinition of that name."""
        try:
            return await self.store.get(NetworkAttachmentDefinition, name, self.namespace)
        except (NotFoundError, NotServedError):
            return None

    async def text(self, name: str) -> str | None:
        """Its configuration; empty if it is not there."""
        found = await self.network(name)
        return found.spec.config if found else ""

    async def events(self, name: str, reason: str, namespace: str | None = None) -> list[str]:
        """Messages of the Events about an object."""
        where = self.namespace if namespace is None else namespace
        found = (await self.store.list(Event, Query(namespace=where))).items
        return [each.message for each in found if each.reason == reason and each.involved_object.name == name]

    async def patch(self, kind: str, name: str, patch: dict[str, Any], *flags: str) -> None:
        await self.kubectl("patch", kind, name, "-n", self.namespace, "--type=merge", "-p", json.dumps(patch), *flags)


async def until(holds: Callable[[], Awaitable[T | None]], seconds: float = WAIT, what: str = "") -> T:
    """What `holds` returns once that is true."""
    deadline = time.monotonic() + seconds
    while True:
        result = await holds()
        if result:
            return result
        assert time.monotonic() < deadline, what or "it does not come about"
        await asyncio.sleep(0.02)


async def becomes(read: Callable[[], Awaitable[object]], value: object, seconds: float = WAIT) -> float:
    """Wait until `read` gives the value; how long it took."""
    began = time.monotonic()
    while (last := await read()) != value:
        assert time.monotonic() - began < seconds, f"{last!r} does not become {value!r} within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@asynccontextmanager
async def leading(store: KubeStore, build: Callable[[Desk], Room]) -> AsyncGenerator[Caches, None]:
    """A room while it leads; whatever fails in it fails the test."""
    caches, recorder = Caches(store), Recorder(store, "spiderpool-controller")
    room = build(Desk(store, caches, recorder, "kube-system"))
    tasks = [asyncio.create_task(caches.run()), asyncio.create_task(recorder.run())]
    try:
        async with asyncio.timeout(WAIT):
            await caches.synced()
        tasks.append(asyncio.create_task(room.run()))
        yield caches
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def multus(desk: Desk) -> Room:
    return MultusRoom(desk, MultusSettings())


def coordinator(settings: CoordinatorStatusSettings) -> Callable[[Desk], Room]:
    return lambda desk: CoordinatorRoom(desk, settings)


@asynccontextmanager
async def world(cluster: Cluster, build: Callable[[Desk], Room] | None = multus) -> AsyncGenerator[World, None]:
    """A namespace of its own, with the room at work; without `build` the test starts the room."""
    store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
    made = World(cluster, store, f"n-{secrets.token_hex(4)}")
    await made.kubectl("create", "namespace", made.namespace)
    try:
        if build is None:
            yield made
        else:
            async with leading(store, build):
                yield made
    finally:
        with suppress(NotServedError):
            for each in (await store.list(NetworkAttachmentDefinition, Query(namespace=made.namespace))).items:
                if each.metadata.finalizers:
                    await made.patch("net-attach-def", each.metadata.name, {"metadata": {"finalizers": None}})
        await made.kubectl("delete", "namespace", made.namespace, "--wait=false")
        await store.close()
