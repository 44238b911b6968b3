"""What the controller does in a cluster and nobody else does on a machine without one.

Pools' status is written, terminating pools are let go once no claim is left, quarantines end, endpoints without
claims are removed, and what should not be is reported. Several agents may do it on one store: every write is checked
against the version it was decided on, and left out when it would change nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from random import uniform

from msgspec.structs import replace
from prometheus_client import Gauge

from api.claim import LABEL_NODE, LABEL_POOL, Claim, label_value
from api.endpoint import Endpoint
from api.meta import FINALIZER, now
from api.pool import Pool
from api.ranges import IPSet
from api.views import pool_status
from daemon.limits import at_least
from plugins.ipam.candidates import PoolFacts, pool_facts
from plugins.ipam.endpoints import remove, uid_of
from store.errors import ConflictError, NotFoundError, StoreError
from store.informer import Informer
from store.port import Query, Store

_log = logging.getLogger(__name__)

POOLS = Gauge("spiderpool_total_ippool_counts", "SpiderIPPools")
TOTAL = Gauge("spiderpool_debug_ippool_total_ip_counts", "Addresses of a SpiderIPPool", ["SpiderIPPool"])
AVAILABLE = Gauge(
    "spiderpool_debug_ippool_available_ip_counts", "Addresses of a SpiderIPPool without a claim", ["SpiderIPPool"]
)
QUARANTINED = Gauge("spiderpool_ippool_quarantined_ip_counts", "Addresses in quarantine", ["SpiderIPPool"])
STRAYS = Gauge("spiderpool_ippool_stray_claims", "Claims on addresses that their pool does not have", ["SpiderIPPool"])
OVERLAPS = Gauge("spiderpool_ippool_overlaps", "Pairs of SpiderIPPools that have addresses in common")
PER_POOL = (TOTAL, AVAILABLE, QUARANTINED, STRAYS)


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
        self._facts: dict[str, PoolFacts] = {}
        self._claims: defaultdict[str, dict[str, Claim]] = defaultdict(dict)
        self._strays: defaultdict[str, set[str]] = defaultdict(set)
        self._overlaps: set[tuple[str, str]] = set()
        self._dirty: set[str] = set()
        self._respecified = False
        self._wake = asyncio.Event()
        self._pools = Informer(store, Pool, on_change=self._pool_changed)
        self._all_claims = Informer(store, Claim, on_change=self._claim_changed)

    async def run(self) -> None:
        """Collect until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pools.run())
            group.create_task(self._all_claims.run())
            await self._pools.synced()
            await self._all_claims.synced()
            group.create_task(self._follow())
            group.create_task(self._sweep())

    # Pools

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._settings.debounce)
            self._wake.clear()
            if self._respecified:
                self._respecified = False
                self._report_overlaps()
                POOLS.set(len(self._facts))
            while self._dirty:
                name = self._dirty.pop()
                try:
                    await self._settle(name)
                except (ConflictError, NotFoundError):
                    self._mark(name)  # decided on an old version: the event that says so is under way
                    break
                except StoreError as error:
                    _log.warning("the status of pool %s is not written yet: %s", name, error)
                    self._mark(name)
                    break

    async def _settle(self, name: str) -> None:
        pool = self._pools.get(name)
        if pool is None:
            return
        claims = self._claims[name]
        if pool.metadata.deletion_timestamp is not None and FINALIZER in pool.metadata.finalizers and not claims:
            await self._let_go(pool)
            return
        status = pool_status(pool, claims.values())
        if status != pool.status:
            self._pools.learn(await self._store.update_status(replace(pool, status=status)))
        total = status.total_ip_count or 0
        TOTAL.labels(name).set(total)
        AVAILABLE.labels(name).set(max(0, total - (status.allocated_ip_count or 0)))
        QUARANTINED.labels(name).set(sum(claim.spec.quarantine is not None for claim in claims.values()))
        STRAYS.labels(name).set(len(self._strays[name]))

    async def _let_go(self, pool: Pool) -> None:
        """Take the finalizer off a terminating pool without claims; the store is asked, not the cache."""
        label = {LABEL_POOL: label_value(pool.metadata.name)}
        if not (await self._store.list(Claim, Query(labels=label))).items:
            finalizers = [finalizer for finalizer in pool.metadata.finalizers if finalizer != FINALIZER]
            await self._store.update(replace(pool, metadata=replace(pool.metadata, finalizers=finalizers)))
            _log.info("pool %s is gone: no claim was left", pool.metadata.name)

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        name = (new or old).metadata.name  # type: ignore[union-attr]
        if new is None:
            self._facts.pop(name, None)
            self._strays.pop(name, None)
            for gauge in PER_POOL:
                gauge.remove(name)
            self._respecified = True
        elif old is None or old.spec != new.spec:
            self._facts[name] = pool_facts(new)
            self._strays[name] = {claim for claim in self._claims[name] if self._is_stray(self._claims[name][claim])}
            self._respecified = True
        self._mark(name)

    def _claim_changed(self, old: Claim | None, new: Claim | None) -> None:
        for claim in (old, new):
            if claim is None:
                continue
            pool, name = claim.spec.pool, claim.metadata.name
            if claim is new:
                self._claims[pool][name] = claim
                if self._is_stray(claim) and name not in self._strays[pool]:
                    self._strays[pool].add(name)
                    _log.warning("claim %s is on an address that its pool %s does not have; it stays", name, pool)
            else:
                self._claims[pool].pop(name, None)
                self._strays[pool].discard(name)
            self._mark(pool)

    def _is_stray(self, claim: Claim) -> bool:
        facts = self._facts.get(claim.spec.pool)
        return facts is not None and int(ip_address(claim.spec.address)) not in facts.addresses

    def _mark(self, name: str) -> None:
        self._dirty.add(name)
        self._wake.set()

    def _report_overlaps(self) -> None:
        pairs = overlaps({name: facts.addresses for name, facts in self._facts.items() if not facts.problem})
        for first, second in sorted(pairs - self._overlaps):
            _log.warning("pools %s and %s have addresses in common: each is given once, to either", first, second)
        self._overlaps = pairs
        OVERLAPS.set(len(pairs))

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
        for claim in list(self._all_claims.values()):
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


def overlaps(pools: Mapping[str, IPSet]) -> set[tuple[str, str]]:
    """Pairs of pools, in order of name, that have addresses in common. Costs a sort and the pairs it finds."""
    found: set[tuple[str, str]] = set()
    for family in (4, 6):
        open_until: list[tuple[int, str]] = []
        for low, high, name in sorted(_intervals(pools, family)):
            open_until = [(end, other) for end, other in open_until if end >= low]
            found.update((min(name, other), max(name, other)) for _, other in open_until if other != name)
            open_until.append((high, name))
    return found


def _intervals(pools: Mapping[str, IPSet], family: int) -> Iterable[tuple[int, int, str]]:
    return (
        (low, high, name)
        for name, addresses in pools.items()
        if addresses.family == family
        for low, high in addresses.intervals
    )
