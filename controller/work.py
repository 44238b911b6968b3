"""Keys whose objects are to be brought in order: the loop that every reconciler runs in.

A key waits at most once and is worked on at most once at a time, however often it is added: the queue is bounded by
the number of objects. What fails is tried again, ever less often, without end: an object's trouble may end by itself,
and it keeps nobody else waiting.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable, Hashable
from random import uniform
from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge

from store.errors import ConflictError, StoreError

K = TypeVar("K", bound=Hashable)

_log = logging.getLogger(__name__)

DEPTH = Gauge("spiderpool_controller_queue_depth", "Keys that wait to be reconciled, pauses included.", ["queue"])
FAILURES = Counter("spiderpool_controller_queue_failures", "Reconciliations that failed.", ["queue"])


class WorkQueue(Generic[K]):
    """One reconciler's keys.

    `reconcile(key)` reads what is and does what is missing; it returns None, or after how many seconds to look again.
    A StoreError is logged in one line, anything else with its trace; both are tried again after a pause that doubles.
    """

    def __init__(
        self,
        name: str,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        workers: int = 2,
        backoff_first: float = 0.2,
        backoff_most: float = 60.0,
    ) -> None:
        self._name = name
        self._reconcile = reconcile
        self._workers = workers
        self._backoff_first = backoff_first
        self._backoff_most = backoff_most
        self._due: dict[K, float] = {}
        """Key to the time (of the loop's clock) from which it may be worked on."""
        self._heap: list[tuple[float, int, K]] = []
        """The same by time, but for keys that are worked on. An entry whose time is not the one in `_due` is void."""
        self._count = 0
        self._busy: set[K] = set()
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def add(self, key: K, after: float = 0.0) -> None:
        """Have `key` reconciled in `after` seconds, or sooner if it is due sooner anyway."""
        due = asyncio.get_running_loop().time() + after
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        if key not in self._busy:
            self._push(due, key)
        DEPTH.labels(self._name).set(len(self._due))
        self._changed.set()

    def _push(self, due: float, key: K) -> None:
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))

    @property
    def idle(self) -> bool:
        """Whether nothing is due now or being worked on."""
        now = asyncio.get_running_loop().time()
        return not self._busy and all(due > now for due in self._due.values())

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key = await self._next()
            try:
                again = await self._reconcile(key)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 (the outermost loop: one object's trouble is not the others')
                self._failed(key, error)
            else:
                self._failures.pop(key, None)
                if again is not None:
                    self.add(key, again)
            finally:
                self._busy.discard(key)
                if key in self._due:
                    self._push(self._due[key], key)
                self._changed.set()

    def _failed(self, key: K, error: Exception) -> None:
        FAILURES.labels(self._name).inc()
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        longest = min(self._backoff_most, self._backoff_first * 2 ** min(failures - 1, 16))
        pause = uniform(longest / 2, longest)
        if isinstance(error, ConflictError):
            _log.info("%s %s: again in %.1f s: %s", self._name, key, pause, error)
        elif isinstance(error, StoreError):
            _log.warning("%s %s: again in %.1f s: %s", self._name, key, pause, error)
        else:
            _log.error("%s %s: again in %.1f s", self._name, key, pause, exc_info=error)
        self.add(key, pause)

    async def _next(self) -> K:
        """The key that is due longest and that nobody works on."""
        while True:
            self._changed.clear()
            while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
                heapq.heappop(self._heap)
            due = self._heap[0][0] if self._heap else None
            if due is not None and due <= asyncio.get_running_loop().time():
                key = heapq.heappop(self._heap)[2]
                del self._due[key]
                self._busy.add(key)
                DEPTH.labels(self._name).set(len(self._due))
                return key
            try:
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            except TimeoutError:
                continue
