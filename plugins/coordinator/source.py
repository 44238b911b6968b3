"""Where a call's settings come from before its own configuration: the cluster's SpiderCoordinator and the pod.

Upstream's plugin asks its agent at every call, and the agent the API server's cache; ours is in the agent and looks
into the caches itself. Only a pod that its cache does not know is read from the API server.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Protocol

from api.annotations import AnnotationError, networks
from api.coordinator import Coordinator as ClusterCoordinator
from api.coordinator import CoordinatorUnusableError, in_force, plugin_mode
from api.core import Pod
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import TryAgainLaterError
from store.informer import Informer
from store.port import Store

DEFAULT_ROUTE_NIC = "ipam.spidernet.io/default-route-nic"
"""A pod's annotation: the NIC of its default route. It goes before the SpiderCoordinator, not before the netconf."""
_SYNC_DEADLINE = 5.0
"""Seconds for the first list of SpiderCoordinators, of which there is one, when the agent has just started."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a pod says about its NICs."""

    default_route_nic: str = ""
    networks: frozenset[str] = frozenset()
    """Names of the further NICs that it is to get, as far as its annotations tell."""


class Source(Protocol):
    """What there is beside the configuration of a call."""

    async def settings(self) -> CoordinatorSettings:
        """The settings to fill a configuration up from. Raises TryAgainLaterError if there are none to go by now."""

    async def wishes(self, namespace: str, name: str, uid: str) -> Wishes:
        """What the pod that CNI_ARGS name wants. Raises CniError, StoreError."""


class PodReader(Protocol):
    """Where pods are known from."""

    async def pod(self, namespace: str, name: str, uid: str) -> Pod | None:
        """The very pod; None if none is named."""


class NodeSource:
    """A machine without Kubernetes: the agent's settings, and pods that say nothing."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings

    async def settings(self) -> CoordinatorSettings:
        """The agent's."""
        return self._settings

    async def wishes(self, namespace: str, name: str, uid: str) -> Wishes:  # noqa: ARG002
        """None."""
        return Wishes()


class ClusterSource:
    """A node of a cluster. `run` must be running."""

    def __init__(self, store: Store, settings: CoordinatorSettings, pods: PodReader) -> None:
        self._settings = settings
        self._pods = pods
        self._known: dict[str, ClusterCoordinator] = {}
        self._informer = Informer(store, ClusterCoordinator, on_change=self._changed)

    async def run(self) -> None:
        """Keep the cache until cancelled."""
        await self._informer.run()

    async def settings(self) -> CoordinatorSettings:
        """The SpiderCoordinator's, over the agent's. Raises TryAgainLaterError with upstream's text while it is not
        there or not synced."""
        if not self._informer.is_synced:
            try:
                async with asyncio.timeout(_SYNC_DEADLINE):
                    await self._informer.synced()
            except TimeoutError:
                raise TryAgainLaterError(
                    "coordinator config not found", "the SpiderCoordinators could not be read yet"
                ) from None
        try:
            return over(in_force(self._known.values()), self._settings)
        except CoordinatorUnusableError as error:
            raise TryAgainLaterError(
                str(error), "pods are attached by a SpiderCoordinator whose phase is Synced"
            ) from None

    async def wishes(self, namespace: str, name: str, uid: str) -> Wishes:
        """What the pod's annotations say. Raises PodGoneError if it is not there, StoreError."""
        pod = await self._pods.pod(namespace, name, uid)
        if pod is None:
            return Wishes()
        said = pod.metadata.annotations
        try:
            further = networks(said, pod.metadata.namespace)
        except AnnotationError:
            further = ()  # Multus' to complain about, which has given the pod NICs by it
        names = frozenset(item.interface or f"net{number}" for number, item in enumerate(further, 1))
        return Wishes(said.get(DEFAULT_ROUTE_NIC, "").strip(), names)

    def _changed(self, old: ClusterCoordinator | None, new: ClusterCoordinator | None) -> None:
        if old is not None:
            self._known.pop(old.metadata.name, None)
        if new is not None:
            self._known[new.metadata.name] = new


def over(coordinator: ClusterCoordinator, settings: CoordinatorSettings) -> CoordinatorSettings:
    """`settings` with what the SpiderCoordinator says in their place. Empty texts and lists say nothing."""
    spec, status = coordinator.spec, coordinator.status
    routes = tuple(f"{route.dst} via {route.gw}" for route in spec.policy_routes or ())
    return replace(
        settings,
        mode=plugin_mode(spec.mode or settings.mode),
        overlay_pod_cidr=tuple((status and status.overlay_pod_cidr) or settings.overlay_pod_cidr),
        service_cidr=tuple((status and status.service_cidr) or settings.service_cidr),
        hijack_cidr=tuple(map(_as_network, spec.hijack_cidr or settings.hijack_cidr)),
        policy_routes=routes or settings.policy_routes,
        pod_mac_prefix=spec.pod_mac_prefix or settings.pod_mac_prefix,
        tune_pod_routes=settings.tune_pod_routes if spec.tune_pod_routes is None else spec.tune_pod_routes,
        pod_default_route_nic=spec.pod_default_route_nic or settings.pod_default_route_nic,
        veth_link_address=spec.veth_link_address or settings.veth_link_address,
        veth_mtu=spec.veth_mtu or settings.veth_mtu,
        host_rule_table=spec.host_rule_table or settings.host_rule_table,
        pod_rp_filter=settings.pod_rp_filter if spec.pod_rp_filter is None else spec.pod_rp_filter,
        tx_queue_len=spec.tx_queue_len or settings.tx_queue_len,
    )


def _as_network(text: str) -> str:
    """An address as the network of it alone; anything else as it came, for the configuration to judge."""
    try:
        return text if "/" in text else str(ip_network(text))
    except ValueError:
        return text
