"""Concurrent calls: kept apart by locks, run at once by `together`, done once for many by `Coalesced`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

Key = tuple[str, str, str]
"""Kind of identity ("container" before "pod"), the identity, the NIC."""


class KeyLocks:
    """One lock per key in use; a key that nobody holds or waits for takes no memory.

    Whoever needs several takes them in sorted order and container keys before pod keys, hence no deadlock.
    """

    def __init__(self) -> None:
        self._locks: dict[Key, tuple[asyncio.Lock, int]] = {}

    def busy(self, key: Key) -> bool:
        """Whether somebody holds the lock or waits for it."""
        return key in self._locks

    @asynccontextmanager
    async def hold(self, *keys: Key) -> AsyncIterator[None]:
        """Hold the locks of all `keys`."""
        async with AsyncExitStack() as stack:
            for key in sorted(set(keys)):
                await stack.enter_async_context(self._one(key))
            yield

    @asynccontextmanager
    async def _one(self, key: Key) -> AsyncIterator[None]:
        lock, users = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            users = self._locks[key][1] - 1
            if users:
                self._locks[key] = (lock, users)
            else:
                del self._locks[key]


def container_key(container_id: str, nic: str) -> Key:
    """The key of one NIC of one container."""
    return "container", container_id, nic


def pod_key(identity: str, nic: str) -> Key:
    """The key of one NIC of one identity, whichever container has it now."""
    return "pod", identity, nic


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, run at once; the first error cancels the others and leaves after they have ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    if not tasks:
        return []
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on to its end even if the caller is cancelled; the caller then is after it.

    For what must not be left half done, such as undoing: `work` has a deadline of its own.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _seen(task)
        raise cancelled
    return task.result()


class Coalesced:
    """Work whose effect is wanted by many at once, such as reading afresh.

    Every caller returns after a run that began after its call; at most one run is under way, and one more waits, which
    all later callers share.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Return after a run that began after this call. Raises what the work raises."""
        task = self._next
        if task is None:
            task = self._next = asyncio.create_task(self._run_after(self._running))
            task.add_done_callback(_seen)
        await asyncio.shield(task)

    async def _run_after(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        self._running, self._next = self._next, None
        await self._work()


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # every caller has it; if all were cancelled, nobody misses it
