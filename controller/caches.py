"""What the whole cluster looks like, once for all rooms: each kind is listed and watched once.

The caches are kept by every replica, also while another one leads: a standby takes over warm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Generic, cast

from api.meta import R, Resource
from store.errors import ForbiddenError, NotServedError
from store.informer import Informer
from store.port import EVERYTHING, Query, Store

Listener = Callable[[R | None, R | None], None]
"""Called with (old, new) after a change; old is None for what is new, new for what is gone. Must not block or raise."""

UNSERVED_SECONDS = 10.0
"""Between two looks whether an optional kind is there by now: each is one small request, and who installs the kind's
definition waits for longer than that anyway."""

_log = logging.getLogger(__name__)


class Cache(Generic[R]):
    """One kind's objects, and who wants to hear of their changes."""

    def __init__(self, store: Store, kind: type[R], query: Query, *, optional: bool = False) -> None:
        self._kind = kind
        self._listeners: list[Listener[R]] = []
        self.informer = Informer(store, kind, query, on_change=self._tell, optional=optional)

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

    async def run(self) -> None:
        """Keep the cache until cancelled."""
        await self.informer.run()

    async def synced(self) -> None:
        """Return when there has been a complete list; the caller sets the deadline."""
        await self.informer.synced()

    def _tell(self, old: R | None, new: R | None) -> None:
        for listener in list(self._listeners):
            listener(old, new)


class OptionalCache(Cache[R]):
    """The cache of a kind that the API server may not have, or not let us list: empty as long as that is so."""

    def __init__(self, store: Store, kind: type[R], query: Query) -> None:
        super().__init__(store, kind, query, optional=True)
        self._missing = asyncio.Event()

    @property
    def served(self) -> bool:
        """Whether the cache has a complete list at present."""
        return self.informer.is_synced

    async def run(self) -> None:
        """Keep the cache whenever the kind is there, until cancelled."""
        while True:
            try:
                await self.informer.run()
            except (NotServedError, ForbiddenError) as error:
                if self.served or not self._missing.is_set():
                    _log.info("%s: looking again every %.0f s: %s", self._kind.TYPE.kind, UNSERVED_SECONDS, error)
            self.informer.clear()
            self._missing.set()
            await asyncio.sleep(UNSERVED_SECONDS)

    async def synced(self) -> None:
        """Return when there has been a complete list, or it is known that there is none to be had."""
        waits = [asyncio.create_task(each) for each in (self.informer.synced(), self._missing.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class Caches:
    """All caches. Ask for each with `of` or `optional` before `run`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._caches: dict[tuple[type[Resource], str], Cache[Any]] = {}
        self._optional: dict[tuple[type[Resource], str], OptionalCache[Any]] = {}

    def of(self, kind: type[R], query: Query = EVERYTHING) -> Cache[R]:
        """The cache of `kind`, restricted by `query`; the same one for everybody who asks for the same."""
        key = (kind, repr(query))
        if key not in self._caches:
            self._caches[key] = Cache(self._store, kind, query)
        return cast(Cache[R], self._caches[key])

    def optional(self, kind: type[R], query: Query = EVERYTHING) -> OptionalCache[R]:
        """The same for a kind whose definition somebody else installs, or not; asked for in this way by everybody."""
        key = (kind, repr(query))
        if key not in self._optional:
            self._optional[key] = OptionalCache(self._store, kind, query)
        return cast(OptionalCache[R], self._optional[key])

    async def run(self) -> None:
        """Keep the caches until cancelled; the failure of one ends all."""
        async with asyncio.TaskGroup() as group:
            for cache in self._all():
                group.create_task(cache.run())

    async def synced(self) -> None:
        """Return when every cache has had a complete list; the caller sets the deadline."""
        for cache in self._all():
            await cache.synced()

    def _all(self) -> list[Cache[Any]]:
        return [*self._caches.values(), *self._optional.values()]
