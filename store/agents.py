"""Whether upstream's agents run in the cluster, over the port."""

from __future__ import annotations

import asyncio
import time

from api.agents import AGENT, LABEL_COMPONENT, upstream_that_runs
from api.apps import DaemonSet
from api.core import Pod
from store.port import Query, Store

_ABSENT_FOR = 300.0
"""Seconds for which it holds that there are none. They may come back, but not beside agents of ours: nothing can keep
them from addresses that have claims either."""
_PRESENT_FOR = 2.0
"""Seconds for which it holds that there are some: calls that wait for their end go on soon."""


async def agents_of_upstream(store: Store) -> list[str]:
    """Upstream's agents that run or may start, for people; read uncached. Raises StoreError."""
    pods = await store.list(Pod, Query(labels={LABEL_COMPONENT: AGENT}))
    sets = await store.list(DaemonSet)
    return upstream_that_runs(pods.whole(), sets.whole())


class UpstreamWatch:
    """What was seen lately of upstream's agents; all who ask at the same time share one look."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = asyncio.Lock()
        self._seen: list[str] = []
        self._until = 0.0

    async def agents(self) -> list[str]:
        """Upstream's agents, for people, as they were minutes ago at most. Raises StoreError."""
        async with self._lock:
            if time.monotonic() >= self._until:
                self._seen = await agents_of_upstream(self._store)
                self._until = time.monotonic() + (_PRESENT_FOR if self._seen else _ABSENT_FOR)
            return self._seen
