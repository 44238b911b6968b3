"""The informer on a real store, with a gate in between that can hold events back and break the connection."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
from msgspec.structs import replace

from api.claim import Claim, ClaimSpec
from api.meta import ObjectMeta, R
from store.errors import ExpiredError, ForbiddenError, UnavailableError
from store.informer import Informer
from store.port import EVERYTHING, Event, Listing, Query
from store.sqlite import SqliteSettings, SqliteStore

WAIT = 10.0
WEB = Query(labels={"app": "web"})


class Gated(SqliteStore):
    """A store whose watches can be held up, and that can be made to fail."""

    def hold(self) -> None:
        self.gate.clear()

    def release(self) -> None:
        self.gate.set()

    def __init__(self, path: str, settings: SqliteSettings) -> None:
        super().__init__(path, settings)
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: list[Exception] = []
        self.lists = 0

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        self.lists += 1
        if self.broken:
            raise self.broken.pop()
        return await super().list(kind, query)

    async def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        await self.gate.wait()
        if self.broken:
            raise self.broken.pop()
        async with aclosing(super().watch(kind, query, since)) as events:
            async for event in events:
                await self.gate.wait()
                if self.broken:
                    raise self.broken.pop()
                yield event


class Changes:
    """What an informer told, and the state that follows from it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.state: dict[str, Claim] = {}
        self.news = asyncio.Event()

    def __call__(self, old: Claim | None, new: Claim | None) -> None:
        name = (new or old).metadata.name  # type: ignore[union-attr]
        assert self.state.get(name) == old, "told a change of something else than it told before"
        assert old != new
        if new is None:
            del self.state[name]
            self.told.append(("gone", name))
        else:
            self.state[name] = new
            self.told.append(("new" if old is None else "changed", name))
        self.news.set()

    async def until(self, count: int) -> list[tuple[str, str]]:
        async with asyncio.timeout(WAIT):
            while len(self.told) < count:
                self.news.clear()
                await self.news.wait()
        told, self.told = self.told, []
        return told


def claim(name: str, app: str = "web", **metadata: object) -> Claim:
    return Claim(
        metadata=ObjectMeta(name=name, labels={"app": app}, **metadata),  # type: ignore[arg-type]
        spec=ClaimSpec(address="10.0.0.1", ip_version=4, pool="blue"),
    )


def label(resource: Claim, app: str) -> Claim:
    return replace(resource, metadata=replace(resource.metadata, labels={"app": app}))


@asynccontextmanager
async def running(informer: Informer[Claim]) -> AsyncGenerator[None, None]:
    task = asyncio.create_task(informer.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


Test = Callable[[Gated, Informer[Claim], Changes], Awaitable[None]]


def informed(tmp_path: os.PathLike[str], test: Test, *, history: int = 1000, query: Query = WEB) -> None:
    async def main() -> None:
        store = await Gated.open(os.path.join(tmp_path, "store.db"), SqliteSettings(history=history))
        changes = Changes()
        informer = Informer(store, Claim, query, changes)
        try:
            async with asyncio.timeout(3 * WAIT):
                await test(store, informer, changes)
            assert {each.metadata.name: each for each in informer.values()} == changes.state
        finally:
            await store.close()

    asyncio.run(main())


def test_lists_then_follows(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        one = await store.create(claim("one"))
        await store.create(claim("other", app="db"))
        synced = [informer.is_synced]
        async with running(informer):
            await informer.synced()
            synced.append(informer.is_synced)
            assert synced == [False, True]
            assert list(informer.values()) == [one]
            assert informer.get("one") == one
            assert informer.get("other") is None
            two = await store.create(claim("two"))
            one = await store.update(replace(one, spec=replace(one.spec, node="n")))
            await store.update(label(two, "db"))
            await store.delete(Claim, "one")
            assert await changes.until(5) == [
                ("new", "one"),
                ("new", "two"),
                ("changed", "one"),
                ("gone", "two"),
                ("gone", "one"),
            ]

    informed(tmp_path, test)


def test_synced_waits_for_the_first_list(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        store.broken = [UnavailableError("down"), UnavailableError("down")]
        async with running(informer):
            waiting = asyncio.create_task(informer.synced())
            await asyncio.sleep(0)
            assert not waiting.done()
            await waiting
            assert store.lists == 3

    informed(tmp_path, test)


@pytest.mark.parametrize("error", [UnavailableError, ExpiredError])
def test_survives_a_broken_watch_and_tells_the_difference(tmp_path: os.PathLike[str], error: type[Exception]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        made = {name: await store.create(claim(name)) for name in ("stays", "goes", "changes", "is-replaced")}
        async with running(informer):
            await changes.until(4)
            store.hold()
            await store.delete(Claim, "goes")
            await store.update(replace(made["changes"], spec=replace(made["changes"].spec, node="n")))
            await store.delete(Claim, "is-replaced")
            again = await store.create(claim("is-replaced"))
            await store.create(claim("comes"))
            store.broken = [UnavailableError("still down"), error("broken")]
            store.release()
            assert sorted(await changes.until(4)) == [
                ("changed", "changes"),
                ("changed", "is-replaced"),
                ("gone", "goes"),
                ("new", "comes"),
            ]
            assert informer.get("is-replaced") == again
            await store.create(claim("later"))
            assert await changes.until(1) == [("new", "later")]

    informed(tmp_path, test)


def test_begins_while_the_store_does_not_know_its_rights_yet(tmp_path: os.PathLike[str]) -> None:
    """A pool's view is opened by an ADD: its informer must not end the agent."""

    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        store.broken = [ForbiddenError("roles are not read yet") for _ in range(2)]
        await store.create(claim("there"))
        async with running(informer):
            assert await changes.until(1) == [("new", "there")]

    informed(tmp_path, test)


def test_lists_again_when_the_log_has_forgotten_its_place(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        await store.create(claim("goes"))
        async with running(informer):
            await changes.until(1)
            store.hold()
            store.broken = [UnavailableError("broken")]
            await store.delete(Claim, "goes")
            store.release()
            await changes.until(1)
            store.hold()
            for number in range(40):
                await store.create(claim(f"c{number}", app="db"))
            await store.create(claim("comes"))
            store.release()
            assert await changes.until(1) == [("new", "comes")]
            await store.create(claim("later"))
            assert await changes.until(1) == [("new", "later")]

    informed(tmp_path, test, history=10)


def test_own_writes_are_seen_at_once_and_told_once(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        async with running(informer):
            await informer.synced()
            store.hold()
            one = await store.create(claim("one"))
            informer.learn(one)
            assert informer.get("one") == one
            newer = await store.update(replace(one, spec=replace(one.spec, node="n")))
            informer.learn(newer)
            informer.learn(one)  # late
            assert informer.get("one") == newer
            assert changes.told == [("new", "one"), ("changed", "one")]
            store.release()
            await store.create(claim("end"))
            assert await changes.until(3) == [("new", "one"), ("changed", "one"), ("new", "end")]
            assert informer.get("one") == newer

    informed(tmp_path, test)


def test_late_events_do_not_undo_forget(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        async with running(informer):
            await informer.synced()
            store.hold()
            one = await store.create(claim("one"))
            informer.learn(one)
            # by somebody else, after what we know and before our delete
            await store.update(replace(one, spec=replace(one.spec, node="n")))
            await store.delete(Claim, "one", uid=one.metadata.uid)
            informer.forget(one)
            assert informer.get("one") is None
            informer.learn(one)
            assert informer.get("one") is None
            store.release()
            await store.create(claim("end"))
            assert await changes.until(3) == [("new", "one"), ("gone", "one"), ("new", "end")]
            again = await store.create(claim("one"))
            assert await changes.until(1) == [("new", "one")]
            assert informer.get("one") == again

    informed(tmp_path, test)


def test_late_delete_does_not_undo_a_successor(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        async with running(informer):
            await informer.synced()
            one = await store.create(claim("one"))
            await changes.until(1)
            store.hold()
            await store.delete(Claim, "one")
            informer.forget(one)
            again = await store.create(claim("one"))
            informer.learn(again)
            store.release()
            await store.create(claim("end"))
            assert await changes.until(3) == [("gone", "one"), ("new", "one"), ("new", "end")]
            assert informer.get("one") == again

    informed(tmp_path, test)


def test_what_the_watch_saw_go_is_not_learned_afterwards(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        async with running(informer):
            await informer.synced()
            one = await store.create(claim("one"))
            await store.delete(Claim, "one")
            await changes.until(2)
            informer.learn(one)
            informer.forget(one)
            assert informer.get("one") is None
            assert changes.told == []
            again = await store.create(claim("one"))
            await changes.until(1)
            assert informer.get("one") == again

    informed(tmp_path, test)


def test_a_list_from_before_an_own_write_does_not_undo_it(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        old = await store.create(claim("old"))
        before = await store.list(Claim, WEB)
        new = await store.create(claim("new"))
        await store.delete(Claim, "old")
        informer.learn(new)
        informer.learn(old)
        informer.forget(old)
        informer._apply_list(before)
        assert [each.metadata.name for each in informer.values()] == ["new"]
        async with running(informer):
            await store.create(claim("end"))
            assert await changes.until(4) == [("new", "new"), ("new", "old"), ("gone", "old"), ("new", "end")]
        assert not informer._forgotten

    informed(tmp_path, test)


def test_learn_keeps_to_the_query(tmp_path: os.PathLike[str]) -> None:
    async def test(store: Gated, informer: Informer[Claim], changes: Changes) -> None:
        async with running(informer):
            await informer.synced()
            store.hold()
            other = await store.create(claim("other", app="db"))
            informer.learn(other)
            informer.forget(other)
            one = await store.create(claim("one"))
            informer.learn(one)
            informer.learn(await store.update(label(one, "db")))
            assert list(informer.values()) == []
            store.release()
            await store.create(claim("end"))
            assert await changes.until(3) == [("new", "one"), ("gone", "one"), ("new", "end")]
            assert not informer._forgotten
            assert not informer._left

    informed(tmp_path, test)


def test_ends_with_what_on_change_raises(tmp_path: os.PathLike[str]) -> None:
    async def main() -> None:
        store = await SqliteStore.open(os.path.join(tmp_path, "store.db"))

        def fail(old: Claim | None, new: Claim | None) -> None:
            raise KeyError("bug")

        await store.create(claim("one"))
        with pytest.raises(KeyError):
            await asyncio.wait_for(Informer(store, Claim, EVERYTHING, fail).run(), WAIT)
        await store.close()

    asyncio.run(main())


def test_cost_of_an_event_does_not_grow_with_the_cache(tmp_path: os.PathLike[str]) -> None:
    def item(number: int, version: int) -> Claim:
        return claim(f"c{number}", uid=f"u{number}", resource_version=str(version))

    def cost(size: int) -> float:
        """Seconds for a thousand events, the best of several tries."""
        informer: Informer[Claim] = Informer(None, Claim)  # type: ignore[arg-type]
        informer._apply_list(Listing([item(number, 1) for number in range(size)], "1"))
        best = float("inf")
        for attempt in range(5):
            first = 2 + attempt * 1000
            events = [Event("MODIFIED", item(n % size, first + n), str(first + n)) for n in range(1000)]
            start = time.perf_counter()
            for event in events:
                informer._apply(event)
            best = min(best, time.perf_counter() - start)
        return best

    assert cost(20_000) < 5 * cost(100)
