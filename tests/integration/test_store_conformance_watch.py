"""What `store.port` promises of watches, tried on every adapter."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from api.claim import Claim
from api.endpoint import Endpoint
from store.errors import ExpiredError
from store.port import EVERYTHING, Query, Store
from tests.integration.store_adapters import (
    WAIT,
    Adapter,
    any_adapter,
    claim,
    edit,
    endpoint,
    on_store,
    opened,
    pool,
    take,
    told,
    version,
)

__all__ = ["any_adapter"]


class TestWatch:
    @on_store
    async def test_order_and_versions(self, store: Store) -> None:
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

    @on_store
    async def test_resume_from_any_version(self, store: Store) -> None:
        made = [await store.create(claim(number)) for number in range(10)]
        for index, last in enumerate(made[:-1]):
            async with aclosing(store.watch(Claim, EVERYTHING, last.metadata.resource_version)) as events:
                got = await take(events, 9 - index)
                assert [event.object for event in got] == made[index + 1 :]
        async with aclosing(store.watch(Claim, EVERYTHING, made[-1].metadata.resource_version)) as events:
            await store.delete(Claim, "10.0.0.0")
            assert told(await take(events, 1)) == [("DELETED", "10.0.0.0")]

    @on_store
    async def test_labels_decide_what_a_change_is(self, store: Store) -> None:
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

    @on_store
    async def test_labels_decide_also_for_the_past(self, store: Store) -> None:
        query = Query(labels={"app": "web"})
        start = (await store.list(Claim, query)).resource_version
        one = await store.create(claim(1, labels={"app": "db"}))
        one = await store.update(edit(one, labels={"app": "web"}))
        await store.update(edit(one, labels={}))
        async with aclosing(store.watch(Claim, query, start)) as events:
            assert told(await take(events, 2)) == [("ADDED", "10.0.0.1"), ("DELETED", "10.0.0.1")]

    @on_store
    async def test_namespace_and_name(self, store: Store) -> None:
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

    @on_store
    async def test_other_clients_hear_of_it(self, store: Store, adapter: Adapter) -> None:
        async with opened(adapter) as other:
            start = (await other.list(Claim)).resource_version
            async with aclosing(other.watch(Claim, EVERYTHING, start)) as events:
                for number in range(5):
                    await store.create(claim(number))
                    assert told(await take(events, 1)) == [("ADDED", f"10.0.0.{number}")]

    @on_store
    async def test_slow_consumer_misses_nothing(self, store: Store) -> None:
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

    @on_store
    async def test_too_old(self, store: Store, adapter: Adapter) -> None:
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
