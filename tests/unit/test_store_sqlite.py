"""What is particular to the SQLite store: the file, its locks, group commit, the cost of queries, watches' limits."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, closing, suppress
from textwrap import dedent

import pytest
from msgspec.structs import replace

from api.claim import Claim, ClaimSpec
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec
from store.errors import (
    ConflictError,
    ExpiredError,
    InvalidError,
    NotFoundError,
    UnavailableError,
    UncertainError,
)
from store.feed import QUEUE, transition
from store.inotify import IN_ATTRIB, IN_MOVED_TO, DirectoryWatch, event_names
from store.lane import Job, Lane
from store.port import EVERYTHING, Event, Query
from store.schema import SCHEMA_VERSION
from store.sqlite import NARROW, Read, SqliteSettings, SqliteStore

WAIT = 10.0


def claim(number: int, **metadata: object) -> Claim:
    name = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return Claim(
        metadata=ObjectMeta(name=name, **metadata),  # type: ignore[arg-type]
        spec=ClaimSpec(address=name, ip_version=4, pool="blue"),
    )


@asynccontextmanager
async def opened(path: str, **settings: float) -> AsyncGenerator[SqliteStore, None]:
    store = await SqliteStore.open(path, SqliteSettings(**settings))  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "run", "store.db")


class TestFile:
    def test_is_private(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                await store.create(claim(1))
                for suffix in ("", "-wal", "-shm"):
                    assert stat.S_IMODE(os.stat(path + suffix).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700

        old = os.umask(0)
        try:
            asyncio.run(main())
        finally:
            os.umask(old)

    def test_keeps_everything_when_closed(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                made = await store.create(claim(1, labels={"a": "b"}))
            async with opened(path) as store:
                assert (await store.list(Claim, Query(labels={"a": "b"}))).items == [made]
                again = await store.update(replace(made, spec=replace(made.spec, node="n")))
                assert int(again.metadata.resource_version) == int(made.metadata.resource_version) + 1

        asyncio.run(main())

    def test_of_a_newer_schema_is_refused(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                await store.create(claim(1))
            with closing(sqlite3.connect(path)) as connection:
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
            with pytest.raises(UnavailableError, match=f"schema version {SCHEMA_VERSION + 1}.*newer release"):
                await SqliteStore.open(path)

        asyncio.run(main())

    def test_of_another_program_is_refused_untouched(self, path: str) -> None:
        os.makedirs(os.path.dirname(path))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        with open(path, "rb") as file:
            before = file.read()
        with pytest.raises(UnavailableError, match="another program"):
            asyncio.run(SqliteStore.open(path))
        with open(path, "rb") as file:
            assert file.read() == before

    def test_that_is_no_database_is_refused(self, path: str) -> None:
        os.makedirs(os.path.dirname(path))
        with open(path, "w") as file:
            file.write("hello " * 1000)
        with pytest.raises(UnavailableError, match=r"store\.db"):
            asyncio.run(SqliteStore.open(path))

    def test_that_cannot_be_made_is_reported(self, tmp_path: os.PathLike[str]) -> None:
        with pytest.raises(UnavailableError, match=r"cannot open /proc/none/store\.db"):
            asyncio.run(SqliteStore.open("/proc/none/store.db"))
        os.mkfifo(os.path.join(tmp_path, "fifo"))
        with pytest.raises(UnavailableError, match="not a regular file"):
            asyncio.run(SqliteStore.open(os.path.join(tmp_path, "fifo")))

    def test_holds_objects_as_json(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                await store.create(claim(1))
                with closing(sqlite3.connect(path)) as connection:
                    (text,) = connection.execute("SELECT object FROM objects").fetchone()
                assert text.startswith(
                    '{"apiVersion":"spiderpool.spidernet.io/v2beta1","kind":"SpiderIPClaim","metadata":{"name":"10.0.0.1"'
                )

        asyncio.run(main())

    def test_write_ahead_log_stays_short(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also when writers and readers never pause, so that checkpoints have to make them wait."""
        monkeypatch.setattr("store.schema.WAL_PAGES", 200)

        async def main() -> int:
            async with opened(path, checkpoint=50) as store:
                for start in range(0, 4000, 50):
                    await asyncio.gather(*(store.create(claim(start + n)) for n in range(50)), store.list(Claim))
                return os.stat(path + "-wal").st_size

        assert asyncio.run(main()) < 3 << 20

    def test_a_checkpoint_that_finds_no_place_spoils_no_write(self, path: str) -> None:
        async def main() -> None:
            go = threading.Event()
            async with opened(path, checkpoint=1, queue=2) as store:
                for _ in range(2):
                    store._scans.submit(lambda _: go.wait())
                try:
                    await store.create(claim(1))
                finally:
                    go.set()

        asyncio.run(main())

    def test_a_reader_that_hangs_does_not_stop_writers(
        self, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("store.schema.WAL_PAGES", 50)

        async def main() -> None:
            async with opened(path, checkpoint=100, busy=WAIT) as store:
                await store.create(claim(0))
                with closing(sqlite3.connect(path, isolation_level=None)) as other:
                    other.execute("BEGIN")
                    other.execute("SELECT count(*) FROM objects").fetchone()
                    start = time.monotonic()
                    for first in range(1, 200, 50):
                        await asyncio.gather(*(store.create(claim(first + n)) for n in range(50)))
                    await store.list(Claim)  # queues behind the checkpoint
                    assert time.monotonic() - start < WAIT / 2
                    assert "still in use" in caplog.text
                    other.execute("ROLLBACK")
                for first in range(300, 600, 50):
                    await asyncio.gather(*(store.create(claim(first + n)) for n in range(50)))
                await store.list(Claim)
                connection = _connection_of(store._scans)
                assert connection.execute("PRAGMA busy_timeout").fetchone() == (WAIT * 1000,)
                _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                assert pages < 200

        asyncio.run(main())


class TestCommit:
    def test_concurrent_writes_share_transactions(self, path: str) -> None:
        async def main() -> None:
            statements: list[str] = []
            async with opened(path) as store:
                store._writer._connection.set_trace_callback(statements.append)
                await asyncio.gather(*(store.create(claim(n)) for n in range(100)))
                assert statements.count("COMMIT") <= 3
                statements.clear()
                made = await store.create(claim(200))
                assert await store.update(made) == made
                assert statements.count("COMMIT") == 1  # nothing to commit for what changes nothing

        asyncio.run(main())

    def test_commits_reach_the_disk(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                assert store._writer._connection.execute("PRAGMA synchronous").fetchone() == (2,)
                assert store._writer._connection.execute("PRAGMA journal_mode").fetchone() == (b"wal",)

        asyncio.run(main())

    def test_writes_of_one_object_in_one_transaction(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                old = await store.create(claim(1, labels={"a": "old"}))
                name = old.metadata.name
                _, _, refused, new, gone, last = await asyncio.gather(
                    store.update(claim(1, labels={"a": "changed"})),
                    store.delete(Claim, name),
                    store.delete(Claim, name),
                    store.create(claim(1, labels={"a": "new"})),
                    store.update(old),
                    store.update(claim(1, labels={"a": "last"})),
                    return_exceptions=True,
                )
                assert isinstance(refused, NotFoundError)
                assert isinstance(gone, ConflictError)
                assert isinstance(new, Claim)
                assert isinstance(last, Claim)
                assert last.metadata.uid == new.metadata.uid != old.metadata.uid
                assert (await store.list(Claim)).items == [last]
                for value, found in (("old", []), ("changed", []), ("new", []), ("last", [last])):
                    assert (await store.list(Claim, Query(labels={"a": value}))).items == found
                async with aclosing(store.watch(Claim, EVERYTHING, "0")) as events:
                    told = [(await anext(events)).type for _ in range(5)]
                assert told == ["ADDED", "MODIFIED", "DELETED", "ADDED", "MODIFIED"]
                created = [store.create(claim(2)), store.delete(Claim, claim(2).metadata.name)]
                await asyncio.gather(*created)
                assert (await store.list(Claim)).items == [last]

        asyncio.run(main())

    def test_no_statement_scans_a_table(self, path: str) -> None:
        """The cost of a read or write of some objects does not depend on how many others there are."""

        async def main() -> None:
            statements: set[str] = set()
            async with opened(path) as store:
                made = await asyncio.gather(*(store.create(claim(n, labels={"a": "b", "c": "d"})) for n in range(40)))
                for connection in (store._writer._connection, _connection_of(store._reads)):
                    connection.set_trace_callback(statements.add)
                await asyncio.gather(
                    *(store.update(replace(m, metadata=replace(m.metadata, labels={"e": "f"}))) for m in made)
                )
                await asyncio.gather(*(store.create(claim(100 + n, labels={"a": "b"})) for n in range(40)))
                await asyncio.gather(*(store.delete(Claim, m.metadata.name) for m in made))
                await store.get(Claim, "10.0.0.101")
                for query in (Query(name="10.0.0.101"), Query(labels={"a": "b"}), Query(labels={"a": "b", "c": "d"})):
                    await store.list(Claim, query)
                async with aclosing(store.watch(Claim, EVERYTHING, made[0].metadata.resource_version)) as events:
                    await anext(events)
            plans = 0
            with closing(sqlite3.connect(path)) as connection:
                for statement in statements:
                    if not statement.startswith(("SELECT", "WITH", "INSERT", "DELETE", "UPDATE")):
                        continue
                    for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {statement}"):
                        plans += 1
                        scanned = step.partition("SCAN ")[2].split(" ")[0]
                        assert scanned not in ("objects", "labels", "events", "o", "e", "l0", "l1"), statement
            assert plans > 20

        asyncio.run(main())

    def test_gives_up_when_another_process_keeps_the_lock(self, path: str) -> None:
        async def main() -> None:
            async with opened(path, busy=0.2) as store:
                made = await store.create(claim(1))
                with closing(sqlite3.connect(path, isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    start = time.monotonic()
                    with pytest.raises(UnavailableError, match="nothing was written"):
                        await store.create(claim(2))
                    assert 0.2 <= time.monotonic() - start < 5
                    assert await store.get(Claim, "10.0.0.1") == made  # readers are not held up
                    other.execute("ROLLBACK")
                await store.create(claim(2))

        asyncio.run(main())

    def test_cancelled_callers_leave_whole_writes(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                for delay in range(30):
                    writes = [asyncio.create_task(store.create(claim(delay * 8 + n))) for n in range(8)]
                    await asyncio.sleep(delay / 20_000)
                    for write in writes[::2]:
                        write.cancel()
                    results = await asyncio.gather(*writes, return_exceptions=True)
                    assert all(isinstance(each, Claim) for each in results[1::2])
                    for number, result in enumerate(results):
                        if isinstance(result, Claim):
                            assert await store.get(Claim, claim(delay * 8 + number).metadata.name) == result
            with closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                (events,) = connection.execute("SELECT count(*) FROM events").fetchone()
                assert connection.execute("SELECT count(*) FROM objects").fetchone() == (events,)

        asyncio.run(main())

    def test_a_failed_commit_is_uncertain(self, path: str) -> None:
        """The disk fills up: in a process of its own, whose files may not grow."""
        asyncio.run(_touch(path))
        program = f"""
            import asyncio, resource, signal
            from store.errors import UncertainError
            from tests.unit.test_store_sqlite import Claim, SqliteStore, claim
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            async def main():
                store = await SqliteStore.open({path!r})
                await store.create(claim(1))
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
                try:
                    big = [claim(n, annotations={{"a": "x" * 9000}}) for n in range(2, 9)]
                    await asyncio.gather(*(store.create(each) for each in big))
                except UncertainError as error:
                    print("uncertain:", error)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                await store.create(claim(9))
                print(*(each.metadata.name for each in (await store.list(Claim)).items))
                await store.close()
            asyncio.run(main())
        """
        command = [sys.executable, "-c", dedent(program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first.startswith("uncertain:")
        assert "commit failed" in first
        assert second == "10.0.0.1 10.0.0.9"

    def test_unreadable_types_are_refused_before_they_are_stored(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                bad = Pool(metadata=ObjectMeta(name="bad"), spec=PoolSpec(subnet=5))  # type: ignore[arg-type]
                good, refused = await asyncio.gather(store.create(claim(1)), store.create(bad), return_exceptions=True)
                assert isinstance(good, Claim)
                assert isinstance(refused, InvalidError)
                assert "spec.subnet" in str(refused)

        asyncio.run(main())

    def test_too_large_is_refused(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                huge = replace(claim(1), spec=replace(claim(1).spec, netns="x" * (1 << 21)))
                with pytest.raises(InvalidError, match="too long"):
                    await store.create(huge)

        asyncio.run(main())


class TestReads:
    def test_long_lists(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                count = NARROW + 20
                await asyncio.gather(*(store.create(claim(n, labels={"a": str(n % 2)})) for n in range(2 * count)))
                for query, size in ((EVERYTHING, 2 * count), (Query(labels={"a": "1"}), count)):
                    names = [each.metadata.name for each in (await store.list(Claim, query)).items]
                    assert len(names) == size
                    assert names == sorted(names)

        asyncio.run(main())

    def test_cluster_scoped_kind_by_namespace(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                with pytest.raises(InvalidError, match="cluster-scoped"):
                    await store.list(Claim, Query(namespace="one"))
                with pytest.raises(InvalidError, match="cluster-scoped"):
                    await anext(store.watch(Claim, Query(namespace="one"), "0"))
                with pytest.raises(NotFoundError):
                    await store.get(Claim, "a", "one")

        asyncio.run(main())

    def test_closed_store(self, path: str) -> None:
        async def main() -> None:
            store = await SqliteStore.open(path)
            await store.close()
            await store.close()
            with pytest.raises(UnavailableError):
                await store.get(Claim, "a")
            with pytest.raises(UnavailableError):
                await store.create(claim(1))
            with pytest.raises(UnavailableError):
                await anext(store.watch(Claim, EVERYTHING, "0"))

        asyncio.run(main())

    def test_close_finishes_what_was_asked(self, path: str) -> None:
        async def main() -> None:
            store = await SqliteStore.open(path)
            writes = [asyncio.create_task(store.create(claim(n))) for n in range(20)]
            await asyncio.sleep(0)
            await store.close()
            assert len(await asyncio.gather(*writes)) == 20

        asyncio.run(main())


class TestWatch:
    def test_log_is_bounded_and_too_old_is_said(self, path: str) -> None:
        async def main() -> None:
            async with opened(path, history=20) as store:
                made = [await store.create(claim(n)) for n in range(50)]
                with closing(sqlite3.connect(path)) as connection:
                    assert connection.execute("SELECT count(*) FROM events").fetchone() == (20,)
                with pytest.raises(ExpiredError, match="too old"):
                    await anext(store.watch(Claim, EVERYTHING, made[28].metadata.resource_version))
                async with aclosing(store.watch(Claim, EVERYTHING, made[29].metadata.resource_version)) as events:
                    assert (await anext(events)).object == made[30]
                with pytest.raises(ExpiredError, match="unknown"):
                    await anext(store.watch(Claim, EVERYTHING, "1000"))
                for wrong in ("", "x", "-1", "1.5"):
                    with pytest.raises(InvalidError):
                        await anext(store.watch(Claim, EVERYTHING, wrong))

        asyncio.run(main())

    def test_expires_later_for_a_consumer_that_stopped(self, path: str) -> None:
        async def main() -> None:
            async with opened(path, history=50) as store:
                first = await store.create(claim(0))
                async with aclosing(store.watch(Claim, EVERYTHING, first.metadata.resource_version)) as events:
                    await store.create(claim(1))
                    await anext(events)
                    for start in range(2, QUEUE + 200, 50):
                        await asyncio.gather(*(store.create(claim(start + n)) for n in range(50)))
                    with pytest.raises(ExpiredError):
                        await asyncio.wait_for(drain(events), WAIT)

        asyncio.run(main())

    def test_bookmarks_let_a_quiet_watch_keep_up(self, path: str) -> None:
        async def main() -> None:
            async with opened(path, tick=0.02, bookmark=0.02) as store:
                start = (await store.list(Pool)).resource_version
                async with aclosing(store.watch(Pool, EVERYTHING, start)) as events, asyncio.timeout(WAIT):
                    reading = asyncio.create_task(anext(events))
                    await asyncio.sleep(0.01)
                    made = await store.create(claim(1))
                    event = await reading
                    assert (event.type, event.object) == ("BOOKMARK", None)
                    assert event.resource_version == made.metadata.resource_version

        asyncio.run(main())

    def test_is_driven_by_events_between_processes(self, path: str) -> None:
        """With the fallback out of reach, what another process writes is still heard of soon."""

        async def main() -> None:
            async with opened(path, tick=1000, bookmark=1000) as store:
                start = (await store.list(Claim)).resource_version
                async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
                    program = (
                        "import asyncio\n"
                        "from tests.unit.test_store_sqlite import SqliteStore, claim\n"
                        "async def main():\n"
                        f"    store = await SqliteStore.open({path!r})\n"
                        "    for n in range(20):\n"
                        "        await store.create(claim(n))\n"
                        "    await store.close()\n"
                        "asyncio.run(main())\n"
                    )
                    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
                    async with asyncio.timeout(WAIT):
                        got = [await anext(events) for _ in range(20)]
                    assert await child.wait() == 0
                    assert [e.object.metadata.name for e in got if e.object] == [f"10.0.0.{n}" for n in range(20)]

        asyncio.run(main())

    def test_falls_back_to_looking_when_the_kernel_gives_no_notice(self, path: str) -> None:
        async def main() -> None:
            async with opened(path, tick=0.02) as store, opened(path) as other:
                start = (await store.list(Claim)).resource_version
                async with aclosing(store.watch(Claim, EVERYTHING, start)) as events, asyncio.timeout(WAIT):
                    await other.create(claim(1))
                    await anext(events)
                    assert store._feed._bell is not None
                    store._feed._bell.close()
                    await other.create(claim(2))
                    event = await anext(events)
                    assert event.object
                    assert event.object.metadata.name == "10.0.0.2"

        asyncio.run(main())

    def test_watches_that_start_amid_writes_hear_everything_once(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                start = (await store.list(Claim)).resource_version
                count = 600

                async def follow() -> list[int]:
                    async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
                        return [int((await anext(events)).resource_version) for _ in range(count)]

                following = []
                for number in range(0, count, 5):
                    following.append(asyncio.create_task(follow()))
                    await asyncio.gather(*(store.create(claim(number + n)) for n in range(5)))
                async with asyncio.timeout(WAIT):
                    for heard in await asyncio.gather(*following):
                        assert heard == list(range(1, count + 1))

        asyncio.run(main())

    def test_many_watches_with_labels_hear_only_of_theirs(self, path: str) -> None:
        async def main() -> None:
            async with opened(path) as store:
                start = (await store.list(Claim)).resource_version
                watches = [store.watch(Claim, Query(labels={"pool": f"p{n}"}), start) for n in range(30)]
                reading = [asyncio.create_task(anext(watch)) for watch in watches]
                await asyncio.sleep(0.05)
                await asyncio.gather(*(store.create(claim(n, labels={"pool": f"p{n}"})) for n in range(30)))
                async with asyncio.timeout(WAIT):
                    got = await asyncio.gather(*reading)
                assert [e.object.metadata.labels for e in got if e.object] == [{"pool": f"p{n}"} for n in range(30)]
                for watch in watches:
                    await watch.aclose()
                assert not store._feed._live
                assert not store._feed._slots

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("change", "was", "matches", "seen"),
        [
            ("ADDED", True, True, "ADDED"),
            ("ADDED", False, False, None),
            ("MODIFIED", True, True, "MODIFIED"),
            ("MODIFIED", False, True, "ADDED"),
            ("MODIFIED", True, False, "DELETED"),
            ("MODIFIED", False, False, None),
            ("DELETED", True, True, "DELETED"),
            ("DELETED", True, False, "DELETED"),
            ("DELETED", False, True, None),
            ("DELETED", False, False, None),
        ],
    )
    def test_transition(self, change: str, was: bool, matches: bool, seen: str | None) -> None:
        assert transition(change, was, matches) == seen  # type: ignore[arg-type]


class TestInotify:
    def test_reports_names(self, tmp_path: os.PathLike[str]) -> None:
        async def main() -> None:
            names: asyncio.Queue[str] = asyncio.Queue()
            watch = DirectoryWatch(str(tmp_path), IN_ATTRIB | IN_MOVED_TO, names.put_nowait)
            try:
                temporary = os.path.join(tmp_path, "a.tmp")
                os.mknod(temporary)
                os.rename(temporary, os.path.join(tmp_path, "ä" * 20))
                os.utime(os.path.join(tmp_path, "ä" * 20))
                async with asyncio.timeout(WAIT):
                    assert await names.get() == "ä" * 20
            finally:
                watch.close()
                watch.close()

        asyncio.run(main())

    def test_missing_directory(self, tmp_path: os.PathLike[str]) -> None:
        async def main() -> None:
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(FileNotFoundError, match="none"):
                DirectoryWatch(os.path.join(tmp_path, "none"), IN_ATTRIB, print)
            assert len(os.listdir("/proc/self/fd")) == before

        asyncio.run(main())

    def test_overflow_is_an_empty_name(self) -> None:
        header = (-1).to_bytes(4, sys.byteorder, signed=True) + (0x4000).to_bytes(4, sys.byteorder) + bytes(8)
        assert event_names(header) == [""]


class TestLane:
    def test_queue_is_bounded(self) -> None:
        async def main() -> None:
            gate = asyncio.Event()
            lane = stuck_lane(gate, limit=3)
            calls = [asyncio.create_task(lane.call(n)) for n in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="overloaded"):
                await lane.call(4)
            gate.set()
            assert await asyncio.gather(*calls) == [0, 1, 2]
            await lane.close(WAIT)

        asyncio.run(main())

    def test_deadline(self) -> None:
        """What has not been started was not done; what has been is uncertain."""

        async def main() -> None:
            gate = asyncio.Event()
            lane = stuck_lane(gate, limit=10, patience=0.05)
            started = asyncio.create_task(lane.call(1))
            async with asyncio.timeout(WAIT):
                while not lane.running:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                waiting = asyncio.create_task(lane.call(2))
                with pytest.raises(UncertainError):
                    await started
                with pytest.raises(UnavailableError):
                    await waiting
                gate.set()
                assert await lane.call(3) == 3
            assert lane.done == [1, 3]
            await lane.close(WAIT)

        asyncio.run(main())

    def test_cancelled_before_it_is_started_is_not_done(self) -> None:
        async def main() -> None:
            gate = asyncio.Event()
            lane = stuck_lane(gate, limit=10)
            first = asyncio.create_task(lane.call(1))
            async with asyncio.timeout(WAIT):
                while not lane.running:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                second, third = (asyncio.create_task(lane.call(n)) for n in (2, 3))
                await asyncio.sleep(0)
                second.cancel()
                gate.set()
                assert await first == 1
                assert await third == 3
                with suppress(asyncio.CancelledError):
                    await second
            assert lane.done == [1, 3]
            await lane.close(WAIT)

        asyncio.run(main())

    def test_bug_in_the_worker_reaches_the_callers_only(self) -> None:
        async def main() -> None:
            def run(jobs: list[Job[int]]) -> None:
                for job in jobs:
                    job.result = 10 // job.work

            lane = Lane("spt", run, batch=1, limit=10, patience=WAIT, finish=lambda: None)
            with pytest.raises(ZeroDivisionError):
                await lane.call(0)
            assert await lane.call(5) == 2
            await lane.close(WAIT)

        asyncio.run(main())


class StuckLane(Lane[int]):
    running = False
    done: list[int]


def stuck_lane(gate: asyncio.Event, *, limit: int, patience: float = WAIT) -> StuckLane:
    """A lane whose thread does nothing until the gate is open."""

    def run(jobs: list[Job[int]]) -> None:
        lane.running = True
        give_up = time.monotonic() + WAIT
        while not gate.is_set() and time.monotonic() < give_up:
            time.sleep(0.001)
        for job in jobs:
            lane.done.append(job.work)
            job.result = job.work

    lane = StuckLane("spt", run, batch=1, limit=limit, patience=patience, late=UncertainError, finish=lambda: None)
    lane.done = []
    return lane


def _connection_of(lane: Lane[Read]) -> sqlite3.Connection:
    connection: sqlite3.Connection = lane._finish.__self__  # type: ignore[attr-defined]
    return connection


async def drain(events: AsyncGenerator[Event[Claim], None]) -> None:
    async for _ in events:
        pass


async def _touch(path: str) -> None:
    async with opened(path):
        pass
