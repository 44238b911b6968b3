"""Who holds an address, and whether it may be taken from them: the reclaim's own decision, for one claim."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from api.claim import Claim
from api.core import Node, Pod
from api.meta import R
from api.mirror import is_mirrored, is_pod_of
from api.reclaim import Action, Switches, Verdict, Witness, is_known_to_node, is_static, judge, workload_key
from api.workloads import judges_of, will_have_again
from store.errors import NotFoundError
from store.port import Store

SWITCHES = Switches(delay=timedelta(seconds=30))
"""The controller's as shipped."""
_UNSEEN = (
    "its pod is gone, nobody here saw when, and its containers on node {node} have their grace period from then on"
)
"""The controller sees pods go, and waits (`api.reclaim.outlived_until`). The API server keeps nothing of a pod that is
gone, neither when that was nor how long its grace period is: a pod removed by force may run for an hour."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What is known of a claim's holder."""

    verdict: Verdict
    """What the reclaim would do with the claim now."""
    pod: Pod | None = None
    """The pod that the claim names."""
    locked: str = ""
    """Why even somebody who insists may not release it; empty if they may."""
    doubt: str = ""
    """Why the address may be in use although nobody is known to have it; empty without doubt."""


def pod_name(claim: Claim) -> str:
    """Name of the claim's pod as the claim has it."""
    workload = claim.spec.workload
    return workload.pod_name if workload else ""


async def in_cluster(store: Store, claim: Claim, moment: datetime) -> Holder:
    """The holder of a claim in a cluster; all that decides is read from the API server. Raises StoreError."""
    witness = await _witness(store, claim)
    locked = ""
    spec = claim.spec
    if spec.state == "Allocated" and spec.pod_uid and witness.pod is not None:
        # A StatefulSet or virtual machine that wants the address back can be overruled, a pod that uses it cannot.
        bare = judge(claim, replace(witness, valid=False), SWITCHES, moment)
        locked = "" if bare.action is Action.RELEASE else bare.reason
    elif spec.state == "Allocated" and is_known_to_node(claim) and witness.node is not None:
        locked = f"its container may run on node {spec.node}, whose agent alone knows it"
    verdict = judge(claim, witness, SWITCHES, moment)
    unseen = spec.state == "Allocated" and bool(spec.pod_uid) and witness.pod is None and not is_mirrored(claim)
    doubt = _UNSEEN.format(node=spec.node or "unknown") if unseen and verdict.action is Action.RELEASE else ""
    return Holder(verdict, witness.pod, locked, doubt)


def on_machine(claim: Claim) -> Holder:
    """The holder of a claim on a machine without Kubernetes, where a claim lives as long as its container."""
    spec = claim.spec
    if spec.state == "Quarantined":
        return Holder(judge(claim, Witness(None), SWITCHES, datetime.now(UTC)))
    if spec.netns and spec.netns_inode and _inode(spec.netns) == spec.netns_inode:
        reason = f"its network namespace {spec.netns} is there"
        return Holder(Verdict(Action.KEEP, reason), locked=reason)
    return Holder(Verdict(Action.KEEP, "its runtime has not said that its container is gone"))


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


async def _witness(store: Store, claim: Claim) -> Witness:
    spec = claim.spec
    if spec.state == "Quarantined":
        return Witness(None)
    pod, namesake = await _pod(store, claim) if spec.pod_uid else (None, None)
    node = pod.spec.node_name if pod else spec.node
    return Witness(
        pod=pod,
        namesake=namesake,
        node=await _get(store, Node, node) if node else None,
        valid=await _valid(store, claim) if is_static(claim, SWITCHES) else False,
    )


async def _pod(store: Store, claim: Claim) -> tuple[Pod | None, Pod | None]:
    """The pod that the claim names, or else the one that has its name now.

    A claim that was written by hand may name its pod wrongly: before a UID counts as gone, all pods are looked at.
    """
    workload, name = claim.spec.workload, pod_name(claim)
    namesake = await _get(store, Pod, name, workload.namespace) if workload and workload.namespace and name else None
    if namesake is not None and is_pod_of(namesake, claim):
        return namesake, None
    pods = (await store.list(Pod)).whole()
    return next((pod for pod in pods if is_pod_of(pod, claim)), None), namesake


async def _valid(store: Store, claim: Claim) -> bool:
    key = workload_key(claim)
    if key is None:
        return False
    namespace, kind, name = key
    found = [await _get(store, each, name, namespace) for each in judges_of(kind)]
    return will_have_again(pod_name(claim), found, claim.spec.node)


async def _get(store: Store, kind: type[R], name: str, namespace: str = "") -> R | None:
    try:
        return await store.get(kind, name, namespace)
    except NotFoundError:
        return None
