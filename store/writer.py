"""Group commit: a batch of writes becomes one transaction, and so shares one fsync.

A batch is read in one go, decided in memory by `store.changes`, and written in one go: a write that fails its own
conditions leaves no trace in the others, and no savepoints are needed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from api.meta import Kind, Resource, decode, now
from store.changes import Change
from store.errors import InvalidError, StoreError, UnavailableError, UncertainError
from store.lane import Job
from store.schema import connect, execute_rows, kind_ids, retry_busy

log = logging.getLogger(__name__)

Key = tuple[int, str, str]
"""Kind, namespace, name."""

_SHOWN = 200
"""Bytes of an unreadable object in a message: they hold its name."""

_LOAD = """WITH wanted (kind, namespace, name) AS (VALUES {rows})
    SELECT o.kind, o.namespace, o.name, o.id, o.object
    FROM wanted CROSS JOIN objects AS o USING (kind, namespace, name)"""


def kind_name(kind: Kind) -> str:
    """What the file calls a kind: as a CRD is named, without the version."""
    return f"{kind.plural}.{kind.group}" if kind.group else kind.plural


@dataclass(frozen=True, slots=True)
class Write:
    """One write: the object's key, and what becomes of it.

    `decide` gets the stored object (None: there is none), the version to use and the time; it returns the change, or
    None if there is nothing to do, and raises StoreError to refuse.
    """

    kind: type[Resource]
    namespace: str
    name: str
    decide: Callable[[Resource | None, str, datetime], Change | None]


class _Row:
    """An object during a batch."""

    __slots__ = ("data", "id", "resource", "stored_id", "stored_labels")

    def __init__(self, number: int | None, data: bytes) -> None:
        self.stored_id = number
        self.stored_labels: dict[str, str] = {}
        self.id = number
        self.data = data
        self.resource: Resource | None = None

    def load(self, kind: type[Resource]) -> Resource | None:
        """The object as it is now. Raises InvalidError."""
        if self.resource is None and self.id is not None:
            self.resource = read(kind, self.data)
            self.stored_labels = self.resource.metadata.labels
        return self.resource


def read(kind: type[Resource], data: bytes) -> Resource:
    """Decode a stored object. Raises InvalidError: a release with other types wrote it."""
    try:
        return decode(kind, data)
    except msgspec.MsgspecError as error:
        start = data[:_SHOWN].decode(errors="replace")
        raise InvalidError(f"a stored {kind.TYPE.kind} cannot be read: {error}; it begins {start}") from error


@dataclass
class _Batch:
    """What a batch adds to the tables."""

    events: list[tuple[int, int, str, bytes, bytes | None]] = field(default_factory=list)
    touched: dict[Key, _Row] = field(default_factory=dict)


class Writer:
    """The writing connection; used by one thread."""

    def __init__(self, path: str, *, patience: float, history: int) -> None:
        self._path = path
        self._patience = patience
        self._history = history
        self._connection = connect(path, 0, reader=False)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def run(self, jobs: list[Job[Write]]) -> None:
        """Do all writes in one transaction; set each job's result (the object) or error."""
        try:
            self._transact(jobs)
        finally:
            self._leave()

    def _transact(self, jobs: list[Job[Write]]) -> None:
        try:
            retry_busy(self._connection, "BEGIN IMMEDIATE", time.monotonic() + self._patience)
            changed = self._apply(jobs)
        except sqlite3.Error as error:
            for job in jobs:
                job.error = UnavailableError(f"{self._path}: {error}; nothing was written")
            return
        if not changed:
            return
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            # the commit record may be in the log already, and come to life at the next recovery
            for job in jobs:
                job.error = UncertainError(f"{self._path}: commit failed: {error}")
            return
        self._ring()

    def _apply(self, jobs: list[Job[Write]]) -> bool:
        connection = self._connection
        kinds = kind_ids(connection, {kind_name(job.work.kind.TYPE) for job in jobs})
        keys = [(kinds[kind_name(job.work.kind.TYPE)], job.work.namespace, job.work.name) for job in jobs]
        rows: dict[Key, _Row] = {
            (kind, namespace.decode(), name.decode()): _Row(number, data)
            for kind, namespace, name, number, data in execute_rows(connection, _LOAD, list(dict.fromkeys(keys)))
        }
        (head,) = connection.execute("SELECT coalesce(max(version), 0) FROM events").fetchone()
        batch = _Batch()
        moment = now()
        for job, key in zip(jobs, keys, strict=True):
            row = rows.setdefault(key, _Row(None, b""))
            version = head + len(batch.events) + 1
            try:
                job.result = _decide(batch, job.work, key, row, version=version, moment=moment)
            except StoreError as error:
                job.error = error
        if batch.events:
            _store(connection, batch)
            connection.execute("DELETE FROM events WHERE version <= ?", (batch.events[-1][0] - self._history,))
        return bool(batch.events)

    def _leave(self) -> None:
        """End the transaction if it has not been committed, by a new connection if need be."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            log.warning("reopening %s, as a rollback failed: %s", self._path, error)
            with suppress(sqlite3.Error):
                self._connection.close()
            with suppress(sqlite3.Error):
                self._connection = connect(self._path, 0, reader=False)

    def _ring(self) -> None:
        """Tell watchers in all processes that there is something new, by touching the file.

        They cannot go by the write-ahead log: it is written before the commit becomes visible, and a look taken at
        that moment finds nothing.
        """
        try:
            os.utime(self._path)
        except OSError as error:
            log.error("watchers of %s learn of changes late: %s", self._path, error)


def _decide(batch: _Batch, write: Write, key: Key, row: _Row, *, version: int, moment: datetime) -> Resource | None:
    old = row.load(write.kind)
    change = write.decide(old, str(version), moment)
    if change is None:
        return old
    new, data = change.next
    event = "DELETED" if change.removed else "ADDED" if old is None else "MODIFIED"
    before = None
    if old is not None and old.metadata.labels != new.metadata.labels:
        before = msgspec.json.encode(old.metadata.labels)
    batch.events.append((version, key[0], event, data, before))
    batch.touched[key] = row
    if change.removed:
        row.id, row.resource, row.data = None, None, b""
    else:
        row.id, row.resource, row.data = version if old is None else row.id, new, data
    return new


def _store(connection: sqlite3.Connection, batch: _Batch) -> None:
    removed = [
        (row.stored_id,) for row in batch.touched.values() if row.stored_id is not None and row.id != row.stored_id
    ]
    kept = [(row.id, *key, row.data) for key, row in batch.touched.items() if row.id is not None]
    labels_gone: list[tuple[int, str, str, int]] = []
    labels_new: list[tuple[int, str, str, int]] = []
    for key, row in batch.touched.items():
        before = set() if row.stored_id is None else {(k, v, row.stored_id) for k, v in row.stored_labels.items()}
        after = set()
        if row.id is not None and row.resource is not None:
            after = {(k, v, row.id) for k, v in row.resource.metadata.labels.items()}
        labels_gone += [(key[0], *label) for label in before - after]
        labels_new += [(key[0], *label) for label in after - before]
    execute_rows(connection, "DELETE FROM objects WHERE (id) IN (VALUES {rows})", removed)
    execute_rows(
        connection,
        "DELETE FROM labels WHERE {rows}",
        sorted(labels_gone),
        row="(kind = ? AND key = ? AND value = ? AND object = ?)",
        joint=" OR ",  # a list of tuples would be a scan of the table
    )
    execute_rows(
        connection,
        "INSERT INTO objects (id, kind, namespace, name, object) SELECT column1, column2, column3, column4, "
        "CAST(column5 AS TEXT) FROM (VALUES {rows}) WHERE true ON CONFLICT (id) DO UPDATE SET object = excluded.object",
        kept,
    )
    execute_rows(connection, "INSERT INTO labels (kind, key, value, object) VALUES {rows}", sorted(labels_new))
    execute_rows(
        connection,
        "INSERT INTO events (version, kind, type, object, before) SELECT column1, column2, column3, "
        "CAST(column4 AS TEXT), CAST(column5 AS TEXT) FROM (VALUES {rows})",
        batch.events,
    )
