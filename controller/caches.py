"""What the whole cluster looks like, once for all rooms: each kind is listed and watched once.

The caches are kept by every replica, also while another one leads: a standby takes over warm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Generic, cast

from api.meta import R, Resource
from store.informer import Informer
from store.port import EVERYTHING, Query, Store

Listener = Callable[[R | None, R | None], None]
"""Called with (old, new) after a change; old is None for what is new, new for what is gone. Must not block or raise."""


class Cache(Generic[R]):
    """One kind's objects, and who wants to hear of their changes."""

    def __init__(self, store: Store, kind: type[R], query: Query) -> None:
        self._listeners: list[Listener[R]] = []
        self.informer = Informer(store, kind, query, on_change=self._tell)

    def get(self, name: str, namespace: str = "") -> R | None:
        """The cached object."""
        return self.informer.get(name, namespace)

    def values(self) -> Iterable[R]:
        """The cached objects in no order: a view, so do not await while iterating."""
        return self.informer.values()

    def listen(self, listener: Listener[R]) -> Callable[[], None]:
        """Tell `listener` of all that is there, as new, and then of every change; the result ends that."""
        self._listeners.append(listener)
        for resource in list(self.informer.values()):
            listener(None, resource)
        return lambda: self._listeners.remove(listener)

    def _tell(self, old: R | None, new: R | None) -> None:
        for listener in list(self._listeners):
            listener(old, new)


class Caches:
    """All caches. Ask for each with `of` before `run`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._caches: dict[tuple[type[Resource], str], Cache[Any]] = {}

    def of(self, kind: type[R], query: Query = EVERYTHING) -> Cache[R]:
        """The cache of `kind`, restricted by `query`; the same one for everybody who asks for the same."""
        key = (kind, repr(query))
        if key not in self._caches:
            self._caches[key] = Cache(self._store, kind, query)
        return cast(Cache[R], self._caches[key])

    async def run(self) -> None:
        """Keep the caches until cancelled; the failure of one ends all."""
        async with asyncio.TaskGroup() as group:
            for cache in self._caches.values():
                group.create_task(cache.informer.run())

    async def synced(self) -> None:
        """Return when every cache has had a complete list; the caller sets the deadline."""
        for cache in self._caches.values():
            await cache.informer.synced()
