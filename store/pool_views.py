"""Pools' status, kept equal to their claims: what the controller does in a cluster, and the agent on one machine.

Whoever owns this tells it of every change of pools and claims, and calls `settle` for the pools that it marks. What
settling a pool costs does not depend on the number of others; only when a pool's ranges change, all are compared once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address

from msgspec.structs import replace

from api.claim import LABEL_POOL, Claim, label_value
from api.condition import Condition
from api.meta import FINALIZER
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool, PoolStatus
from api.ranges import IPSet
from api.validate.pool import pool_addresses
from api.views import READY, has_foreign_records, is_marked, pool_status
from store.errors import InvalidError
from store.metrics import AVAILABLE, PER_POOL, POOLS, QUARANTINED, STRAYS, TOTAL
from store.port import Query, Store

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _View:
    """One pool and its claims. There may be claims without a pool, and then it is only them."""

    pool: Pool | None = None
    addresses: IPSet = field(default_factory=lambda: IPSet(4))
    claims: dict[str, Claim] = field(default_factory=dict)
    quarantined: int = 0
    strays: set[str] = field(default_factory=set)
    """Claims on addresses that the pool does not have."""
    conflict: str = ""
    """Why an older pool goes first; empty if none does."""


Judge = Callable[[list[Pool]], dict[str, str]]
"""Of all pools, those that may not be used since they conflict with an older one: name to a sentence."""


class PoolViews:
    """All pools and claims, and the writing of what they amount to."""

    def __init__(self, store: Store, mark: Callable[[str], None], judge: Judge) -> None:
        self._store = store
        self._mark = mark
        self._judge = judge
        self._views: dict[str, _View] = {}
        self._pools = 0
        self.respecified = False
        """A pool came, went or has other ranges: `compare` is due."""

    def pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        """Take in a change of a pool."""
        name = (new or old).metadata.name  # type: ignore[union-attr]
        view = self._views.setdefault(name, _View())
        view.pool = new
        self._pools += (new is not None) - (old is not None)
        POOLS.set(self._pools)
        if new is None:
            view.strays.clear()
            for gauge in PER_POOL:
                with suppress(KeyError):
                    gauge.remove(name)
            self._drop_if_empty(name)
            self.respecified = True
        elif old is None or old.spec != new.spec:
            view.addresses = pool_addresses(new.spec)
            view.strays = {claim for claim in view.claims if _is_stray(view, view.claims[claim])}
            self.respecified = True
        if old is None or new is None or _differs(old, new):
            self._mark(name)

    def claim_changed(self, old: Claim | None, new: Claim | None) -> None:
        """Take in a change of a claim."""
        if old is not None:
            self._remove(old)
        if new is not None:
            pool, name = new.spec.pool, new.metadata.name
            view = self._views.setdefault(pool, _View())
            view.claims[name] = new
            view.quarantined += new.spec.state == "Quarantined"
            if _is_stray(view, new):
                view.strays.add(name)
                if old is None:
                    _log.warning("claim %s is on an address that its pool %s does not have; it stays", name, pool)
            self._mark(pool)
        if old is not None and (new is None or new.spec.pool != old.spec.pool):
            self._mark(old.spec.pool)

    def compare(self) -> None:
        """Look for pools that conflict, and mark those for which that has changed."""
        self.respecified = False
        conflicts = self._judge([view.pool for view in self._views.values() if view.pool is not None])
        for name, view in self._views.items():
            conflict = conflicts.get(name, "")
            if conflict != view.conflict:
                view.conflict = conflict
                if conflict:
                    _log.warning("pool %s: %s", name, conflict)
                self._mark(name)

    async def settle(self, name: str) -> Condition | None:
        """Write what the pool and its claims amount to, if it is not written yet; its readiness, if that has changed.

        Raises StoreError; ConflictError and NotFoundError mean that the pool is not what the cache has.
        """
        view = self._views.get(name)
        if view is None or view.pool is None:
            return None
        pool = await self._settle_metadata(view, view.pool)
        if pool is None:
            return None
        status = pool_status(pool, view.claims.values(), conflict=view.conflict)
        if status.allocated_ips is not None and not is_marked(pool) and not has_foreign_records(pool):
            status = replace(
                status, allocated_ips=None
            )  # the mark was refused, so the records would pass for upstream's
        if status != pool.status:
            await self._store.update_status(replace(pool, status=status))
        total = status.total_ip_count or 0
        TOTAL.labels(name).set(total)
        AVAILABLE.labels(name).set(max(0, total - (status.allocated_ip_count or 0)))
        QUARANTINED.labels(name).set(view.quarantined)
        STRAYS.labels(name).set(len(view.strays))
        return _news(pool.status, status)

    async def _settle_metadata(self, view: _View, pool: Pool) -> Pool | None:
        """The pool with its finalizer and the mark that claims are authoritative; None once it is let go."""
        meta = pool.metadata
        finalizers, annotations = meta.finalizers, meta.annotations
        if meta.deletion_timestamp is not None:
            if FINALIZER in finalizers and not view.claims and not has_foreign_records(pool):
                return await self._let_go(pool)
        elif FINALIZER not in finalizers:
            finalizers = [*finalizers, FINALIZER]
        if view.claims and not is_marked(pool) and not has_foreign_records(pool):
            annotations = {**annotations, ANNOTATION_CLAIMS: CLAIMS_AUTHORITATIVE}
        if (finalizers, annotations) == (meta.finalizers, meta.annotations):
            return pool
        try:
            return await self._store.update(
                replace(pool, metadata=replace(meta, finalizers=finalizers, annotations=annotations))
            )
        except InvalidError as error:
            _log.warning("pool %s cannot be given its finalizer and mark: %s", meta.name, error)
            return pool

    async def _let_go(self, pool: Pool) -> Pool | None:
        """Take the finalizer off a terminating pool without claims; the store is asked, not the cache."""
        label = {LABEL_POOL: label_value(pool.metadata.name)}
        if (await self._store.list(Claim, Query(labels=label))).whole():
            return pool
        finalizers = [finalizer for finalizer in pool.metadata.finalizers if finalizer != FINALIZER]
        await self._store.update(replace(pool, metadata=replace(pool.metadata, finalizers=finalizers)))
        _log.info("pool %s is gone: no claim was left", pool.metadata.name)
        return None

    def _remove(self, claim: Claim) -> None:
        pool, name = claim.spec.pool, claim.metadata.name
        view = self._views.get(pool)
        if view is not None and view.claims.pop(name, None) is not None:
            view.quarantined -= claim.spec.state == "Quarantined"
            view.strays.discard(name)
            self._drop_if_empty(pool)

    def _drop_if_empty(self, name: str) -> None:
        view = self._views[name]
        if view.pool is None and not view.claims:
            del self._views[name]


def _differs(old: Pool, new: Pool) -> bool:
    """Whether something changed that the status depends on; also the status itself, for others may write it."""
    return (old.spec, old.status) != (new.spec, new.status) or (
        old.metadata.finalizers,
        old.metadata.annotations,
        old.metadata.deletion_timestamp,
        old.metadata.generation,
    ) != (
        new.metadata.finalizers,
        new.metadata.annotations,
        new.metadata.deletion_timestamp,
        new.metadata.generation,
    )


def _is_stray(view: _View, claim: Claim) -> bool:
    if view.pool is None:
        return False
    try:
        return int(ip_address(claim.spec.address)) not in view.addresses
    except ValueError:
        return True


def _news(old: PoolStatus | None, new: PoolStatus) -> Condition | None:
    def ready(status: PoolStatus | None) -> Condition | None:
        conditions = status.conditions if status is not None and status.conditions else []
        return next((condition for condition in conditions if condition.type == READY), None)

    before, after = ready(old), ready(new)
    if after is None or (before is not None and before.reason == after.reason):
        return None
    return after
