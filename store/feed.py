"""Watches of one process: the event log is read once per change and handed to everybody whom it concerns.

A watch that starts in the past, or whose consumer is slow, reads the log by itself until it has caught up; so no queue
grows without bound and no event is lost unless the log has forgotten it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple, cast

import msgspec

from api.meta import R, Resource
from store.errors import ExpiredError, InvalidError, StoreError, UnavailableError
from store.inotify import IN_ATTRIB, DirectoryWatch
from store.port import Event, Query
from store.rules import check_query
from store.writer import kind_name, read

log = logging.getLogger(__name__)

QUEUE = 2048
"""Events that a watch keeps for its consumer; beyond that it goes back to reading the log."""

Change = Literal["ADDED", "MODIFIED", "DELETED"]


class Row(NamedTuple):
    """A row of the event log; kind as `kind_name` says it."""

    version: int
    kind: bytes
    type: bytes
    object: bytes
    before: bytes | None


class Page(NamedTuple):
    """A part of the log: all events after the version asked for, up to `reached`."""

    rows: list[Row]
    reached: int
    head: int
    """The newest version."""
    floor: int
    """The newest version that is forgotten."""


ReadPage = Callable[[int, str | None], Awaitable[Page]]
"""Read the log after a version, of one kind or of all."""


class _Labelled(msgspec.Struct):
    labels: dict[str, str] = {}


class _Object(msgspec.Struct):
    """As much of an object as it takes to see whether anybody asked for it."""

    metadata: _Labelled


_decode_object = msgspec.json.Decoder(_Object).decode
_decode_labels = msgspec.json.Decoder(dict[str, str]).decode


def transition(change: Change, was: bool, matches: bool) -> Change | None:
    """What a change is to somebody who asked for certain labels; `was`: they matched before it.

    Source: k8s.io/apiserver `pkg/storage/cacher/cache_watcher.go`, convertToWatchEvent.
    """
    if change == "ADDED":
        return "ADDED" if matches else None
    if change == "DELETED" or not matches:
        return "DELETED" if was else None
    return "MODIFIED" if was else "ADDED"


class _Watch:
    """One consumer."""

    __slots__ = ("cursor", "failure", "kind", "live", "name", "query", "queue", "wake")

    def __init__(self, kind: type[Resource], query: Query, since: int) -> None:
        self.kind = kind
        self.name = kind_name(kind.TYPE)
        self.query = query
        self.cursor = since
        self.queue: deque[Event[Any]] = deque()
        self.wake = asyncio.Event()
        self.live = False
        self.failure: Exception | None = None

    def put(self, event: Event[Any], version: int) -> None:
        self.queue.append(event)
        self.cursor = version
        self.wake.set()

    def event(self, row: Row, resource: Resource) -> Event[Any] | None:
        """The event that `row` is to this consumer, if any."""
        metadata = resource.metadata
        change = cast(Change, row.type.decode())
        matches = self.query.selects(metadata)
        was = matches
        if row.before is not None:
            was = self.query.selects(metadata, _decode_labels(row.before))
        seen = transition(change, was, matches)
        return seen and Event(seen, resource, metadata.resource_version)

    @property
    def label(self) -> tuple[str, str] | None:
        """The label that an object must have, now or before, to be of interest; one of those asked for."""
        return next(iter(self.query.labels.items()), None)


class Feed:
    """All watches of one store in one process."""

    def __init__(self, path: str, read_page: ReadPage, *, tick: float, bookmark: float) -> None:
        self._path = path
        self._read = read_page
        self._tick = tick
        self._bookmark = bookmark
        self._slots: dict[str, dict[tuple[str, str] | None, dict[_Watch, None]]] = {}
        self._live: dict[_Watch, None] = {}
        self._all: set[_Watch] = set()
        self._position = 0
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._bell: DirectoryWatch | None = None
        self._closed = False

    async def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        """As `Store.watch`."""
        check_query(kind.TYPE, query)
        if not since.isascii() or not since.isdigit():
            raise InvalidError(f"cannot watch from resourceVersion {since!r}: it is none of this store's")
        if self._closed:
            raise UnavailableError("the store is closed")
        self._start()
        watch = _Watch(kind, query, int(since))
        self._all.add(watch)
        try:
            while not self._closed:
                if not watch.live and not watch.queue:
                    for event in await self._catch_up(watch):
                        yield event
                    continue
                while watch.queue:
                    yield watch.queue.popleft()
                if watch.failure is not None:
                    raise watch.failure
                if watch.live and not watch.queue:
                    watch.wake.clear()
                    await watch.wake.wait()
        except UnavailableError:
            if not self._closed:
                raise
        finally:
            self._all.discard(watch)
            self._leave(watch)

    async def close(self) -> None:
        """End all watches."""
        self._closed = True
        if self._bell is not None:
            self._bell.close()
        if self._pump is not None:
            self._pump.cancel()
            with suppress(asyncio.CancelledError):
                await self._pump
        for watch in self._all:
            watch.wake.set()

    def _start(self) -> None:
        if self._pump is not None:
            return
        directory, name = os.path.split(self._path)
        try:
            self._bell = DirectoryWatch(directory, IN_ATTRIB, lambda file: self._ring(file, name))
        except OSError as error:
            log.warning("changes of %s are looked for every %s s only: %s", self._path, self._tick, error)
        self._pump = asyncio.create_task(self._run(), name="store-feed")
        self._pump.add_done_callback(self._ended)

    def _ring(self, file: str, name: str) -> None:
        if file in ("", name):
            self._wake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.error("watches failed", exc_info=failure)
            for watch in list(self._all):
                watch.failure = UnavailableError(f"watches failed: {failure}")
                watch.wake.set()
            self._live.clear()
            self._slots.clear()
            self._pump = None
            if self._bell is not None:
                self._bell.close()  # the next watch begins anew

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_bookmark = loop.time() + self._bookmark
        while True:
            timer = loop.call_later(self._tick, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
            self._wake.clear()
            try:
                await self._advance()
            except UnavailableError as error:
                log.warning("watches wait: %s", error)
            if loop.time() >= next_bookmark:
                next_bookmark = loop.time() + self._bookmark
                self._mark()

    async def _advance(self) -> None:
        while self._live:
            start = self._position
            page = await self._read(start, None)
            if page.floor > start or page.head < start:
                for watch in list(self._live):
                    self._leave(watch)  # to find out by itself what it has missed
                return
            if start == self._position:
                for row in page.rows:
                    self._dispatch(row)
                self._position = page.reached
            if page.reached >= page.head:
                return

    def _dispatch(self, row: Row) -> None:
        name = row.kind.decode()
        decoded: dict[type[Resource], Resource] = {}
        for watch in self._candidates(name, row):
            if row.version <= watch.cursor:
                continue
            try:
                resource = decoded.get(watch.kind)
                if resource is None:
                    resource = decoded[watch.kind] = read(watch.kind, row.object)
                event = watch.event(row, resource)
            except StoreError as error:
                watch.failure = error
                self._leave(watch)
                continue
            if event is None:
                continue
            if len(watch.queue) >= QUEUE:
                self._leave(watch)
            else:
                watch.put(event, row.version)

    def _candidates(self, name: str, row: Row) -> list[_Watch]:
        """The watches that may care for `row`, found by its labels: there is one watch per pool, and many pools."""
        slots = self._slots.get(name)
        if slots is None:
            return []
        pairs: dict[tuple[str, str] | None, None] = {None: None}
        pairs |= dict.fromkeys(_decode_object(row.object).metadata.labels.items())
        if row.before is not None:
            pairs |= dict.fromkeys(_decode_labels(row.before).items())
        return [watch for pair in pairs for watch in slots.get(pair, ())]

    def _mark(self) -> None:
        for watch in list(self._live):
            if watch.cursor < self._position and not watch.queue:
                watch.put(Event("BOOKMARK", None, str(self._position)), self._position)

    async def _catch_up(self, watch: _Watch) -> list[Event[Any]]:
        """The next events from the log; makes the watch live if there are no more."""
        if watch.failure is not None:
            raise watch.failure
        page = await self._read(watch.cursor, watch.name)
        if page.floor > watch.cursor:
            raise ExpiredError(f"resourceVersion {watch.cursor} is too old, the oldest to watch from is {page.floor}")
        if page.head < watch.cursor:
            raise ExpiredError(f"resourceVersion {watch.cursor} is unknown, the store's newest is {page.head}")
        events = [event for row in page.rows if (event := watch.event(row, read(watch.kind, row.object)))]
        watch.cursor = page.reached
        if page.reached >= page.head:
            self._join(watch)
        return events

    def _join(self, watch: _Watch) -> None:
        """Hand `watch` over to the pump, unless that has gone further in the meantime."""
        if self._live and self._position > watch.cursor:
            return
        if not self._live:
            self._position = watch.cursor
        watch.live = True
        self._live[watch] = None
        self._slots.setdefault(watch.name, {}).setdefault(watch.label, {})[watch] = None
        self._wake.set()

    def _leave(self, watch: _Watch) -> None:
        watch.live = False
        watch.wake.set()
        self._live.pop(watch, None)
        slots = self._slots.get(watch.name, {})
        slot = slots.get(watch.label, {})
        slot.pop(watch, None)
        if not slot:
            slots.pop(watch.label, None)
        if not slots:
            self._slots.pop(watch.name, None)
