"""The rooms of the house, built from their settings: which plugin is served under which name."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from agent.collector import Collector
from agent.daemon import Rooms
from agent.dataplane import Dataplane
from agent.host import Host
from agent.recheck import InUse, Recheck
from agent.repair import RepairLoop
from agent.settings import Settings
from agent.upstream.settings import UpstreamSettings
from daemon.health import Health
from plugins.cni import Plugin
from plugins.coordinator.coordinator import Coordinator
from plugins.coordinator.probe import Prober
from plugins.coordinator.source import ClusterSource
from plugins.ifacer.ifacer import Ifacer
from plugins.ipam.plugin import Ipam
from plugins.ipam.pods import NoPods, Pods
from plugins.ipam.provider import Provider
from plugins.vlan.vlan import Vlan
from store.open import open_store
from store.port import Store
from store.provider import ProviderClient
from store.recorder import Recorder


async def furnish(settings: Settings, stack: AsyncExitStack) -> Rooms:
    """Open the store and build every room on it. Raises StoreError, OSError."""
    store = await open_store(settings.store)
    stack.push_async_callback(store.close)
    prober = Prober(settings.probe)
    stack.push_async_callback(prober.close)
    node = settings.node.resolve()
    pods = Pods(store, node, settings.ipam) if settings.store.kind == "kubernetes" else NoPods()
    provider: Provider | None = None
    if settings.provider.server_url:
        client = ProviderClient(settings.provider)
        stack.push_async_callback(client.close)
        provider = Provider(store, settings.ipam, client)
    ipam = Ipam(store, node, settings.ipam, prober, pods=pods, provider=provider)
    source = ClusterSource(store, settings.coordinator, pods) if settings.store.kind == "kubernetes" else None
    coordinator = Coordinator(settings.coordinator, prober, source)
    stack.push_async_callback(coordinator.close)
    ifacer = Ifacer(settings.ifacer)
    stack.push_async_callback(ifacer.close)
    vlan = Vlan(
        ipam,
        has_provider=provider is not None,
        kernel_timeout=settings.coordinator.kernel_timeout,
        undo_deadline=settings.ipam.rollback_deadline,
    )
    plugins: dict[str, Plugin] = {"spiderpool": ipam, "coordinator": coordinator, "ifacer": ifacer, "vlan": vlan}
    background: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {"ipam": ipam.run, "ifacer": ifacer.run}
    if source is not None:
        background["coordinator"] = source.run
    if settings.coordinator.repair_interval:
        background["repair"] = RepairLoop(
            coordinator, settings.coordinator, ipam.held, lambda: ipam.ready(math.inf)
        ).run
    if settings.collector.enabled:
        background["collector"] = Collector(store, node, settings.collector).run
    if settings.recheck.enabled:
        background["recheck"] = Recheck(
            store=store,
            in_use=lambda: (InUse(claim, gateway) for claim, gateway in ipam.asked_about()),
            prober=prober,
            recorder=Recorder(store, "spiderpool-agent", node) if pods.knows_pods else None,
            settings=settings.recheck,
        ).run
    if settings.dataplane.enabled:
        background["dataplane"] = Dataplane(store, settings.dataplane).run
    doors: dict[str, Callable[[Host, Health], Coroutine[Any, Any, None]]] = {}
    if path := settings.upstream.path(settings.store.kind):
        doors["upstream"] = _upstream_door(path, settings.upstream, store)
    return Rooms(plugins=plugins, background=background, ready=ipam.ready, doors=doors)


def _upstream_door(
    path: str, settings: UpstreamSettings, store: Store
) -> Callable[[Host, Health], Coroutine[Any, Any, None]]:
    """Upstream's API; its HTTP library is loaded only where it is served."""
    from agent.upstream.api import UpstreamApi  # noqa: PLC0415
    from agent.upstream.door import UpstreamDoor  # noqa: PLC0415 (20 MB)

    def serve(host: Host, health: Health) -> Coroutine[Any, Any, None]:
        return UpstreamDoor(path, settings, UpstreamApi(settings, store, host, health)).run()

    return serve
