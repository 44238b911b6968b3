"""What this agent knows of pools and reserved addresses, kept by informers, and which pools it chooses for a NIC."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from api.annotations import PoolNames
from api.autopools import Application
from api.meta import Resource
from api.pool import Pool
from api.ranges import Address, Family, IPSet, parse_range
from api.reservedip import ReservedIP
from api.subnet import is_automatic
from api.views import has_foreign_records, is_marked
from plugins.errors import NoPoolError
from plugins.ipam.candidates import (
    NO_POOL,
    Asker,
    Candidates,
    Look,
    PoolFacts,
    expand,
    pool_facts,
    select,
)
from plugins.ipam.concurrency import Coalesced
from plugins.ipam.config import IpamConfig
from plugins.ipam.conflicts import Conflicts
from plugins.ipam.nic import master_addresses
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import Source, network_of, source_of
from plugins.ipam.subnets import AutoPools
from store.agents import UpstreamWatch
from store.informer import Informer
from store.port import Store

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

_SELECTIONS = 256
"""Remembered selections, each of them for all pods between which no pool makes a difference."""
_EXPANSIONS = 64
"""Remembered lists of names with their patterns expanded."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a NIC is to get, and from which pools."""

    source: Source
    named: Mapping[Family, tuple[str, ...]]
    """Pools that the source means, patterns expanded, whether or not they may serve."""
    candidates: tuple[Candidates, ...]
    """Those that may, for each family that the NIC gets."""


class Catalog:
    """Pools with their facts, and the union of the reserved addresses of each family.

    With `knows_pods` false there is no pod that says which pools it wants, there never was another Spiderpool on this
    store, and pools that overlap are all used: claims alone keep them apart.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        settings: IpamSettings,
        on_pool: Callable[[str, PoolFacts | None], None],
        on_reserved: Callable[[Family], None],
        *,
        knows_pods: bool = False,
    ) -> None:
        self._store = store
        self._node = node
        self._settings = settings
        self._knows_pods = knows_pods
        enabled: dict[Family, bool] = {4: settings.enable_ipv4, 6: settings.enable_ipv6}
        self._families = tuple(family for family, on in enabled.items() if on)
        self._refresh = Coalesced(self._read_afresh)
        self._on_pool = on_pool
        self._on_reserved = on_reserved
        self._facts: dict[str, PoolFacts] = {}
        self._automatic = AutoPools(store)
        self._upstream = UpstreamWatch(store)
        self._conflicts = Conflicts(self._all_pools)
        self._looks: Counter[Look] = Counter()
        """What pools look at, and how many do."""
        self._expansions: dict[PoolNames, Mapping[Family, tuple[str, ...]]] = {}
        self._selections: dict[tuple[object, ...], tuple[Candidates, ...]] = {}
        self.reserved: dict[Family, IPSet] = {4: IPSet(4), 6: IPSet(6)}
        """Addresses that are never chosen."""
        self.pools = Informer(store, Pool, on_change=self._pool_changed)
        self.reserved_ips = Informer(store, ReservedIP, on_change=self._reserved_changed)

    def get(self, name: str) -> PoolFacts | None:
        """The pool of that name."""
        return self._facts.get(name)

    def source(self, config: IpamConfig, nic: str, facts: PodFacts | None) -> Source:
        """Where the NIC's pools come from, its routes and its default route. Raises InvalidConfigError."""
        return source_of(config, nic, facts, self._settings)

    async def named(self, source: Source, facts: PodFacts | None) -> Mapping[Family, tuple[str, ...]]:
        """The pools that `source` means, patterns expanded, whether or not they may serve.

        Waits for the pools that the controller makes for the pod's application. Raises TryAgainLaterError if they do
        not come, NoPoolError, InvalidConfigError, StoreError.
        """
        return self._expanded(await self._names(source, facts))

    async def select(
        self,
        config: IpamConfig,
        nic: str,
        facts: PodFacts | None,
        *,
        namespace: str | None = None,
        netns_fd: int | None = None,
    ) -> Selection:
        """Candidates for a NIC. `namespace` counts where there are no `facts`; None: pools' namespaces are not judged.

        Before it refuses, the pools are read from the store: one may just have been made. Raises NoPoolError,
        InvalidConfigError, TryAgainLaterError and StoreError; IOFailureError where the NIC's physical function cannot
        be found for `match_master_subnet`.
        """
        source = self.source(config, nic, facts)
        masters = None
        if config.match_master_subnet and netns_fd is not None:
            masters = await master_addresses(netns_fd, nic)
        names = await self._names(source, facts)
        asker = self._asker(nic, facts, namespace, masters)
        try:
            candidates = self._select(names, source, nic, asker)
        except NoPoolError:
            await self._refresh()
            candidates = self._select(names, source, nic, asker)
        if not all(pool.marked for each in candidates for pool in each.pools) and (
            rivals := await self._upstream.agents()
        ):
            candidates = self._select(
                names, source, nic, asker, f"upstream's agents still give its addresses: {rivals[0]}"
            )
        return Selection(source, self._expanded(names), candidates)

    async def _names(self, source: Source, facts: PodFacts | None) -> PoolNames:
        if source.subnets is None or facts is None:
            return source.pools
        patience = min(self._settings.auto_pool_wait, 0.9 * self._settings.add_deadline)
        found = await self._automatic.find(source.subnets, facts, self._families, patience)
        if not found:
            raise NoPoolError(NO_POOL, f"{source.what} names only subnets of a family that is disabled on this node")
        v4, v6 = found.get(4), found.get(6)
        return PoolNames((v4,) if v4 else (), (v6,) if v6 else ())

    def _asker(
        self, nic: str, facts: PodFacts | None, namespace: str | None, masters: frozenset[Address] | None
    ) -> Asker:
        if facts is None:
            return Asker(self._node, namespace, masters=masters)
        meta, space = facts.pod.metadata, facts.namespace.metadata
        network, problem = network_of(nic, facts, self._settings) if self._looks["network", ""] else ("", "")
        return Asker(
            node=self._node,
            namespace=meta.namespace,
            pod_labels=meta.labels,
            namespace_labels=space.labels,
            node_labels=facts.node_labels,
            application=Application.of(facts.controller, meta.namespace),
            network=network,
            network_problem=problem,
            installation=self._settings.namespace,
            masters=masters,
        )

    def _select(
        self, names: PoolNames, source: Source, nic: str, asker: Asker, unmarked: str = ""
    ) -> tuple[Candidates, ...]:
        """Remembered by what pools look at alone, so that its cost grows neither with pools nor with pods.

        `unmarked` tells why pools without a mark may not serve; empty: they may.
        """
        key = (names, unmarked, asker.namespace, asker.masters, asker.pod_labels is None, *self._seen_of(asker))
        found = self._selections.get(key)
        if found is None:
            found = select(
                named=self._expanded(names),
                source=source.what,
                nic=nic,
                asker=asker,
                families=self._families,
                pools=self._facts,
                conflicts=self._refused(unmarked),
            )
            _remember(self._selections, key, found, _SELECTIONS)
        return found

    def _refused(self, unmarked: str) -> Mapping[str, str]:
        """Pools that may serve nobody for what there is beside them, and why."""
        conflicts = self._conflicts.now() if self._knows_pods else {}
        if not unmarked:
            return conflicts
        return {name: unmarked for name, pool in self._facts.items() if not pool.marked} | dict(conflicts)

    def _seen_of(self, asker: Asker) -> list[object]:
        """What pools see of the asker when they look, in the order of `_looks`."""
        whole: dict[str, object] = {"application": asker.application, "network": (asker.network, asker.network_problem)}
        labels = {"pod": asker.pod_labels, "namespace": asker.namespace_labels, "node": asker.node_labels}
        return [whole[what] if what in whole else (labels[what] or {}).get(key) for what, key in self._looks]

    def _expanded(self, names: PoolNames) -> Mapping[Family, tuple[str, ...]]:
        found = self._expansions.get(names)
        if found is None:
            found = expand(names, self._facts)
            _remember(self._expansions, names, found, _EXPANSIONS)
        return found

    def _all_pools(self) -> Iterable[Pool]:
        return self.pools.values()

    async def _read_afresh(self) -> None:
        for pool in (await self._store.list(Pool)).items:
            self.pools.learn(pool)

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        name = _name(new, old)
        known = self._facts.pop(name, None)
        same = old is not None and new is not None and old.metadata.uid == new.metadata.uid
        facts = None if new is None else self._facts_of(new, known if same else None)
        if facts is not None:
            self._facts[name] = facts
        if facts is known:
            return
        if facts is not None and facts.problem and (known is None or known.problem != facts.problem):
            log.warning("pool %s is not used: %s", name, facts.problem)
        for look in known.looks_at if known else ():
            self._looks[look] -= 1
            if not self._looks[look]:
                del self._looks[look]
        self._looks.update(facts.looks_at if facts else ())
        if known is None or facts is None or _rank(known) != _rank(facts):
            self._expansions.clear()
        self._selections.clear()
        self._automatic.changed(known, facts)
        self._conflicts.changed(old, new)
        self._on_pool(name, facts)

    def _facts_of(self, pool: Pool, known: PoolFacts | None) -> PoolFacts:
        """The pool's facts; `known` again where nothing that decides here has changed, as status often does."""
        foreign, marked = self._knows_pods and has_foreign_records(pool), not self._knows_pods or is_marked(pool)
        terminating = pool.metadata.deletion_timestamp is not None
        if known is not None and (
            known.spec,
            known.terminating,
            known.foreign,
            known.marked,
            known.labels,
        ) == (
            pool.spec,
            terminating,
            foreign,
            marked,
            pool.metadata.labels if is_automatic(pool) else None,
        ):
            return known
        return replace(pool_facts(pool), foreign=foreign, marked=marked)

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


def _remember(memory: dict[K, V], key: K, value: V, limit: int) -> None:
    if len(memory) >= limit:
        memory.clear()
    memory[key] = value


def _rank(facts: PoolFacts) -> tuple[Family, bool]:
    """What lists of names are expanded by, beside the pool's name."""
    return facts.family, bool(facts.spec.default)


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
