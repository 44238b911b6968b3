"""The rooms of the house, built from their settings: which plugin is served under which name."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from agent.collector import Collector
from agent.daemon import Rooms
from agent.dataplane import Dataplane
from agent.settings import Settings
from plugins.cni import Plugin
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.probe import Prober
from plugins.ipam.plugin import Ipam
from store.open import open_store


async def furnish(settings: Settings, stack: AsyncExitStack) -> Rooms:
    """Open the store and build every room on it. Raises StoreError, OSError."""
    store = await open_store(settings.store)
    stack.push_async_callback(store.close)
    prober = Prober(settings.probe)
    stack.push_async_callback(prober.close)
    node = settings.node.resolve()
    ipam = Ipam(store, node, settings.ipam, prober)
    coordinator = Coordinator(settings.coordinator, prober)
    stack.push_async_callback(coordinator.close)
    plugins: dict[str, Plugin] = {"spiderpool": ipam, "coordinator": coordinator}
    background: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {"ipam": ipam.run}
    if settings.collector.enabled:
        background["collector"] = Collector(store, node, settings.collector).run
    if settings.dataplane.enabled:
        background["dataplane"] = Dataplane(store, settings.dataplane).run
    return Rooms(plugins=plugins, background=background, ready=ipam.ready)
