"""What this agent knows of pools and reserved addresses, kept by informers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from api.meta import Resource
from api.pool import Pool
from api.ranges import Family, IPSet, parse_range
from api.reservedip import ReservedIP
from plugins.errors import NoPoolError
from plugins.ipam.candidates import Candidates, PoolFacts, pool_facts, select
from plugins.ipam.concurrency import Coalesced
from plugins.ipam.config import IpamConfig
from store.informer import Informer
from store.port import Store

log = logging.getLogger(__name__)

_SELECTIONS = 256
"""Remembered selections; one per network configuration and namespace, all forgotten when a pool changes."""


class Catalog:
    """Pools with their facts, and the union of the reserved addresses of each family."""

    def __init__(
        self,
        store: Store,
        node: str,
        families: tuple[Family, ...],
        on_pool: Callable[[str, PoolFacts | None], None],
        on_reserved: Callable[[Family], None],
    ) -> None:
        self._store = store
        self._node = node
        self._refresh = Coalesced(self._read_afresh)
        self._families = families
        self._on_pool = on_pool
        self._on_reserved = on_reserved
        self._facts: dict[str, PoolFacts] = {}
        self._defaults: dict[str, PoolFacts] = {}
        self._selections: dict[tuple[IpamConfig, str | None], tuple[Candidates, ...]] = {}
        self.reserved: dict[Family, IPSet] = {4: IPSet(4), 6: IPSet(6)}
        """Addresses that are never chosen."""
        self.pools = Informer(store, Pool, on_change=self._pool_changed)
        self.reserved_ips = Informer(store, ReservedIP, on_change=self._reserved_changed)

    def get(self, name: str) -> PoolFacts | None:
        """The pool of that name."""
        return self._facts.get(name)

    def select(self, config: IpamConfig, namespace: str | None) -> tuple[Candidates, ...]:
        """Candidates for a NIC; raises as `candidates.select`.

        A selection looks at every pool a pattern could mean, so it is remembered until a pool changes: the cost of
        an allocation does not grow with the number of pools.
        """
        key = (config, namespace)
        found = self._selections.get(key)
        if found is None:
            found = select(
                config=config,
                namespace=namespace,
                node=self._node,
                families=self._families,
                pools=self._facts,
                defaults=self._defaults.values(),
            )
            if len(self._selections) >= _SELECTIONS:
                self._selections.clear()
            self._selections[key] = found
        return found

    async def select_surely(self, config: IpamConfig, namespace: str | None) -> tuple[Candidates, ...]:
        """As `select`, but before it refuses, the pools are read from the store: one may just have been made.

        Raises StoreError too.
        """
        try:
            return self.select(config, namespace)
        except NoPoolError:
            await self._refresh()
            return self.select(config, namespace)

    async def _read_afresh(self) -> None:
        for pool in (await self._store.list(Pool)).items:
            self.pools.learn(pool)

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        name = _name(new, old)
        if new is None:
            self._facts.pop(name, None)
            self._defaults.pop(name, None)
        else:
            known = self._facts.get(name)
            terminating = new.metadata.deletion_timestamp is not None
            if known is not None and known.spec == new.spec and known.terminating == terminating:
                return  # status and labels change often and decide nothing here
            facts = pool_facts(new)
            if facts.problem:
                log.warning("pool %s is not used: %s", name, facts.problem)
            self._facts[name] = facts
            if new.spec.default:
                self._defaults[name] = facts
            else:
                self._defaults.pop(name, None)
        self._selections.clear()
        self._on_pool(name, self._facts.get(name))

    def _reserved_changed(self, old: ReservedIP | None, new: ReservedIP | None) -> None:
        del old, new
        ranges: dict[Family, list[tuple[int, int]]] = {4: [], 6: []}
        for resource in self.reserved_ips.values():
            if resource.metadata.deletion_timestamp is None:
                part = _reserved(resource)
                ranges[part.family] += part.intervals
        for family, intervals in ranges.items():
            union = IPSet(family, intervals)
            if union != self.reserved[family]:
                self.reserved[family] = union
                self._on_reserved(family)


def _name(new: Resource | None, old: Resource | None) -> str:
    resource = new or old
    assert resource is not None  # noqa: S101 - an informer never reports a change from nothing to nothing
    return resource.metadata.name


def _reserved(resource: ReservedIP) -> IPSet:
    """What the object reserves. A range that cannot be read is reported; the others count all the same."""
    texts = resource.spec.ips or []
    family: Family = resource.spec.ip_version or (6 if any(":" in text for text in texts) else 4)
    intervals = []
    for text in texts:
        try:
            intervals.append(parse_range(text, family))
        except ValueError as error:
            log.warning("reserved IP %s: a range is ignored: %s", resource.metadata.name, error)
    return IPSet(family, intervals)
