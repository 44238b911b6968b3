"""A cache of the objects that a query selects, kept up to date by list and watch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing
from random import uniform
from typing import Generic

from api.meta import R
from store.errors import ExpiredError, ForbiddenError, NotServedError, StoreError, UnavailableError
from store.port import EVERYTHING, Event, Listing, Query, Store

log = logging.getLogger(__name__)

Key = tuple[str, str]

BACKOFF_FIRST = 0.05
"""Seconds before the second attempt to list; doubled for each further one."""

BACKOFF_MOST = 5.0
"""Seconds between attempts at most; half to all of it is waited, so that many informers do not come back as one."""

RESTART = 8
"""Attempts in a row, about ten seconds of them, in which a store may say that it has no such kind or no right for us
though it had: an API server that has just been started knows neither definitions nor rights for a moment."""


class Informer(Generic[R]):
    """The objects of `kind` that `query` selects, in memory.

    `on_change(old, new)` is called after each change of the cache, in the order of versions for each object; old is
    None for what is new to the cache, new for what leaves it. It must not call back into the informer.

    Versions of all writes of a store are ordered, so the newest wins, whichever way it comes: by watch, by a list, or
    by `learn`, with which the result of an own write is seen at once. What the watch still says about the past then
    changes nothing.
    """

    def __init__(
        self,
        store: Store,
        kind: type[R],
        query: Query = EVERYTHING,
        on_change: Callable[[R | None, R | None], None] | None = None,
        *,
        optional: bool = False,
    ) -> None:
        self._store = store
        self._kind = kind
        self._query = query
        self._on_change = on_change
        self._optional = optional
        self._cache: dict[Key, R] = {}
        self._forgotten: dict[str, int] = {}
        """uid of what we deleted to the version we deleted, until the watch says that it is gone."""
        self._left: dict[str, int] = {}
        """uid of what an own write took out of the query's sight, to the version of that, until the watch is there."""
        self._position = 0
        """The version up to which everything has been seen."""
        self._synced = asyncio.Event()

    @property
    def is_synced(self) -> bool:
        """Whether a complete list has been applied."""
        return self._synced.is_set()

    async def synced(self) -> None:
        """Return when `is_synced`; the caller sets the deadline."""
        await self._synced.wait()

    async def run(self) -> None:
        """List and watch until cancelled; what `on_change` raises ends it too.

        Raises ForbiddenError if the first list is refused `RESTART` times; what was allowed once is waited for. An API
        server that has just started refuses with 403 until it has read its roles, also informers that start later than
        their process. An `optional` informer gives up at once, or after `RESTART` attempts if it had its kind, with
        NotServedError or ForbiddenError; others also wait for their kind to be defined.
        """
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                self._apply_list(await self._store.list(self._kind, self._query))
                async with aclosing(self._store.watch(self._kind, self._query, str(self._position))) as events:
                    async for event in events:
                        failures = 0
                        self._apply(event)
            except ExpiredError as error:
                log.info("%s: listing again: %s", self._kind.TYPE.kind, error)
            except (UnavailableError, ForbiddenError) as error:
                if self._is_final(error, failures):
                    raise
                log.warning("%s: waiting for the store: %s", self._kind.TYPE.kind, error)
            if loop.time() - began > BACKOFF_MOST:
                failures = 0
            failures += 1
            longest = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(failures - 1, 16))
            await asyncio.sleep(uniform(longest / 2, longest))

    def _is_final(self, error: StoreError, failures: int) -> bool:
        """Whether to give up, at an error after so many failures in a row."""
        if not isinstance(error, NotServedError | ForbiddenError):
            return False
        if not self.is_synced:
            return self._optional or (isinstance(error, ForbiddenError) and failures >= RESTART)
        return self._optional and failures >= RESTART

    def get(self, name: str, namespace: str = "") -> R | None:
        """The cached object."""
        return self._cache.get((namespace, name))

    def values(self) -> Iterable[R]:
        """The cached objects in no order: a view, so do not await while iterating."""
        return self._cache.values()

    def learn(self, resource: R) -> None:
        """Take in the result of an own write, unless something newer is known."""
        version = int(resource.metadata.resource_version)
        if version <= self._position and _key(resource) not in self._cache:
            return  # the watch has passed this version: it is gone since, or was never asked for
        self._put(resource, version)

    def forget(self, resource: R) -> None:
        """Take out what was deleted by an own call; `resource` is what was deleted, in any version of it."""
        uid, key = resource.metadata.uid, _key(resource)
        old = self._cache.get(key)
        known = old is not None and old.metadata.uid == uid
        if not known and int(resource.metadata.resource_version) <= self._position:
            return  # the watch has said so already
        if self._query.selects(resource.metadata) or known:
            self._forgotten[uid] = int(resource.metadata.resource_version)
        if known:
            self._remove(key)

    def clear(self) -> None:
        """Take out everything, for the store does not have the kind any more. Not while `run` runs."""
        self._synced.clear()
        for key in list(self._cache):
            self._remove(key)
        self._forgotten.clear()
        self._left.clear()

    def _apply_list(self, listing: Listing[R]) -> None:
        """Make the cache equal to a snapshot, apart from what is known to be newer."""
        version = int(listing.resource_version)
        listed = {_key(item): item for item in listing.items}
        uids = {item.metadata.uid for item in listing.items}
        self._forgotten = {uid: at for uid, at in self._forgotten.items() if uid in uids or at > version}
        gone = [
            key
            for key, old in self._cache.items()
            if key not in listed and int(old.metadata.resource_version) <= version
        ]
        for key in gone:
            self._remove(key)
        for item in listing.items:
            self._put(item, int(item.metadata.resource_version))
        self._advance(version)
        self._synced.set()

    def _apply(self, event: Event[R]) -> None:
        version = int(event.resource_version)
        resource = event.object
        if event.type == "DELETED" and resource is not None:
            self._forgotten.pop(resource.metadata.uid, None)
            old = self._cache.get(_key(resource))
            if old is not None and int(old.metadata.resource_version) <= version:
                self._remove(_key(resource))
        elif resource is not None:
            self._put(resource, version)
        self._advance(version)

    def _advance(self, version: int) -> None:
        self._position = max(self._position, version)
        while self._left:
            uid = next(iter(self._left))
            if self._left[uid] > self._position:
                break
            del self._left[uid]

    def _put(self, resource: R, version: int) -> None:
        key = _key(resource)
        old = self._cache.get(key)
        uid = resource.metadata.uid
        if uid in self._forgotten or version <= self._left.get(uid, 0):
            return
        if old is not None and int(old.metadata.resource_version) >= version:
            return
        if not self._query.selects(resource.metadata):
            self._left[uid] = version
            if old is not None:
                self._remove(key)
            return
        self._cache[key] = resource
        self._tell(old, resource)

    def _remove(self, key: Key) -> None:
        self._tell(self._cache.pop(key), None)

    def _tell(self, old: R | None, new: R | None) -> None:
        if self._on_change is not None:
            self._on_change(old, new)


def _key(resource: R) -> Key:
    metadata = resource.metadata
    return metadata.namespace, metadata.name
