"""What `store.port` promises, tried on every adapter.

To add an adapter: write a class with the methods of `Adapter`, picklable, and add its name to the fixture. Nothing
else here knows which one it has.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

import pytest
from msgspec.structs import replace

from api.claim import Claim, ClaimSpec
from api.endpoint import Endpoint, EndpointCurrent, EndpointStatus
from api.meta import ObjectMeta, OwnerReference, Resource, now
from api.pool import Pool, PoolSpec, PoolStatus
from store.errors import AlreadyExistsError, ConflictError, ExpiredError, InvalidError, NotFoundError
from store.port import EVERYTHING, Event, Query, Store
from store.sqlite import SqliteSettings, SqliteStore

R = TypeVar("R", bound=Resource)
WAIT = 10.0
"""Seconds within which an event must come."""

SPAWN = multiprocessing.get_context("spawn")


class Adapter(Protocol):
    """One empty store, and how to open it, also from other processes."""

    async def open(self) -> Store:
        """A client of the store."""

    async def expire(self) -> None:
        """Make the store forget its past, so that watches from before now are too old."""


@dataclass(frozen=True)
class Sqlite:
    path: str

    async def open(self) -> Store:
        return await SqliteStore.open(self.path)

    async def expire(self) -> None:
        store = await SqliteStore.open(self.path, SqliteSettings(history=1))
        created = await store.create(claim(250_000))
        await store.delete(Claim, created.metadata.name)
        await store.close()


@pytest.fixture(params=["sqlite"])
def adapter(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Adapter:
    return {"sqlite": lambda: Sqlite(os.path.join(tmp_path, "store", "store.db"))}[request.param]()


def with_store(adapter: Adapter, test: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(adapter) as store:
            await test(store)

    asyncio.run(main())


@asynccontextmanager
async def opened(adapter: Adapter) -> AsyncGenerator[Store, None]:
    store = await adapter.open()
    try:
        yield store
    finally:
        await store.close()


def claim(number: int, **metadata: object) -> Claim:
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return Claim(
        metadata=ObjectMeta(**({"name": address} | metadata)),  # type: ignore[arg-type]
        spec=ClaimSpec(address=address, ip_version=4, pool="blue"),
    )


def pool(name: str = "blue", **metadata: object) -> Pool:
    return Pool(
        metadata=ObjectMeta(name=name, **metadata),  # type: ignore[arg-type]
        spec=PoolSpec(subnet="10.0.0.0/8", ip_version=4, ips=["10.0.0.1-10.0.0.9"]),
    )


def endpoint(name: str, namespace: str, **metadata: object) -> Endpoint:
    return Endpoint(metadata=ObjectMeta(name=name, namespace=namespace, **metadata))  # type: ignore[arg-type]


def edit(resource: R, **metadata: object) -> R:
    return replace(resource, metadata=replace(resource.metadata, **metadata))


def version(resource: Resource) -> int:
    return int(resource.metadata.resource_version)


async def take(events: AsyncGenerator[Event[R], None], count: int) -> list[Event[R]]:
    """The next `count` events that are no bookmarks."""
    got: list[Event[R]] = []
    async with asyncio.timeout(WAIT):
        while len(got) < count:
            event = await anext(events)
            if event.type != "BOOKMARK":
                got.append(event)
    return got


def told(events: list[Event[R]]) -> list[tuple[str, str]]:
    return [(event.type, event.object.metadata.name) for event in events if event.object is not None]


class TestCreate:
    def test_sets_what_is_the_stores_to_set(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            before = now()
            given = claim(1, labels={"app": "web"}, annotations={"a": "b"}, uid="mine", generation=7)
            made = await store.create(edit(given, deletion_timestamp=before, deletion_grace_period_seconds=3))
            metadata = made.metadata
            assert metadata.uid not in ("", "mine")
            assert metadata.resource_version
            assert metadata.generation == 1
            assert metadata.creation_timestamp is not None
            assert abs((metadata.creation_timestamp - before).total_seconds()) < 60
            assert metadata.deletion_timestamp is None
            assert metadata.deletion_grace_period_seconds is None
            assert (metadata.labels, metadata.annotations) == ({"app": "web"}, {"a": "b"})
            assert made.spec == given.spec
            assert await store.get(Claim, "10.0.0.1") == made

        with_store(adapter, test)

    def test_refuses_a_name_that_exists(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            with pytest.raises(AlreadyExistsError, match=r"10\.0\.0\.1"):
                await store.create(claim(1))
            assert await store.get(Claim, "10.0.0.1") == made

        with_store(adapter, test)

    def test_refuses_a_resource_version(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(InvalidError, match="resourceVersion"):
                await store.create(claim(1, resource_version="1"))

        with_store(adapter, test)

    def test_same_name_in_other_kinds_and_namespaces_is_another_object(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = [
                await store.create(pool("same")),
                await store.create(edit(claim(1), name="same")),
                await store.create(endpoint("same", "one")),
                await store.create(endpoint("same", "two")),
            ]
            assert len({each.metadata.uid for each in made}) == 4
            assert (await store.get(Endpoint, "same", "two")).metadata.uid == made[3].metadata.uid

        with_store(adapter, test)

    def test_versions_order_all_writes(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            first = await store.create(claim(1))
            second = await store.create(pool())
            third = await store.update(edit(first, labels={"a": "b"}))
            assert version(first) < version(second) < version(third)

        with_store(adapter, test)

    def test_name_can_be_used_again_after_delete_by_a_new_object(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            first = await store.create(claim(1))
            await store.delete(Claim, "10.0.0.1")
            second = await store.create(claim(1))
            assert second.metadata.uid != first.metadata.uid
            assert version(second) > version(first) + 1

        with_store(adapter, test)

    def test_concurrent_creates_have_one_winner_and_do_not_spoil_each_other(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            names = [number for number in range(40) for _ in range(3)]
            bad = claim(1, name="Bad_Name")
            results = await asyncio.gather(
                *(store.create(claim(number)) for number in names), store.create(bad), return_exceptions=True
            )
            assert isinstance(results.pop(), InvalidError)
            won = [each for each in results if isinstance(each, Claim)]
            assert sorted(each.metadata.name for each in won) == sorted(claim(n).metadata.name for n in range(40))
            assert all(isinstance(each, Claim | AlreadyExistsError) for each in results)
            listing = await store.list(Claim)
            assert {each.metadata.uid for each in listing.items} == {each.metadata.uid for each in won}
            assert len({version(each) for each in won}) == 40

        with_store(adapter, test)


class TestRead:
    def test_get_tells_what_is_missing(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(NotFoundError, match=r"SpiderIPClaim '10\.0\.0\.1'"):
                await store.get(Claim, "10.0.0.1")
            await store.create(endpoint("pod", "one"))
            with pytest.raises(NotFoundError, match="two/pod"):
                await store.get(Endpoint, "pod", "two")

        with_store(adapter, test)

    def test_list_of_nothing_can_be_watched_from(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            listing = await store.list(Claim)
            assert listing.items == []
            async with aclosing(store.watch(Claim, EVERYTHING, listing.resource_version)) as events:
                await store.create(claim(1))
                assert told(await take(events, 1)) == [("ADDED", "10.0.0.1")]

        with_store(adapter, test)

    def test_list_is_ordered_by_namespace_and_name(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            for name, namespace in (("b", "two"), ("a", "two"), ("c", "one"), ("a-b", "one"), ("a.b", "one")):
                await store.create(endpoint(name, namespace, labels={"app": "web"}))
            for query in (EVERYTHING, Query(labels={"app": "web"})):
                got = [(e.metadata.namespace, e.metadata.name) for e in (await store.list(Endpoint, query)).items]
                assert got == [("one", "a-b"), ("one", "a.b"), ("one", "c"), ("two", "a"), ("two", "b")]

        with_store(adapter, test)

    @pytest.mark.parametrize(
        ("query", "names"),
        [
            (Query(), ["a", "b", "a"]),
            (Query(namespace="one"), ["a", "b"]),
            (Query(namespace="none"), []),
            (Query(name="a"), ["a", "a"]),
            (Query(name="a", namespace="two"), ["a"]),
            (Query(labels={"app": "web"}), ["a", "a"]),
            (Query(labels={"app": "web", "tier": "front"}), ["a"]),
            (Query(labels={"tier": "front", "app": "web"}, namespace="two"), []),
            (Query(labels={"app": "web"}, name="b"), []),
            (Query(labels={"app": ""}), ["b"]),
            (Query(labels={"app": "none"}), []),
            (Query(labels={"none": "web"}), []),
        ],
    )
    def test_all_conditions_of_a_query_must_hold(self, adapter: Adapter, query: Query, names: list[str]) -> None:
        async def test(store: Store) -> None:
            await store.create(endpoint("a", "one", labels={"app": "web", "tier": "front"}))
            await store.create(endpoint("b", "one", labels={"app": ""}))
            await store.create(endpoint("a", "two", labels={"app": "web"}))
            await store.create(claim(1, labels={"app": "web"}))
            assert [each.metadata.name for each in (await store.list(Endpoint, query)).items] == names

        with_store(adapter, test)

    def test_list_by_labels_follows_updates_and_deletes(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            one, two = [await store.create(claim(number, labels={"app": "web"})) for number in (1, 2)]
            await store.update(edit(one, labels={"app": "db"}))
            await store.delete(Claim, two.metadata.name)
            assert (await store.list(Claim, Query(labels={"app": "web"}))).items == []
            assert [e.metadata.name for e in (await store.list(Claim, Query(labels={"app": "db"}))).items] == [
                "10.0.0.1"
            ]

        with_store(adapter, test)

    def test_list_is_a_snapshot_to_watch_from(self, adapter: Adapter) -> None:
        """What a list shows and what a watch from it tells together are every write, once."""

        async def test(store: Store) -> None:
            async def write() -> None:
                for number in range(60):
                    await store.create(claim(number))

            writing = asyncio.create_task(write())
            for _ in range(5):
                listing = await store.list(Claim)
                seen = {each.metadata.name for each in listing.items}
                async with aclosing(store.watch(Claim, EVERYTHING, listing.resource_version)) as events:
                    rest = {name for _, name in told(await take(events, 60 - len(seen)))}
                assert not seen & rest
                assert len(seen | rest) == 60
            await writing

        with_store(adapter, test)


class TestUpdate:
    def test_replaces_and_keeps_identity(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1, labels={"a": "b"}, annotations={"x": "y"}))
            wanted = replace(edit(made, labels={"c": "d"}, annotations={}), spec=replace(made.spec, node="n1"))
            got = await store.update(wanted)
            assert (got.metadata.labels, got.metadata.annotations, got.spec.node) == ({"c": "d"}, {}, "n1")
            assert (got.metadata.uid, got.metadata.creation_timestamp) == (
                made.metadata.uid,
                made.metadata.creation_timestamp,
            )
            assert version(got) > version(made)
            assert await store.get(Claim, "10.0.0.1") == got

        with_store(adapter, test)

    def test_generation_counts_changes_of_the_spec(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool())
            labelled = await store.update(edit(made, labels={"a": "b"}, generation=9))
            assert labelled.metadata.generation == 1
            told = await store.update_status(replace(labelled, status=PoolStatus(total_ip_count=9)))
            assert told.metadata.generation == 1
            changed = await store.update(replace(told, spec=replace(told.spec, gateway="10.0.0.254")))
            assert changed.metadata.generation == 2

        with_store(adapter, test)

    def test_without_version_and_uid_is_unconditional(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            await store.update(edit(made, labels={"a": "b"}))
            got = await store.update(claim(1, labels={"c": "d"}))
            assert got.metadata.labels == {"c": "d"}
            assert got.metadata.uid == made.metadata.uid

        with_store(adapter, test)

    def test_stale_version_is_a_conflict(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            newer = await store.update(edit(made, labels={"a": "b"}))
            with pytest.raises(ConflictError):
                await store.update(edit(made, labels={"c": "d"}))
            assert await store.get(Claim, "10.0.0.1") == newer

        with_store(adapter, test)

    def test_other_uid_is_a_conflict(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            await store.delete(Claim, "10.0.0.1")
            await store.create(claim(1))
            with pytest.raises(ConflictError):
                await store.update(edit(made, resource_version=""))

        with_store(adapter, test)

    def test_missing_object(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(NotFoundError):
                await store.update(claim(1))
            made = await store.create(claim(1))
            await store.delete(Claim, "10.0.0.1")
            with pytest.raises(NotFoundError):
                await store.update(made)

        with_store(adapter, test)

    def test_concurrent_updates_of_one_version_have_one_winner(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            results = await asyncio.gather(
                *(store.update(edit(made, labels={"n": str(n)})) for n in range(20)), return_exceptions=True
            )
            won = [each for each in results if isinstance(each, Claim)]
            assert len(won) == 1
            assert sum(isinstance(each, ConflictError) for each in results) == 19
            assert await store.get(Claim, "10.0.0.1") == won[0]

        with_store(adapter, test)

    def test_changing_nothing_keeps_the_version_and_sends_no_event(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool(labels={"a": "1", "b": "2"}))
            async with aclosing(store.watch(Pool, EVERYTHING, made.metadata.resource_version)) as events:
                assert await store.update(edit(made, labels={"b": "2", "a": "1"})) == made
                assert await store.update(pool(labels={"a": "1", "b": "2"})) == made
                assert await store.update_status(made) == made
                await store.create(pool("end"))
                assert told(await take(events, 1)) == [("ADDED", "end")]

        with_store(adapter, test)

    def test_timestamps_are_immutable(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            with pytest.raises(InvalidError, match=r"metadata\.deletionTimestamp"):
                await store.update(edit(made, deletion_timestamp=now()))

        with_store(adapter, test)


class TestStatus:
    def test_create_and_update_ignore_status(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(replace(pool(), status=PoolStatus(total_ip_count=1)))
            assert made.status is None or made.status == PoolStatus()
            told = await store.update_status(replace(made, status=PoolStatus(total_ip_count=9)))
            assert told.status == PoolStatus(total_ip_count=9)
            got = await store.update(
                replace(edit(told, labels={"a": "b"}), status=PoolStatus(total_ip_count=1, allocated_ip_count=1))
            )
            assert got.status == PoolStatus(total_ip_count=9)
            assert got.metadata.labels == {"a": "b"}

        with_store(adapter, test)

    def test_update_status_ignores_the_rest(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool(labels={"a": "b"}))
            other = replace(edit(made, labels={"c": "d"}, annotations={"x": "y"}, finalizers=["f.io/x"]))
            other = replace(
                other, spec=replace(made.spec, gateway="10.0.0.254"), status=PoolStatus(allocated_ip_count=2)
            )
            got = await store.update_status(other)
            assert got.status == PoolStatus(allocated_ip_count=2)
            assert got.spec == made.spec
            assert replace(got.metadata, resource_version="") == replace(made.metadata, resource_version="")
            assert version(got) > version(made)

        with_store(adapter, test)

    def test_update_status_raises_as_update(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(NotFoundError):
                await store.update_status(pool())
            made = await store.create(pool())
            await store.update(edit(made, labels={"a": "b"}))
            with pytest.raises(ConflictError):
                await store.update_status(replace(made, status=PoolStatus(total_ip_count=1)))
            with pytest.raises(ConflictError):
                await store.update_status(edit(made, uid="other", resource_version=""))

        with_store(adapter, test)

    def test_kind_without_subresource(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            current = EndpointCurrent(uid="u", node="n", ips=[])
            status = EndpointStatus(current=current, owner_controller_type="Pod", owner_controller_name="pod")
            made = await store.create(replace(endpoint("pod", "one"), status=status))
            assert made.status == status
            with pytest.raises(NotFoundError):
                await store.update_status(made)

        with_store(adapter, test)


class TestDelete:
    def test_removes(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            await store.create(claim(1))
            await store.delete(Claim, "10.0.0.1")
            with pytest.raises(NotFoundError):
                await store.get(Claim, "10.0.0.1")
            with pytest.raises(NotFoundError):
                await store.delete(Claim, "10.0.0.1")
            assert (await store.list(Claim)).items == []

        with_store(adapter, test)

    def test_preconditions(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            newer = await store.update(edit(made, labels={"a": "b"}))
            uid = made.metadata.uid
            for wrong in (
                {"uid": "other"},
                {"resource_version": made.metadata.resource_version},
                {"uid": uid, "resource_version": made.metadata.resource_version},
                {"uid": "other", "resource_version": newer.metadata.resource_version},
            ):
                with pytest.raises(ConflictError):
                    await store.delete(Claim, "10.0.0.1", **wrong)
            await store.delete(Claim, "10.0.0.1", uid=uid, resource_version=newer.metadata.resource_version)
            with pytest.raises(NotFoundError):
                await store.delete(Claim, "10.0.0.1", uid=uid)

        with_store(adapter, test)

    def test_finalizers_hold_the_object_until_the_last_is_removed(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool(finalizers=["f.io/one", "f.io/two"]))
            async with aclosing(store.watch(Pool, EVERYTHING, made.metadata.resource_version)) as events:
                await store.delete(Pool, "blue")
                dying = await store.get(Pool, "blue")
                assert dying.metadata.deletion_timestamp is not None
                assert version(dying) > version(made)
                await store.delete(Pool, "blue")  # once more changes nothing
                assert await store.get(Pool, "blue") == dying
                with pytest.raises(AlreadyExistsError):
                    await store.create(pool())
                half = await store.update(edit(dying, finalizers=["f.io/two"]))
                assert await store.get(Pool, "blue") == half
                last = await store.update(edit(half, finalizers=[]))
                assert last.metadata.finalizers == []
                with pytest.raises(NotFoundError):
                    await store.get(Pool, "blue")
                assert [event.type for event in await take(events, 3)] == ["MODIFIED", "MODIFIED", "DELETED"]
            assert (await store.create(pool())).metadata.uid != made.metadata.uid

        with_store(adapter, test)

    def test_preconditions_hold_for_objects_with_finalizers_too(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool(finalizers=["f.io/one"]))
            with pytest.raises(ConflictError):
                await store.delete(Pool, "blue", uid="other")
            assert await store.get(Pool, "blue") == made

        with_store(adapter, test)

    def test_removing_the_last_finalizer_of_a_living_object_keeps_it(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(pool(finalizers=["f.io/one"]))
            await store.update(edit(made, finalizers=[]))
            assert (await store.get(Pool, "blue")).metadata.finalizers == []

        with_store(adapter, test)

    def test_terminating_object_takes_no_new_finalizers(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            await store.create(pool(finalizers=["f.io/one"]))
            await store.delete(Pool, "blue")
            dying = await store.get(Pool, "blue")
            with pytest.raises(InvalidError, match=r"metadata\.finalizers"):
                await store.update(edit(dying, finalizers=["f.io/one", "f.io/two"]))
            kept = await store.update(edit(dying, labels={"a": "b"}, deletion_timestamp=None))
            assert kept.metadata.deletion_timestamp == dying.metadata.deletion_timestamp

        with_store(adapter, test)


class TestWatch:
    def test_order_and_versions(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            start = (await store.list(Claim)).resource_version
            async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
                made = await store.create(claim(1))
                await store.create(pool())  # another kind is not heard of
                newer = await store.update(edit(made, labels={"a": "b"}))
                await store.delete(Claim, "10.0.0.1")
                again = await store.create(claim(1))
                got = await take(events, 4)
            assert [event.type for event in got] == ["ADDED", "MODIFIED", "DELETED", "ADDED"]
            assert [got[0].object, got[1].object, got[3].object] == [made, newer, again]
            gone = got[2].object
            assert gone is not None
            assert (gone.metadata.uid, gone.metadata.labels) == (made.metadata.uid, {"a": "b"})
            versions = [int(event.resource_version) for event in got]
            assert versions == sorted(set(versions))
            assert all(event.object and version(event.object) == int(event.resource_version) for event in got)

        with_store(adapter, test)

    def test_resume_from_any_version(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = [await store.create(claim(number)) for number in range(10)]
            for index, last in enumerate(made[:-1]):
                async with aclosing(store.watch(Claim, EVERYTHING, last.metadata.resource_version)) as events:
                    got = await take(events, 9 - index)
                    assert [event.object for event in got] == made[index + 1 :]
            async with aclosing(store.watch(Claim, EVERYTHING, made[-1].metadata.resource_version)) as events:
                await store.delete(Claim, "10.0.0.0")
                assert told(await take(events, 1)) == [("DELETED", "10.0.0.0")]

        with_store(adapter, test)

    def test_labels_decide_what_a_change_is(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            query = Query(labels={"app": "web", "tier": "front"})
            start = (await store.list(Claim, query)).resource_version
            async with aclosing(store.watch(Claim, query, start)) as events:
                both = {"app": "web", "tier": "front"}
                await store.create(claim(9, labels={"app": "web"}))  # never matches
                one = await store.create(claim(1, labels={"app": "web"}))
                one = await store.update(edit(one, labels=both))
                one = await store.update(edit(one, annotations={"a": "b"}))
                one = await store.update(edit(one, labels={"app": "web"}))
                left = version(one)
                await store.update(edit(one, annotations={}))  # out of sight
                await store.delete(Claim, "10.0.0.1")
                two = await store.create(claim(2, labels=both))
                await store.delete(Claim, "10.0.0.2")
                got = await take(events, 5)
            assert told(got) == [
                ("ADDED", "10.0.0.1"),
                ("MODIFIED", "10.0.0.1"),
                ("DELETED", "10.0.0.1"),
                ("ADDED", "10.0.0.2"),
                ("DELETED", "10.0.0.2"),
            ]
            assert int(got[2].resource_version) == left
            assert int(got[4].resource_version) > version(two)

        with_store(adapter, test)

    def test_labels_decide_also_for_the_past(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            query = Query(labels={"app": "web"})
            start = (await store.list(Claim, query)).resource_version
            one = await store.create(claim(1, labels={"app": "db"}))
            one = await store.update(edit(one, labels={"app": "web"}))
            await store.update(edit(one, labels={}))
            async with aclosing(store.watch(Claim, query, start)) as events:
                assert told(await take(events, 2)) == [("ADDED", "10.0.0.1"), ("DELETED", "10.0.0.1")]

        with_store(adapter, test)

    def test_namespace_and_name(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            start = (await store.list(Endpoint)).resource_version
            by_namespace = store.watch(Endpoint, Query(namespace="one"), start)
            by_name = store.watch(Endpoint, Query(namespace="one", name="b"), start)
            async with aclosing(by_namespace), aclosing(by_name):
                for name, namespace in (("a", "one"), ("b", "two"), ("b", "one")):
                    await store.create(endpoint(name, namespace))
                assert told(await take(by_namespace, 2)) == [("ADDED", "a"), ("ADDED", "b")]
                (event,) = await take(by_name, 1)
                assert event.object is not None
                assert event.object.metadata.namespace == "one"

        with_store(adapter, test)

    def test_other_clients_hear_of_it(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            async with opened(adapter) as other:
                start = (await other.list(Claim)).resource_version
                async with aclosing(other.watch(Claim, EVERYTHING, start)) as events:
                    for number in range(5):
                        await store.create(claim(number))
                        assert told(await take(events, 1)) == [("ADDED", f"10.0.0.{number}")]

        with_store(adapter, test)

    def test_slow_consumer_misses_nothing(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            start = (await store.list(Claim)).resource_version
            async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
                await store.create(claim(0))
                await take(events, 1)
                for chunk in range(1, 4000, 500):
                    await asyncio.gather(*(store.create(claim(n)) for n in range(chunk, min(chunk + 500, 4000))))
                got = await take(events, 3999)
            names = [name for _, name in told(got)]
            assert set(names) == {claim(number).metadata.name for number in range(1, 4000)}
            assert len(names) == 3999
            assert [int(e.resource_version) for e in got] == sorted(int(e.resource_version) for e in got)

        with_store(adapter, test)

    def test_too_old(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            start = (await store.list(Claim)).resource_version
            await store.create(claim(1))
            await store.create(claim(2))
            await adapter.expire()
            with pytest.raises(ExpiredError):
                await take(store.watch(Claim, EVERYTHING, start), 3)
            listing = await store.list(Claim)
            assert len(listing.items) == 2
            async with aclosing(store.watch(Claim, EVERYTHING, listing.resource_version)) as events:
                await store.create(claim(3))
                assert told(await take(events, 1)) == [("ADDED", "10.0.0.3")]

        with_store(adapter, test)

    def test_close_ends_watches(self, adapter: Adapter) -> None:
        async def main() -> None:
            store = await adapter.open()
            start = (await store.list(Claim)).resource_version

            async def consume() -> int:
                return sum([1 async for event in store.watch(Claim, EVERYTHING, start) if event.type == "ADDED"])

            watches = [asyncio.create_task(consume()) for _ in range(3)]
            await store.create(claim(1))
            await asyncio.sleep(0)
            await store.close()
            async with asyncio.timeout(WAIT):
                await asyncio.gather(*watches)

        asyncio.run(main())


INVALID = [
    (claim(1, name=""), "metadata.name"),
    (claim(1, name="Upper"), "metadata.name"),
    (claim(1, name="under_score"), "metadata.name"),
    (claim(1, name="-dash"), "metadata.name"),
    (claim(1, name="dot..dot"), "metadata.name"),
    (claim(1, name="a/b"), "metadata.name"),
    (claim(1, name="line\n"), "metadata.name"),
    (claim(1, name="a" * 254), "metadata.name"),
    (claim(1, namespace="one"), "metadata.namespace"),
    (endpoint("pod", ""), "metadata.namespace"),
    (endpoint("pod", "dotted.name"), "metadata.namespace"),
    (endpoint("pod", "a" * 64), "metadata.namespace"),
    (claim(1, labels={"": "x"}), "metadata.labels"),
    (claim(1, labels={"-x": "x"}), "metadata.labels"),
    (claim(1, labels={"a/b/c": "x"}), "metadata.labels"),
    (claim(1, labels={"/b": "x"}), "metadata.labels"),
    (claim(1, labels={"Upper.io/b": "x"}), "metadata.labels"),
    (claim(1, labels={"a" * 64: "x"}), "metadata.labels"),
    (claim(1, labels={"app": "a" * 64}), "metadata.labels"),
    (claim(1, labels={"app": "a b"}), "metadata.labels"),
    (claim(1, labels={"app": "fd00::1"}), "metadata.labels"),
    (claim(1, labels={"app": "x-"}), "metadata.labels"),
    (claim(1, annotations={"a b": "x"}), "metadata.annotations"),
    (claim(1, annotations={"big": "x" * 262_144}), "metadata.annotations"),
    (claim(1, finalizers=["no/good/name"]), "metadata.finalizers"),
    (
        claim(1, owner_references=[OwnerReference(api_version="v1", kind="Pod", name="", uid="u")]),
        "metadata.ownerReferences[0].name",
    ),
    (
        claim(
            1,
            owner_references=[
                OwnerReference(api_version="v1", kind="Pod", name=name, uid=name, controller=True) for name in "ab"
            ],
        ),
        "metadata.ownerReferences",
    ),
]

VALID: list[Resource] = [
    claim(1, name="a"),
    claim(1, name="fd00-0000-0000-0000-0000-0000-0000-0001"),
    claim(1, name="a" * 253),
    claim(1, name="0-a.b.9"),
    endpoint("pod.one", "a" * 63),
    claim(1, labels={"a" * 63: "b" * 63, f"{'x' * 249}.io/A_b.c-9": "", "e": "A_b.c-9"}),
    claim(1, annotations={"Upper.io/key": "any text at all: ü\n", "big": "x" * 262_000}),
    claim(1, finalizers=["spiderpool.spidernet.io", "f.io/x"]),
]


class TestRules:
    @pytest.mark.parametrize(("resource", "path"), INVALID, ids=[f"{n}-{path}" for n, (_, path) in enumerate(INVALID)])
    def test_refused_with_the_field_path(self, adapter: Adapter, resource: Resource, path: str) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(InvalidError) as caught:
                await store.create(resource)
            assert path in str(caught.value)
            assert (await store.list(type(resource))).items == []

        with_store(adapter, test)

    @pytest.mark.parametrize("resource", VALID, ids=range(len(VALID)))
    def test_accepted_and_read_back(self, adapter: Adapter, resource: Resource) -> None:
        async def test(store: Store) -> None:
            made = await store.create(resource)
            got = await store.get(type(resource), made.metadata.name, made.metadata.namespace)
            assert got == made
            assert (got.metadata.labels, got.metadata.annotations, got.metadata.finalizers) == (
                resource.metadata.labels,
                resource.metadata.annotations,
                resource.metadata.finalizers,
            )

        with_store(adapter, test)

    def test_update_is_checked_like_create(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            made = await store.create(claim(1))
            with pytest.raises(InvalidError, match=r"metadata\.labels"):
                await store.update(edit(made, labels={"app": "a b"}))
            assert await store.get(Claim, "10.0.0.1") == made

        with_store(adapter, test)

    def test_every_problem_is_named(self, adapter: Adapter) -> None:
        async def test(store: Store) -> None:
            with pytest.raises(InvalidError) as caught:
                await store.create(claim(1, name="Bad", labels={"app": "a b"}, finalizers=["?"]))
            for path in ("metadata.name", "metadata.labels", "metadata.finalizers"):
                assert path in str(caught.value)

        with_store(adapter, test)


def run_child(target: Callable[..., Awaitable[None]], *arguments: object) -> None:
    asyncio.run(target(*arguments))  # type: ignore[arg-type]


async def race(adapter: Adapter, barrier: object, names: int, outcome: Connection) -> None:
    won: list[str] = []
    async with opened(adapter) as store:
        await asyncio.to_thread(barrier.wait, 30)  # type: ignore[attr-defined]

        async def attempt(number: int) -> None:
            with suppress(AlreadyExistsError):
                won.append((await store.create(claim(number))).metadata.uid)

        for start in range(0, names, 20):
            await asyncio.gather(*(attempt(number) for number in range(start, start + 20)))
    outcome.send(won)


async def write_for_ever(adapter: Adapter, first: int, acknowledged: Connection) -> None:
    """Create, relabel and delete; tells each acknowledged state of an object as (name, resourceVersion or None)."""
    async with opened(adapter) as store:

        async def one(number: int) -> None:
            made = await store.create(claim(number, labels={"state": "new"}))
            acknowledged.send((made.metadata.name, made.metadata.resource_version))
            made = await store.update(edit(made, labels={"state": "old"}))
            acknowledged.send((made.metadata.name, made.metadata.resource_version))
            if number % 3 == 0:
                await store.delete(Claim, made.metadata.name)
                acknowledged.send((made.metadata.name, None))

        while True:
            await asyncio.gather(*(one(first + number) for number in range(16)))
            first += 16


class TestProcesses:
    def test_exactly_one_winner_for_each_name(self, adapter: Adapter) -> None:
        processes, names = 4, 200
        asyncio.run(newest_version(adapter))
        barrier = SPAWN.Barrier(processes)
        pipes = [SPAWN.Pipe(duplex=False) for _ in range(processes)]
        with children([SPAWN.Process(target=run_child, args=(race, adapter, barrier, names, end)) for _, end in pipes]):
            won = [uid for end, _ in pipes for uid in receive(end)]

        async def test(store: Store) -> None:
            items = (await store.list(Claim)).items
            assert len(items) == len(won) == names
            assert {each.metadata.uid for each in items} == set(won)
            assert len({version(each) for each in items}) == names

        with_store(adapter, test)

    def test_first_use_by_several_processes_at_once(self, adapter: Adapter) -> None:
        processes = 3
        barrier = SPAWN.Barrier(processes)
        pipes = [SPAWN.Pipe(duplex=False) for _ in range(processes)]
        with children([SPAWN.Process(target=run_child, args=(race, adapter, barrier, 20, end)) for _, end in pipes]):
            won = [uid for end, _ in pipes for uid in receive(end)]
        assert len(set(won)) == len(won) == 20

    @pytest.mark.parametrize("after", [1, 40, 300])
    def test_killed_while_writing(self, adapter: Adapter, after: int) -> None:
        """Killed with -9: what was acknowledged is there, and the store is whole and usable."""
        start = asyncio.run(newest_version(adapter))
        heard: dict[str, list[str | None]] = {}
        end, child_end = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=run_child, args=(write_for_ever, adapter, 0, child_end))
        with children([process]):
            child_end.close()
            count = 0
            while True:
                try:
                    name, seen = receive(end)
                except EOFError:
                    break
                heard.setdefault(name, []).append(seen)
                count += 1
                if count == after and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
        assert count >= after

        async def test(store: Store) -> None:
            listing = await store.list(Claim)
            present = {each.metadata.name: each for each in listing.items}
            for name, versions in heard.items():
                if versions[-1] is None:
                    assert name not in present
                elif name in present:
                    assert version(present[name]) >= int(versions[-1])
                else:  # deleted, and killed before it could say so
                    assert len(versions) == 2
                    assert number_of(name) % 3 == 0
            await consistent(store, start)

        with_store(adapter, test)


async def consistent(store: Store, start: str) -> None:
    """The history, the objects and the label index tell the same."""
    listing = await store.list(Claim)
    objects = {each.metadata.name: each for each in listing.items}
    for state in ("new", "old"):
        by_label = {e.metadata.name for e in (await store.list(Claim, Query(labels={"state": state}))).items}
        assert by_label == {name for name, each in objects.items() if each.metadata.labels.get("state") == state}
    end = await store.create(claim(250_001))
    replayed: dict[str, Resource] = {}
    async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
        while True:
            (event,) = await take(events, 1)
            assert event.object is not None
            if event.resource_version == end.metadata.resource_version:
                break
            if event.type == "DELETED":
                del replayed[event.object.metadata.name]
            else:
                assert (event.type == "ADDED") == (event.object.metadata.name not in replayed)
                replayed[event.object.metadata.name] = event.object
    assert replayed == objects
    await store.delete(Claim, end.metadata.name)


async def newest_version(adapter: Adapter) -> str:
    async with opened(adapter) as store:
        return (await store.list(Claim)).resource_version


def number_of(name: str) -> int:
    """What `claim` was called with."""
    return int.from_bytes(IPv4Address(name).packed) & 0xFFFFFF


def receive(end: Connection) -> Any:
    assert end.poll(60), "the child does not answer"
    return end.recv()


@contextmanager
def children(processes: list[SpawnProcess]) -> Iterator[None]:
    """Run processes; none is left at the end."""
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
