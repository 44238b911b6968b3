"""Where a history takes place: nodes, a leader, a few addresses of either family, pods without a kubelet, and a log."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from api.meta import GROUP, VERSION
from lab.kube.cluster import Cluster
from lab.kube.components import SERVER
from tests.kube.fault_proxy import Proxy
from tests.kube.history import Change, History, Pod
from tests.kube.history_child import ATTEMPT, RECLAIM
from tests.kube.history_processes import Json, Nursery, Process, process
from tests.kube.history_program import NODES
from tests.kube.ipam_pods import APPS, CORE, IPPOOL, _stateful_set
from tests.kube.store_rig import raw_session, write_kubeconfig

OURS = f"/apis/{GROUP}/{VERSION}"
CLAIMS = f"{OURS}/spideripclaims"
MERGE = "application/merge-patch+json"
PATIENCE = 45.0
"""Seconds for which a request of the administrator's is tried again: the API server may be away."""
DATABASE = "db"
"""Name of the StatefulSet."""


def now() -> float:
    return time.monotonic()


class SlowProxy(Proxy):
    """A proxy on a slow way to the server."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.latency: dict[str, float] = {}
        """Seconds that requests of a method are held up, and then done all the same."""

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if "watch" not in request.query and (seconds := self.latency.get(request.method)):
            await asyncio.sleep(seconds)
        return await super()._answer(request)


@dataclass
class NodeSite:
    """A node and its agent."""

    name: str
    agent: Process
    lost: bool = False


@dataclass
class Stage:
    """One history's."""

    cluster: Cluster
    session: aiohttp.ClientSession
    key: str
    size: int
    """Addresses of each family."""
    proxies: dict[str, SlowProxy]
    nodes: list[NodeSite] = field(default_factory=list)
    leader: Process = field(init=False)
    history: History = field(default_factory=History)
    replicas: int = 0
    """What the StatefulSet is asked for."""
    log_position: int = 0

    def __post_init__(self) -> None:
        number = int(self.key, 16)
        self.namespace = f"history-{self.key}"
        self.net = f"10.{100 + number % 100}.{number // 100 % 256}."
        self.net6 = f"fd00:{number >> 8:x}:{256 + number % 256:x}::"
        self.annotations = {IPPOOL: json.dumps({"ipv4": [f"v4-{self.key}"], "ipv6": [f"v6-{self.key}"]})}

    def note(self, what: str) -> None:
        self.history.faults.append((now(), what))

    # The administrator

    async def ask(self, method: str, path: str, body: Any = None, *, fine: tuple[int, ...] = ()) -> tuple[int, Json]:
        """A request that is repeated while the server is away; statuses of refusal that are `fine` are returned."""
        headers = {"Content-Type": MERGE if method == "PATCH" else "application/json"}
        data = None if body is None else json.dumps(body)
        end = now() + PATIENCE
        while True:
            answer: tuple[int, Json] = 0, {}
            with suppress(aiohttp.ClientError, TimeoutError):
                async with (
                    asyncio.timeout(10),
                    self.session.request(method, path, data=data, headers=headers) as response,
                ):
                    answer = response.status, await response.json(content_type=None)
            status = answer[0]
            if 200 <= status < 300 or status in fine:
                return answer
            assert status in (0, 403, 429) or status >= 500, f"{method} {path}: {answer}"
            assert now() < end, f"{method} {path}: {answer}"
            await asyncio.sleep(0.1)

    def path(self, plural: str, name: str = "", base: str = CORE) -> str:
        return f"{base}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    async def claims(self) -> dict[str, str]:
        """Address to the UID of the pod that has it, by the API server."""
        _, listing = await self.ask("GET", CLAIMS)
        return {
            item["spec"]["address"]: item["spec"].get("podUID", "") for item in listing["items"] if self._mine(item)
        }

    def _mine(self, item: Json) -> bool:
        return str(item["spec"]["address"]).startswith((self.net, self.net6))

    async def ready(self, node: NodeSite, *, ready: bool) -> None:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "Test", "message": "test"}
        times = {"lastHeartbeatTime": moment, "lastTransitionTime": moment}
        await self.ask(
            "PATCH", f"{CORE}/nodes/{node.name}/status", {"status": {"conditions": [condition | times]}}, fine=(404,)
        )

    async def scale(self, replicas: int) -> None:
        moment = now()
        before, self.replicas = self.replicas, replicas
        for ordinal in range(replicas, before):
            name = f"{DATABASE}-{ordinal}"
            self.history.scaled.append((name, moment))
            for pod in self.history.pods.values():
                if pod.name == name:
                    pod.delete(moment)
        await self.ask("PATCH", self.path("statefulsets", DATABASE, APPS), {"spec": {"replicas": replicas}})

    async def delete(self, pod: Pod, grace: int) -> None:
        """Ask for the pod's deletion; with no grace it is gone when this returns."""
        moment = now()
        if grace == 0:
            pod.delete(moment)
        body = {"gracePeriodSeconds": grace, "preconditions": {"uid": pod.uid}}
        status, answer = await self.ask("DELETE", self.path("pods", pod.name), body, fine=(404, 409))
        at = answer.get("metadata", {}).get("deletionTimestamp") if status == 200 else None
        if at is None:
            pod.delete(moment)  # somebody else did it, or nobody knows when
        elif grace:
            left = datetime.fromisoformat(at).timestamp() - time.time()
            pod.delete(moment, now() + left + RECLAIM.teardown)

    async def lose(self, node: NodeSite, milliseconds: int) -> None:
        """Pull the node's plug, evict its pods, and give it back."""
        if node.lost:
            return
        node.lost = True
        self.note(f"{node.name} is lost")
        node.agent.kill()
        await self.ready(node, ready=False)
        victims = [pod for pod in self.history.pods.values() if pod.node == node.name and pod.deleted == float("inf")]
        await asyncio.gather(*(self.delete(pod, 1) for pod in victims))
        await asyncio.sleep(milliseconds / 1000)
        await self.give_back(node)

    async def give_back(self, node: NodeSite) -> None:
        if node.lost:
            await self.ready(node, ready=True)
            node.lost = False
            self.note(f"{node.name} is back")

    async def restart_server(self) -> None:
        self.note("the API server is killed")
        await asyncio.to_thread(self.cluster.stop, SERVER, signal.SIGKILL)
        await asyncio.to_thread(self.cluster.start, SERVER)
        self.note("the API server is back")

    # The log of the claims

    async def follow(self, since: str) -> None:
        """Write down every change of a claim, in order; after a gap what has changed in all: no loss escapes."""
        while True:
            query = {"watch": "1", "resourceVersion": since, "allowWatchBookmarks": "true"}
            with suppress(aiohttp.ClientError):
                timeout = aiohttp.ClientTimeout(total=None)
                async with self.session.get(CLAIMS, params=query, timeout=timeout) as answer:
                    async for line in answer.content:
                        if answer.status != 200:
                            break
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            since = await self._catch_up()
                            break
                        since = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            self._log(event)
            await asyncio.sleep(0.05)

    async def _catch_up(self) -> str:
        """Log how the claims of now differ from the last ones known; their resourceVersion."""
        _, listing = await self.ask("GET", CLAIMS)
        there = {item["metadata"]["uid"]: item for item in listing["items"] if self._mine(item)}
        version = listing["metadata"]["resourceVersion"]
        for claim, last in {change.claim: change for change in self.history.changes}.items():
            if last.pod and claim not in there:
                self.history.changes.append(Change(int(version), now(), last.address, claim, ""))
        for item in there.values():
            self._log({"type": "MODIFIED", "object": item})
        return str(version)

    def _log(self, event: Json) -> None:
        item = event["object"]
        if self._mine(item):
            meta, spec = item["metadata"], item["spec"]
            pod = "" if event["type"] == "DELETED" else spec.get("podUID", "")
            self.history.changes.append(Change(int(meta["resourceVersion"]), now(), spec["address"], meta["uid"], pod))

    # Setting up

    async def build(self) -> None:
        await self.ask("POST", f"{CORE}/namespaces", {"metadata": {"name": self.namespace}})
        ranges = (
            (4, f"{self.net}0/24", f"{self.net}1-{self.net}{self.size}"),
            (6, f"{self.net6}/64", f"{self.net6}1-{self.net6}{self.size:x}"),
        )
        for family, subnet, ips in ranges:
            body = {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": "SpiderIPPool",
                "metadata": {"name": f"v{family}-{self.key}"},
                "spec": {"subnet": subnet, "ipVersion": family, "ips": [ips]},
            }
            await self.ask("POST", f"{OURS}/spiderippools", body)
        for number in range(NODES):
            name = f"n{number}-{self.key}"
            await self.ask("POST", f"{CORE}/nodes", {"metadata": {"name": name}})
        while (  # noqa: ASYNC110 - the API server tells nobody
            await self.ask("GET", self.path("serviceaccounts", "default"), fine=(404,))
        )[0] == 404:
            await asyncio.sleep(0.02)
        await self.ask(
            "POST", self.path("statefulsets", base=APPS), _stateful_set(DATABASE, self.replicas, self.annotations)
        )

    async def clear(self) -> None:
        await self.ask("DELETE", self.path("statefulsets", base=APPS))
        await self.ask("DELETE", self.path("pods"), {"gracePeriodSeconds": 0})
        await self.ask("DELETE", f"{CORE}/namespaces/{self.namespace}", fine=(404, 409))
        _, listing = await self.ask("GET", CLAIMS)
        for item in listing["items"]:
            if self._mine(item):
                await self.ask("DELETE", f"{CLAIMS}/{item['metadata']['name']}", fine=(404,))
        for family in (4, 6):
            path = f"{OURS}/spiderippools/v{family}-{self.key}"
            await self.ask("DELETE", path, fine=(404,))
            await self.ask("PATCH", path, {"metadata": {"finalizers": None}}, fine=(404,))
        for node in self.nodes:
            await self.ask("DELETE", f"{CORE}/nodes/{node.name}", fine=(404,))


@asynccontextmanager
async def _running(proxy: SlowProxy) -> AsyncIterator[SlowProxy]:
    async with proxy.running():
        yield proxy


@asynccontextmanager
async def stage(
    cluster: Cluster, nursery: Nursery, token: str, folder: str, *, size: int, replicas: int, attempt: float = ATTEMPT
) -> AsyncIterator[Stage]:
    """A stage that is ready, with all processes, for whom an answer counts as lost after `attempt` seconds.

    It leaves nothing behind.
    """
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(raw_session(cluster, limit=0))
        proxies = {whom: await stack.enter_async_context(_running(SlowProxy(cluster))) for whom in ("nodes", "leader")}
        there = Stage(cluster, session, secrets.token_hex(3), size, proxies, replicas=replicas)
        stack.push_async_callback(there.clear)
        await there.build()

        def config(role: str, whom: str, **more: str) -> Json:
            more["log"] = f"{folder}/log-{there.key}"
            path = write_kubeconfig(f"{folder}/{whom}-{there.key}", cluster, proxies[whom].url, {"token": token})
            return {"role": role, "kubeconfig": path, "attempt": attempt, **more}

        _, listing = await there.ask("GET", CLAIMS)
        following = asyncio.create_task(there.follow(listing["metadata"]["resourceVersion"]))
        for number in range(NODES):
            name = f"n{number}-{there.key}"
            agent = await stack.enter_async_context(process(nursery, config("node", "nodes", node=name)))
            there.nodes.append(NodeSite(name, agent))
            await there.ready(there.nodes[-1], ready=True)
        there.leader = await stack.enter_async_context(process(nursery, config("leader", "leader")))
        try:
            yield there
        finally:
            if following.done():
                following.result()
            following.cancel()
            await asyncio.wait([following])
