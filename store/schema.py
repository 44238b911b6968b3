"""The SQLite file: its tables, how it is created and opened, and the few statements of more than one line.

Everything is in four tables. `events` is the log that watches read and at the same time the counter of versions: each
write adds exactly one row, so the newest row's number is the store's resourceVersion.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from random import uniform
from typing import Any

from store.errors import UnavailableError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x53706472
"""`Spdr`: tells our files from other SQLite files."""

WAL_PAGES = 8192
"""Write-ahead log length, in pages of 4 KiB, above which checkpoints wait for readers instead of yielding to them."""

_TABLES = (
    "CREATE TABLE kinds (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    # id is the version that created the object: unique for ever, and known before the row is inserted
    """CREATE TABLE objects (
        id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
        object TEXT NOT NULL, UNIQUE (kind, namespace, name))""",
    """CREATE TABLE labels (
        kind INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, object INTEGER NOT NULL,
        PRIMARY KEY (kind, key, value, object)) WITHOUT ROWID""",
    # before: the labels before the write as JSON, NULL if they are the object's
    """CREATE TABLE events (
        version INTEGER PRIMARY KEY, kind INTEGER NOT NULL, type TEXT NOT NULL, object TEXT NOT NULL, before TEXT)""",
)


def connect(path: str, patience: float, *, reader: bool) -> sqlite3.Connection:
    """A connection in autocommit mode that waits `patience` seconds for locks. Raises sqlite3.Error.

    Text comes back as bytes: nearly all of it is JSON for a decoder that takes bytes.
    """
    connection = sqlite3.connect(
        path, timeout=patience, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    connection.text_factory = bytes
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA journal_size_limit = 16777216")
    if reader:
        connection.execute("PRAGMA query_only = ON")
    return connection


def prepare(path: str, patience: float) -> None:
    """Create the file (0600, its directory 0700) and its tables if they are not there.

    Raises UnavailableError: also for a file of another program or of a newer schema.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        _create_file(path)
        connection = connect(path, patience, reader=False)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(f"cannot open {path}: {error}") from error
    try:
        _prepare(connection, path, time.monotonic() + patience)
    except sqlite3.Error as error:
        raise UnavailableError(f"cannot open {path}: {error}") from error
    finally:
        connection.close()


def _create_file(path: str) -> None:
    """mknod and not open: closing a descriptor of the file would drop the locks that SQLite holds for this process."""
    try:
        os.mknod(path, stat.S_IFREG | 0o600)
    except FileExistsError:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UnavailableError(f"cannot open {path}: not a regular file") from None


def _prepare(connection: sqlite3.Connection, path: str, deadline: float) -> None:
    _check_owner(connection, path)
    retry_busy(connection, "PRAGMA journal_mode = WAL", deadline)
    retry_busy(connection, "BEGIN IMMEDIATE", deadline)
    try:
        if _check_owner(connection, path) == 0:
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _check_owner(connection: sqlite3.Connection, path: str) -> int:
    """The file's schema version, 0 for an empty file. Raises UnavailableError if it is not ours to use."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and application != APPLICATION_ID:
        raise UnavailableError(f"{path} is an SQLite file of another program")
    if version > SCHEMA_VERSION:
        raise UnavailableError(
            f"{path} has schema version {version}, this program knows versions up to {SCHEMA_VERSION}: "
            "it was written by a newer release, run that one"
        )
    return int(version)


def retry_busy(connection: sqlite3.Connection, statement: str, deadline: float) -> None:
    """Execute `statement` as soon as no other process holds the write lock. Raises sqlite3.OperationalError.

    The connection should have no busy timeout: SQLite's own handler backs off to 100 ms, fifty times what a commit
    takes here, and who waits that long between tries never gets a lock that others ask for all the time.
    """
    pause = 0.0004
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(uniform(pause / 4, pause))
        pause = min(pause * 1.02, 0.005)


def checkpoint(connection: sqlite3.Connection) -> int:
    """Move the write-ahead log's content into the file; how many pages stay in the log since somebody uses it.

    Not done by commits themselves: they would pay two more fsyncs while callers wait. Nobody waits for this one
    either, unless the log is long: then writers stand back for 0.1 s at most, so that it can start anew.
    Raises sqlite3.Error.
    """
    _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    if pages <= WAL_PAGES:
        return 0
    (patience,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 100")
    try:
        busy, pages, _ = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {patience}")
    return int(pages) if busy else 0


def execute_rows(
    connection: sqlite3.Connection, statement: str, rows: Sequence[Sequence[Any]], row: str = "", joint: str = ","
) -> list[Any]:
    """Execute `statement` for all `rows` of parameters; what it returns.

    `{rows}` in it stands for one `row` per row, with `joint` in between; `row` is a tuple of parameters by default.
    Each step of a statement gives the interpreter lock away, and under load getting it back takes longer than the
    step: so many rows go into one statement. Sizes are powers of two, so that few statements are ever compiled.
    """
    result: list[Any] = []
    start = 0
    while start < len(rows):
        size = min(32, 1 << ((len(rows) - start).bit_length() - 1))
        parameters = list(chain.from_iterable(rows[start : start + size]))
        text = _expand(statement, row or f"({','.join('?' * len(rows[0]))})", joint, size)
        result += connection.execute(text, parameters)
        start += size
    return result


@lru_cache(maxsize=256)
def _expand(statement: str, row: str, joint: str, size: int) -> str:
    return statement.format(rows=joint.join([row] * size))


def kind_ids(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, int]:
    """The numbers of these kinds, new ones being registered. Within a write transaction."""
    result: dict[str, int] = {}
    for name in names:
        row = connection.execute("SELECT id FROM kinds WHERE name = ?", (name,)).fetchone()
        if row is None:
            row = connection.execute("INSERT INTO kinds (name) VALUES (?) RETURNING id", (name,)).fetchone()
        result[name] = row[0]
    return result
