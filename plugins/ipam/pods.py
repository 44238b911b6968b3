"""What this agent knows of its node's pods, their namespaces and the node, kept by informers; and of who owns a pod."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from api.claim import Controller
from api.core import Namespace, Node, Pod
from api.mirror import uid_on_node
from api.workloads import is_alive, static_name
from plugins.errors import PodGoneError
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError
from store.informer import Informer
from store.owners import Owners
from store.port import Query, Store


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod that is there and alive, and what decides with it."""

    pod: Pod
    namespace: Namespace
    controller: Controller
    """The top controller; the pod itself if it has none."""
    static: str
    """The name under which its addresses outlive the pod; empty if they do not."""
    node_labels: Mapping[str, str]


class PodSource(Protocol):
    """Where pods are known from."""

    knows_pods: bool
    """Whether there are pods at all: then it is they who say which pools they want."""

    async def run(self) -> None:
        """Keep the caches until cancelled."""

    async def ready(self) -> None:
        """Return when the caches are complete; the caller sets the deadline."""

    async def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:
        """The pod that CNI_ARGS name; None where there are no pods, or where no pod is named."""

    async def pod(self, namespace: str, name: str, uid: str) -> Pod | None:
        """The pod alone, dead or alive."""


class NoPods:
    """A machine without Kubernetes."""

    knows_pods = False

    async def run(self) -> None:
        """Nothing is kept: wait to be cancelled."""
        await asyncio.Event().wait()

    async def ready(self) -> None:
        """At once."""

    async def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:  # noqa: ARG002
        """None."""
        return None

    async def pod(self, namespace: str, name: str, uid: str) -> Pod | None:  # noqa: ARG002
        """None."""
        return None


class Pods:
    """The pods of one node of a cluster. `run` must be running for anything to be found."""

    knows_pods = True

    def __init__(self, store: Store, node: str, settings: IpamSettings) -> None:
        self._store = store
        self._node = node
        self._settings = settings
        self._owners = Owners(store)
        self._pods = Informer(store, Pod, Query(node=node))
        self._namespaces = Informer(store, Namespace)
        self._nodes = Informer(store, Node, Query(name=node))

    async def run(self) -> None:
        """Keep the caches until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in (self._pods, self._namespaces, self._nodes):
                group.create_task(informer.run())

    async def ready(self) -> None:
        """Return when the caches are complete; the caller sets the deadline."""
        for informer in (self._pods, self._namespaces, self._nodes):
            await informer.synced()

    async def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:
        """The pod that CNI_ARGS name; None if they name none.

        The cache counts only for the very UID asked for; in any other case the API server itself is asked. Raises
        PodGoneError if there is no such pod or it is not alive, StoreError.
        """
        pod = await self.pod(namespace, name, uid)
        if pod is None:
            return None
        if not is_alive(pod):
            raise PodGoneError(f"dead Pod {namespace}/{name}, we cannot allocate IP addresses to it", _state(pod))
        controller = await self._owners.top_controller(pod)
        node = self._nodes.get(self._node)
        return PodFacts(
            pod=pod,
            namespace=await self._namespace(namespace),
            controller=controller,
            static=static_name(
                name,
                controller,
                stateful_sets=self._settings.enable_statefulset,
                virtual_machines=self._settings.enable_kubevirt_static_ip,
            ),
            node_labels=node.metadata.labels if node is not None else {},
        )

    async def pod(self, namespace: str, name: str, uid: str) -> Pod | None:
        """The pod that CNI_ARGS name, dead or alive; None if they name none. Raises PodGoneError, StoreError."""
        if not namespace or not name:
            return None
        pod = self._pods.get(name, namespace)
        if pod is None or not uid or uid_on_node(pod) != uid:
            pod = await self._read(namespace, name, uid)
        return pod

    async def _read(self, namespace: str, name: str, uid: str) -> Pod:
        try:
            pod = await self._store.get(Pod, name, namespace)
        except NotFoundError:
            raise PodGoneError(f"failed to get Pod {namespace}/{name}", "the API server has no such pod") from None
        if uid and uid_on_node(pod) != uid:
            raise PodGoneError(
                f"failed to get Pod {namespace}/{name}",
                f"its UID is {uid_on_node(pod)}, and K8S_POD_UID of CNI_ARGS {uid}: that one is gone",
            )
        return pod

    async def _namespace(self, name: str) -> Namespace:
        known = self._namespaces.get(name)
        if known is not None:
            return known
        try:
            return await self._store.get(Namespace, name)
        except NotFoundError:
            raise PodGoneError(f"failed to get Namespace {name}", "the API server has no such namespace") from None


def _state(pod: Pod) -> str:
    if pod.metadata.deletion_timestamp is not None:
        return "it is terminating"
    return f"its phase is {pod.status.phase}, and its restartPolicy {pod.spec.restart_policy}"
