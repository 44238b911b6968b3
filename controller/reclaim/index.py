"""Whose claim it is: finds the claims that an event concerns, without looking at the others."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TypeVar

from api.claim import Claim
from api.core import Pod
from api.reclaim import is_known_to_node, workload_key

WorkloadKey = tuple[str, str, str]
K = TypeVar("K", bound=Hashable)


def holder_of(claim: Claim) -> str:
    """Who holds the claim: the pod's UID, or where there is no pod the claim's name after a slash, as no UID has it."""
    spec = claim.spec
    return spec.pod_uid if spec.pod_uid and spec.state == "Allocated" else f"/{claim.metadata.name}"


class Index:
    """Claims by holder, workload and node, and pods by UID. It holds names, and what caches hold anyway."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        """Every pod there is, by UID."""
        self._claims: dict[str, tuple[str, ...]] = {}
        """Names of claims, by holder."""
        self._waiting: dict[WorkloadKey, set[str]] = {}
        """Names of claims that a workload keeps, of pods there or gone."""
        self._on_node: dict[str, set[str]] = {}
        """Names of claims whose containers the node may be alone to know of, by node."""

    def claim_changed(self, old: Claim | None, new: Claim | None) -> None:
        """Take in a change of the cache."""
        if old is not None:
            self._remove(old)
        if new is not None:
            self._add(new)

    def pod_changed(self, old: Pod | None, new: Pod | None) -> None:
        """Take in a change of the cache."""
        if old is not None and (new is None or new.metadata.uid != old.metadata.uid):
            self.pods.pop(old.metadata.uid, None)
        if new is not None:
            self.pods[new.metadata.uid] = new

    def claims(self, holder: str) -> tuple[str, ...]:
        """Names of the claims that the holder has."""
        return self._claims.get(holder, ())

    def waiting(self, workload: WorkloadKey) -> Collection[str]:
        """Names of the claims that the workload keeps, of pods there or gone."""
        return tuple(self._waiting.get(workload, ()))

    def on_node(self, node: str) -> Collection[str]:
        """Names of the claims on the node whose containers it may be alone to know of."""
        return tuple(self._on_node.get(node, ()))

    def _add(self, claim: Claim) -> None:
        holder, name = holder_of(claim), claim.metadata.name
        known = self._claims.get(holder, ())
        if name not in known:
            self._claims[holder] = (*known, name)
        if claim.spec.node and is_known_to_node(claim):
            self._on_node.setdefault(claim.spec.node, set()).add(name)
        workload = workload_key(claim)
        if workload is not None:
            self._waiting.setdefault(workload, set()).add(name)

    def _remove(self, claim: Claim) -> None:
        holder, name = holder_of(claim), claim.metadata.name
        left = tuple(known for known in self._claims.get(holder, ()) if known != name)
        if left:
            self._claims[holder] = left
        else:
            self._claims.pop(holder, None)
        _discard(self._on_node, claim.spec.node, name)
        workload = workload_key(claim)
        if workload is not None:
            _discard(self._waiting, workload, name)


def _discard(place: dict[K, set[str]], key: K, name: str) -> None:
    members = place.get(key)
    if members is not None:
        members.discard(name)
        if not members:
            del place[key]
