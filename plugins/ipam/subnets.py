"""Finding the pools that the controller makes for an application, and waiting until they are there."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping

from api.annotations import IPNumber, NicSubnets, ip_number
from api.apps import CronJob, DaemonSet, Deployment, Job, ReplicaSet, StatefulSet
from api.autopools import Application, desired_number, lookup_labels
from api.ranges import Family
from api.workloads import Scalable, replicas
from plugins.errors import InvalidConfigError, TryAgainLaterError
from plugins.ipam.candidates import PoolFacts
from plugins.ipam.pods import PodFacts
from store.errors import NotFoundError
from store.port import Store

_SCALABLE: dict[tuple[str, str], type[Scalable]] = {
    (kind.TYPE.api_version, kind.TYPE.kind): kind
    for kind in (Deployment, ReplicaSet, StatefulSet, DaemonSet, Job, CronJob)
}
_KEYS = tuple(lookup_labels(Application("", "", "", ""), "", 4, "", ""))
"""Labels that an automatic pool is found by."""

_Values = tuple[str | None, ...]


class AutoPools:
    """The automatic pools there are, by what they were made for. The catalog tells of every change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pools: defaultdict[_Values, dict[str, PoolFacts]] = defaultdict(dict)
        self._waiters: defaultdict[_Values, set[asyncio.Future[None]]] = defaultdict(set)

    def changed(self, old: PoolFacts | None, new: PoolFacts | None) -> None:
        """A pool came, went or changed."""
        for facts in (old, new):
            if facts is None or facts.labels is None:
                continue
            values = tuple(facts.labels.get(key) for key in _KEYS)
            if facts is new:
                self._pools[values][facts.name] = facts
            elif self._pools[values].pop(facts.name, None) and not self._pools[values]:
                del self._pools[values]
            for waiter in self._waiters.get(values, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def find(
        self, subnets: NicSubnets, facts: PodFacts, families: Iterable[Family], wait: float
    ) -> dict[Family, str]:
        """The pool of each family, which has as many addresses as the application is to have.

        After `wait` seconds one with fewer is taken too: what it has may do. Raises TryAgainLaterError if there is
        none then, InvalidConfigError if there are several, StoreError.
        """
        wanted = {4: subnets.ipv4, 6: subnets.ipv6}
        number = ip_number(facts.pod.metadata.annotations)
        size = desired_number(number, await self._replicas(facts, number), spare=0)
        deadline = asyncio.get_running_loop().time() + wait
        application = Application.of(facts.controller, facts.pod.metadata.namespace)
        found = {}
        for family in families:
            if wanted[family]:
                labels = lookup_labels(application, facts.controller.uid, family, subnets.interface, wanted[family])
                found[family] = await self._await(labels, application, size, deadline)
        return found

    async def _await(self, labels: Mapping[str, str], application: Application, size: int, deadline: float) -> str:
        values = tuple(labels[key] for key in _KEYS)
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    pool = self._only(values, application)
                    if pool is not None and pool.addresses.count >= size:
                        return pool.name
                    await self._change(values)
        except TimeoutError:
            pool = self._only(values, application)
            if pool is not None:
                return pool.name
            told = ", ".join(f"{key.partition('/')[2]}={value}" for key, value in labels.items())
            raise TryAgainLaterError(
                "the application's automatic IPPool is not there yet",
                f"spiderpool-controller makes it; awaited is one for {application} with the labels {told}",
            ) from None

    def _only(self, values: _Values, application: Application) -> PoolFacts | None:
        pools = [pool for pool in self._pools.get(values, {}).values() if not pool.terminating]
        if len(pools) > 1:
            names = ", ".join(sorted(pool.name for pool in pools))
            raise InvalidConfigError("several automatic IPPools are for one NIC", f"{names}, all for {application}")
        return pools[0] if pools else None

    async def _change(self, values: _Values) -> None:
        """Return after one of the pools with these labels changed."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[values].add(waiter)
        try:
            await waiter
        finally:
            self._waiters[values].discard(waiter)
            if not self._waiters[values]:
                del self._waiters[values]

    async def _replicas(self, facts: PodFacts, number: IPNumber | None) -> int:
        """How many pods the application is to have; 0 if that is not asked, not known, or the application is gone."""
        controller = facts.controller
        kind = _SCALABLE.get((controller.api_version, controller.kind))
        if kind is None or (number is not None and not number.flexible):
            return 0
        try:
            application = await self._store.get(kind, controller.name, facts.pod.metadata.namespace)
        except NotFoundError:
            return 0
        return replicas(application)
