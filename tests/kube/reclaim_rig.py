"""What the reclaim's tests share: the leader's rooms on a real API server, and pods that no kubelet looks after."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import aiohttp

from api.claim import (
    LABEL_IDENTITY,
    LABEL_NODE,
    LABEL_POOL,
    LABEL_WORKLOAD,
    Claim,
    ClaimSpec,
    Controller,
    Quarantine,
    Workload,
    claim_name,
    identity_label,
    label_value,
    workload_label,
)
from api.meta import FINALIZER, ObjectMeta
from api.pool import Pool, PoolSpec
from controller.caches import Caches
from controller.reclaim.reclaim import NO_PROVIDER, Reclaim
from controller.reclaim.settings import ReclaimSettings
from controller.room import Desk
from controller.status.pools import PoolStatusRoom
from controller.status.settings import StatusSettings
from lab.kube.cluster import Cluster
from store.errors import NotFoundError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Store
from store.provider import ProviderSettings
from store.recorder import Recorder
from tests.kube.store_rig import raw_session

WAIT = 20.0
QUICK = ReclaimSettings(teardown=0.3, settle=0.1, lost_node=0.5, interval=3600)
STATUS = StatusSettings(interval=0.2)
MERGE = {"Content-Type": "application/merge-patch+json"}
STATEFUL = "StatefulSet"


@dataclass(frozen=True)
class Rooms:
    """The leader at work."""

    store: Store
    """The tests' own, which nothing is done to."""
    reclaim: Reclaim
    status: PoolStatusRoom


@asynccontextmanager
async def opened(cluster: Cluster) -> AsyncGenerator[Store, None]:
    store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def leading(
    cluster: Cluster,
    settings: ReclaimSettings = QUICK,
    status: StatusSettings = STATUS,
    wrap: Callable[[Store], Store] = lambda store: store,
    provider: ProviderSettings = NO_PROVIDER,
) -> AsyncGenerator[Rooms, None]:
    """Both rooms running, as a leader runs them; what ends them is a failure."""
    async with opened(cluster) as inner, opened(cluster) as own:
        store = wrap(inner)
        desk = Desk(store, Caches(store), Recorder(store, "spiderpool-controller"), "kube-system")
        reclaim, pools = Reclaim(desk, settings, provider), PoolStatusRoom(desk, status)
        tasks = [asyncio.create_task(each) for each in (desk.caches.run(), desk.events.run())]
        async with asyncio.timeout(WAIT):
            await desk.caches.synced()
        tasks += [asyncio.create_task(each) for each in (reclaim.run(), pools.run())]
        try:
            yield Rooms(own, reclaim, pools)
            for task in tasks:
                assert not task.done(), task.exception()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Api:
    """The API server as an administrator has it, for kinds that the store only reads."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        data = None if body is None else json.dumps(body)
        sent = {"Content-Type": "application/json", **headers}
        async with self._session.request(method, path, data=data, headers=sent) as answer:
            assert answer.status < 300 or (method == "DELETE" and answer.status == 404), await answer.text()
            return await answer.json()

    async def namespace(self, name: str) -> None:
        """Make one, and wait until pods can be made in it."""
        await self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        async with asyncio.timeout(WAIT):
            while True:
                async with self._session.get(f"/api/v1/namespaces/{name}/serviceaccounts/default") as answer:
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.02)

    async def node(self, name: str, *, ready: bool = True) -> None:
        """Make a node, or say that it is ready, or not."""
        async with self._session.get(f"/api/v1/nodes/{name}") as answer:
            there = answer.status == 200
        if not there:
            await self.call("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        condition = {"type": "Ready", "status": "True" if ready else "False", "reason": "Test", "message": "test"}
        times = {"lastHeartbeatTime": moment, "lastTransitionTime": moment}
        body = {"status": {"conditions": [condition | times]}}
        await self.call("PATCH", f"/api/v1/nodes/{name}/status", body, **MERGE)

    async def pod(self, namespace: str, name: str, *, node: str = "", grace: int = 30, **meta: Any) -> str:
        """Make a pod; its UID."""
        spec = {
            "containers": [{"name": "c", "image": "none"}],
            "terminationGracePeriodSeconds": grace,
            **({"nodeName": node} if node else {}),
        }
        body = {"metadata": {"name": name, **meta}, "spec": spec}
        made = await self.call("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        return str(made["metadata"]["uid"])

    async def phase(self, namespace: str, name: str, phase: str, *, ended: float | None = None) -> None:
        """Say what a kubelet would: the phase, and that its container ended so many seconds ago."""
        status: dict[str, Any] = {"phase": phase}
        if ended is None:
            status["podIPs"] = [{"ip": "10.0.0.1"}]
            status["podIP"] = "10.0.0.1"
        else:
            at = (datetime.now(UTC) - timedelta(seconds=ended)).isoformat(timespec="seconds").replace("+00:00", "Z")
            state = {"terminated": {"exitCode": 0, "finishedAt": at}}
            container = {"name": "c", "image": "none", "imageID": "", "ready": False, "restartCount": 0}
            status["containerStatuses"] = [container | {"state": state}]
        await self.call("PATCH", f"/api/v1/namespaces/{namespace}/pods/{name}/status", {"status": status}, **MERGE)

    async def delete_pod(self, namespace: str, name: str, grace: int = 0) -> None:
        """Delete it; with no grace it is gone at once."""
        await self.call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}", {"gracePeriodSeconds": grace})

    async def pods(self, namespace: str) -> dict[str, Any]:
        """All pods of a namespace, by name."""
        listing = await self.call("GET", f"/api/v1/namespaces/{namespace}/pods")
        return {item["metadata"]["name"]: item for item in listing["items"]}

    async def events(self, namespace: str, name: str) -> list[tuple[str, str]]:
        """Reasons and messages of the events on an object."""
        listing = await self.call("GET", f"/api/v1/namespaces/{namespace}/events")
        found = [item for item in listing["items"] if item["involvedObject"]["name"] == name]
        return [(item["reason"], item["message"]) for item in found]


@asynccontextmanager
async def api(cluster: Cluster) -> AsyncGenerator[Api, None]:
    async with raw_session(cluster) as session:
        yield Api(session)


def new_claim(
    address: str,
    *,
    pool: str = "p",
    namespace: str = "",
    name: str = "",
    uid: str = "",
    controller: Controller | None = None,
    static: str = "",
    node: str = "n1",
    container: str = "c",
    nic: str = "eth0",
    until: datetime | None = None,
) -> Claim:
    """A claim as IPAM writes it. `static` is the name that it outlives its pod under."""
    labels = {LABEL_POOL: label_value(pool), LABEL_NODE: label_value(node)}
    if until is None:
        labels[LABEL_IDENTITY] = identity_label(uid, container)
    if static:
        labels[LABEL_WORKLOAD] = workload_label(namespace, static)
    pod = name if static and static != name else ""
    workload = Workload(namespace=namespace, name=static or name, pod=pod, controller=controller)
    ip = ip_address(address)
    return Claim(
        metadata=ObjectMeta(name=claim_name(ip), labels=labels),
        spec=ClaimSpec(
            address=address,
            ip_version=ip.version,
            pool=pool,
            state="Quarantined" if until else "Allocated",
            workload=workload if name or static else None,
            pod_uid=uid,
            container_id="" if until else container,
            nic=nic,
            node=node,
            quarantine=Quarantine(reason="test", mac="02:00:00:00:00:01", until=until) if until else None,
        ),
    )


async def pool(store: Store, name: str, ips: str, *, finalizer: bool = True, **spec: Any) -> Pool:
    """Make a pool with one range; its subnet is the range's /16."""
    subnet = ".".join(ips.split(".")[:2]) + ".0.0/16" if ips else "10.99.0.0/16"
    meta = ObjectMeta(name=name, finalizers=[FINALIZER] if finalizer else [])
    body = {"subnet": subnet, "ip_version": 4, "ips": [ips] if ips else None, **spec}
    return await store.create(Pool(metadata=meta, spec=PoolSpec(**body)))


async def left(store: Store, claims: Iterable[Claim]) -> set[str]:
    """The addresses of those claims that are still there, whoever has them."""
    there = {claim.metadata.name for claim in (await store.list(Claim)).items}
    return {claim.spec.address for claim in claims if claim.metadata.name in there}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = WAIT) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - the API server tells nobody
            await asyncio.sleep(0.05)


async def until_gone(store: Store, *claims: Claim, seconds: float = WAIT) -> None:
    async def gone() -> bool:
        return not await left(store, claims)

    await until(gone, seconds)


async def stays(store: Store, *claims: Claim, seconds: float = 0.7) -> None:
    """Assert that the claims are there, and remain so for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert await left(store, claims) == {claim.spec.address for claim in claims}
        await asyncio.sleep(0.1)


async def is_gone(store: Store, kind: Any, name: str, namespace: str = "") -> bool:
    try:
        await store.get(kind, name, namespace)
    except NotFoundError:
        return True
    return False
