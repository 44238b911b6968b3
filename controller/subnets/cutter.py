"""Brings one automatic pool in order: it is there, is the application's, and has the addresses that it is to have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from api.autopools import (
    ANNOTATION_NUMBER,
    LABEL_APP_UID,
    LABEL_RECLAIM,
    MOST_ADDRESSES,
    Wish,
    kin_labels,
    lookup_labels,
    new_pool,
    pool_name,
)
from api.claim import LABEL_POOL, Claim, label_value
from api.ledger import Grant
from api.meta import FINALIZER
from api.pool import Pool
from api.ranges import IPSet
from api.reservedip import ReservedIP
from api.subnet import LABEL_OWNER_SUBNET, READY, Subnet, label_text, owner_reference
from api.validate.pool import pool_addresses
from api.validate.subnet import family_of, ledger_of, subnet_addresses
from controller.room import Desk
from controller.subnets.book import Index, Locks, free_addresses, is_claimed, network_key, write_ledger
from controller.subnets.plan import Shortage, Step, grown, held_by, next_step, released, shrunk, trimmed
from store.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError
from store.port import Query

log = logging.getLogger(__name__)

_ROUNDS = 4
"""How often a pool is begun anew because somebody else, such as who keeps its status, wrote it meanwhile."""
_STEPS = 10
"""More than any pool takes: to shrink three, and as many to end what a crash left undone before it."""
_TOUCHED = "ipam.spidernet.io/subnet-version"
"""Annotation of a pool that had to be written for its version's sake: the version of the subnet by then."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at the subnet, and then at the pool."""

    subnet: Subnet
    pool: Pool
    grants: dict[str, Grant]
    grant: Grant
    """The pool's."""

    @property
    def have(self) -> IPSet:
        """The pool's addresses."""
        return pool_addresses(self.pool.spec)


class RefusalError(Exception):
    """The pool cannot be as wished; the text goes into an event on the application."""

    def __init__(self, reason: str, message: str, *, waits: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        """CamelCase, for the event."""
        self.waits = waits
        """Whether a change of the subnet may help."""


class LedgerError(Exception):
    """The ledger of a subnet is not what its pools are: it must be put right first."""


class Cutter:
    """Cuts pools from subnets. The caller sees to it that no application is worked on twice at a time."""

    def __init__(self, desk: Desk, locks: Locks, index: Index) -> None:
        self._store = desk.store
        self._events = desk.events
        self._claims = desk.caches.of(Claim)
        self._reserved = desk.caches.of(ReservedIP)
        self._locks = locks
        self._index = index

    def in_order(self, wish: Wish, subnet: Subnet | None) -> bool:
        """Whether the caches say that nothing is to be done; `subnet` is the cached one."""
        if subnet is None or subnet.metadata.deletion_timestamp is not None:
            return False
        wanted = lookup_labels(wish.application, wish.uid, wish.family, wish.nic, wish.subnet)
        kin = kin_labels(wish.application, wish.family, wish.nic)
        found = [p for p in self._index.of_application(wish.application) if kin.items() <= p.metadata.labels.items()]
        if len(found) != 1 or not wanted.items() <= found[0].metadata.labels.items():
            return False
        pool = found[0]
        grant = ledger_of(subnet).get(pool.metadata.name) or _nothing(subnet)
        have = pool_addresses(pool.spec)
        return (
            _dressed(pool, wish, subnet, have) == pool
            and next_step(have, grant, wish.size, kept=IPSet(wish.family)) is Step.DONE
        )

    async def settle(self, wish: Wish, kin: Iterable[Pool]) -> bool:
        """Do what is missing. Whether that is all: False while pods still have addresses that the pool is to lose.

        `kin` are the application's and its forerunners' pools for this NIC and family, uncached; forerunners that are
        not retained are gone already. Raises RefusalError, LedgerError, StoreError.
        """
        if wish.size > MOST_ADDRESSES:
            text = f"an automatic pool has at most {MOST_ADDRESSES} addresses, {wish.size} are asked for"
            raise RefusalError("TooManyAddresses", text)
        name = await self._name(wish, await self._subnet(wish), kin)
        for left in reversed(range(_ROUNDS)):
            try:
                return await self._resize(wish, name)
            except ConflictError as error:
                if not left:
                    raise
                log.debug("pool %s: beginning anew: %s", name, error)
        raise AssertionError("unreachable")

    async def _subnet(self, wish: Wish) -> Subnet:
        try:
            subnet = await self._store.get(Subnet, wish.subnet)
        except NotFoundError:
            text = f"there is no SpiderSubnet {wish.subnet}"
            raise RefusalError("SubnetNotFound", text, waits=True) from None
        if subnet.metadata.deletion_timestamp is not None:
            text = f"SpiderSubnet {wish.subnet} is terminating, no pools are cut from it any more"
            raise RefusalError("SubnetTerminating", text, waits=True)
        if network_key(subnet) is None or family_of(subnet.spec) != wish.family:
            text = f"SpiderSubnet {wish.subnet} with {subnet.spec.subnet} has no IPv{wish.family} addresses"
            raise RefusalError("WrongSubnet", text)
        conditions = (subnet.status.conditions if subnet.status else None) or ()
        ready = next((condition for condition in conditions if condition.type == READY), None)
        if ready is None or ready.status != "True":
            why = ready.message if ready is not None else "nobody has looked at it yet"
            raise RefusalError("SubnetNotReady", f"SpiderSubnet {wish.subnet} is not used: {why}", waits=True)
        return subnet

    async def _name(self, wish: Wish, subnet: Subnet, kin: Iterable[Pool]) -> str:
        """Name of the application's pool, which is there: its own, or one that was retained, or a new one."""
        alive = [pool for pool in kin if pool.metadata.deletion_timestamp is None]
        own = [pool for pool in alive if pool.metadata.labels.get(LABEL_APP_UID) == wish.uid]
        for pool in own:
            if not _is_of(pool, subnet):
                message = (
                    f"{wish.application.kind} {wish.application.namespace}/{wish.application.name} now asks for "
                    f"SpiderSubnet {wish.subnet} ({subnet.spec.subnet}) for {wish.nic}, this has {pool.spec.subnet}"
                )
                self._events.warning(pool, "ApplicationSubnetChanged", message)
                raise RefusalError(
                    "ApplicationSubnetChanged",
                    f"IPPool {pool.metadata.name} for {wish.nic} is not SpiderSubnet {wish.subnet}'s: a pool does not "
                    "change its subnet, make the application anew",
                )
        retained = [pool for pool in alive if pool not in own and _is_of(pool, subnet)]
        for pools in (own, retained):
            if pools:
                return min(pools, key=lambda pool: (pool.metadata.creation_timestamp, pool.metadata.uid)).metadata.name
        return await self._create(wish, subnet)

    async def _create(self, wish: Wish, subnet: Subnet) -> str:
        """Make the pool, yet without addresses."""
        wanted = lookup_labels(wish.application, wish.uid, wish.family, wish.nic, wish.subnet)
        for long in (False, True):
            name = pool_name(wish.application, wish.uid, wish.family, wish.nic, long=long)
            try:
                await self._store.create(new_pool(wish, subnet, name))
            except AlreadyExistsError:
                there = await self._store.get(Pool, name)
                if not wanted.items() <= there.metadata.labels.items():
                    continue
                if there.metadata.deletion_timestamp is not None:
                    raise ConflictError(f"pool {name} is still terminating") from None
            return name
        raise RefusalError("PoolNameTaken", f"IPPool {name} is there already, and not for this application")

    async def _resize(self, wish: Wish, name: str) -> bool:
        kept = IPSet(wish.family)
        fenced = False  # whether the pool was written since the ledger marked what is to be free
        lock = self._locks.of(wish.subnet)
        for _ in range(_STEPS):
            async with lock:
                seen = await self._look(wish, name)
                step = next_step(seen.have, seen.grant, wish.size, kept=kept)
                if step is Step.RELEASE and fenced:
                    kept = await self._release(seen)
                    continue
                changed = await self._amended(step, wish, seen)
                if changed is not None:
                    await self._record(seen, changed)
            # The pool is written while others have their turn: if it is another version by then, that is found out.
            match step:
                case Step.TRIM:
                    fenced = False
                case Step.RELEASE:
                    await self._touch(seen)
                    fenced = True
                case Step.GROW | Step.WRITE:
                    ips = (changed or seen.grant).pool
                    self._check(seen, ips - seen.have)
                    try:
                        await self._write(seen, wish, ips)
                    except InvalidError as refusal:
                        await self._take_back(seen, refusal)
                    fenced = True
                case Step.DONE | Step.SHRINK if changed is None:
                    await self._write(seen, wish, seen.have)
                    return step is Step.DONE and not kept
        raise ConflictError(f"pool {name} is being changed by somebody else")

    async def _look(self, wish: Wish, name: str) -> _Seen:
        # The ledger first: a pool that has more than an older ledger gives it says nothing.
        subnet = await self._subnet(wish)
        pool = await self._store.get(Pool, name)
        if pool.metadata.deletion_timestamp is not None:
            raise ConflictError(f"pool {name} is terminating")
        grants = ledger_of(subnet)
        return _Seen(subnet, pool, grants, _for_application(grants.get(name) or _nothing(subnet), wish))

    async def _record(self, seen: _Seen, grant: Grant) -> None:
        await write_ledger(self._store, seen.subnet, {**seen.grants, seen.pool.metadata.name: grant})

    async def _amended(self, step: Step, wish: Wish, seen: _Seen) -> Grant | None:
        """What the ledger shall say of the pool now, before anything is done to it; None: what it says."""
        match step:
            case Step.REPAIR:
                raise LedgerError(f"IPPool {seen.pool.metadata.name} has what {wish.subnet} does not give it")
            case Step.GROW:
                return self._grow(wish, seen)
            case Step.TRIM:
                return trimmed(seen.grant, wish.size, seen.have)
            case Step.SHRINK:
                smaller = shrunk(seen.grant, wish.size, await self._held(seen.pool))
                return smaller if smaller != seen.grant else None
        return None

    async def _take_back(self, seen: _Seen, refusal: InvalidError) -> None:
        """Leave the pool what was claimed since it was marked: admission did not let it go. Raises the refusal."""
        held = await self._held(seen.pool) & seen.grant.releasing
        if not held:
            raise refusal
        await self._record(seen, Grant(seen.grant.ips, seen.grant.releasing - held, seen.grant.application))

    async def _touch(self, seen: _Seen) -> None:
        """Write the pool, so that nobody can write it who has read it before."""
        meta = seen.pool.metadata
        annotations = {**meta.annotations, _TOUCHED: seen.subnet.metadata.resource_version}
        await self._store.update(replace(seen.pool, metadata=replace(meta, annotations=annotations)))

    async def _release(self, seen: _Seen) -> IPSet:
        """Free what the pool has lost, but for the addresses that claims keep from that, which are the result."""
        smaller = released(seen.grant, await self._held(seen.pool))
        await self._record(seen, smaller)
        if smaller.releasing:
            message = (
                f"{', '.join(smaller.releasing.to_ranges())} was claimed while the pool was made smaller: pods keep "
                "that, and nobody else gets it until then"
            )
            self._events.warning(seen.pool, "ClaimedWhileShrinking", message)
        return smaller.releasing

    def _check(self, seen: _Seen, new: IPSet) -> None:
        """Raise LedgerError if the ledger gives the pool what is not the subnet's, or another pool's."""
        foreign = new - subnet_addresses(seen.subnet.spec)
        for other in self._others(seen):
            foreign |= new & pool_addresses(other.spec)
        if foreign:
            listed = ", ".join(foreign.to_ranges()[:5])
            raise LedgerError(
                f"SpiderSubnet {seen.subnet.metadata.name} gives IPPool {seen.pool.metadata.name} {listed}"
            )

    def _others(self, seen: _Seen) -> list[Pool]:
        near = self._index.of_network(network_key(seen.subnet) or "")
        return [each for each in near if each.metadata.name != seen.pool.metadata.name]

    def _grow(self, wish: Wish, seen: _Seen) -> Grant:
        free = free_addresses(seen.subnet, seen.grants, self._others(seen), self._reserved)
        avoided: Callable[[int], bool] = lambda number: is_claimed(self._claims, wish.family, number)  # noqa: E731
        result = grown(seen.grant, wish.size, free, avoided)
        if isinstance(result, Shortage):
            raise RefusalError(
                "InsufficientIPs",
                f"IPPool {seen.pool.metadata.name} for {wish.nic} cannot have {wish.size} addresses: insufficient "
                f"subnet FreeIPs, required '{result.required}' but only left '{result.left}' in SpiderSubnet "
                f"{wish.subnet}",
                waits=True,
            )
        return result

    async def _write(self, seen: _Seen, wish: Wish, ips: IPSet) -> None:
        """Raises ConflictError if the pool is not in this version any more."""
        wanted = _dressed(seen.pool, wish, seen.subnet, ips)
        if wanted != seen.pool:
            await self._store.update(wanted)

    async def _held(self, pool: Pool) -> IPSet:
        query = Query(labels={LABEL_POOL: label_value(pool.metadata.name)})
        claims = (await self._store.list(Claim, query)).whole()
        mine = (claim for claim in claims if claim.spec.pool == pool.metadata.name)
        return held_by(mine, pool.spec.ip_version or 4)


def _for_application(grant: Grant, wish: Wish) -> Grant:
    return Grant(grant.ips, grant.releasing, str(wish.application))


def _nothing(subnet: Subnet) -> Grant:
    empty = IPSet(family_of(subnet.spec))
    return Grant(empty, empty)


def _is_of(pool: Pool, subnet: Subnet) -> bool:
    labelled = pool.metadata.labels.get(LABEL_OWNER_SUBNET) == label_text(subnet.metadata.name)
    return labelled and network_key(pool) == network_key(subnet)


def _dressed(pool: Pool, wish: Wish, subnet: Subnet, ips: IPSet) -> Pool:
    """The pool as it is to be, with these addresses."""
    meta, spec = pool.metadata, pool.spec
    finalizers = meta.finalizers if FINALIZER in meta.finalizers else [*meta.finalizers, FINALIZER]
    owner = owner_reference(subnet)
    others = [each for each in meta.owner_references if not each.controller and each.uid != owner.uid]
    labels = {
        **meta.labels,
        **lookup_labels(wish.application, wish.uid, wish.family, wish.nic, wish.subnet),
        LABEL_RECLAIM: "true" if wish.reclaim else "false",
    }
    metadata = replace(
        meta,
        labels=labels,
        annotations={**meta.annotations, ANNOTATION_NUMBER: wish.number},
        finalizers=finalizers,
        owner_references=[*others, owner] if owner not in meta.owner_references else meta.owner_references,
    )
    if ips != pool_addresses(spec):
        spec = replace(spec, ips=ips.to_ranges(), exclude_ips=None)
    return replace(pool, metadata=metadata, spec=spec)
