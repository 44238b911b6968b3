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
        writer = Writer(path, patience=settings.busy, history=settings.history)
        self._writes: Lane[Write] = Lane(
            "store-write",
            writer.run,
            batch=settings.batch,
            limit=settings.queue,
            patience=settings.patience,
            late=UncertainError,
            finish=writer.close,
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
        if query.namespace and not kind.TYPE.namespaced:
            raise InvalidError(f"{kind.TYPE.kind} is cluster-scoped, it cannot be asked for by namespace")
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
            self._uncheckpointed = 0
            self._scans.submit(checkpoint).future.add_done_callback(_report_checkpoint)
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
    if not future.cancelled() and future.exception() is not None:
        log.warning("the write-ahead log grows: %s", future.exception())


_GET = """SELECT object FROM objects
    WHERE kind = (SELECT id FROM kinds WHERE name = ?) AND namespace = ? AND name = ?"""


def _get(connection: sqlite3.Connection, kind: type[Resource], namespace: str, name: str) -> bytes | None:
    row = connection.execute(_GET, (kind_name(kind.TYPE), namespace, name)).fetchone()
    return row[0] if row else None


def _list(connection: sqlite3.Connection, kind: type[Resource], query: Query, limit: int) -> _ListPage:
    """A snapshot of at most `limit` matching objects (-1: all) in order."""
    connection.execute("BEGIN")
    try:
        (version,) = connection.execute("SELECT coalesce(max(version), 0) FROM events").fetchone()
        row = connection.execute("SELECT id FROM kinds WHERE name = ?", (kind_name(kind.TYPE),)).fetchone()
        items = [] if row is None else _select(connection, kind, row[0], query, limit)
    finally:
        connection.execute("ROLLBACK")
    return _ListPage(items, version)


def _select(connection: sqlite3.Connection, kind: type[Resource], number: int, query: Query, limit: int) -> list[bytes]:
    namespace = query.namespace if kind.TYPE.namespaced else ""
    conditions = ["o.kind = ?"]
    parameters: list[Any] = [number]
    for column, value, wanted in (
        ("namespace", namespace, bool(namespace) or not kind.TYPE.namespaced),
        ("name", query.name, bool(query.name)),
    ):
        if wanted:
            conditions.append(f"o.{column} = ?")
            parameters.append(value)
    source = "objects AS o"
    if query.labels:
        # the rarest label leads: it decides how many objects are looked at
        pairs = sorted(query.labels.items(), key=lambda pair: _rarity(connection, number, pair, len(query.labels)))
        tables = [f"labels AS l{index}" for index in range(len(pairs))]
        source = " CROSS JOIN ".join([*tables, "objects AS o"])
        for index, (key, value) in enumerate(pairs):
            conditions.append(f"l{index}.kind = ? AND l{index}.key = ? AND l{index}.value = ? AND ")
            conditions[-1] += f"l{index}.object = {'o.id' if index == 0 else 'l0.object'}"
            parameters += [number, key, value]
    statement = (
        f"SELECT o.object FROM {source} WHERE {' AND '.join(conditions)} ORDER BY o.namespace, o.name LIMIT {limit}"  # noqa: S608
    )
    return [data for (data,) in connection.execute(statement, parameters)]


def _rarity(connection: sqlite3.Connection, kind: int, pair: tuple[str, str], conditions: int) -> int:
    """How many objects have this label, as far as 100."""
    if conditions == 1:
        return 0
    statement = "SELECT count(*) FROM (SELECT 1 FROM labels WHERE kind = ? AND key = ? AND value = ? LIMIT 100)"
    (count,) = connection.execute(statement, (kind, *pair)).fetchone()
    return int(count)


_BOUNDS = "SELECT (SELECT coalesce(min(version), 1) - 1 FROM events), (SELECT coalesce(max(version), 0) FROM events)"
_EVENTS = """SELECT e.version, k.name, e.type, e.object, e.before FROM events AS e JOIN kinds AS k ON k.id = e.kind
    WHERE e.version > ?1 AND e.version <= ?2 AND (?3 IS NULL OR k.name = ?3) ORDER BY e.version"""


def _events(connection: sqlite3.Connection, since: int, kind: str | None) -> Page:
    connection.execute("BEGIN")
    try:
        floor, head = connection.execute(_BOUNDS).fetchone()
        reached = min(head, since + EVENTS_PAGE)
        rows = [Row._make(row) for row in connection.execute(_EVENTS, (since, reached, kind))]
    finally:
        connection.execute("ROLLBACK")
    return Page(rows, reached, head, floor)
