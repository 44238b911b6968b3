"""Whether a claim may be taken back: the whole decision, without asking anybody. Pure.

An address is in use as long as its pod exists by UID, has not come to its end, and is not past the end of its grace
period. Nothing in use is released, but for the rows of lost nodes. `deletionTimestamp` already lies one grace period
after the request to delete, so no second one is waited for. A pod that was removed by force has not ended with that:
its kubelet gives it the whole grace period.

The matrix is upstream's (docs/reclaim.md has it, row by row, with what is different here and why).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from api.apps import StatefulSet, VirtualMachineInstance
from api.claim import LABEL_WORKLOAD, Claim
from api.core import Node, Pod
from api.mirror import is_mirror, is_mirrored
from api.workloads import is_stateful_set, is_virtual_machine

_DEFAULT_GRACE = 30
"""Seconds that a pod has to end where it does not say (Kubernetes' default for terminationGracePeriodSeconds)."""


class Action(Enum):
    """What is to be done with a claim."""

    KEEP = "keep"
    RELEASE = "release"
    LATER = "look again"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with a claim, and why."""

    action: Action
    reason: str
    """Part of a sentence, for logs and events."""
    at: datetime | None = None
    """When to look again, for LATER."""


@dataclass(frozen=True, slots=True)
class Switches:
    """What the administrator allows."""

    stateful_sets: bool = True
    """Pods of StatefulSets keep their addresses."""
    virtual_machines: bool = True
    """KubeVirt virtual machines keep their addresses."""
    ended_on_ready_node: bool = True
    """Pods whose time is over are released on nodes that are ready; else that is left to their kubelet."""
    ended_on_lost_node: bool = True
    """The same on nodes that are not ready, or gone."""
    running_without_ips_on_lost_node: bool = False
    """A running pod without addresses in its status is released if its node is not ready, or gone."""
    delay: timedelta = timedelta(seconds=30)
    """After the grace period, for the kubelet to kill what does not end, and to tear the sandbox down."""
    lost_node: timedelta = timedelta(seconds=300)
    """How long a node must be gone until claims of containers that only it knew of go with it."""


@dataclass(frozen=True, slots=True)
class Witness:
    """What is known about a claim's holder; for a decision, all of it read after the claim was."""

    pod: Pod | None
    """The pod that the claim names (`mirror.is_pod_of`); None if there is none any more."""
    namesake: Pod | None = None
    """The pod that has the name now, with another UID."""
    node: Node | None = None
    """The node of the pod, or of the claim where there is no pod; None if there is none of that name (any more)."""
    node_missing_since: datetime | None = None
    """Since when, as far as that was watched, there is no such node."""
    gone_until: datetime | None = None
    """For a pod that is gone: until when its containers may outlive it; see `outlived_until`."""
    valid: bool = False
    """For a static claim: whether its workload has, or will have, a pod that takes the addresses over."""


def is_static(claim: Claim, switches: Switches) -> bool:
    """Whether the claim outlives its pod: a StatefulSet's or virtual machine's, where that is switched on."""
    workload = claim.spec.workload
    if workload is None or workload.controller is None or LABEL_WORKLOAD not in claim.metadata.labels:
        return False
    if is_stateful_set(workload.controller):
        return switches.stateful_sets
    return switches.virtual_machines and is_virtual_machine(workload.controller)


def judge(claim: Claim, witness: Witness, switches: Switches, moment: datetime) -> Verdict:
    """What to do with `claim`, at `moment`."""
    spec = claim.spec
    if spec.state == "Quarantined":
        return _quarantined(claim, moment)
    if not spec.pod_uid or (witness.pod is None and is_mirrored(claim)):
        return _known_to_node(claim, witness, switches, moment)
    static = is_static(claim, switches)
    if witness.pod is None:
        return _pod_is_gone(witness, moment, static=static)
    return _of_pod(witness.pod, witness, switches, moment, static=static)


def _of_pod(pod: Pod, witness: Witness, switches: Switches, moment: datetime, *, static: bool) -> Verdict:
    ended = _ended(pod, switches)
    if ended is None:
        return _running(pod, witness, switches, static=static)
    if static and witness.valid:
        return Verdict(Action.KEEP, "its workload will have the pod again")
    at, reason = ended
    if moment < at:
        return Verdict(Action.LATER, reason, at)
    return _of_node(witness, switches, reason)


def _quarantined(claim: Claim, moment: datetime) -> Verdict:
    quarantine = claim.spec.quarantine
    if quarantine is None:
        return Verdict(Action.KEEP, "it is in quarantine without an end")
    if moment < quarantine.until:
        return Verdict(Action.LATER, "it is in quarantine", quarantine.until)
    return Verdict(Action.RELEASE, "its quarantine is over")


def is_known_to_node(claim: Claim) -> bool:
    """Whether the claim's node may know of its container what the API does not."""
    return not claim.spec.pod_uid or is_mirrored(claim)


def _known_to_node(claim: Claim, witness: Witness, switches: Switches, moment: datetime) -> Verdict:
    """A container that no pod in the API belongs to is known to its node's agent alone, as long as there is one."""
    if not (claim.spec.pod_uid or claim.spec.container_id) or not claim.spec.node:
        return Verdict(Action.KEEP, "it names neither a pod nor a container of a node: somebody made it by hand")
    if witness.node is not None:
        return Verdict(Action.KEEP, "its container is for the agent of its node to judge")
    at = (witness.node_missing_since or moment) + switches.lost_node
    if moment < at:
        return Verdict(Action.LATER, "its node is gone, perhaps for a moment", at)
    return Verdict(Action.RELEASE, "its node is gone")


def _pod_is_gone(witness: Witness, moment: datetime, *, static: bool) -> Verdict:
    reason = "its pod is gone"
    if static and not witness.valid:
        reason = "its pod is gone, and its workload will not have it again"
    elif static:
        namesake = witness.namesake
        if namesake is None or not namesake.status.pod_ips or namesake.metadata.deletion_timestamp is not None:
            return Verdict(Action.KEEP, "its workload will have the pod again")
        # Addresses are in the status when the whole sandbox is up: what was not taken over by then is not wanted.
        reason = "its pod's successor has other addresses"
    if witness.gone_until is not None and moment < witness.gone_until:
        return Verdict(Action.LATER, reason, witness.gone_until)
    return Verdict(Action.RELEASE, reason)


def _running(pod: Pod, witness: Witness, switches: Switches, *, static: bool) -> Verdict:
    if (
        switches.running_without_ips_on_lost_node
        and not static
        and pod.status.phase == "Running"
        and not pod.status.pod_ips
        and not _is_ready(witness)
    ):
        return Verdict(Action.RELEASE, "its pod has no addresses in its status, and its node is lost")
    return Verdict(Action.KEEP, "its pod is there")


def _of_node(witness: Witness, switches: Switches, reason: str) -> Verdict:
    """A pod whose time is over is still there: the node's kubelet is slow, or nobody is there to remove it."""
    if _is_ready(witness):
        if switches.ended_on_ready_node:
            return Verdict(Action.RELEASE, reason)
        return Verdict(Action.KEEP, f"{reason}, and its node is ready: that is left to the kubelet")
    if switches.ended_on_lost_node:
        return Verdict(Action.RELEASE, f"{reason}, and its node is lost")
    return Verdict(Action.KEEP, f"{reason}, and its node is lost: that is left to its return")


def _is_ready(witness: Witness) -> bool:
    return witness.node is not None and witness.node.ready


def _ended(pod: Pod, switches: Switches) -> tuple[datetime, str] | None:
    """When a pod's addresses cannot be in use any more, and why; None for a pod that goes on."""
    ends: list[tuple[datetime, str]] = []
    deletion = pod.metadata.deletion_timestamp
    if deletion is not None and not is_mirror(pod):
        if pod.metadata.deletion_grace_period_seconds == 0:  # by force: to its kubelet that is no grace period
            deletion += _grace(pod)
        ends.append((deletion, "its pod was deleted and its grace period is over"))
    finished = finished_at(pod)
    if finished is not None:
        ends.append((finished + _grace(pod), f"its pod has {pod.status.phase.lower()}"))
    if not ends:
        return None
    at, reason = min(ends)
    return at + switches.delay, reason


def outlived_until(pod: Pod, switches: Switches, moment: datetime) -> datetime:
    """Until when containers of a pod may go on that was gone from the API at `moment`; `pod` is the last seen of it.

    Who removes a pod by force does not wait for its kubelet, which hears of it then and ends the containers with the
    pod's whole grace period. A pod without a node has no containers, and of one that has finished its kubelet may have
    said that they have ended.
    """
    if not pod.spec.node_name or _all_ended(pod):
        return moment
    ended = _ended(pod, switches)
    return moment + _grace(pod) + switches.delay if ended is None else ended[0]


def _all_ended(pod: Pod) -> bool:
    statuses = pod.status.container_statuses
    finished = pod.status.phase in ("Succeeded", "Failed")
    return finished and bool(statuses) and all(status.state.terminated is not None for status in statuses)


def _grace(pod: Pod) -> timedelta:
    seconds = pod.spec.termination_grace_period_seconds
    return timedelta(seconds=_DEFAULT_GRACE if seconds is None else max(0, seconds))


def finished_at(pod: Pod) -> datetime | None:
    """When the last container of a finished pod ended; None for a pod that is not finished.

    A pod that was evicted may not tell of its containers: then the latest of what its conditions and its metadata
    tell, which is never before its end by more than the pod's start took.
    """
    if pod.status.phase not in ("Succeeded", "Failed"):
        return None
    ends = [
        status.state.terminated.finished_at
        for status in pod.status.container_statuses
        if status.state.terminated is not None and status.state.terminated.finished_at is not None
    ]
    ends += [each.last_transition_time for each in pod.status.conditions if each.last_transition_time is not None]
    created = pod.metadata.creation_timestamp
    return max(ends) if ends else created


def workload_key(claim: Claim) -> tuple[str, str, str] | None:
    """Namespace, kind and name of the workload that a retained claim waits for; None for other claims."""
    workload = claim.spec.workload
    if workload is None or workload.controller is None or LABEL_WORKLOAD not in claim.metadata.labels:
        return None
    controller = workload.controller
    if is_stateful_set(controller):
        return workload.namespace, StatefulSet.TYPE.kind, controller.name
    if is_virtual_machine(controller):
        return workload.namespace, VirtualMachineInstance.TYPE.kind, controller.name
    return None
