"""Who is alive, whose addresses stay, and how many pods an application has."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from api.apps import (
    CronJob,
    CronJobSpec,
    DaemonSet,
    DaemonSetStatus,
    Deployment,
    Job,
    JobSpec,
    JobTemplate,
    Ordinals,
    ScaledSpec,
    StatefulSet,
    StatefulSetSpec,
    VirtualMachine,
    VirtualMachineInstance,
    VirtualMachineInstanceStatus,
)
from api.claim import Controller
from api.core import Pod, PodSpec, PodStatus
from api.meta import ObjectMeta, OwnerReference
from api.pool import LabelSelector, Requirement
from api.selectors import keys, matches
from api.workloads import (
    Scalable,
    is_alive,
    is_third_party,
    judges_of,
    ordinal,
    replicas,
    static_name,
    will_have_again,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GOING = ObjectMeta(name="x", deletion_timestamp=NOW)
THERE = ObjectMeta(name="x")


@pytest.mark.parametrize(
    ("phase", "policy", "reason", "alive"),
    [
        ("Pending", "Always", "", True),
        ("Running", "Never", "", True),
        ("Succeeded", "Always", "", True),
        ("Succeeded", "OnFailure", "", False),
        ("Succeeded", "Never", "", False),
        ("Failed", "Always", "", True),
        ("Failed", "OnFailure", "", True),
        ("Failed", "Never", "", False),
        ("Failed", "Always", "Evicted", False),
        ("Unknown", "Always", "", True),
    ],
)
def test_a_pod_is_alive_while_it_will_run(phase: str, policy: str, reason: str, alive: bool) -> None:
    spec, status = PodSpec(restart_policy=policy), PodStatus(phase=phase, reason=reason)
    assert is_alive(Pod(metadata=THERE, spec=spec, status=status)) is alive
    assert not is_alive(Pod(metadata=GOING, spec=spec, status=status))


def controller(kind: str, api_version: str = "apps/v1") -> Controller:
    return Controller(api_version=api_version, kind=kind, name="top", uid="u")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (controller("StatefulSet"), "top-0"),
        (controller("StatefulSet", "apps.kruise.io/v1beta1"), ""),
        (controller("VirtualMachineInstance", "kubevirt.io/v1"), "top"),
        (controller("VirtualMachineInstance", "kubevirt.io/v1alpha3"), ""),
        (controller("Deployment"), ""),
        (controller("Pod", "v1"), ""),
    ],
)
def test_addresses_outlive_pods_under_a_name(owner: Controller, name: str) -> None:
    assert static_name("top-0", owner, stateful_sets=True, virtual_machines=True) == name
    assert static_name("top-0", owner, stateful_sets=False, virtual_machines=False) == ""


def test_third_parties_are_those_of_other_groups() -> None:
    assert is_third_party(controller("StatefulSet", "apps.kruise.io/v1beta1"))
    assert not any(is_third_party(controller("X", version)) for version in ("v1", "apps/v1", "batch/v1"))


@pytest.mark.parametrize(
    ("pod", "name", "number"),
    [("a-0", "a", 0), ("a-b-12", "a-b", 12), ("a-b-1", "a", None), ("a-01", "a", None), ("a-", "a", None),
     ("a", "a", None), ("b-1", "a", None), ("a--1", "a", None), ("a-1x", "a", None), ("a-٣", "a", None)],
)  # fmt: skip
def test_ordinals(pod: str, name: str, number: int | None) -> None:
    assert ordinal(pod, name) == number


@pytest.mark.parametrize(
    ("pod", "replicas_", "start", "valid"),
    [("x-0", 1, None, True), ("x-1", 1, None, False), ("x-0", None, None, True), ("x-0", 0, None, False),
     ("x-5", 2, 5, True), ("x-6", 2, 5, True), ("x-7", 2, 5, False), ("x-4", 2, 5, False), ("y-0", 9, None, False)],
)  # fmt: skip
def test_stateful_pods_are_valid_by_their_number(
    pod: str, replicas_: int | None, start: int | None, valid: bool
) -> None:
    ordinals = None if start is None else Ordinals(start=start)
    there = StatefulSet(metadata=THERE, spec=StatefulSetSpec(replicas=replicas_, ordinals=ordinals))
    assert will_have_again(pod, [there]) is valid
    assert not will_have_again(pod, [None])
    assert not will_have_again(pod, [])
    assert judges_of("StatefulSet") == (StatefulSet,)


def instance(meta: ObjectMeta, *, owned: bool = False) -> VirtualMachineInstance:
    owner = OwnerReference(api_version="kubevirt.io/v1", kind="VirtualMachine", name="x", uid="u", controller=True)
    owners = [owner] if owned else []
    return VirtualMachineInstance(
        metadata=ObjectMeta(name="x", deletion_timestamp=meta.deletion_timestamp, owner_references=owners)
    )


@pytest.mark.parametrize(
    ("vmi", "machine", "valid"),
    [
        (instance(THERE), None, True),
        (instance(GOING), THERE, False),
        (instance(GOING, owned=True), THERE, True),
        (instance(GOING, owned=True), GOING, False),
        (instance(GOING, owned=True), None, False),
        (None, THERE, True),
        (None, GOING, False),
        (None, None, False),
    ],
)
def test_virtual_machines_are_valid(
    vmi: VirtualMachineInstance | None, machine: ObjectMeta | None, valid: bool
) -> None:
    assert will_have_again("x", [vmi, VirtualMachine(metadata=machine) if machine else None]) is valid
    assert judges_of("VirtualMachineInstance") == (VirtualMachineInstance, VirtualMachine)


@pytest.mark.parametrize(
    ("claimed_on", "runs_on", "phase", "valid"),
    [
        ("target", "source", "Running", True),  # a migration to there failed, and the source is being shut down
        ("source", "source", "Running", False),
        ("target", "source", "Succeeded", False),
        ("target", "", "Scheduling", False),
        ("", "source", "Running", False),
    ],
)
def test_a_failed_migration_leaves_the_address_with_the_source(
    claimed_on: str, runs_on: str, phase: str, valid: bool
) -> None:
    status = VirtualMachineInstanceStatus(node_name=runs_on, phase=phase)
    leaving = VirtualMachineInstance(metadata=GOING, status=status)
    assert will_have_again("x", [leaving, None], claimed_on) is valid


def job(**spec: Any) -> Job:
    return Job(metadata=THERE, spec=JobSpec(**spec))


@pytest.mark.parametrize(
    ("application", "number"),
    [
        (Deployment(metadata=THERE, spec=ScaledSpec(replicas=3)), 3),
        (Deployment(metadata=THERE), 0),
        (StatefulSet(metadata=THERE, spec=StatefulSetSpec(replicas=2)), 2),
        (DaemonSet(metadata=THERE, status=DaemonSetStatus(desired_number_scheduled=4)), 4),
        (job(), 1),
        (job(parallelism=5), 5),
        (job(parallelism=0), 1),
        (job(parallelism=5, completions=2), 2),
        (job(parallelism=5, completions=0), 1),
        (CronJob(metadata=THERE, spec=CronJobSpec(job_template=JobTemplate(spec=JobSpec(completions=6)))), 6),
    ],
)
def test_replicas(application: Scalable, number: int) -> None:
    assert replicas(application) == number


@pytest.mark.parametrize(
    ("operator", "values", "labels", "holds"),
    [
        ("In", ["a", "b"], {"k": "a"}, True),
        ("In", ["a", "b"], {"k": "c"}, False),
        ("In", ["a"], {}, False),
        ("NotIn", ["a"], {"k": "b"}, True),
        ("NotIn", ["a"], {"k": "a"}, False),
        ("NotIn", ["a"], {}, True),
        ("Exists", None, {"k": ""}, True),
        ("Exists", None, {}, False),
        ("DoesNotExist", None, {}, True),
        ("DoesNotExist", None, {"k": "a"}, False),
    ],
)
def test_selectors(operator: str, values: list[str] | None, labels: dict[str, str], holds: bool) -> None:
    selector = LabelSelector(match_expressions=[Requirement(key="k", operator=operator, values=values)])
    assert matches(selector, labels) is holds
    both = LabelSelector(match_labels={"x": "y"}, match_expressions=selector.match_expressions)
    assert matches(both, labels) is False
    assert matches(both, {**labels, "x": "y"}) is holds
    assert keys(both) == {"k", "x"}
    assert matches(LabelSelector(), labels)
