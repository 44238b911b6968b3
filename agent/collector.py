"""What the controller does in a cluster and nobody else does on a machine without one.

Pools' status is written, terminating pools are let go once no claim is left, quarantines end, endpoints without
claims are removed, and what should not be is reported. Several agents may do it on one store: every write is checked
against the version it was decided on, and left out when it would change nothing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from random import uniform

from prometheus_client import Gauge

from api.claim import LABEL_NODE, Claim, label_value
from api.endpoint import Endpoint
from api.meta import now
from api.pool import Pool
from api.validate.pool import pool_addresses
from api.views import overlaps
from daemon.limits import at_least
from plugins.ipam.endpoints import remove, uid_of
from store.errors import ConflictError, NotFoundError, StoreError
from store.informer import Informer
from store.pool_views import PoolViews
from store.port import Query, Store

_log = logging.getLogger(__name__)

OVERLAPS = Gauge("spiderpool_ippool_overlaps", "Pairs of SpiderIPPools that have addresses in common")


@dataclass(frozen=True)
class CollectorSettings:
    """Times are in seconds."""

    enabled: bool = True
    """Collect on this node. On in embedded mode, where at least one agent of a store must; in a cluster the
    controller does it."""
    debounce: float = 1.0
    """How long changes are gathered before pools' status is written: a burst of pods costs one write for each pool."""
    sweep: float = 15.0
    """Time between two looks for quarantines that are over and endpoints whose pod is gone; a quarantine may last so
    much longer."""

    def __post_init__(self) -> None:
        at_least(0.01, debounce=self.debounce, sweep=self.sweep)


class Collector:
    """Collects until cancelled."""

    def __init__(self, store: Store, node: str, settings: CollectorSettings) -> None:
        self._store = store
        self._node = node
        self._settings = settings
        self._views = PoolViews(store, self._mark, self._conflicts)
        self._overlaps: set[tuple[str, str]] = set()
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._pools = Informer(store, Pool, on_change=self._pool_changed)
        self._claims = Informer(store, Claim, on_change=self._views.claim_changed)

    async def run(self) -> None:
        """Collect until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pools.run())
            group.create_task(self._claims.run())
            await self._pools.synced()
            await self._claims.synced()
            group.create_task(self._follow())
            group.create_task(self._sweep())

    # Pools

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._settings.debounce)
            self._wake.clear()
            if self._views.respecified:
                self._views.compare()
            while self._dirty:
                name = self._dirty.pop()
                try:
                    await self._views.settle(name)
                except (ConflictError, NotFoundError):
                    self._mark(name)  # decided on an old version: the event that says so is under way
                    break
                except StoreError as error:
                    _log.warning("the status of pool %s is not written yet: %s", name, error)
                    self._mark(name)
                    break

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        self._views.pool_changed(old, new)
        if self._views.respecified:
            self._wake.set()

    def _mark(self, name: str) -> None:
        self._dirty.add(name)
        self._wake.set()

    def _conflicts(self, pools: list[Pool]) -> dict[str, str]:
        """Overlaps are reported, and nobody is kept from a pool for them: each address is given once, to either."""
        pairs = overlaps({pool.metadata.name: pool_addresses(pool.spec) for pool in pools})
        for first, second in sorted(pairs - self._overlaps):
            _log.warning("pools %s and %s have addresses in common: each is given once, to either", first, second)
        self._overlaps = pairs
        OVERLAPS.set(len(pairs))
        return {}

    # What time brings

    async def _sweep(self) -> None:
        while True:
            try:
                await self._end_quarantines()
                await self._remove_endpoints()
            except StoreError as error:
                _log.warning("the sweep is put off: %s", error)
            longest = self._settings.sweep
            await asyncio.sleep(uniform(longest / 2, longest))  # agents of one store do not come as one

    async def _end_quarantines(self) -> None:
        moment = now()
        for claim in list(self._claims.values()):
            quarantine, meta = claim.spec.quarantine, claim.metadata
            if claim.spec.state != "Quarantined" or quarantine is None or quarantine.until > moment:
                continue
            try:
                await self._store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)
            except (NotFoundError, ConflictError):
                continue  # another agent was faster
            _log.info("the quarantine of %s in pool %s is over", claim.spec.address, claim.spec.pool)

    async def _remove_endpoints(self) -> None:
        """Remove this node's endpoints whose pod has no claims: left when the agent died between the two.

        Endpoints are read before claims, so that one whose claims are younger than the reading is not misjudged.
        """
        endpoints = (await self._store.list(Endpoint)).items
        mine = [e for e in endpoints if e.status is not None and e.status.current.node == self._node]
        if not mine:
            return
        claims = (await self._store.list(Claim, Query(labels={LABEL_NODE: label_value(self._node)}))).items
        holders = {claim.spec.pod_uid or claim.spec.container_id for claim in claims}
        for endpoint in mine:
            if uid_of(endpoint) not in holders:
                try:
                    await remove(self._store, endpoint)
                except (NotFoundError, ConflictError):
                    continue
