"""SpiderEndpoints that nobody else removes: upstream's with finalizers, and those of pods whose claims were taken back.

They are views, so to err does no harm; still nothing is removed that a live pod or a claim stands behind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from ipaddress import ip_interface
from typing import ClassVar

from msgspec.structs import replace

from api.claim import LABEL_WORKLOAD, Claim, claim_name, workload_label
from api.core import Pod
from api.endpoint import Endpoint
from api.meta import FINALIZER, Kind, Resource, Struct
from api.mirror import uid_on_node
from api.pool import Pool
from api.views import has_foreign_records
from controller.reclaim.index import Index
from controller.reclaim.settings import ReclaimSettings
from controller.room import Desk
from controller.work import WorkQueue
from store.errors import NotFoundError

_log = logging.getLogger(__name__)

_UPSTREAM_PAUSE = 30.0
"""Seconds between two looks at an endpoint that upstream's agents may still release addresses by."""


class _Current(Struct, frozen=True, kw_only=True):
    uid: str = ""


class _Status(Struct, frozen=True, kw_only=True):
    current: _Current | None = None


class EndpointHead(Resource, frozen=True, kw_only=True):
    """As much of a SpiderEndpoint as it takes to see whether it should be there: a cluster has as many as pods."""

    TYPE: ClassVar[Kind] = Endpoint.TYPE._replace(partial=True)
    status: _Status | None = None

    @property
    def uid(self) -> str:
        """UID of the pod that it tells of."""
        return self.status.current.uid if self.status and self.status.current else ""


class Endpoints:
    """Removes them, one after the other."""

    def __init__(self, desk: Desk, settings: ReclaimSettings) -> None:
        self._store = desk.store
        self._clean = settings.clean_outdated_endpoints
        self._heads = desk.caches.of(EndpointHead)
        self._pools = desk.caches.of(Pool)
        self._index = Index()
        self._orphans: dict[tuple[str, str], str] = {}
        """Endpoints whose pod's claims were taken back, and the pod's UID."""
        self._queue: WorkQueue[tuple[str, str]] = WorkQueue("endpoints", self._settle, workers=2)

    async def run(self, index: Index) -> None:
        """Remove until cancelled."""
        await self._heads.informer.synced()
        self._index = index
        self._orphans.clear()
        self._queue = WorkQueue("endpoints", self._settle, workers=2)
        stop = self._heads.listen(self._changed)
        try:
            await self._queue.run()
        finally:
            stop()

    def scan(self) -> None:
        """Look for endpoints without a pod, if that is wanted."""
        if self._clean:
            for head in self._heads.values():
                if head.uid not in self._index.pods:
                    self._queue.add(_key(head))

    def released(self, claims: Iterable[Claim]) -> None:
        """Claims were taken back: the endpoints that tell of them tell the past."""
        for claim in claims:
            workload = claim.spec.workload
            if workload is None or not claim.spec.pod_uid:
                continue
            head = self._heads.get(workload.name, workload.namespace)
            if head is None or head.uid != claim.spec.pod_uid:
                continue
            owned = any(owner.kind == Pod.TYPE.kind for owner in head.metadata.owner_references)
            if owned and claim.spec.pod_uid not in self._index.pods:
                continue  # Kubernetes collects it, with its owner
            self._orphans[_key(head)] = head.uid
            self._queue.add(_key(head))

    def _changed(self, _old: EndpointHead | None, new: EndpointHead | None) -> None:
        if new is not None and new.metadata.deletion_timestamp is not None and FINALIZER in new.metadata.finalizers:
            self._queue.add(_key(new))

    async def _settle(self, key: tuple[str, str]) -> float | None:
        again = await self._look(*key)
        if again is None:
            self._orphans.pop(key, None)
        return again

    async def _look(self, namespace: str, name: str) -> float | None:
        """Remove the endpoint if it should not be there; in how many seconds to look again, if at all."""
        orphan_of = self._orphans.get((namespace, name))
        try:
            endpoint = await self._store.get(Endpoint, name, namespace)
        except NotFoundError:
            return None
        terminating = endpoint.metadata.deletion_timestamp is not None
        if not terminating and not await self._is_outdated(endpoint, orphan_of):
            return None
        if self._is_upstreams(endpoint):
            return _UPSTREAM_PAUSE if terminating else None
        if FINALIZER in endpoint.metadata.finalizers:
            others = [finalizer for finalizer in endpoint.metadata.finalizers if finalizer != FINALIZER]
            meta = replace(endpoint.metadata, finalizers=others)
            endpoint = await self._store.update(replace(endpoint, metadata=meta))
        if not terminating:
            meta = endpoint.metadata
            try:
                await self._store.delete(
                    Endpoint, name, namespace, uid=meta.uid, resource_version=meta.resource_version
                )
            except NotFoundError:
                return None
        _log.info("endpoint %s/%s is removed: %s", namespace, name, "deleted" if terminating else "its pod has ended")
        return None

    def _is_upstreams(self, endpoint: Endpoint) -> bool:
        """Whether it names a pool whose records are still upstream's: its agents release addresses by endpoints."""
        for entry in endpoint.status.current.ips if endpoint.status else ():
            for name in (entry.ipv4_pool, entry.ipv6_pool):
                pool = self._pools.get(name) if name else None
                if pool is not None and has_foreign_records(pool):
                    return True
        return False

    async def _is_outdated(self, endpoint: Endpoint, orphan_of: str | None) -> bool:
        """Whether no live pod and no claim stands behind it."""
        uid = endpoint.status.current.uid if endpoint.status else ""
        if not (orphan_of == uid if orphan_of else self._clean):
            return False
        meta = endpoint.metadata
        if not orphan_of and (uid in self._index.pods or await self._pod_is_there(meta.namespace, meta.name, uid)):
            return False
        label = workload_label(meta.namespace, meta.name)
        for name in _claims_of(endpoint):
            try:
                claim = await self._store.get(Claim, name)
            except NotFoundError:
                continue
            if claim.spec.pod_uid == uid or claim.metadata.labels.get(LABEL_WORKLOAD) == label:
                return False
        return True

    async def _pod_is_there(self, namespace: str, name: str, uid: str) -> bool:
        try:
            return uid_on_node(await self._store.get(Pod, name, namespace)) == uid
        except NotFoundError:
            return False


def _key(head: EndpointHead) -> tuple[str, str]:
    return head.metadata.namespace, head.metadata.name


def _claims_of(endpoint: Endpoint) -> Iterable[str]:
    for entry in endpoint.status.current.ips if endpoint.status else ():
        for text in (entry.ipv4, entry.ipv6):
            if text:
                try:
                    yield claim_name(ip_interface(text).ip)
                except ValueError:
                    continue
