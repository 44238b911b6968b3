"""The reconcilers' queue: what waits, what is worked on, what is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from controller.work import WorkQueue
from store.errors import UnavailableError


async def while_running(queue: WorkQueue[str], until: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(5):
            await until()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_key_is_worked_on_once_at_a_time_and_again_if_it_was_added_meanwhile() -> None:
    async def scenario() -> None:
        running, most, runs = 0, 0, 0
        entered, go, twice = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def reconcile(key: str) -> None:
            nonlocal running, most, runs
            assert key == "a"
            running += 1
            runs += 1
            most = max(most, running)
            entered.set()
            await go.wait()
            running -= 1
            if runs == 2:
                twice.set()

        queue = WorkQueue("test", reconcile, workers=3)
        for _ in range(5):
            queue.add("a")

        async def act() -> None:
            await entered.wait()
            for _ in range(5):
                queue.add("a")
            await asyncio.sleep(0.01)
            go.set()
            await twice.wait()
            await asyncio.sleep(0.01)

        await while_running(queue, act)
        assert (most, runs) == (1, 2)

    asyncio.run(scenario())


def test_a_key_that_takes_long_keeps_nobody_waiting_who_is_due_later() -> None:
    async def scenario() -> None:
        done = asyncio.Event()
        entered = asyncio.Event()

        async def reconcile(key: str) -> None:
            if key == "later":
                done.set()
                return
            entered.set()
            await asyncio.Event().wait()

        queue = WorkQueue("test", reconcile)
        queue.add("long")

        async def act() -> None:
            await entered.wait()
            queue.add("long")  # due at once, and worked on
            queue.add("later", 0.05)
            await done.wait()

        await while_running(queue, act)

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [UnavailableError("gone"), KeyError("a bug")])
def test_what_fails_is_tried_again_and_keeps_nobody_waiting(error: Exception) -> None:
    async def scenario() -> None:
        seen: list[str] = []
        done = asyncio.Event()

        async def reconcile(key: str) -> None:
            seen.append(key)
            if key == "bad" and seen.count("bad") < 3:
                raise error
            if seen.count("bad") == 3:
                done.set()

        queue = WorkQueue("test", reconcile, workers=1, backoff_first=0.02)
        queue.add("bad")
        queue.add("good")
        await while_running(queue, done.wait)
        assert seen[:2] == ["bad", "good"]

    asyncio.run(scenario())


def test_a_sooner_time_replaces_a_later_one_and_a_later_one_replaces_none() -> None:
    async def scenario() -> None:
        seen: list[str] = []
        done = asyncio.Event()

        async def reconcile(key: str) -> float | None:
            seen.append(key)
            if key == "soon" and seen.count("soon") == 1:
                return 0.01
            if seen.count("soon") == 2:
                done.set()
            return None

        queue = WorkQueue("test", reconcile, workers=1)
        queue.add("soon", 60)
        queue.add("soon")
        queue.add("soon", 60)
        queue.add("late", 60)
        await while_running(queue, done.wait)
        assert seen == ["soon", "soon"]
        assert queue.idle

    asyncio.run(scenario())


def test_a_key_that_is_worked_on_for_long_and_due_again_delays_no_other() -> None:
    async def scenario() -> None:
        entered, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def reconcile(key: str) -> None:
            if key == "slow":
                entered.set()
                await go.wait()
            else:
                done.set()

        queue = WorkQueue("test", reconcile, workers=2)
        queue.add("slow")

        async def act() -> None:
            await entered.wait()
            queue.add("slow")
            queue.add("other", 0.05)
            await done.wait()
            go.set()

        await while_running(queue, act)

    asyncio.run(scenario())
