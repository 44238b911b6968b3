"""Locks by key, so that what concerns one NIC of one pod happens one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

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
