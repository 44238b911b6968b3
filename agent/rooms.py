"""The rooms of the house, built from their settings: which plugin is served under which name."""

from __future__ import annotations

from contextlib import AsyncExitStack

from agent.daemon import Rooms
from agent.settings import Settings
from store.sqlite import SqliteStore


async def furnish(settings: Settings, stack: AsyncExitStack) -> Rooms:
    """Open the store and build every room on it. Raises StoreError, OSError."""
    store = await SqliteStore.open(settings.store.path)
    stack.push_async_callback(store.close)

    async def ready(_deadline: float) -> None:
        return

    return Rooms(plugins={}, background={}, ready=ready)
