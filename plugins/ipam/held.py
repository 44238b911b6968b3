"""The claims of this node: who holds what, found by identity or by container."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable

from api.claim import LABEL_IDENTITY, LABEL_NODE, LABEL_WORKLOAD, Claim, identity_label, label_value
from api.ranges import Family
from store.errors import NotFoundError
from store.informer import Informer
from store.port import Query, Store

SetKey = tuple[str, str]
"""Identity label and NIC: the claims of one set share them."""


class NodeClaims:
    """An informer on the claims labelled with this node, indexed.

    All writers of such claims are this agent, whose writes are learned at once, and others that only take away: the
    cluster's garbage collection, and other nodes' agents, to which a workload's addresses follow it. So a claim that
    is not here does not exist, once the informer has synced; one that is here may be gone, and is read again before
    anybody relies on it.
    """

    def __init__(self, store: Store, node: str) -> None:
        self._store = store
        self.label = label_value(node)
        """Value of the node label."""
        self._query = Query(labels={LABEL_NODE: self.label})
        self._sets: dict[SetKey, dict[str, Claim]] = {}
        self._identities: dict[str, dict[str, Claim]] = {}
        self._containers: dict[str, dict[str, Claim]] = {}
        self.informer = Informer(store, Claim, self._query, on_change=self._changed)

    async def of_set(self, identity: str, nic: str) -> list[Claim]:
        """What the identity holds for the NIC as far as this agent knows. Raises StoreError before the first sync."""
        if self.informer.is_synced:
            return list(self._sets.get((identity, nic), {}).values())
        return await self.read_set(identity, nic)

    async def read_set(self, identity: str, nic: str) -> list[Claim]:
        """What the identity holds for the NIC: what is known here, each claim read again. Raises StoreError.

        Before the first sync by a list, which costs the API server a look at all claims of the cluster.
        """
        if self.informer.is_synced:
            known = self._sets.get((identity, nic), {})
            read = await asyncio.gather(*(self._read(name) for name in list(known)))
            claims = [claim for claim in read if claim is not None]
        else:
            claims = (await self._store.list(Claim, Query(labels={LABEL_IDENTITY: identity}))).items
        return [claim for claim in claims if _is_held(claim) and set_key(claim) == (identity, nic)]

    async def _read(self, name: str) -> Claim | None:
        try:
            return await self._store.get(Claim, name)
        except NotFoundError:
            return None

    async def of_container(self, container_id: str, nic: str, pod_uid: str) -> list[Claim]:
        """What a DEL for this container and NIC releases.

        A release names both the container and, if it knows it, the pod: the claims that a successor of the same pod
        took over name another container and are not found. Raises StoreError before the first sync.
        """
        if not self.informer.is_synced:
            return await self.read_container(container_id, nic, pod_uid)
        claims = self._containers.get(container_id, {}).values()
        return [claim for claim in claims if belongs(claim, container_id, nic, pod_uid)]

    async def read_container(self, container_id: str, nic: str, pod_uid: str) -> list[Claim]:
        """The same, read from the store. Raises StoreError."""
        listing = await self._store.list(Claim, self._query)
        return [claim for claim in listing.items if belongs(claim, container_id, nic, pod_uid)]

    def of_identity(self, identity: str) -> list[Claim]:
        """What the identity holds for all of its NICs, as far as this agent knows."""
        return list(self._identities.get(identity, {}).values())

    def sets(self) -> dict[SetKey, list[Claim]]:
        """All sets of this node."""
        return {key: list(claims.values()) for key, claims in self._sets.items()}

    def _changed(self, old: Claim | None, new: Claim | None) -> None:
        for claim in (old, new):
            if claim is None or not _is_held(claim):
                continue
            key, name = set_key(claim), claim.metadata.name
            if claim is new:
                self._sets.setdefault(key, {})[name] = claim
                self._identities.setdefault(key[0], {})[name] = claim
                self._containers.setdefault(claim.spec.container_id, {})[name] = claim
            else:
                _drop(self._sets, key, name)
                _drop(self._identities, key[0], name)
                _drop(self._containers, claim.spec.container_id, name)


def belongs(claim: Claim, container_id: str, nic: str, pod_uid: str) -> bool:
    """Whether the claim is this container's for this NIC. An unknown pod UID (empty) rules nothing out."""
    spec = claim.spec
    return (
        _is_held(claim)
        and spec.container_id == container_id
        and spec.nic == nic
        and (not pod_uid or not spec.pod_uid or spec.pod_uid == pod_uid)
    )


def set_key(claim: Claim) -> SetKey:
    """The set that the claim belongs to."""
    return identity_label(claim.spec.pod_uid, claim.spec.container_id), claim.spec.nic


def partial(claims: Iterable[Claim]) -> bool:
    """Whether these claims of one set are for fewer families than the ADD that made them wanted."""
    claims = list(claims)
    families = {claim.spec.ip_version for claim in claims}
    return len(families) < max((claim.spec.set_size for claim in claims), default=0)


def by_family(claims: Iterable[Claim]) -> tuple[dict[Family, Claim], list[Claim]]:
    """The oldest claim of each family, and the rest, which nobody needs.

    A second claim of a family can be left by a write whose answer was lost.
    """
    groups: defaultdict[Family, list[Claim]] = defaultdict(list)
    for claim in sorted(claims, key=lambda c: (int(c.metadata.resource_version), c.metadata.name)):
        groups[claim.spec.ip_version].append(claim)
    return {family: group[0] for family, group in groups.items()}, [c for group in groups.values() for c in group[1:]]


def is_retained(claim: Claim) -> bool:
    """Whether the address outlives its pod: it is a static workload's."""
    return LABEL_WORKLOAD in claim.metadata.labels


def _is_held(claim: Claim) -> bool:
    return claim.spec.state == "Allocated"


def _drop(index: dict[SetKey, dict[str, Claim]] | dict[str, dict[str, Claim]], key: object, name: str) -> None:
    inner = index.get(key)  # type: ignore[call-overload]
    if inner is not None:
        inner.pop(name, None)
        if not inner:
            del index[key]  # type: ignore[arg-type]
