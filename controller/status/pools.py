"""Keeps pools' status, finalizers and marks; who reads it is people, and what changes fast is written slowly."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from api.claim import Claim
from api.conflicts import pool_conflicts
from api.pool import Pool
from controller.room import Desk
from controller.status.settings import StatusSettings
from controller.work import WorkQueue
from store.errors import ConflictError, NotFoundError
from store.pool_views import PoolViews

_COMPARE = ""
"""The queue's key for the comparison of all pools, which is no pool's name."""
_AGAIN = 0.5
"""Seconds after which a pool is tried again whose newest version the cache did not have."""
_WARNINGS = frozenset({"InvalidSpec", "Overlap", "UpstreamRecords", "Exhausted"})
"""Reasons for not being ready that somebody should do something about."""


class PoolStatusRoom:
    """The room; `run` is the leader's."""

    def __init__(self, desk: Desk, settings: StatusSettings) -> None:
        self._desk = desk
        self._settings = settings
        self._pools = desk.caches.of(Pool)
        self._claims = desk.caches.of(Claim)
        self._forget()

    def _forget(self) -> None:
        self._views = PoolViews(self._desk.store, self._mark, pool_conflicts)
        self._next: dict[str, float] = {}
        """From when on a pool's status may be written again, on the loop's clock."""
        self._queue: WorkQueue[str] = WorkQueue("pool-status", self._settle, workers=self._settings.workers)

    async def run(self) -> None:
        """Keep the status until cancelled."""
        for cache in (self._pools, self._claims):
            await cache.informer.synced()
        self._forget()
        with ExitStack() as stack:
            stack.callback(self._pools.listen(self._pool_changed))
            stack.callback(self._claims.listen(self._views.claim_changed))
            await self._queue.run()

    @property
    def idle(self) -> bool:
        """Whether nothing is due or being written."""
        return self._queue.idle

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        self._views.pool_changed(old, new)
        if new is None and old is not None:
            self._next.pop(old.metadata.name, None)
        if self._views.respecified:
            self._queue.add(_COMPARE, 0.05)

    def _mark(self, name: str) -> None:
        now = asyncio.get_running_loop().time()
        self._queue.add(name, max(0.0, self._next.get(name, now) - now))

    async def _settle(self, name: str) -> float | None:
        if name == _COMPARE:
            self._views.compare()
            return None
        pool = self._pools.get(name)
        if pool is None:
            return None
        shown = len(pool.status.allocated_ips or "") if pool.status else 0
        pause = max(self._settings.interval, shown / self._settings.rate)
        self._next[name] = asyncio.get_running_loop().time() + pause
        try:
            news = await self._views.settle(name)
        except (ConflictError, NotFoundError):
            return _AGAIN  # decided on an old version: the event that says so is under way
        if news is not None and news.reason in _WARNINGS:
            self._desk.events.warning(pool, news.reason, news.message)
        return None
