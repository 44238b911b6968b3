"""The room for subnets beside a real API server and the real controllers, which make ReplicaSets and Pods.

Nobody assigns addresses here: tests write the claims that agents would write.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar

from msgspec.structs import replace

from api.annotations import IP_NUMBER, RECLAIM, SUBNET, SUBNETS
from api.autopools import application_of
from api.claim import LABEL_POOL, Claim, ClaimSpec, claim_name, label_value
from api.event import Event
from api.meta import FINALIZER, ObjectMeta
from api.pool import Pool
from api.ranges import IPSet
from api.subnet import Subnet, SubnetSpec, is_ready
from api.validate.pool import pool_addresses
from api.validate.subnet import ledger_of
from controller.caches import Caches
from controller.room import Desk
from controller.subnets.room import Subnets
from controller.subnets.settings import SubnetSettings
from lab.kube.cluster import Cluster
from store.errors import ConflictError, NotFoundError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Query, Store
from store.recorder import Recorder

T = TypeVar("T")
WAIT = 20.0
"""Seconds within which what must come about does."""

DEFAULTS = SubnetSettings(settle=0.05, patience=1.0)


@dataclass
class Rig:
    """One test's world: a namespace, and a store that sees all of the cluster."""

    cluster: Cluster
    store: Store
    namespace: str

    async def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return await asyncio.to_thread(self.cluster.kubectl, *arguments, stdin=stdin)

    async def apply(self, *documents: Mapping[str, Any]) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        await self.kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps(items))

    async def delete(self, kind: str, name: str, *flags: str) -> None:
        await self.kubectl("delete", kind, name, "-n", self.namespace, "--wait=false", *flags)

    async def subnet(self, cidr: str, ips: list[str], **spec: Any) -> str:
        """A new subnet that is ready; its name."""
        name = f"s-{secrets.token_hex(4)}"
        family = ip_address(cidr.partition("/")[0]).version
        made = SubnetSpec(subnet=cidr, ip_version=family, ips=ips, **spec)
        await self.store.create(Subnet(metadata=ObjectMeta(name=name), spec=made))
        await self.until(lambda: self.is_ready(name))
        return name

    async def is_ready(self, name: str) -> bool:
        return is_ready(await self.store.get(Subnet, name))

    async def pools(self, subnet: str = "") -> list[Pool]:
        """Automatic pools of applications of the namespace."""
        wanted = {"ipam.spidernet.io/owner-application-namespace": self.namespace}
        found = (await self.store.list(Pool, Query(labels=wanted))).items
        return [p for p in found if not subnet or p.metadata.owner_references[0].name == subnet]

    async def sizes(self) -> dict[str, int]:
        """Application and NIC and family to size; terminating ones apart."""
        sizes = {}
        for pool in await self.pools():
            if pool.metadata.deletion_timestamp is None:
                labels = pool.metadata.labels
                key = "/".join(labels[f"ipam.spidernet.io/{k}"] for k in ("owner-application-name", "interface"))
                sizes[f"{key}/{pool.spec.ip_version}"] = pool_addresses(pool.spec).count
        return sizes

    async def sizes_by_name(self) -> dict[str, int]:
        """As `sizes`, with names that are too long for labels."""
        sizes = {}
        for pool in await self.pools():
            application = application_of(pool)
            assert application is not None
            nic = pool.metadata.labels["ipam.spidernet.io/interface"]
            sizes[f"{application.name}/{nic}/{pool.spec.ip_version}"] = pool_addresses(pool.spec).count
        return sizes

    async def until(self, holds: Callable[[], Awaitable[T]], what: str = "") -> T:
        """What `holds` returns once that is true."""
        deadline = time.monotonic() + WAIT
        while True:
            result = await holds()
            if result:
                return result
            assert time.monotonic() < deadline, what or "it does not come about"
            await asyncio.sleep(0.05)

    async def becomes(self, read: Callable[[], Awaitable[object]], value: object) -> None:
        """Wait until `read` gives the value."""
        last: list[object] = []

        async def same() -> bool:
            last[:] = [await read()]
            return last[0] == value

        try:
            await self.until(same)
        except AssertionError:
            raise AssertionError(f"{last[0]!r} does not become {value!r}") from None

    async def free(self, subnet: str) -> int:
        status = (await self.store.get(Subnet, subnet)).status
        assert status is not None
        return (status.total_ip_count or 0) - (status.allocated_ip_count or 0)

    async def frees(self, subnet: str, count: int) -> None:
        """Wait until so many of the subnet's addresses are free, and nothing contradicts that."""
        await self.becomes(lambda: self.free(subnet), count)
        await self.consistent(subnet)

    async def told(self, reason: str, about: str) -> None:
        """Wait for an event."""

        async def there() -> bool:
            return any(e.involved_object.name == about for e in await self.events(reason))

        await self.until(there, f"no event {reason} on {about}")

    async def take(self, pool: str, *numbers: int) -> None:
        """Claim addresses of a pool, by their place in it."""
        there = await self.store.get(Pool, pool)
        family = there.spec.ip_version or 4
        found = [value for low, high in pool_addresses(there.spec).intervals for value in range(low, high + 1)]
        for number in numbers:
            await self.store.create(claim(pool, found[number], family))

    async def give_back(self, pool: str, count: int | None = None) -> None:
        query = Query(labels={LABEL_POOL: label_value(pool)})
        for each in (await self.store.list(Claim, query)).items[:count]:
            await self.store.delete(Claim, each.metadata.name)

    async def events(self, reason: str) -> list[Event]:
        found = (await self.store.list(Event)).items
        mine = {self.namespace, "default"}
        return [e for e in found if e.reason == reason and e.metadata.namespace in mine]

    async def consistent(self, subnet: str) -> None:
        """No address is in two pools, and the ledger says what the pools have."""
        there = await self.store.get(Subnet, subnet)
        grants = ledger_of(there)
        seen: dict[int, str] = {}
        for pool in (await self.store.list(Pool)).items:
            if pool.spec.subnet != there.spec.subnet:
                continue
            have = pool_addresses(pool.spec)
            name = pool.metadata.name
            assert have == (grants[name].ips if name in grants else IPSet(have.family)), name
            for low, high in have.intervals:
                for value in range(low, high + 1):
                    assert value not in seen, (value, name, seen[value])
                    seen[value] = name
        assert there.status is not None
        assert there.status.allocated_ip_count == len(seen)

    async def finalize(self) -> None:
        """What the room for pools' status does: let terminating pools go that no claim names."""
        while True:
            for pool in (await self.store.list(Pool)).items:
                query = Query(labels={LABEL_POOL: label_value(pool.metadata.name)})
                if pool.metadata.deletion_timestamp and not (await self.store.list(Claim, query)).items:
                    finalizers = [each for each in pool.metadata.finalizers if each != FINALIZER]
                    with suppress(ConflictError, NotFoundError):
                        await self.store.update(replace(pool, metadata=replace(pool.metadata, finalizers=finalizers)))
            await asyncio.sleep(0.1)


def claim(pool: str, value: int, family: Any) -> Claim:
    address = ip_address(value) if family == 4 else ip_address(value.to_bytes(16, "big"))
    return Claim(
        metadata=ObjectMeta(name=claim_name(address), labels={LABEL_POOL: label_value(pool)}),
        spec=ClaimSpec(address=str(address), ip_version=family, pool=pool),
    )


def asking(*nics: Mapping[str, Any], number: str = "", reclaim: str = "") -> dict[str, str]:
    found = {SUBNET: json.dumps(nics[0])} if len(nics) == 1 else {SUBNETS: json.dumps(nics)}
    return found | ({IP_NUMBER: number} if number else {}) | ({RECLAIM: reclaim} if reclaim else {})


def template(wanted: Mapping[str, str], **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "lab.invalid/web:1"}
    return {
        "metadata": {"labels": {"app": "x"}, "annotations": dict(wanted)},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0, **spec},
    }


def workload(kind: str, name: str, wanted: Mapping[str, str], size: int = 1, **pod: Any) -> dict[str, Any]:
    """A controller of the kind with so many pods."""
    job: dict[str, Any] = {
        "parallelism": size,
        "completions": size,
        "template": template(wanted, restartPolicy="Never", **pod),
    }
    selector = {"matchLabels": {"app": "x"}}
    many: dict[str, Any] = {"replicas": size, "selector": selector, "template": template(wanted, **pod)}
    spec: dict[str, Any] = {
        "Deployment": many,
        "ReplicaSet": many,
        "StatefulSet": {**many, "serviceName": name},
        "DaemonSet": {"selector": selector, "template": template(wanted, **pod)},
        "Job": job,
        "CronJob": {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": job}},
    }[kind]
    group = "batch/v1" if kind in ("Job", "CronJob") else "apps/v1"
    return {"apiVersion": group, "kind": kind, "metadata": {"name": name}, "spec": spec}


@asynccontextmanager
async def room(store: Store, settings: SubnetSettings = DEFAULTS) -> AsyncGenerator[Subnets, None]:
    """The room while it leads."""
    caches, recorder = Caches(store), Recorder(store, "spiderpool-controller")
    subnets = Subnets(Desk(store, caches, recorder, "kube-system"), settings)
    tasks = [asyncio.create_task(work()) for work in (caches.run, recorder.run, subnets.run)]
    try:
        yield subnets
        for task in tasks:
            assert not task.done(), task.exception()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def rig(cluster: Cluster, settings: SubnetSettings | None = DEFAULTS) -> AsyncGenerator[Rig, None]:
    """A namespace of its own, with the room at work; without `settings` the test starts the room."""
    store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
    world = Rig(cluster, store, f"n-{secrets.token_hex(4)}")
    await world.kubectl("create", "namespace", world.namespace)
    finalizing = asyncio.create_task(world.finalize())
    try:
        if settings is None:
            yield world
        else:
            async with room(store, settings):
                yield world
        assert not finalizing.done(), finalizing.exception()
    finally:
        await clean(world)
        finalizing.cancel()
        await asyncio.gather(finalizing, return_exceptions=True)
        await store.close()


async def clean(world: Rig) -> None:
    await world.kubectl("delete", "namespace", world.namespace, "--wait=false")
    for claim_ in (await world.store.list(Claim)).items:
        with suppress(NotFoundError):
            await world.store.delete(Claim, claim_.metadata.name)

    async def emptied() -> bool:
        """A controller that runs meanwhile writes them, and makes others as long as it sees applications."""
        left = [each for kind in (Pool, Subnet) for each in (await world.store.list(kind)).items]
        for each in left:
            with suppress(NotFoundError, ConflictError):
                meta = replace(each.metadata, finalizers=[], resource_version="")
                await world.store.update(replace(each, metadata=meta))
                await world.store.delete(type(each), each.metadata.name)
        return not left

    await world.until(emptied, "pools and subnets are gone")
