"""Addresses that outlive a pod: finding those of the predecessor, and whether its successor may have them.

A workload is *static* if its pods keep their addresses: a StatefulSet's pod by its name, a KubeVirt virtual machine.
Its claims stay after a DEL, naming the pod that is gone, until the next pod of the workload takes them over, wherever
it runs, or until the workload needs them no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from ipaddress import ip_interface

from api.annotations import MIGRATION
from api.apps import VirtualMachineInstanceMigration
from api.claim import LABEL_WORKLOAD, Claim, Workload, claim_name, workload_label
from api.core import Pod
from api.endpoint import Endpoint
from api.meta import now
from api.ranges import Family
from api.workloads import is_alive
from plugins.errors import PodGoneError, TryAgainLaterError
from plugins.ipam.held import partial
from plugins.ipam.pods import PodFacts
from store.errors import NotFoundError
from store.port import Query, Store


class RetainedClaims:
    """Reads claims that a static workload has kept; everything from the store and nothing from a cache."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, workload: Workload, nic: str) -> list[Claim]:
        """What the workload holds for the NIC, whichever of its pods the claims name. Raises StoreError.

        The API server has no index on labels: a list by label makes it look at every claim of the cluster. So the
        endpoint is asked first, and as it is only a view, believed in no more than that the claims it names prove.
        """
        names = hinted(await self._endpoint(workload.namespace, workload.name), nic)
        if names:
            read = await asyncio.gather(*(self._claim(claim) for claim in names))
            claims = [claim for claim in read if claim is not None and _is_kept(claim, workload, nic)]
            if len(claims) == len(names) and not partial(claims):
                return claims
        label = workload_label(workload.namespace, workload.name)
        listing = await self._store.list(Claim, Query(labels={LABEL_WORKLOAD: label}))
        return [claim for claim in listing.items if _is_kept(claim, workload, nic)]

    async def migrates(self, facts: PodFacts) -> bool:
        """Whether the pod is the target of a live migration. Raises StoreError."""
        name = facts.pod.metadata.annotations.get(MIGRATION, "")
        if not name:
            return False
        try:
            await self._store.get(VirtualMachineInstanceMigration, name, facts.pod.metadata.namespace)
        except NotFoundError:
            return False
        return True

    async def ensure_free(self, claims: list[Claim], facts: PodFacts, *, migrates: bool) -> None:
        """Return if the pod may take the claims over from the pods that they name.

        The source of a live migration is alive and shares its address with the target: that is what a live migration
        is. The claim then names the target, so the source's DEL finds nothing to release.

        Raises TryAgainLaterError if a holder is alive; PodGoneError if the pod itself is gone, since it may have a
        successor, from which it must not take anything; StoreError.
        """
        meta = facts.pod.metadata
        for name, uid in {(_pod_name(claim), claim.spec.pod_uid) for claim in claims}:
            current = await self._pod(meta.namespace, name)
            if name == meta.name and (current is None or current.metadata.uid != meta.uid):
                raise PodGoneError(f"failed to get Pod {meta.namespace}/{name}", f"the one with UID {meta.uid} is gone")
            if current is not None and current.metadata.uid == uid and is_using(current, now()) and not migrates:
                raise TryAgainLaterError(
                    "the addresses of the workload are still in use",
                    f"pod {meta.namespace}/{name} with UID {uid} has {_list(claims)}",
                )

    async def _endpoint(self, namespace: str, name: str) -> Endpoint | None:
        try:
            return await self._store.get(Endpoint, name, namespace)
        except NotFoundError:
            return None

    async def _claim(self, name: str) -> Claim | None:
        try:
            return await self._store.get(Claim, name)
        except NotFoundError:
            return None

    async def _pod(self, namespace: str, name: str) -> Pod | None:
        try:
            return await self._store.get(Pod, name, namespace)
        except NotFoundError:
            return None


def hinted(endpoint: Endpoint | None, nic: str) -> list[str]:
    """Names of the claims that the endpoint tells of for the NIC; none for what is no address."""
    if endpoint is None or endpoint.status is None:
        return []
    names = []
    for entry in endpoint.status.current.ips:
        for text in (entry.ipv4, entry.ipv6) if entry.interface == nic else ():
            if text:
                try:
                    names.append(claim_name(ip_interface(text).ip))
                except ValueError:
                    return []
    return names


def is_using(pod: Pod, moment: datetime) -> bool:
    """Whether the pod may still use its addresses: it has not ended, and its time to end is not over.

    `deletionTimestamp` already lies one grace period after the deletion was asked for.
    """
    deletion = pod.metadata.deletion_timestamp
    if deletion is None:
        return is_alive(pod)
    return pod.status.phase not in ("Succeeded", "Failed") and moment < deletion


def split(
    claims: Mapping[Family, Claim], named: Mapping[Family, tuple[str, ...]]
) -> tuple[dict[Family, Claim], list[Claim]]:
    """Which claims stay, since their pool is still named for the NIC, and which go."""
    kept = {family: claim for family, claim in claims.items() if claim.spec.pool in named.get(family, ())}
    return kept, [claim for family, claim in claims.items() if family not in kept]


def _is_kept(claim: Claim, workload: Workload, nic: str) -> bool:
    label = workload_label(workload.namespace, workload.name)
    kept = claim.metadata.labels.get(LABEL_WORKLOAD) == label and _kind(claim.spec.workload) == _kind(workload)
    return kept and claim.spec.state == "Allocated" and claim.spec.nic == nic


def _kind(workload: Workload | None) -> str:
    """A StatefulSet's pod and a virtual machine may have the same name."""
    return workload.controller.kind if workload is not None and workload.controller is not None else ""


def _pod_name(claim: Claim) -> str:
    workload = claim.spec.workload
    return workload.pod_name if workload is not None else ""


def _list(claims: list[Claim]) -> str:
    return ", ".join(sorted(claim.spec.address for claim in claims))
