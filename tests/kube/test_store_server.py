"""The store and a server that restarts, forgets, and has a lot."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import ClassVar

import pytest
from msgspec.structs import replace

from api.claim import Claim
from api.meta import Kind, Resource, Struct
from lab.kube.cluster import Cluster
from lab.kube.components import ETCD, SERVER
from store.errors import ExpiredError, InvalidError
from store.informer import Informer
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import EVERYTHING, Query, Store
from tests.integration.store_adapters import claim, edit, opened, take
from tests.kube.store_rig import Kube, empty, stalls


@pytest.fixture(name="server", scope="module")
def an_emptied_cluster(mortal: Cluster) -> Iterator[Cluster]:
    yield mortal
    empty(mortal)


class Follower:
    """An informer, and a way to wait for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = asyncio.Event()
        self.informer = Informer(store, Claim, on_change=lambda _old, _new: self._changed.set())

    async def agrees(self) -> None:
        """Wait until the informer has what the server has."""
        wanted = {each.metadata.name: each for each in (await self._store.list(Claim)).items}
        async with asyncio.timeout(20):
            while {each.metadata.name: each for each in self.informer.values()} != wanted:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def following(store: Store) -> AsyncGenerator[Follower, None]:
    follower = Follower(store)
    task = asyncio.create_task(follower.informer.run())
    try:
        await follower.informer.synced()
        yield follower
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class TestRestart:
    @pytest.mark.parametrize("component", [SERVER, ETCD])
    def test_informer_lives_through_it(self, server: Cluster, component: str) -> None:
        empty(server)

        async def main() -> None:
            async with opened(Kube(server.admin)) as store, following(store) as follower:
                made = [await store.create(claim(number)) for number in range(20)]
                await follower.agrees()
                await asyncio.to_thread(server.stop, component, signal.SIGKILL)
                reading = asyncio.create_task(store.get(Claim, made[0].metadata.name))
                await asyncio.sleep(1)
                await asyncio.to_thread(server.start, component)
                assert await reading == made[0]
                await store.update(edit(made[1], labels={"a": "b"}))
                await store.delete(Claim, made[2].metadata.name)
                await store.create(claim(21))
                await follower.agrees()

        asyncio.run(main())

    def test_watch_goes_on_if_nothing_happened(self, server: Cluster) -> None:
        """From the newest version even a server that has forgotten everything can go on."""
        empty(server)

        async def main() -> None:
            async with opened(Kube(server.admin)) as store:
                start = (await store.list(Claim)).resource_version
                made = await store.create(claim(1))
                async with aclosing(store.watch(Claim, EVERYTHING, start)) as events:
                    await take(events, 1)
                    await asyncio.to_thread(server.stop, SERVER, signal.SIGKILL)
                    await asyncio.to_thread(server.start, SERVER)
                    with suppress(ExpiredError):  # other kinds' writes may have moved the server's version on
                        changed = await store.update(edit(made, labels={"a": "b"}))
                        (event,) = await take(events, 1)
                        assert event.object == changed

        asyncio.run(main())


class TestMany:
    def test_pages_of_thousands_stall_nobody(self, server: Cluster) -> None:
        empty(server)
        count = 2000

        async def look(page: int) -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=server.admin, page=page))
            worst: list[float] = []
            for _ in range(5):
                async with stalls(time.thread_time) as seen:
                    listing = await store.list(Claim)
                worst.append(max(seen))
                assert len(listing.items) == count
                names = [each.metadata.name for each in listing.items]
                assert names == sorted(names)
            await store.close()
            # the least of several: now and then Python looks through all that is in memory for garbage
            assert min(worst) < 0.01, worst

        async def main() -> None:
            async with opened(Kube(server.admin)) as store:
                made: list[Claim] = []
                for start in range(0, count, 500):
                    made += await asyncio.gather(*(store.create(claim(start + n)) for n in range(500)))
                await look(500)
                await look(count)

                async def drop(each: Claim) -> None:
                    # By its UID: where an answer does not come in time, it is still known whether this one is gone.
                    await store.delete(Claim, each.metadata.name, uid=each.metadata.uid)

                await asyncio.gather(*(drop(each) for each in made[::2]))
                assert len((await store.list(Claim)).items) == count // 2

        asyncio.run(main())

    def test_pages_of_a_compacted_past(self, server: Cluster) -> None:
        """etcd forgets between two pages: the list is whole all the same."""
        empty(server)

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=server.admin, page=10))
            made = [await store.create(claim(number)) for number in range(100)]

            async def disturb() -> None:
                for number in range(5):
                    await store.create(claim(1000 + number, labels={"other": "1"}))
                    await asyncio.to_thread(server.compact)

            disturbing = asyncio.create_task(disturb())
            while not disturbing.done():
                listing = await store.list(Claim)
                assert [each for each in listing.items if not each.metadata.labels] == sorted(
                    made, key=lambda each: each.metadata.name
                )
            await disturbing
            await store.close()

        asyncio.run(main())


class StrictSpec(Struct, frozen=True, kw_only=True):
    network: str
    """Missing in most claims."""


class Strict(Resource, frozen=True, kw_only=True):
    """Claims as a later release may want them."""

    TYPE: ClassVar[Kind] = Claim.TYPE
    spec: StrictSpec


class TestUnreadable:
    def test_hides_nothing_else(self, server: Cluster, caplog: pytest.LogCaptureFixture) -> None:
        empty(server)

        async def main() -> None:
            async with opened(Kube(server.admin)) as store:
                start = (await store.list(Strict)).resource_version
                await store.create(claim(1))
                good = claim(2)
                await store.create(replace(good, spec=replace(good.spec, network="n")))
                listing = await store.list(Strict)
                assert [each.metadata.name for each in listing.items] == [good.metadata.name]
                with pytest.raises(
                    InvalidError, match=r"cannot be read, and may not be taken for absent: .*10\.0\.0\.1"
                ):
                    listing.whole()
                assert (await store.list(Claim)).whole()  # whose type can read both
                (event,) = await take(store.watch(Strict, Query(), start), 1)
                assert event.object is not None
                assert event.object.metadata.name == good.metadata.name
                with pytest.raises(InvalidError, match=r"spec"):
                    await store.get(Strict, claim(1).metadata.name)

        asyncio.run(main())
        assert "'10.0.0.1' is left out" in caplog.text
