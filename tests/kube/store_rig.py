"""What the tests of the store on the Kubernetes API share."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from api.claim import Claim
from api.endpoint import Endpoint
from api.meta import GROUP, VERSION, Resource
from api.pool import Pool
from lab.kube.cluster import Cluster
from lab.kube.components import SERVER
from lab.layout import LabError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Store

KINDS: tuple[type[Resource], ...] = (Claim, Endpoint, Pool)


@dataclass(frozen=True)
class Kube:
    """The adapter of the conformance tests; other processes get it without the cluster, which is this one's."""

    kubeconfig: str
    cluster: Cluster | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[Kube], tuple[str]]:
        return Kube, (self.kubeconfig,)

    async def open(self) -> Store:
        return await KubeStore.open(KubeSettings(kubeconfig=self.kubeconfig))

    async def expire(self) -> None:
        """etcd forgets by compaction, and the API server, which has its own memory, by starting anew."""
        assert self.cluster is not None
        await asyncio.to_thread(restart_forgetting, self.cluster)


def restart_forgetting(cluster: Cluster) -> None:
    cluster.compact()
    cluster.stop(SERVER, signal.SIGKILL)  # asked politely, it waits for its clients
    cluster.start(SERVER)


def raw_session(cluster: Cluster, **connector: Any) -> aiohttp.ClientSession:
    """The plainest client that can be: what ours is compared with, and what cleans up behind it."""
    pki = cluster.place.pki
    tls = ssl.create_default_context(cafile=f"{pki}/ca.crt")
    tls.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
    return aiohttp.ClientSession(cluster.place.url, connector=aiohttp.TCPConnector(ssl=tls, **connector))


def token_of(cluster: Cluster, name: str, *, seconds: int = 3600) -> str:
    """A token of a service account in `default`, which is made if it is not there; it has no rights yet."""
    with suppress(LabError):
        cluster.kubectl("create", "serviceaccount", name)
    return cluster.kubectl("create", "token", name, f"--duration={seconds}s").strip()


def make_admin(cluster: Cluster, name: str) -> None:
    """Give a service account all rights."""
    cluster.kubectl(
        "create", "clusterrolebinding", name, "--clusterrole=cluster-admin", f"--serviceaccount=default:{name}"
    )


def write_kubeconfig(path: str, cluster: Cluster, server: str, user: Mapping[str, object]) -> str:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": server, "certificate-authority": f"{cluster.place.pki}/ca.crt"}}
        ],
        "users": [{"name": "u", "user": user}],
    }
    with open(path, "w") as file:
        json.dump(content, file)
    return path


def empty(cluster: Cluster) -> None:
    """Remove all objects of our kinds, those with finalizers as well."""

    async def remove() -> None:
        async with raw_session(cluster) as session:
            for kind in KINDS:
                path = f"/apis/{GROUP}/{VERSION}/{kind.TYPE.plural}"
                while True:
                    async with session.get(path) as answer:
                        if answer.status != 429:  # "storage is (re)initializing", after a restart
                            assert answer.status == 200, await answer.text()
                            items = (await answer.json())["items"]
                            break
                    await asyncio.sleep(0.1)
                gate = asyncio.Semaphore(16)
                await asyncio.gather(*(_remove(session, gate, kind, item) for item in items))

    asyncio.run(remove())


async def _remove(session: aiohttp.ClientSession, gate: asyncio.Semaphore, kind: type[Resource], item: Any) -> None:
    metadata = item["metadata"]
    scope = f"namespaces/{metadata['namespace']}/" if "namespace" in metadata else ""
    path = f"/apis/{GROUP}/{VERSION}/{scope}{kind.TYPE.plural}/{metadata['name']}"
    async with gate:
        if metadata.get("finalizers"):
            patch = json.dumps({"metadata": {"finalizers": None}})
            headers = {"Content-Type": "application/merge-patch+json"}
            async with session.patch(path, data=patch, headers=headers) as answer:
                assert answer.status in (200, 404), await answer.text()
        async with session.delete(path) as answer:
            assert answer.status in (200, 404), await answer.text()


@asynccontextmanager
async def stalls(clock: Callable[[], float] = time.perf_counter) -> AsyncGenerator[list[float], None]:
    """How long each turn of the event loop takes, in seconds; by `time.thread_time` without what others do to us."""
    seen: list[float] = []

    async def turn() -> None:
        last = clock()
        while True:
            await asyncio.sleep(0)
            now = clock()
            seen.append(now - last)
            last = now

    task = asyncio.create_task(turn())
    await asyncio.sleep(0)
    try:
        yield seen
    finally:
        await asyncio.sleep(0)  # the last turn counts too
        task.cancel()
