"""Several processes on one store, and a process that dies: tried on every adapter."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest

from api.claim import Claim
from api.meta import Resource
from store.errors import AlreadyExistsError
from store.port import EVERYTHING, Query, Store
from tests.integration.store_adapters import (
    Adapter,
    any_adapter,
    claim,
    edit,
    opened,
    take,
    version,
)

__all__ = ["any_adapter"]


SPAWN = multiprocessing.get_context("spawn")


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

        async def check() -> None:
            async with opened(adapter) as store:
                items = (await store.list(Claim)).items
            assert len(items) == len(won) == names
            assert {each.metadata.uid for each in items} == set(won)
            assert len({version(each) for each in items}) == names

        asyncio.run(check())

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

        async def check() -> None:
            async with opened(adapter) as store:
                await quiet(store)
                present = {each.metadata.name: each for each in (await store.list(Claim)).items}
                for name, versions in heard.items():
                    if versions[-1] is None:
                        assert name not in present
                    elif name in present:
                        assert version(present[name]) >= int(versions[-1])
                    else:  # deleted, and killed before it could say so
                        assert len(versions) == 2
                        assert number_of(name) % 3 == 0
                await consistent(store, start)

        asyncio.run(check())


async def quiet(store: Store) -> None:
    """Wait until nothing changes any more: a server may still be at work on what a dead client asked for."""
    last = None
    for _ in range(60):
        if last == (last := (await store.list(Claim)).items):
            return
        await asyncio.sleep(0.5)
    raise AssertionError("it does not become quiet")


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
