"""Adoption: upstream's records become claims, and then claims are authoritative.

The order is what makes it safe. As long as a pool has records and no mark, nobody allocates from it: not our agents,
and not upstream's, of which none is left. Claims are made first, the mark comes last, under the condition of the
version in which the records were read: whoever dies in between, the next pass finds the claims and goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from msgspec.structs import replace

from api.apps import StatefulSet
from api.claim import Claim, Controller
from api.core import Pod
from api.endpoint import Endpoint
from api.meta import R, Resource
from api.mirror import is_mirror, is_pod_of
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool
from api.views import has_foreign_records
from api.workloads import judges_of, will_have_again
from controller.adoption.decide import (
    Evidence,
    Record,
    RecordsError,
    Standing,
    Switches,
    claim_of,
    compare,
    names,
    owner_of,
    records_of,
)
from controller.adoption.settings import AdoptionSettings
from controller.room import Desk
from controller.work import WorkQueue
from store.agents import agents_of_upstream
from store.errors import AlreadyExistsError, ConflictError, NotFoundError, StoreError
from store.owners import Owners
from store.port import Store

_log = logging.getLogger(__name__)
_ATTEMPTS = 4
_EVERYTHING = ""
"""The queue's only key: what pods and endpoints there are is read once for all pools."""
_TOLD = 5
"""How many names a message has at most."""


class _Cluster:
    """Pods and endpoints as they were read after the records."""

    def __init__(self, pods: list[Pod], endpoints: list[Endpoint]) -> None:
        self._pods = {pod.metadata.uid: pod for pod in pods}
        self._mirrors = {(pod.metadata.namespace, pod.metadata.name): pod for pod in pods if is_mirror(pod)}
        self.endpoints = {(each.metadata.namespace, each.metadata.name): each for each in endpoints}

    def pod_of(self, record: Record) -> Pod | None:
        """The pod that the record is of. A mirror's name is enough: upstream records the UID of an object that may
        have been made anew since, while the pod goes on."""
        return self._pods.get(record.pod_uid) or self._mirrors.get((record.namespace, record.name))

    def has_pod_of(self, claim: Claim) -> bool:
        """Whether the pod that the claim names is there."""
        workload = claim.spec.workload
        mirror = self._mirrors.get((workload.namespace, workload.pod_name)) if workload is not None else None
        return claim.spec.pod_uid in self._pods or (mirror is not None and is_pod_of(mirror, claim))


class Adopter:
    """One pass over all pools, over the port alone; nothing is remembered between passes."""

    def __init__(self, store: Store, settings: AdoptionSettings, switches: Switches) -> None:
        self._store = store
        self._settings = settings
        self._switches = switches
        self._owners = Owners(store)
        self.troubles: dict[str, str] = {}
        """Pools that are to be adopted and could not be, and why, as of the last pass."""

    async def foreign(self) -> list[Pool]:
        """Pools to adopt, read uncached. Raises StoreError."""
        return [pool for pool in (await self._store.list(Pool)).items if has_foreign_records(pool)]

    async def adopt_all(self) -> bool:
        """Adopt what can be adopted; whether nothing is left. Raises StoreError."""
        pools = await self.foreign()
        self.troubles = {}
        if not pools:
            return True
        if running := await agents_of_upstream(self._store):
            text = f"upstream's agents are still there: {_some(running)}"
            self.troubles = {pool.metadata.name: text for pool in pools}
            return False
        cluster = _Cluster((await self._store.list(Pod)).whole(), (await self._store.list(Endpoint)).whole())
        for pool in pools:
            try:
                await self._adopt(pool, cluster)
            except RecordsError as error:
                self.troubles[pool.metadata.name] = str(error)
            except (ConflictError, NotFoundError) as error:
                self.troubles[pool.metadata.name] = f"it was changed meanwhile: {error}"
        return not self.troubles

    async def _adopt(self, pool: Pool, cluster: _Cluster) -> None:
        gate = asyncio.Semaphore(self._settings.workers)
        outcomes: Counter[str] = Counter()

        async def one(record: Record) -> None:
            async with gate:
                outcomes[await self._settle(record, pool, cluster)] += 1

        for outcome in await asyncio.gather(*(one(record) for record in records_of(pool)), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        if running := await agents_of_upstream(self._store):
            raise ConflictError(f"upstream's agents are back: {_some(running)}")
        await self._mark(pool)
        _log.info(
            "pool %s is adopted: %d addresses claimed, %d were nobody's, %d are held by other pods",
            pool.metadata.name,
            outcomes["claimed"],
            outcomes["nobody's"],
            outcomes["taken"],
        )

    async def _mark(self, pool: Pool) -> None:
        """From now on claims decide. Raises ConflictError if the pool is not as it was read."""
        if pool.metadata.deletion_timestamp is not None and pool.status is not None:
            # It may not be changed any more, but for its status; nobody allocates from it either.
            await self._store.update_status(replace(pool, status=replace(pool.status, allocated_ips=None)))
            return
        annotations = {**pool.metadata.annotations, ANNOTATION_CLAIMS: CLAIMS_AUTHORITATIVE}
        await self._store.update(replace(pool, metadata=replace(pool.metadata, annotations=annotations)))

    async def _settle(self, record: Record, pool: Pool, cluster: _Cluster) -> str:
        """Have the claim made that the record asks for; what became of it."""
        wanted = claim_of(record, pool, await self._evidence(record, cluster), self._switches)
        if wanted is None:
            _log.info("pool %s: %s was of %s/%s, which is gone", pool.metadata.name, *_told(record))
            return "nobody's"
        for _ in range(_ATTEMPTS):
            try:
                await self._store.create(wanted)
            except AlreadyExistsError:
                pass
            else:
                return "claimed"
            try:
                found = await self._store.get(Claim, wanted.metadata.name)
            except NotFoundError:
                continue
            standing = compare(found, wanted, cluster.has_pod_of)
            if standing is Standing.SAME:
                return "claimed"
            if standing is Standing.TAKEN:
                _log.error("pool %s: %s of %s/%s is also held by another pod", pool.metadata.name, *_told(record))
                return "taken"
            try:
                await self._store.update(
                    replace(found, metadata=replace(found.metadata, labels=wanted.metadata.labels), spec=wanted.spec)
                )
            except (ConflictError, NotFoundError):
                continue
            return "claimed"
        raise ConflictError(f"claim {wanted.metadata.name} keeps changing")

    async def _evidence(self, record: Record, cluster: _Cluster) -> Evidence:
        pod = cluster.pod_of(record)
        endpoint = cluster.endpoints.get((record.namespace, record.name))
        if pod is not None:
            return Evidence(pod, endpoint, await self._owners.top_controller(pod))
        owner = owner_of(endpoint) if endpoint is not None and names(endpoint, record.address) else None
        if owner is None:
            return Evidence(None, endpoint, None)
        kind, above = owner
        # Upstream calls a virtual machine's record by the machine, and names who is above that.
        name = above if kind == StatefulSet.TYPE.kind else record.name
        found = [await self._get(each, name, record.namespace) for each in judges_of(kind)]
        controller = _controller(judges_of(kind)[0], name, found[0])
        return Evidence(None, endpoint, controller, will_have_again(record.name, found))

    async def _get(self, kind: type[R], name: str, namespace: str) -> R | None:
        try:
            return await self._store.get(kind, name, namespace)
        except NotFoundError:
            return None


class AdoptionRoom:
    """The room; `run` is the leader's."""

    def __init__(self, desk: Desk, settings: AdoptionSettings, switches: Switches) -> None:
        self._desk = desk
        self._settings = settings
        self._pools = desk.caches.of(Pool)
        self._adopter = Adopter(desk.store, settings, switches)
        self._queue: WorkQueue[str] = WorkQueue("adoption", self._pass, workers=1)

    async def run(self) -> None:
        """Adopt until cancelled."""
        await self._pools.informer.synced()
        self._queue = WorkQueue("adoption", self._pass, workers=1)
        stop: Callable[[], None] = self._pools.listen(self._changed)
        try:
            await self._queue.run()
        finally:
            stop()

    def _changed(self, _old: Pool | None, new: Pool | None) -> None:
        if new is not None and has_foreign_records(new):
            self._queue.add(_EVERYTHING)

    async def _pass(self, _: str) -> float | None:
        try:
            if await self._adopter.adopt_all():
                return None
        except StoreError as error:
            _log.warning("adoption is put off: %s", error)
            return self._settings.retry
        for name, trouble in self._adopter.troubles.items():
            _log.warning("pool %s is not adopted yet: %s", name, trouble)
            pool = self._pools.get(name)
            if pool is not None:
                self._desk.events.warning(pool, "NotAdopted", f"Its addresses cannot be given yet: {trouble}.")
        return self._settings.retry


def _controller(kind: type[Resource], name: str, found: Resource | None) -> Controller:
    uid = found.metadata.uid if found is not None else ""
    return Controller(api_version=kind.TYPE.api_version, kind=kind.TYPE.kind, name=name, uid=uid)


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _TOLD} more" if len(items) > _TOLD else ""
    return ", ".join(items[:_TOLD]) + more


def _told(record: Record) -> tuple[str, str, str]:
    return str(record.address), record.namespace, record.name
