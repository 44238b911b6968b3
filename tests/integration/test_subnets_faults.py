"""Two leaders, and a leader that dies between any two writes: no address is ever in two pools, and none is lost.

The parts of the room that write, on a store that can be stopped at every call. All that they remember is thrown away
with each crash, so whoever comes next has nothing but what is stored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from api.autopools import Application, Wish, application_labels
from api.claim import LABEL_POOL, Claim, ClaimSpec, claim_name, label_value
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec
from api.ranges import parse_address
from api.subnet import Subnet, SubnetSpec, is_automatic
from api.validate.pool import default_pool, pool_addresses
from api.validate.subnet import default_subnet, ledger_of
from controller.caches import Caches
from controller.room import Desk
from controller.subnets.book import Index, Locks
from controller.subnets.cutter import Cutter, LedgerError, RefusalError
from controller.subnets.keeper import Keeper
from store.errors import AlreadyExistsError, ConflictError, InvalidError
from store.port import EVERYTHING, Query
from store.recorder import Recorder
from store.sqlite import SqliteStore

NETWORK = "10.50.0.0/24"


class CrashError(Exception):
    """The process dies here."""


class RestlessError(Exception):
    """The pool does not become what is wanted."""


class Faulty:
    """A store that dies at its n-th write, before or after it is done, and checks what must hold after every write."""

    def __init__(self, store: SqliteStore, pause: Callable[[], Awaitable[None]] | None = None) -> None:
        self._store = store
        self._pause = pause
        self.dies_at = -1
        self.after = False
        self.writes = 0

    async def get(self, *arguments: Any) -> Any:
        await self._turn()
        return await self._store.get(*arguments)

    async def list(self, kind: Any, query: Query = EVERYTHING) -> Any:
        await self._turn()
        return await self._store.list(kind, query)

    def watch(self, *arguments: Any) -> Any:
        return self._store.watch(*arguments)

    async def create(self, resource: Any) -> Any:
        return await self._write(lambda: self._store.create(resource))

    async def update(self, resource: Any) -> Any:
        return await self._write(lambda: self._store.update(resource))

    async def update_status(self, resource: Any) -> Any:
        return await self._write(lambda: self._store.update_status(resource))

    async def delete(self, *arguments: Any, **preconditions: Any) -> Any:
        return await self._write(lambda: self._store.delete(*arguments, **preconditions))

    async def close(self) -> None:
        """Nothing of its own."""

    async def _turn(self) -> None:
        if self._pause is not None:
            await self._pause()

    async def _write(self, write: Callable[[], Awaitable[Any]]) -> Any:
        await self._turn()
        self.writes += 1
        if self.writes == self.dies_at and not self.after:
            raise CrashError
        result = await write()
        await safe(self._store)
        if self.writes == self.dies_at:
            raise CrashError
        return result


async def safe(store: SqliteStore) -> None:
    """What holds at every instant: pools are disjoint, and no automatic one has more than the ledger gives it."""
    pools = (await store.list(Pool)).items
    seen: dict[int, str] = {}
    for pool in pools:
        for low, high in pool_addresses(pool.spec).intervals:
            for number in range(low, high + 1):
                assert number not in seen, (number, pool.metadata.name, seen[number])
                seen[number] = pool.metadata.name
    for subnet in (await store.list(Subnet)).items:
        grants = ledger_of(subnet)
        for pool in pools:
            if is_automatic(pool):
                have = pool_addresses(pool.spec)
                assert not have or have <= grants[pool.metadata.name].ips, pool.metadata.name


class Leader:
    """One term of leading: caches that are read once, as a slow watch would have them, and nothing else remembered."""

    def __init__(self, store: Any) -> None:
        self.store = store
        caches = Caches(store)
        desk = Desk(store, caches, Recorder(store, "test"), "kube-system")
        locks, index = Locks(), Index()
        self.cutter, self.keeper = Cutter(desk, locks, index), Keeper(desk, locks, index)

    async def want(self, wish: Wish) -> None:
        """As the room does for one application, with its retries."""
        for _ in range(60):
            try:
                kin = (await self.store.list(Pool, Query(labels=application_labels(wish.application)))).items
                if await self.cutter.settle(wish, kin):
                    return
            except LedgerError:
                await self.keeper.keep(wish.subnet)
            except ConflictError:
                await asyncio.sleep(random.random() * 0.002)
        raise RestlessError(str(wish))


def wish(name: str, size: int, uid: str = "") -> Wish:
    application = Application("apps/v1", "Deployment", "default", name)
    return Wish(application, uid or f"u-{name}00000", 4, "eth0", "subnet", size, f"+{size}", reclaim=True)


@asynccontextmanager
async def world(path: Path, ips: str = "10.50.0.1-10.50.0.12") -> AsyncGenerator[SqliteStore, None]:
    store = await SqliteStore.open(str(path / "store" / "store.db"))
    spec = SubnetSpec(subnet=NETWORK, ips=[ips])
    await store.create(default_subnet(Subnet(metadata=ObjectMeta(name="subnet"), spec=spec)))
    await Leader(store).keeper.keep("subnet")
    try:
        yield store
    finally:
        await store.close()


async def sizes(store: SqliteStore) -> dict[str, int]:
    found = (await store.list(Pool)).items
    return {p.metadata.labels["ipam.spidernet.io/owner-application-name"]: pool_addresses(p.spec).count for p in found}


async def nothing_lost(store: SqliteStore) -> None:
    """The ledger is exactly what pools have."""
    subnet = await store.get(Subnet, "subnet")
    have = {p.metadata.name: pool_addresses(p.spec) for p in (await store.list(Pool)).items}
    assert {name: grant.ips for name, grant in ledger_of(subnet).items()} == {n: h for n, h in have.items() if h}
    assert subnet.status is not None
    assert subnet.status.allocated_ip_count == sum(each.count for each in have.values())


def lives(after: bool, at: int, steps: Callable[[Leader], Awaitable[None]], path: Path) -> bool:
    """Run the steps with a crash at the `at`-th write; then another leader does what is left. Whether it crashed."""

    async def scenario() -> bool:
        async with world(path) as store:
            await Leader(store).want(wish("old", 4))
            faulty = Faulty(store)
            faulty.dies_at, faulty.after = at, after
            crashed = False
            try:
                await steps(Leader(faulty))
            except CrashError:
                crashed = True
            successor = Leader(Faulty(store))
            await successor.want(wish("other", 3))  # whoever comes first may take what is free, and nothing else
            await steps(successor)
            for application in await successor.keeper.keep("subnet"):
                raise AssertionError(f"{application} is unfinished")
            await nothing_lost(store)
            return crashed

    return asyncio.run(scenario())


async def grow(leader: Leader) -> None:
    await leader.want(wish("old", 8))


async def create(leader: Leader) -> None:
    await leader.want(wish("new", 3))


async def shrink(leader: Leader) -> None:
    await leader.want(wish("old", 1))


async def shrink_after_growing(leader: Leader) -> None:
    await leader.want(wish("old", 7))
    await leader.want(wish("old", 2))
    await leader.want(wish("old", 5))


async def adopt_by_hand(leader: Leader) -> None:
    spec = PoolSpec(subnet=NETWORK, ips=["10.50.0.11-10.50.0.12"])
    with suppress(AlreadyExistsError):
        await leader.store.create(default_pool(Pool(metadata=ObjectMeta(name="hand"), spec=spec)))
    await leader.keeper.keep("subnet")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("steps", [grow, create, shrink, shrink_after_growing, adopt_by_hand])
def test_a_leader_dies_at_every_write_in_turn(
    tmp_path: Path, steps: Callable[[Leader], Awaitable[None]], after: bool
) -> None:
    at = 0
    crashed = True
    while crashed:
        at += 1
        crashed = lives(after, at, steps, tmp_path / str(at))
    assert at > 2, "nothing was tried"


@pytest.mark.parametrize("seed", range(12))
def test_two_leaders_never_give_one_address_twice(tmp_path: Path, seed: int) -> None:
    """Both see everything late and stop at any call; every write of either is checked."""
    chance = random.Random(seed)

    async def pause() -> None:
        for _ in range(chance.choice((0, 0, 1, 3, 20))):
            await asyncio.sleep(0)

    async def lead(store: SqliteStore, final: dict[str, int]) -> None:
        leader = Leader(Faulty(store, pause))
        for _ in range(6):
            name = chance.choice(sorted(final))
            with suppress(RestlessError):  # the other leader wants something else
                await leader.want(wish(name, chance.randint(0, 4)))

    async def scenario() -> None:
        final = {"a": 4, "b": 3, "c": 2}
        async with world(tmp_path) as store:
            await asyncio.gather(*(lead(store, final) for _ in range(2)))
            last = Leader(Faulty(store))
            for name, size in final.items():
                await last.want(wish(name, 0))
                await last.want(wish(name, size))
            assert await sizes(store) == final
            assert not await last.keeper.keep("subnet")
            await nothing_lost(store)

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 1])
def test_who_was_paused_before_the_pool_gets_its_addresses_is_too_late(tmp_path: Path, size: int) -> None:
    """The ledger has given, the pool has not got; meanwhile another leader takes back, and gives to somebody else."""

    async def scenario() -> None:
        async with world(tmp_path) as store:
            await Leader(store).want(wish("app", size))
            paused, go = asyncio.Event(), asyncio.Event()

            class Slow(Faulty):
                async def update(self, resource: Any) -> Any:
                    if not go.is_set() and pool_addresses(resource.spec).count == 9:
                        paused.set()
                        await go.wait()
                    return await super().update(resource)

            late = asyncio.create_task(Leader(Slow(store)).want(wish("app", 9)))
            await paused.wait()
            other = Leader(Faulty(store))
            await other.want(wish("app", size))
            await other.want(wish("greedy", 12 - size))
            go.set()
            with pytest.raises(RefusalError, match="insufficient subnet FreeIPs"):
                await late
            await nothing_lost(store)

    asyncio.run(scenario())


def test_a_claim_that_races_with_the_shrinking_keeps_its_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as store:
            await Leader(store).want(wish("app", 4))
            (pool,) = (await store.list(Pool)).items
            name = pool.metadata.name

            class Late(Faulty):
                """An agent claims after the controller has looked, before the pool is narrowed."""

                async def update(self, resource: Any) -> Any:
                    if isinstance(resource, Pool) and not self.writes > 100:
                        self.writes = 1000
                        await take(store, name, "10.50.0.1")
                    return await super().update(resource)

            leader = Leader(Late(store))
            kin = (await store.list(Pool)).items
            assert not await leader.cutter.settle(wish("app", 2), kin), "it is not all done"
            (pool,) = (await store.list(Pool)).items
            assert pool.spec.ips == ["10.50.0.3-10.50.0.4"]
            grant = ledger_of(await store.get(Subnet, "subnet"))[name]
            assert (grant.ips.to_ranges(), grant.releasing.to_ranges()) == (
                ["10.50.0.1", "10.50.0.3-10.50.0.4"],
                ["10.50.0.1"],
            )
            await leader.want(wish("greedy", 9))
            (greedy,) = (p for p in (await store.list(Pool)).items if p.metadata.name != name)
            assert greedy.spec.ips == ["10.50.0.2", "10.50.0.5-10.50.0.12"]
            await store.delete(Claim, "10.50.0.1")
            await leader.want(wish("app", 2))
            await nothing_lost(store)

    asyncio.run(scenario())


def test_a_pool_that_admission_does_not_let_shrink_keeps_what_is_claimed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as store:
            await Leader(store).want(wish("app", 4))
            (pool,) = (await store.list(Pool)).items

            class Admission(Faulty):
                """Claims come before the pool is narrowed, and the webhook sees them."""

                async def update(self, resource: Any) -> Any:
                    if isinstance(resource, Pool) and not self.writes > 100:
                        self.writes = 1000
                        await take(store, resource.metadata.name, "10.50.0.1")
                    if 0x0A320001 not in pool_addresses(resource.spec):
                        raise InvalidError("remove an IP address 10.50.0.1 that is being used")
                    return await super().update(resource)

            await Leader(Admission(store)).cutter.settle(wish("app", 2), [pool])
            (pool,) = (await store.list(Pool)).items
            assert pool.spec.ips == ["10.50.0.1", "10.50.0.4"]
            await nothing_lost(store)

    asyncio.run(scenario())


async def take(store: SqliteStore, pool: str, address: str) -> None:
    name = claim_name(parse_address(address, 4))
    labels = {LABEL_POOL: label_value(pool)}
    spec = ClaimSpec(address=address, ip_version=4, pool=pool)
    await store.create(Claim(metadata=ObjectMeta(name=name, labels=labels), spec=spec))


def test_a_pool_that_is_gone_gives_its_addresses_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as store:
            leader = Leader(Faulty(store))
            await leader.want(wish("app", 12))
            (pool,) = (await store.list(Pool)).items
            await store.update(_without_finalizers(pool))
            await store.delete(Pool, pool.metadata.name)
            await leader.keeper.keep("subnet")
            await leader.want(wish("next", 12))
            await nothing_lost(store)

    asyncio.run(scenario())


def _without_finalizers(pool: Pool) -> Pool:
    return replace(pool, metadata=replace(pool.metadata, finalizers=[]))
