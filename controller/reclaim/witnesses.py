"""What is known of claims' holders: from the caches, to find who is suspect, and then from the API server, to decide.

What caches say keeps an address; it never frees one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from api.apps import StatefulSet, VirtualMachine, VirtualMachineInstance
from api.claim import Claim
from api.core import Node, Pod
from api.meta import R, Resource
from api.mirror import is_pod_of
from api.reclaim import Witness, is_known_to_node, workload_key
from api.workloads import judges_of, will_have_again
from controller.caches import Cache, Caches
from controller.reclaim.absences import Absences
from controller.reclaim.index import Index, WorkloadKey
from store.errors import NotFoundError
from store.port import Query, Store

READ_ONE_BY_ONE = 16
"""Up to so many pods of a namespace are read each; more, by one list of the namespace. A list is as consistent as a
read, costs the server half a millisecond for each pod of the namespace, and is one request."""


def pod_name(claim: Claim) -> str:
    """Name of the claim's pod as the claim has it."""
    workload = claim.spec.workload
    return workload.pod_name if workload else ""


def _namespace(claim: Claim) -> str:
    return claim.spec.workload.namespace if claim.spec.workload else ""


def _pod_of(claim: Claim, *found: Pod | None) -> Pod | None:
    """The pod that the claim names, of those found by its UID and by its name."""
    if not claim.spec.pod_uid:
        return None
    return next((pod for pod in found if pod is not None and is_pod_of(pod, claim)), None)


class Watched:
    """The caches that the reclaim needs. Virtual machines are optional: their kinds may not be there."""

    def __init__(self, caches: Caches) -> None:
        self.claims = caches.of(Claim)
        self.pods = caches.of(Pod)
        self.nodes = caches.of(Node)
        self.sets = caches.of(StatefulSet)
        self.instances = caches.optional(VirtualMachineInstance)
        self.machines = caches.optional(VirtualMachine)
        self.judges: dict[type[Resource], Cache[Any]] = {
            StatefulSet: self.sets,
            VirtualMachineInstance: self.instances,
            VirtualMachine: self.machines,
        }
        """Those that tell whether a workload will have its pod again."""

    async def synced(self) -> None:
        """Return when all have been listed."""
        for each in (self.claims, self.pods, self.nodes, self.sets, self.instances, self.machines):
            await each.synced()


class Remembered:
    """From the caches."""

    def __init__(self, index: Index, watched: Watched, absences: Absences) -> None:
        self._index = index
        self._watched = watched
        self._absences = absences

    def witness(self, claim: Claim, missing_since: Mapping[str, datetime], moment: datetime) -> Witness:
        """What the caches know at `moment`."""
        namesake = self._watched.pods.get(pod_name(claim), _namespace(claim))
        pod = _pod_of(claim, self._index.pods.get(claim.spec.pod_uid), namesake)
        node = pod.spec.node_name if pod else claim.spec.node
        return Witness(
            pod=pod,
            namesake=None if pod else namesake,
            node=self._watched.nodes.get(node),
            node_missing_since=missing_since.get(node),
            gone_until=self._absences.until(claim, moment) if pod is None else None,
            valid=self._is_valid(claim),
        )

    def _is_valid(self, claim: Claim) -> bool:
        key = workload_key(claim)
        if key is None:
            return False
        namespace, kind, name = key
        found = [self._watched.judges[each].get(name, namespace) for each in judges_of(kind)]
        return will_have_again(pod_name(claim), found, claim.spec.node)


class Fresh:
    """From the API server, each object once. For one batch of claims of one namespace, all older than this object."""

    def __init__(self, store: Store, index: Index, absences: Absences) -> None:
        self._store = store
        self._index = index
        self._absences = absences
        self._by_uid: dict[str, Pod] = {}
        self._by_name: dict[tuple[str, str], Pod] = {}
        self._nodes: dict[str, Node | None] = {}
        self._judges: dict[WorkloadKey, list[Resource | None]] = {}

    async def read_pods(self, claims: Collection[Claim]) -> None:
        """Read the claims' pods. Raises StoreError, also if one of those listed cannot be read.

        A pod is sought under the name that the claim has for it, and under the one that the cache knows its UID by,
        which may be another if somebody wrote the claim by hand.
        """
        names: set[tuple[str, str]] = set()
        nameless = False
        for claim in claims:
            uid = claim.spec.pod_uid
            if not uid or claim.spec.state != "Allocated":
                continue
            known = self._index.pods.get(uid)
            if known is not None:
                names.add((known.metadata.namespace, known.metadata.name))
            if pod_name(claim) and _namespace(claim):
                names.add((_namespace(claim), pod_name(claim)))
            elif known is None:
                nameless = True
        if nameless:
            self._learn((await self._store.list(Pod)).whole())
            return
        by_namespace: dict[str, list[str]] = {}
        for namespace, name in names:
            by_namespace.setdefault(namespace, []).append(name)
        for namespace, wanted in by_namespace.items():
            if len(wanted) > READ_ONE_BY_ONE:
                self._learn((await self._store.list(Pod, Query(namespace=namespace))).whole())
            else:
                found = await asyncio.gather(*(self._get(Pod, name, namespace) for name in wanted))
                self._learn([pod for pod in found if pod is not None])

    async def witness(self, claim: Claim, missing_since: Mapping[str, datetime], *, static: bool) -> Witness:
        """What the API server says about the claim, whose pod has been read. Raises StoreError."""
        namesake = self._by_name.get((_namespace(claim), pod_name(claim)))
        pod = _pod_of(claim, self._by_uid.get(claim.spec.pod_uid), namesake)
        node = pod.spec.node_name if pod else claim.spec.node
        return Witness(
            pod=pod,
            namesake=None if pod else namesake,
            node=await self._node(node) if pod or is_known_to_node(claim) else None,
            node_missing_since=missing_since.get(node),
            gone_until=self._absences.until(claim, datetime.now(UTC)) if pod is None else None,
            valid=await self._is_valid(claim) if static else False,
        )

    def _learn(self, pods: Collection[Pod]) -> None:
        for pod in pods:
            self._by_uid[pod.metadata.uid] = pod
            self._by_name[pod.metadata.namespace, pod.metadata.name] = pod

    async def _node(self, name: str) -> Node | None:
        if name and name not in self._nodes:
            self._nodes[name] = await self._get(Node, name)
        return self._nodes.get(name)

    async def _is_valid(self, claim: Claim) -> bool:
        key = workload_key(claim)
        if key is None:
            return False
        namespace, kind, name = key
        if key not in self._judges:
            self._judges[key] = [await self._get(each, name, namespace) for each in judges_of(kind)]
        return will_have_again(pod_name(claim), self._judges[key], claim.spec.node)

    async def _get(self, kind: type[R], name: str, namespace: str = "") -> R | None:
        try:
            return await self._store.get(kind, name, namespace)
        except NotFoundError:
            return None
