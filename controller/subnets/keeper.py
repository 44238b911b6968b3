"""Keeps one subnet: its pools are its own, its ledger says what they have, and it goes when they are gone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from api.apps import controller_of
from api.autopools import Application, application_of
from api.condition import Condition, updated
from api.conflicts import subnet_conflicts
from api.ledger import Grant, union
from api.meta import FINALIZER
from api.pool import LABEL_CIDR, Pool, cidr_label
from api.ranges import IPSet
from api.subnet import READY, Subnet, is_automatic, is_ready
from api.validate.pool import pool_addresses
from api.validate.subnet import created_subnet_errors, default_subnet, family_of, inherited, ledger_of, subnet_addresses
from controller.room import Desk
from controller.subnets.book import Index, Locks, network_key, write_ledger, written_status
from store.errors import InvalidError, NotFoundError
from store.port import Query

log = logging.getLogger(__name__)

_ORPHAN = "orphan"
"""Finalizer of the garbage collector: who deletes the subnet wants to keep its pools."""


class Keeper:
    """Reconciles subnets, one at a time each."""

    def __init__(self, desk: Desk, locks: Locks, index: Index) -> None:
        self._store = desk.store
        self._events = desk.events
        self._subnets = desk.caches.of(Subnet)
        self._locks = locks
        self._index = index

    async def keep(self, name: str) -> set[Application]:
        """Do what is missing for the subnet of that name; whose pools are not what the ledger now says.

        Raises StoreError.
        """
        lock = self._locks.of(name)
        async with lock:
            try:
                subnet = await self._store.get(Subnet, name)
            except NotFoundError:
                return set()
            pools = await self._pools(subnet)
            if subnet.metadata.deletion_timestamp is not None:
                await self._leave(subnet, pools)
                return set()
            subnet, refused = await self._defaulted(subnet)
            problem = await self._obstacle(subnet) or refused
            if not problem:
                pools = [await self._adopt(pool, subnet) for pool in pools]
            grants = recomputed(subnet, pools)
            await write_ledger(self._store, subnet, grants, _conditions(subnet, problem))
            return set(_unfinished(pools, grants))

    async def _defaulted(self, subnet: Subnet) -> tuple[Subnet, str]:
        """The subnet with its finalizer and defaults, or as it is, and why that is refused.

        One from before there was a webhook may break its rules: then it is said to be unusable, until it is mended.
        """
        wanted = default_subnet(subnet)
        if wanted == subnet:
            return subnet, ""
        try:
            return await self._store.update(wanted), ""
        except InvalidError as error:
            return subnet, str(error)

    async def _obstacle(self, subnet: Subnet) -> str:
        """Why the subnet is not used; empty if it is. Of those that overlap the oldest is.

        One that is used is compared with those that the cache knows, which tells of others in time: they are younger,
        as a rule. One that is to be used from now on is compared with all there are.
        """
        if network_key(subnet) is None:
            return f"'spec.subnet' {subnet.spec.subnet} is not a CIDR"
        # Admission may not have seen it: it came before the webhook, or the webhook comes after this.
        if errors := created_subnet_errors(subnet):
            return "; ".join(map(str, errors))
        known = list(self._subnets.values()) if is_ready(subnet) else (await self._store.list(Subnet)).items
        others = [each for each in known if each.metadata.name != subnet.metadata.name]
        return subnet_conflicts([*others, subnet]).get(subnet.metadata.name, "")

    async def _pools(self, subnet: Subnet) -> list[Pool]:
        """The pools with the subnet's network, uncached, but for those that lack the label and are known by cache."""
        network = network_key(subnet)
        if network is None:
            return []
        query = Query(labels={LABEL_CIDR: cidr_label(network)})
        found = {pool.metadata.name: pool for pool in (await self._store.list(Pool, query)).items}
        for pool in list(self._index.of_network(network)):
            if LABEL_CIDR not in pool.metadata.labels and pool.metadata.name not in found:
                try:
                    found[pool.metadata.name] = await self._store.get(Pool, pool.metadata.name)
                except NotFoundError:
                    continue
        return [pool for pool in found.values() if network_key(pool) == network]

    async def _adopt(self, pool: Pool, subnet: Subnet) -> Pool:
        """The pool as the subnet's; as it was if that is refused, which concerns this pool alone."""
        wanted = inherited(pool, [subnet])
        if wanted == pool:
            return pool
        try:
            return await self._store.update(wanted)
        except InvalidError as error:
            self._events.warning(pool, "NotAdopted", f"SpiderSubnet {subnet.metadata.name} cannot own it: {error}")
        except NotFoundError:
            log.info("pool %s is gone", pool.metadata.name)
        return pool

    async def _leave(self, subnet: Subnet, pools: Iterable[Pool]) -> None:
        """Delete the subnet's pools, which wait for their addresses; once all are gone, let the subnet go.

        As foreground deletion would; Kubernetes' own may be at work beside us, or may be told to leave the pools.
        """
        meta = subnet.metadata
        if _ORPHAN in meta.finalizers or FINALIZER not in meta.finalizers:
            return
        owned = [pool for pool in pools if _is_owned(pool, subnet)]
        for pool in owned:
            if pool.metadata.deletion_timestamp is None:
                try:
                    await self._store.delete(Pool, pool.metadata.name, uid=pool.metadata.uid)
                except NotFoundError:
                    continue
        if owned:
            # Pools without a finalizer are gone at once; others come back as events.
            owned = [pool for pool in await self._pools(subnet) if _is_owned(pool, subnet)]
        if owned:
            await write_ledger(self._store, subnet, recomputed(subnet, owned), _conditions(subnet, ""))
            return
        finalizers = [each for each in meta.finalizers if each != FINALIZER]
        await self._store.update(replace(subnet, metadata=replace(meta, finalizers=finalizers)))


def recomputed(subnet: Subnet, pools: Iterable[Pool]) -> dict[str, Grant]:
    """The ledger that is right for these pools, read after the subnet.

    A pool made by hand has the addresses of the subnet that it names. An automatic one has what it has, and keeps what
    it was given and nobody else has, since whoever gave it is about to write the pool. All else in the ledger is dirt.
    """
    family = family_of(subnet.spec)
    total, old, found = subnet_addresses(subnet.spec), ledger_of(subnet), {}
    empty = IPSet(family)
    pools = list(pools)
    there = union(family, (pool_addresses(pool.spec) for pool in pools))
    for pool in pools:
        name, have = pool.metadata.name, pool_addresses(pool.spec)
        if not is_automatic(pool):
            grant = Grant(have & total, empty)
        else:
            known = old.get(name) or Grant(empty, empty)
            application = application_of(pool)
            grant = Grant(
                ((known.ips - there) & total) | have,
                known.releasing & (total - (there - have)),
                str(application) if application is not None else known.application,
            )
        if grant.ips:
            found[name] = grant
    return found


def looks_right(subnet: Subnet, index: Index) -> bool:
    """Whether the status is what the caches would make of it, as after our own writes."""
    pools = index.of_network(network_key(subnet) or "")
    conditions = (subnet.status.conditions if subnet.status else None) or ()
    judged = any(condition.type == READY for condition in conditions)
    return judged and written_status(subnet, recomputed(subnet, pools)) == subnet.status


def _unfinished(pools: Iterable[Pool], grants: Mapping[str, Grant]) -> Iterator[Application]:
    for pool in pools:
        application, grant = application_of(pool), grants.get(pool.metadata.name)
        if application is not None and grant is not None and pool_addresses(pool.spec) != grant.ips:
            yield application


def _is_owned(pool: Pool, subnet: Subnet) -> bool:
    owner = controller_of(pool.metadata)
    return owner is not None and owner.uid == subnet.metadata.uid


def _conditions(subnet: Subnet, problem: str) -> list[Condition]:
    terminating = subnet.metadata.deletion_timestamp is not None
    if terminating:
        status, reason, message = "False", "Terminating", "it was deleted, and goes when its pools are gone"
    elif problem:
        status, reason, message = "False", "Unusable", problem
    else:
        status, reason, message = "True", "Usable", ""
    condition = Condition(
        type=READY,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        message=message,
        observed_generation=subnet.metadata.generation,
    )
    return updated(subnet.status.conditions if subnet.status else None, condition)
