"""The duty: subnets are kept, and applications have the pools that they ask for.

Two queues: subnets by name, and applications. What happens to an object of the cluster puts into them what may have to
do with it, and only if a part has changed that counts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, suppress

from api.autopools import (
    ANNOTATION_NUMBER,
    LABEL_APP_UID,
    LABEL_INTERFACE,
    LABEL_RECLAIM,
    Application,
    Wish,
    application_labels,
    application_of,
    kin_labels,
)
from api.claim import Claim
from api.conflicts import subnet_conflicts
from api.core import Pod
from api.meta import Resource
from api.pool import Pool
from api.reservedip import ReservedIP
from api.subnet import Subnet
from api.validate.pool import pool_addresses
from api.validate.subnet import ledger_of
from api.workloads import Scalable
from controller.room import Desk
from controller.subnets import demand
from controller.subnets.book import Index, Locks, network_key
from controller.subnets.cutter import Cutter, LedgerError, RefusalError
from controller.subnets.demand import BY_KIND, NATIVE, Demand
from controller.subnets.gauges import shown
from controller.subnets.keeper import Keeper, looks_right
from controller.subnets.settings import SubnetSettings
from controller.subnets.thirdparty import ThirdParties
from controller.work import WorkQueue
from store.errors import ConflictError, ForbiddenError, NotFoundError, UnavailableError
from store.port import Query

_COMPARE = ""
"""The queue's key for the comparison of all subnets, which is no subnet's name."""


class Subnets:
    """The room; see the module."""

    def __init__(self, desk: Desk, settings: SubnetSettings) -> None:
        self._desk = desk
        self._settings = settings
        caches = desk.caches
        self._subnets = caches.of(Subnet)
        self._pools = caches.of(Pool)
        self._claims = caches.of(Claim)
        self._reserved = caches.of(ReservedIP)
        kinds = NATIVE if settings.auto_pools else ()
        self._native = {(kind.TYPE.api_version, kind.TYPE.kind): caches.of(kind) for kind in kinds}
        self._pods = caches.of(Pod) if settings.auto_pools else None

    async def run(self) -> None:
        """As `Room`."""
        for cache in (self._subnets, self._pools, self._claims, self._reserved, self._pods, *self._native.values()):
            if cache is not None:
                await cache.informer.synced()
        shift = _Shift(self._desk, self._settings)
        with ExitStack() as stack:
            stack.enter_context(shown(self._subnets))
            stack.callback(self._subnets.listen(shift.subnet_changed))
            stack.callback(self._pools.listen(shift.pool_changed))
            if self._settings.auto_pools:
                stack.callback(self._claims.listen(shift.claim_changed))
                stack.callback(self._reserved.listen(shift.reserved_changed))
                for cache in self._native.values():
                    stack.callback(cache.listen(shift.application_changed))
                assert self._pods is not None  # noqa: S101 (of the same condition)
                stack.callback(self._pods.listen(shift.pod_changed))
            await shift.run()


class _Shift:
    """One time of leading: all that is remembered."""

    def __init__(self, desk: Desk, settings: SubnetSettings) -> None:
        caches = desk.caches
        self._desk = desk
        self._store = desk.store
        self._settings = settings
        self._subnets = caches.of(Subnet)
        self._pools = caches.of(Pool)
        self._index = Index()
        locks = Locks()
        self._keeper = Keeper(desk, locks, self._index)
        self._cutter = Cutter(desk, locks, self._index)
        self._third = ThirdParties()
        self._conflicts: frozenset[str] = frozenset()
        """Subnets that are not used, as of the last comparison."""
        self._waiting: dict[str, set[Application]] = defaultdict(set)
        """Subnet to the applications that a change of it may help."""
        self._shrinking: set[Application] = set()
        """Those whose pools have addresses to lose that pods still have."""
        self._books: WorkQueue[str] = WorkQueue("subnets", self._keep, workers=settings.workers)
        self._applications: WorkQueue[Application] = WorkQueue("automatic-pools", self._serve, workers=settings.workers)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._books.run())
            if self._settings.auto_pools:
                group.create_task(self._applications.run())

    # What happened

    def subnet_changed(self, old: Subnet | None, new: Subnet | None) -> None:
        """A listener of the cache."""
        subnet = new or old
        if subnet is None:
            return
        if old is None or new is None or _facts(old) != _facts(new):
            self._books.add(subnet.metadata.name)
            self._books.add(_COMPARE, self._settings.settle)
        elif old.status != new.status and not looks_right(new, self._index):
            self._books.add(subnet.metadata.name, self._settings.settle)
        for application in self._waiting.pop(subnet.metadata.name, ()):
            self._applications.add(application)

    def pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        """A listener of the cache."""
        self._index.changed(old, new)
        if old is not None and new is not None and _facts(old) == _facts(new):
            return
        for pool in (old, new):
            if pool is None:
                continue
            for subnet in self._subnets_of(pool):
                self._books.add(subnet, self._settings.settle)
            application = application_of(pool)
            if application is not None and self._settings.auto_pools:
                self._applications.add(application, 0.0 if new is None else self._settings.settle)

    def claim_changed(self, old: Claim | None, new: Claim | None) -> None:
        """A listener of the cache: addresses that are given back may be what a pool is to lose."""
        if old is None or new is not None or not self._shrinking:
            return
        pool = self._pools.get(old.spec.pool)
        application = application_of(pool) if pool is not None else None
        if application in self._shrinking and application is not None:
            self._applications.add(application, self._settings.settle)

    def reserved_changed(self, old: ReservedIP | None, new: ReservedIP | None) -> None:  # noqa: ARG002
        """A listener of the cache: fewer reserved addresses are more free ones."""
        if old is not None:
            for subnet in list(self._waiting):
                for application in self._waiting.pop(subnet):
                    self._applications.add(application)

    def application_changed(self, old: Scalable | None, new: Scalable | None) -> None:
        """A listener of the cache."""
        resource = new or old
        if resource is None or (old is not None and new is not None and demand.facts(old) == demand.facts(new)):
            return
        application = demand.application_of(resource)
        asks = any(demand.asks(demand.template_of(each).metadata.annotations) for each in (old, new) if each)
        if asks or any(True for _ in self._index.of_application(application)):
            self._applications.add(application)

    def pod_changed(self, old: Pod | None, new: Pod | None) -> None:
        """A listener of the cache."""
        for application in self._third.changed(old, new):
            self._applications.add(application)

    def _subnets_of(self, pool: Pool) -> Iterable[str]:
        network = network_key(pool)
        return [] if network is None else [s.metadata.name for s in self._subnets.values() if network_key(s) == network]

    # What is done about it

    async def _keep(self, name: str) -> float | None:
        if name == _COMPARE:
            before, self._conflicts = self._conflicts, frozenset(subnet_conflicts(self._subnets.values()))
            for changed in before ^ self._conflicts:
                self._books.add(changed)
            return None
        try:
            for application in await self._keeper.keep(name):
                self._applications.add(application)
        except NotFoundError:
            return None  # it is gone
        return None

    async def _serve(self, application: Application) -> float | None:
        """Bring the application's pools in order."""
        asked = self._demand(application)
        if asked is None:
            return await self._retire(application)
        if asked.problem:
            self._desk.events.warning(asked.about, "WrongInput", asked.problem)
            return None
        if not asked.wishes:
            return None
        if all(self._cutter.in_order(wish, self._subnets.get(wish.subnet)) for wish in asked.wishes):
            self._shrinking.discard(application)
            return None
        pools = await self._pools_of(application)
        if any(pool.metadata.labels.get(LABEL_APP_UID) != asked.uid for pool in pools):
            await self._confirm(application, asked.uid)
            await self._delete(pool for pool in pools if pool.metadata.labels.get(LABEL_APP_UID) != asked.uid)
            pools = [
                pool
                for pool in pools
                if pool.metadata.labels.get(LABEL_APP_UID) == asked.uid or not _goes_with_application(pool)
            ]
        again = None
        complete = True
        for wish in asked.wishes:
            wanted = kin_labels(application, wish.family, wish.nic)
            kin = [pool for pool in pools if wanted.items() <= pool.metadata.labels.items()]
            try:
                complete &= await self._cutter.settle(wish, kin)
            except RefusalError as error:
                self._desk.events.warning(asked.about, error.reason, str(error))
                if error.waits:
                    self._waiting[wish.subnet].add(application)
                    again = self._settings.patience
            except LedgerError:
                self._books.add(wish.subnet)
                raise
        (self._shrinking.discard if complete else self._shrinking.add)(application)
        return again if complete else self._settings.patience

    def _demand(self, application: Application) -> Demand | None:
        """What the application asks for; None if it is not there, as far as is known."""
        families = self._settings.families()
        kind = BY_KIND.get((application.api_version, application.kind))
        if kind is None:
            return self._third.demand(application, families)
        resource = self._desk.caches.of(kind).get(application.name, application.namespace)
        if resource is None:
            return None
        nothing = Demand(application, resource.metadata.uid, resource)
        if resource.metadata.deletion_timestamp is not None:
            return nothing
        return demand.native_demand(resource, families, self._settings.spare_addresses) or nothing

    async def _pools_of(self, application: Application) -> list[Pool]:
        listing = await self._store.list(Pool, Query(labels=application_labels(application)))
        return [pool for pool in listing.items if application_of(pool) == application]

    async def _find(self, application: Application) -> Resource | None:
        """The application, uncached; None if it is gone."""
        kind = BY_KIND.get((application.api_version, application.kind))
        wanted: type[Resource] = kind or demand.third_party_kind(application.api_version, application.kind)
        try:
            return await self._store.get(wanted, application.name, application.namespace)
        except NotFoundError:
            return None

    async def _confirm(self, application: Application, uid: str) -> None:
        """Raise ConflictError unless the application is the one that we know: pools of another one are at stake."""
        found = await self._find(application)
        if found is None or found.metadata.uid != uid:
            raise ConflictError(f"{application} is not the one that is known")

    async def _retire(self, application: Application) -> float | None:
        """The application is not there: its pools go, those apart that wait for the next of its name and kind."""
        if not any(True for _ in self._index.of_application(application)):
            return None
        third = (application.api_version, application.kind) not in BY_KIND
        try:
            found = await self._find(application)
        except (ForbiddenError, UnavailableError) as error:
            if not third:
                raise
            for pool in list(self._index.of_application(application)):
                text = f"whether {application} is gone cannot be told: {error}"
                self._desk.events.warning(pool, "ApplicationUnknown", text)
            return self._settings.patience
        if found is not None:
            # Third parties' are known by their pods alone: it has none now. Others: the cache is behind.
            pools = [] if not third else await self._pools_of(application)
            await self._delete(p for p in pools if p.metadata.labels.get(LABEL_APP_UID) != found.metadata.uid)
            return self._settings.patience
        self._shrinking.discard(application)
        pools = await self._pools_of(application)
        await self._delete(pools)
        for pool in pools:
            if not _goes_with_application(pool) and pool.metadata.deletion_timestamp is None:
                await self._finish(pool, application)
        return None

    async def _delete(self, pools: Iterable[Pool]) -> None:
        """Delete those that go with their application; each waits for its addresses."""
        for pool in pools:
            if _goes_with_application(pool) and pool.metadata.deletion_timestamp is None:
                try:
                    await self._store.delete(Pool, pool.metadata.name, uid=pool.metadata.uid)
                except NotFoundError:
                    continue

    async def _finish(self, pool: Pool, application: Application) -> None:
        """Take from a retained pool what the ledger gives it, if a crash left it without."""
        for subnet in map(self._subnets.get, self._subnets_of(pool)):
            grant = ledger_of(subnet).get(pool.metadata.name) if subnet is not None else None
            if subnet is not None and grant is not None and grant.ips != pool_addresses(pool.spec):
                labels = pool.metadata.labels
                wish = Wish(
                    application,
                    labels.get(LABEL_APP_UID, ""),
                    pool.spec.ip_version or 4,
                    labels.get(LABEL_INTERFACE, ""),
                    subnet.metadata.name,
                    pool_addresses(pool.spec).count,
                    pool.metadata.annotations.get(ANNOTATION_NUMBER, ""),
                    reclaim=False,
                )
                with suppress(RefusalError):  # of a subnet that is going itself
                    await self._cutter.settle(wish, [pool])


def _goes_with_application(pool: Pool) -> bool:
    return pool.metadata.labels.get(LABEL_RECLAIM) == "true"


def _facts(resource: Pool | Subnet) -> object:
    """All but the status, and what changes with every write."""
    meta = resource.metadata
    return (
        meta.uid,
        resource.spec,
        meta.labels,
        meta.annotations,
        meta.finalizers,
        meta.owner_references,
        meta.deletion_timestamp,
    )
