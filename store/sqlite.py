"""The store on one machine: an SQLite file that several processes use at once.

Writes of one process are committed together (`store.writer`), each acknowledged only when it is on disk. Reads go to
the file, in threads: one for what is small, one for what may take long, so that a point read never waits for a list.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self, cast

from api.meta import R, Resource
from store import changes, rules
from store.changes import Change
from store.errors import AlreadyExistsError, InvalidError, NotFoundError, UnavailableError, UncertainError
from store.feed import Feed, Page, Row
from store.lane import Job, Lane
from store.port import EVERYTHING, Event, Listing, Query, Store
from store.schema import checkpoint, connect, prepare
from store.writer import Write, Writer, kind_name, read

log = logging.getLogger(__name__)

NARROW = 256
"""A list by name or labels that finds more objects than this is moved to the thread for long reads."""

EVENTS_PAGE = 1024
"""Versions of the event log that are read in one go."""


@dataclass(frozen=True, slots=True)
class SqliteSettings:
    """How a store uses its file."""

    history: int = 50_000
    """Events that the file remembers, in number; a watch away for longer must list again. 0.7 kB each."""
    busy: float = 5.0
    """Seconds to wait for other processes' locks; a commit holds them for a few milliseconds."""
    patience: float = 30.0
    """Seconds after which a call is given up: a disk that does not answer must not hang its callers."""
    queue: int = 4096
    """Calls that may wait, in number; more are refused, since they would be answered too late."""
    batch: int = 256
    """Writes in one transaction, in number: bounds how long other processes wait for the lock."""
    checkpoint: int = 512
    """Writes after which the write-ahead log (5 to 40 kB each) is moved into the file."""
    tick: float = 1.0
    """Seconds between looks at the event log when the kernel reports nothing; only a lost notification needs it."""
    bookmark: float = 15.0
    """Seconds between bookmarks to a watch that has nothing to report."""


class _ListPage(NamedTuple):
    items: list[bytes]
    version: int


Read = Callable[[sqlite3.Connection], Any]


class SqliteStore(Store):
    """The adapter for one machine; use `open`."""

    def __init__(self, path: str, settings: SqliteSettings) -> None:
        """Open the connections of an existing file, blocking; needs a running loop."""
        self._settings = settings
        self._writer = Writer(path, patience=settings.busy, history=settings.history)
        self._writes: Lane[Write] = Lane(
            "store-write",
            self._writer.run,
            batch=settings.batch,
            limit=settings.queue,
            patience=settings.patience,
            late=UncertainError,
            finish=self._writer.close,
        )
        self._reads = self._read_lane("store-read", connect(path, settings.busy, reader=True), batch=16)
        self._scans = self._read_lane("store-scan", connect(path, settings.busy, reader=False), batch=1)
        self._feed = Feed(path, self._events, tick=settings.tick, bookmark=settings.bookmark)
        self._uncheckpointed = 0

    @classmethod
    async def open(cls, path: str, settings: SqliteSettings = SqliteSettings()) -> Self:
        """The store in the file `path`, which is made (0600, in a directory 0700) if there is none.

        Raises UnavailableError, also if a newer release or another program wrote the file.
        """
        path = os.path.abspath(path)  # noqa: ASYNC240 reads the working directory, no file
        await asyncio.to_thread(prepare, path, settings.busy)
        try:
            return cls(path, settings)
        except sqlite3.Error as error:
            raise UnavailableError(f"cannot open {path}: {error}") from error

    async def close(self) -> None:
        """As the port says; what is queued is still written."""
        await self._feed.close()
        for lane in (self._writes, self._reads, self._scans):
            await lane.close(self._settings.patience)

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        """As the port says."""
        data: bytes | None = await self._reads.call(lambda connection: _get(connection, kind, namespace, name))
        if data is None:
            raise _missing(kind, namespace, name)
        return cast(R, read(kind, data))

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        """As the port says."""
        rules.check_query(kind.TYPE, query)
        if query.node:
            raise InvalidError("there are no nodes' pods here")
        page: _ListPage | None = None
        if query.labels or query.name:
            page = await self._reads.call(lambda connection: _list(connection, kind, query, NARROW + 1))
        if page is None or len(page.items) > NARROW:
            page = await self._scans.call(lambda connection: _list(connection, kind, query, -1))
        items: list[R] = []
        for number, data in enumerate(page.items, 1):
            items.append(cast(R, read(kind, data)))
            if number % NARROW == 0:
                await asyncio.sleep(0)  # a long list is decoded without holding up others
        items.sort(key=lambda item: (item.metadata.namespace, item.metadata.name))
        return Listing(items, str(page.version))

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        """As the port says."""
        return self._feed.watch(kind, query, since)

    async def create(self, resource: R) -> R:
        """As the port says."""
        rules.check(resource)
        if resource.metadata.resource_version:
            raise InvalidError("metadata.resourceVersion: must not be set on objects to be created")

        def decide(stored: Resource | None, version: str, moment: datetime) -> Change:
            if stored is not None:
                raise AlreadyExistsError(f"{changes.title(resource)} already exists")
            return changes.create(resource, version, moment)

        return await self._write(resource, decide)

    async def update(self, resource: R) -> R:
        """As the port says."""
        rules.check(resource)

        def decide(stored: Resource | None, version: str, _: datetime) -> Change | None:
            return changes.update(_existing(stored, resource), resource, version)

        return await self._write(resource, decide)

    async def update_status(self, resource: R) -> R:
        """As the port says; NotFoundError also if the kind has no status subresource."""

        def decide(stored: Resource | None, version: str, _: datetime) -> Change | None:
            return changes.update_status(_existing(stored, resource), resource, version)

        return await self._write(resource, decide)

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        """As the port says."""

        def decide(stored: Resource | None, version: str, moment: datetime) -> Change | None:
            if stored is None:
                raise _missing(kind, namespace, name)
            return changes.delete(stored, version, moment, uid=uid, resource_version=resource_version)

        await self._commit(Write(kind, namespace, name, decide))

    async def _write(self, resource: R, decide: Callable[[Resource | None, str, datetime], Change | None]) -> R:
        metadata = resource.metadata
        return cast(R, await self._commit(Write(type(resource), metadata.namespace, metadata.name, decide)))

    async def _commit(self, write: Write) -> Any:
        result = await self._writes.call(write)
        self._uncheckpointed += 1
        if self._uncheckpointed >= self._settings.checkpoint:
            with suppress(UnavailableError):  # a full queue must not make the caller believe that nothing was written
                self._scans.submit(checkpoint).future.add_done_callback(_report_checkpoint)
                self._uncheckpointed = 0
        return result

    async def _events(self, since: int, kind: str | None) -> Page:
        page: Page = await self._reads.call(lambda connection: _events(connection, since, kind))
        return page

    def _read_lane(self, name: str, connection: sqlite3.Connection, *, batch: int) -> Lane[Read]:
        def run(jobs: list[Job[Read]]) -> None:
            for job in jobs:
                try:
                    job.result = job.work(connection)
                except sqlite3.Error as error:
                    job.error = UnavailableError(f"cannot read: {error}")

        settings = self._settings
        return Lane(name, run, batch=batch, limit=settings.queue, patience=settings.patience, finish=connection.close)


def _existing(stored: Resource | None, resource: R) -> R:
    if stored is None:
        metadata = resource.metadata
        raise _missing(type(resource), metadata.namespace, metadata.name)
    return cast(R, stored)


def _missing(kind: type[Resource], namespace: str, name: str) -> NotFoundError:
    return NotFoundError(f"{kind.TYPE.kind} {f'{namespace}/{name}' if namespace else name!r} not found")


def _report_checkpoint(future: asyncio.Future[Any]) -> None:
    if future.cancelled():
        return
    if future.exception() is not None:
        log.warning("the write-ahead log grows: %s", future.exception())
    elif future.result():
        log.warning("the write-ahead log grows: %s pages are still in use by some process", future.result())


# Reading a row gives the interpreter lock away, and a busy loop gives it back late: after 5 ms each time at worst. So
# lists and events come as one row, with lines that JSON cannot contain as separators, and are put in order here.

_GET = """SELECT object FROM objects
    WHERE kind = (SELECT id FROM kinds WHERE name = ?) AND namespace = ? AND name = ?"""


def _get(connection: sqlite3.Connection, kind: type[Resource], namespace: str, name: str) -> bytes | None:
    row = connection.execute(_GET, (kind_name(kind.TYPE), namespace, name)).fetchone()
    return row[0] if row else None


def _list(connection: sqlite3.Connection, kind: type[Resource], query: Query, limit: int) -> _ListPage:
    """A snapshot of at most `limit` matching objects (-1: all)."""
    found, parameters = _selection(connection, kind, query)
    version, text = connection.execute(
        f"SELECT (SELECT coalesce(max(version), 0) FROM events), "  # noqa: S608 no values in it
        f"(SELECT group_concat(object, char(10)) FROM (SELECT o.object {found} LIMIT {limit}))",
        parameters,
    ).fetchone()
    return _ListPage(text.split(b"\n") if text else [], version)


def _selection(connection: sqlite3.Connection, kind: type[Resource], query: Query) -> tuple[str, list[Any]]:
    """FROM and WHERE of a list, and the parameters."""
    name = kind_name(kind.TYPE)
    conditions = ["o.kind = (SELECT id FROM kinds WHERE name = ?)"]
    parameters: list[Any] = [name]
    if query.namespace or not kind.TYPE.namespaced:
        conditions.append("o.namespace = ?")
        parameters.append(query.namespace)
    if query.name:
        conditions.append("o.name = ?")
        parameters.append(query.name)
    if not query.labels:
        return f"FROM objects AS o WHERE {' AND '.join(conditions)}", parameters
    pairs = list(query.labels.items())
    if len(pairs) > 1:
        pairs.sort(key=lambda pair: _rarity(connection, name, pair))
    # the rarest label leads: it decides how many objects are looked at
    tables = [f"labels AS l{index}" for index in range(len(pairs))]
    for index, (key, value) in enumerate(pairs):
        label = f"l{index}"
        conditions += [
            f"{label}.kind = (SELECT id FROM kinds WHERE name = ?)",  # noqa: S608 values are parameters
            f"{label}.key = ?",
            f"{label}.value = ?",
            f"{label}.object = {'o.id' if index == 0 else 'l0.object'}",
        ]
        parameters += [name, key, value]
    return f"FROM {' CROSS JOIN '.join([*tables, 'objects AS o'])} WHERE {' AND '.join(conditions)}", parameters


_RARITY = """SELECT count(*) FROM (SELECT 1 FROM labels
    WHERE kind = (SELECT id FROM kinds WHERE name = ?) AND key = ? AND value = ? LIMIT 100)"""


def _rarity(connection: sqlite3.Connection, kind: str, pair: tuple[str, str]) -> int:
    """How many objects have this label, as far as 100."""
    (count,) = connection.execute(_RARITY, (kind, *pair)).fetchone()
    return int(count)


_EVENTS = """SELECT
    (SELECT coalesce(min(version), 1) - 1 FROM events),
    (SELECT coalesce(max(version), 0) FROM events),
    (SELECT group_concat(
        e.version || char(9) || k.name || char(9) || e.type || char(9) || e.object || char(9) || coalesce(e.before, ''),
        char(10))
     FROM events AS e CROSS JOIN kinds AS k ON k.id = e.kind
     WHERE e.version > ?1 AND e.version <= ?2 AND (?3 IS NULL OR k.name = ?3))"""


def _events(connection: sqlite3.Connection, since: int, kind: str | None) -> Page:
    floor, head, text = connection.execute(_EVENTS, (since, since + EVENTS_PAGE, kind)).fetchone()
    rows = []
    for line in text.split(b"\n") if text else ():
        version, name, change, data, before = line.split(b"\t")
        rows.append(Row(int(version), name, change, data, before or None))
    rows.sort()
    return Page(rows, min(head, since + EVENTS_PAGE), head, floor)
