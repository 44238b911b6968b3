"""The decision whether a claim may be taken back: every row of the matrix, and that nothing in use ever is."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.claim import LABEL_WORKLOAD, Claim
from api.core import Node, Pod, PodSpec
from api.mirror import MIRROR
from api.reclaim import Action, Switches, Verdict, Witness, finished_at, is_static, judge, outlived_until, workload_key

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
UID = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
DELAY = Switches().delay
STATEFUL = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "s"}
MACHINE = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "name": "vm", "uid": "v"}
NODE = {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "n"}
FOREIGN = {"apiVersion": "apps.kruise.io/v1beta1", "kind": "StatefulSet", "name": "db", "uid": "k"}


def ago(**delta: float) -> str:
    return (NOW - timedelta(**delta)).isoformat()


def claim(controller: dict[str, str] | None = None, *, labelled: bool | None = None, **spec: Any) -> Claim:
    labels = {LABEL_WORKLOAD: "w.x"} if (controller is not None if labelled is None else labelled) else {}
    workload = {"namespace": "ns", "name": "db-0", **({"controller": controller} if controller else {})}
    whole = {"address": "10.0.0.1", "ipVersion": 4, "pool": "p", "podUID": UID, "workload": workload, **spec}
    return msgspec.convert({"metadata": {"name": "10.0.0.1", "labels": labels}, "spec": whole}, Claim)


def pod(phase: str = "Running", *, ips: bool = True, uid: str = UID, status: Any = None, **meta: Any) -> Pod:
    listed = [{"ip": "10.0.0.1"}] if ips else []
    return msgspec.convert(
        {
            "metadata": {"name": "db-0", "namespace": "ns", "uid": uid, "creationTimestamp": ago(days=1), **meta},
            "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 60},
            "status": {"phase": phase, "podIPs": listed, **(status or {})},
        },
        Pod,
    )


def leaving(phase: str = "Running", *, since: float, ips: bool = True) -> Pod:
    """A pod whose grace period ended so many seconds ago."""
    return pod(phase, ips=ips, deletionTimestamp=ago(seconds=since), deletionGracePeriodSeconds=30)


def done(phase: str, *, since: float, **meta: Any) -> Pod:
    """A pod whose last container ended so many seconds ago."""
    ends = [
        {"name": "a", "state": {"terminated": {"finishedAt": ago(seconds=since + 100)}}},
        {"name": "b", "state": {"terminated": {"finishedAt": ago(seconds=since)}}},
    ]
    return pod(phase, ips=False, status={"containerStatuses": ends}, **meta)


def mirror(*, of: str = UID, **meta: Any) -> Pod:
    """The object for a pod that its kubelet runs from a file, and knows by another UID."""
    return pod(uid=OTHER, annotations={MIRROR: of}, **meta)


def ago_moment(**delta: float) -> datetime:
    return NOW - timedelta(**delta)


def node(ready: str = "True") -> Node:
    return msgspec.convert(
        {"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}, Node
    )


READY, LOST, GONE = node(), node("Unknown"), None
LEAVE_TO_KUBELET = Switches(ended_on_ready_node=False)
LEAVE_TO_RETURN = Switches(ended_on_lost_node=False)
RUNNING_TOO = Switches(running_without_ips_on_lost_node=True)
SOON = NOW + timedelta(seconds=1)
KEEP, RELEASE, LATER = Action.KEEP, Action.RELEASE, Action.LATER

ROWS: dict[str, tuple[Claim, Witness, Switches, Action]] = {
    "pod gone": (claim(), Witness(None), Switches(), RELEASE),
    "pod gone, its node is of no interest": (claim(), Witness(None, node=READY), LEAVE_TO_KUBELET, RELEASE),
    "pod gone, stateful, valid": (claim(STATEFUL), Witness(None, valid=True), Switches(), KEEP),
    "pod gone, stateful, invalid": (claim(STATEFUL), Witness(None), Switches(), RELEASE),
    "pod gone, virtual machine, valid": (claim(MACHINE), Witness(None, valid=True), Switches(), KEEP),
    "pod gone, virtual machine, invalid": (claim(MACHINE), Witness(None), Switches(), RELEASE),
    "pod gone, stateful switched off": (
        claim(STATEFUL),
        Witness(None, valid=True),
        Switches(stateful_sets=False),
        RELEASE,
    ),
    "pod gone, machines switched off": (
        claim(MACHINE),
        Witness(None, valid=True),
        Switches(virtual_machines=False),
        RELEASE,
    ),
    "pod gone, stateful by name only": (claim(FOREIGN), Witness(None, valid=True), Switches(), RELEASE),
    "pod gone, stateful and not retained": (
        claim(STATEFUL, labelled=False),
        Witness(None, valid=True),
        Switches(),
        RELEASE,
    ),
    "pod gone, its containers perhaps not": (claim(), Witness(None, gone_until=SOON), Switches(), LATER),
    "pod gone, stateful, invalid, its containers perhaps not": (
        claim(STATEFUL),
        Witness(None, gone_until=SOON),
        Switches(),
        LATER,
    ),
    "pod gone, its containers too": (claim(), Witness(None, gone_until=NOW), Switches(), RELEASE),
    "uid differs, stateful, successor is up without it, its containers perhaps not": (
        claim(STATEFUL),
        Witness(None, pod(uid=OTHER), gone_until=SOON, valid=True),
        Switches(),
        LATER,
    ),
    "uid differs, stateless": (claim(), Witness(None, pod(uid=OTHER)), Switches(), RELEASE),
    "uid differs, stateful, successor starts": (
        claim(STATEFUL),
        Witness(None, pod("Pending", ips=False, uid=OTHER), valid=True),
        Switches(),
        KEEP,
    ),
    "uid differs, stateful, successor is up without it": (
        claim(STATEFUL),
        Witness(None, pod(uid=OTHER), valid=True),
        Switches(),
        RELEASE,
    ),
    "uid differs, stateful, successor goes": (
        claim(STATEFUL),
        Witness(None, pod(uid=OTHER, deletionTimestamp=ago(seconds=0)), valid=True),
        Switches(),
        KEEP,
    ),
    "running": (claim(), Witness(pod(), node=READY), Switches(), KEEP),
    "running, node lost": (claim(), Witness(pod(), node=LOST), RUNNING_TOO, KEEP),
    "running, node gone": (claim(), Witness(pod(), node=GONE), Switches(), KEEP),
    "running, stateful, invalid": (claim(STATEFUL), Witness(pod(), node=READY), Switches(), KEEP),
    "pending": (claim(), Witness(pod("Pending", ips=False), node=READY), RUNNING_TOO, KEEP),
    "unknown phase without addresses": (claim(), Witness(pod("Unknown", ips=False), node=LOST), RUNNING_TOO, KEEP),
    "running without addresses": (claim(), Witness(pod(ips=False), node=LOST), Switches(), KEEP),
    "running without addresses, switch, ready": (claim(), Witness(pod(ips=False), node=READY), RUNNING_TOO, KEEP),
    "running without addresses, switch, lost": (claim(), Witness(pod(ips=False), node=LOST), RUNNING_TOO, RELEASE),
    "running without addresses, switch, gone": (claim(), Witness(pod(ips=False), node=GONE), RUNNING_TOO, RELEASE),
    "running without addresses, switch, stateful": (
        claim(STATEFUL),
        Witness(pod(ips=False), node=LOST, valid=True),
        RUNNING_TOO,
        KEEP,
    ),
    "terminating, in its grace period": (claim(), Witness(leaving(since=-10), node=READY), Switches(), LATER),
    "terminating, no addresses any more": (
        claim(),
        Witness(leaving(since=-10, ips=False), node=READY),
        Switches(),
        LATER,
    ),
    "terminating, in the teardown": (claim(), Witness(leaving(since=29), node=READY), Switches(), LATER),
    "terminating, past it": (claim(), Witness(leaving(since=30), node=READY), Switches(), RELEASE),
    "terminating, past it, pending": (claim(), Witness(leaving("Pending", since=30), node=READY), Switches(), RELEASE),
    "terminating, past it, node lost": (claim(), Witness(leaving(since=30), node=LOST), Switches(), RELEASE),
    "terminating, past it, node gone": (claim(), Witness(leaving(since=30), node=GONE), Switches(), RELEASE),
    "terminating, past it, left to kubelet": (claim(), Witness(leaving(since=30), node=READY), LEAVE_TO_KUBELET, KEEP),
    "terminating, past it, left to kubelet, lost": (
        claim(),
        Witness(leaving(since=30), node=LOST),
        LEAVE_TO_KUBELET,
        RELEASE,
    ),
    "terminating, past it, left to its return": (claim(), Witness(leaving(since=30), node=LOST), LEAVE_TO_RETURN, KEEP),
    "terminating, past it, left to its return, gone": (
        claim(),
        Witness(leaving(since=30), node=GONE),
        LEAVE_TO_RETURN,
        KEEP,
    ),
    "terminating, past it, left to its return, ready": (
        claim(),
        Witness(leaving(since=30), node=READY),
        LEAVE_TO_RETURN,
        RELEASE,
    ),
    "terminating, longer delay": (
        claim(),
        Witness(leaving(since=30), node=READY),
        Switches(delay=timedelta(seconds=90)),
        LATER,
    ),
    "terminating, stateful, valid": (
        claim(STATEFUL),
        Witness(leaving(since=600), node=READY, valid=True),
        Switches(),
        KEEP,
    ),
    "terminating, stateful, invalid": (claim(STATEFUL), Witness(leaving(since=30), node=READY), Switches(), RELEASE),
    "terminating, stateful, invalid, in its grace period": (
        claim(STATEFUL),
        Witness(leaving(since=-1, ips=False), node=READY),
        Switches(),
        LATER,
    ),
    "succeeded, just now": (claim(), Witness(done("Succeeded", since=5), node=READY), Switches(), LATER),
    "succeeded, past the grace period": (
        claim(),
        Witness(done("Succeeded", since=90), node=READY),
        Switches(),
        RELEASE,
    ),
    "failed, past the grace period": (claim(), Witness(done("Failed", since=90), node=READY), Switches(), RELEASE),
    "failed, node lost": (claim(), Witness(done("Failed", since=90), node=LOST), Switches(), RELEASE),
    "failed, left to kubelet": (claim(), Witness(done("Failed", since=90), node=READY), LEAVE_TO_KUBELET, KEEP),
    "evicted, tells nothing": (claim(), Witness(pod("Failed", ips=False), node=READY), Switches(), RELEASE),
    "succeeded, stateful, valid": (
        claim(STATEFUL),
        Witness(done("Succeeded", since=900), node=READY, valid=True),
        Switches(),
        KEEP,
    ),
    "failed, stateful, invalid": (claim(STATEFUL), Witness(done("Failed", since=90), node=READY), Switches(), RELEASE),
    "finished long ago, deleted just now": (
        claim(),
        Witness(done("Succeeded", since=900, deletionTimestamp=ago(seconds=-30)), node=READY),
        Switches(),
        RELEASE,
    ),
    "container, node there": (claim(podUID="", containerID="c", node="n"), Witness(None, node=LOST), Switches(), KEEP),
    "container, node just missed": (claim(podUID="", containerID="c", node="n"), Witness(None), Switches(), LATER),
    "container, node missed for long": (
        claim(podUID="", containerID="c", node="n"),
        Witness(None, node_missing_since=NOW - timedelta(seconds=300)),
        Switches(),
        RELEASE,
    ),
    "static pod, its mirror is there": (claim(NODE, labelled=False), Witness(mirror(), node=READY), Switches(), KEEP),
    "static pod, somebody deletes its mirror": (
        claim(NODE, labelled=False),
        Witness(mirror(deletionTimestamp=ago(seconds=900), deletionGracePeriodSeconds=30), node=READY),
        Switches(),
        KEEP,
    ),
    "static pod, somebody deletes its mirror, node lost": (
        claim(NODE, labelled=False),
        Witness(mirror(deletionTimestamp=ago(seconds=900), deletionGracePeriodSeconds=0), node=LOST),
        Switches(),
        KEEP,
    ),
    "static pod, its mirror is gone": (
        claim(NODE, labelled=False, node="n"),
        Witness(None, node=READY, gone_until=ago_moment(seconds=900)),
        Switches(),
        KEEP,
    ),
    "static pod, its mirror is another's": (
        claim(NODE, labelled=False, node="n"),
        Witness(None, mirror(of=OTHER), node=READY, gone_until=ago_moment(seconds=900)),
        Switches(),
        KEEP,
    ),
    "static pod, its mirror is gone, node lost": (
        claim(NODE, labelled=False, node="n"),
        Witness(None, node=LOST, gone_until=ago_moment(seconds=900)),
        Switches(),
        KEEP,
    ),
    "static pod, its mirror is gone, node just missed": (
        claim(NODE, labelled=False, node="n"),
        Witness(None, gone_until=ago_moment(seconds=900)),
        Switches(),
        LATER,
    ),
    "static pod, its mirror is gone, node missed for long": (
        claim(NODE, labelled=False, node="n"),
        Witness(None, node_missing_since=NOW - timedelta(seconds=300)),
        Switches(),
        RELEASE,
    ),
    "static pod, finished": (
        claim(NODE, labelled=False),
        Witness(done("Succeeded", since=90, annotations={MIRROR: UID}), node=READY),
        Switches(),
        RELEASE,
    ),
    "container, no node": (claim(podUID="", containerID="c"), Witness(None), Switches(), KEEP),
    "neither pod nor container": (claim(podUID="", node="n"), Witness(None), Switches(), KEEP),
    "in quarantine": (
        claim(podUID="", state="Quarantined", quarantine={"reason": "r", "mac": "m", "until": ago(seconds=-1)}),
        Witness(None),
        Switches(),
        LATER,
    ),
    "quarantine over": (
        claim(podUID="", state="Quarantined", quarantine={"reason": "r", "mac": "m", "until": ago(seconds=0)}),
        Witness(None),
        Switches(),
        RELEASE,
    ),
    "quarantine without an end": (claim(podUID="", state="Quarantined"), Witness(None), Switches(), KEEP),
}


@pytest.mark.parametrize("row", ROWS)
def test_matrix(row: str) -> None:
    held, witness, switches, expected = ROWS[row]
    verdict = judge(held, witness, switches, NOW)
    assert verdict.action is expected, verdict
    assert (verdict.at is not None and verdict.at > NOW) == (expected is LATER)
    assert verdict.reason


def test_the_grace_period_is_waited_for_once() -> None:
    """deletionTimestamp is the end of the grace period; upstream adds the period to it once more."""
    verdict = judge(claim(), Witness(leaving(since=-20), node=READY), Switches(), NOW)
    assert verdict.at == NOW + timedelta(seconds=20) + DELAY


def test_how_long_containers_may_outlive_their_pod() -> None:
    """A kubelet gives what was removed by force the pod's grace period, of 60 s here."""
    soon = NOW + timedelta(seconds=60) + DELAY
    assert outlived_until(pod(), Switches(), NOW) == soon
    assert outlived_until(pod("Pending", ips=False), Switches(), NOW) == soon
    assert outlived_until(leaving(since=-20), Switches(), NOW) == NOW + timedelta(seconds=20) + DELAY
    assert outlived_until(done("Failed", since=7), Switches(), NOW) == NOW
    given_up = pod("Failed", status={"conditions": [{"lastTransitionTime": ago(seconds=4)}]})  # by the control plane
    assert outlived_until(given_up, Switches(), NOW) == NOW + timedelta(seconds=60 - 4) + DELAY
    forced = pod(deletionTimestamp=ago(seconds=0), deletionGracePeriodSeconds=0)
    assert outlived_until(forced, Switches(), NOW) == soon
    nowhere = msgspec.structs.replace(pod(), spec=PodSpec())
    assert outlived_until(nowhere, Switches(), NOW) == NOW


def test_when_a_pod_has_finished() -> None:
    assert finished_at(pod()) is None
    assert finished_at(done("Failed", since=7)) == NOW - timedelta(seconds=7)
    evicted = pod("Failed", status={"conditions": [{"lastTransitionTime": ago(seconds=4)}, {}]})
    assert finished_at(evicted) == NOW - timedelta(seconds=4)
    assert finished_at(pod("Failed")) == NOW - timedelta(days=1)
    verdict = judge(claim(), Witness(done("Failed", since=7), node=READY), Switches(), NOW)
    assert verdict.at == NOW + timedelta(seconds=60 - 7) + DELAY


def test_whose_workload_a_claim_waits_for() -> None:
    assert workload_key(claim(STATEFUL)) == ("ns", "StatefulSet", "db")
    assert workload_key(claim(MACHINE)) == ("ns", "VirtualMachineInstance", "vm")
    assert workload_key(claim(FOREIGN)) is workload_key(claim()) is workload_key(claim(workload=None)) is None
    assert workload_key(claim(STATEFUL, labelled=False)) is None
    assert not is_static(claim(workload=None), Switches())


moments = st.integers(-7200, 7200).map(lambda seconds: (NOW + timedelta(seconds=seconds)).isoformat())
phases = st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown", ""])


@st.composite
def pods(draw: st.DrawFn, uid: str) -> Pod:
    meta: dict[str, Any] = {}
    if draw(st.booleans()):
        meta["deletionTimestamp"] = draw(moments)
        meta["deletionGracePeriodSeconds"] = draw(st.integers(0, 600))
    if draw(st.booleans()):
        meta["annotations"] = {MIRROR: uid}
    ended = [{"name": "c", "state": {"terminated": {"finishedAt": end}}} for end in draw(st.lists(moments, max_size=2))]
    status = {
        "containerStatuses": ended,
        "conditions": [{"lastTransitionTime": at} for at in draw(st.lists(moments, max_size=2))],
    }
    return pod(draw(phases), ips=draw(st.booleans()), uid=uid, status=status, **meta)


claims = st.builds(
    lambda controller, labelled, state, uid, container: claim(
        controller,
        labelled=labelled,
        podUID=uid,
        containerID=container,
        node="n",
        **(
            {"state": state, "quarantine": {"reason": "r", "mac": "m", "until": ago(seconds=-60)}}
            if state == "Quarantined"
            else {}
        ),
    ),
    st.sampled_from([None, STATEFUL, MACHINE, FOREIGN, NODE]),
    st.booleans(),
    st.sampled_from(["Allocated", "Allocated", "Quarantined"]),
    st.sampled_from([UID, UID, ""]),
    st.sampled_from(["", "c1"]),
)
switches = st.builds(
    Switches,
    stateful_sets=st.booleans(),
    virtual_machines=st.booleans(),
    ended_on_ready_node=st.booleans(),
    ended_on_lost_node=st.booleans(),
    delay=st.integers(0, 60).map(lambda seconds: timedelta(seconds=seconds)),
)
witnesses = st.builds(
    Witness,
    pod=st.none() | pods(UID),
    namesake=st.none() | pods(OTHER),
    node=st.sampled_from([READY, LOST, GONE]),
    node_missing_since=st.none() | st.integers(0, 900).map(lambda seconds: NOW - timedelta(seconds=seconds)),
    gone_until=st.none() | st.integers(-60, 60).map(lambda seconds: NOW + timedelta(seconds=seconds)),
    valid=st.booleans(),
)


def in_use(held: Claim, witness: Witness) -> bool:
    """What design says, in other words than the code's: the pod is there, and neither at its end nor out of grace.

    What only its node knows of is in use as long as there is a node; and who deletes a mirror ends nothing.
    """
    if held.spec.state == "Quarantined":
        return True  # until its end, which no example reaches
    if not held.spec.pod_uid:
        return witness.node is not None
    controller = held.spec.workload.controller if held.spec.workload else None
    if witness.pod is None and controller is not None and controller.kind == "Node":
        return witness.node is not None
    if witness.pod is None:
        return witness.gone_until is not None and witness.gone_until > NOW
    if witness.pod.status.phase in ("Succeeded", "Failed"):
        return False
    deletion = witness.pod.metadata.deletion_timestamp
    return deletion is None or deletion > NOW or MIRROR in witness.pod.metadata.annotations


@given(claims, witnesses, switches)
def test_nothing_in_use_is_released(held: Claim, witness: Witness, allowed: Switches) -> None:
    verdict = judge(held, witness, allowed, NOW)
    assert verdict.action is not RELEASE or not in_use(held, witness), verdict


@given(claims, witnesses, switches)
def test_who_is_to_be_looked_at_again_is_settled_then(held: Claim, witness: Witness, allowed: Switches) -> None:
    """No claim waits for ever: at the time named, and with nothing changed, the decision is made."""

    def later(verdict: Verdict) -> bool:
        return verdict.action is LATER

    first = judge(held, witness, allowed, NOW)
    if later(first):
        assert first.at is not None
        missed = witness.node_missing_since or NOW
        then = replace(witness, node_missing_since=missed)
        assert not later(judge(held, then, allowed, first.at))
