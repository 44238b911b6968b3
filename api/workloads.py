"""What is known of pods' controllers without asking anybody: who is alive, whose addresses outlive their pods. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from api.apps import (
    CronJob,
    DaemonSet,
    Deployment,
    Job,
    JobSpec,
    ReplicaSet,
    StatefulSet,
    VirtualMachine,
    VirtualMachineInstance,
    controller_of,
)
from api.claim import Controller
from api.core import Pod
from api.meta import Resource
from api.mirror import is_mirror

Scalable = Deployment | ReplicaSet | StatefulSet | DaemonSet | Job | CronJob

NATIVE_VERSIONS = frozenset({"v1", "apps/v1", "batch/v1"})
"""apiVersions of the controllers that are Kubernetes' own; all others are third parties'."""

_STATEFUL_SET = (StatefulSet.TYPE.api_version, StatefulSet.TYPE.kind)
_VMI = (VirtualMachineInstance.TYPE.api_version, VirtualMachineInstance.TYPE.kind)
_JUDGES: dict[str, tuple[type[Resource], ...]] = {
    StatefulSet.TYPE.kind: (StatefulSet,),
    VirtualMachineInstance.TYPE.kind: (VirtualMachineInstance, VirtualMachine),
}
_ORDINAL = re.compile(r"0|[1-9][0-9]{0,9}")


def is_alive(pod: Pod) -> bool:
    """Whether the pod may have addresses: it is not terminating, and will run (again).

    Who deletes a mirror deletes no pod.
    """
    if pod.metadata.deletion_timestamp is not None and not is_mirror(pod):
        return False
    phase, policy = pod.status.phase, pod.spec.restart_policy
    if phase == "Succeeded":
        return policy == "Always"
    return not (phase == "Failed" and (policy == "Never" or pod.status.reason == "Evicted"))


def is_stateful_set(controller: Controller) -> bool:
    """Whether it is Kubernetes' own StatefulSet; third parties' of the same name are stateless here."""
    return (controller.api_version, controller.kind) == _STATEFUL_SET


def is_virtual_machine(controller: Controller) -> bool:
    """Whether it is a KubeVirt VirtualMachineInstance."""
    return (controller.api_version, controller.kind) == _VMI


def static_name(pod_name: str, controller: Controller, *, stateful_sets: bool, virtual_machines: bool) -> str:
    """The name under which the addresses outlive the pod; empty if they do not.

    `stateful_sets` and `virtual_machines` tell for which of them that is switched on. A virtual machine's pods have
    random names, so its addresses go by the VirtualMachineInstance's.
    """
    if stateful_sets and is_stateful_set(controller):
        return pod_name
    return controller.name if virtual_machines and is_virtual_machine(controller) else ""


def is_third_party(controller: Controller) -> bool:
    """Whether nothing is known of the controller but its name."""
    return controller.api_version not in NATIVE_VERSIONS


def ordinal(pod_name: str, stateful_set: str) -> int | None:
    """The number in `<stateful set>-<number>`; None if the pod is not called so."""
    head, dash, number = pod_name.rpartition("-")
    return int(number) if dash and head == stateful_set and _ORDINAL.fullmatch(number) else None


def judges_of(kind: str) -> tuple[type[Resource], ...]:
    """The kinds of the objects that tell whether a workload of that kind, whose addresses outlive its pods, will have a
    pod again. All have the workload's name and namespace.
    """
    return _JUDGES.get(kind, ())


def will_have_again(pod_name: str, found: Sequence[Resource | None], node: str = "") -> bool:
    """Whether the workload has, or will have, a pod that takes over the addresses of one called `pod_name`.

    `found` are the objects of `judges_of`, in that order, None for what is gone; `node` is the one that a claim on the
    addresses names.
    """
    match found:
        case [StatefulSet() as stateful_set]:
            return _has_pod(pod_name, stateful_set)
        case [VirtualMachineInstance() | None as instance, VirtualMachine() | None as machine]:
            return _goes_on(instance, machine, node)
    return False


def _has_pod(pod_name: str, stateful_set: StatefulSet) -> bool:
    """Whether the StatefulSet has or will have a pod of that name (again)."""
    number = ordinal(pod_name, stateful_set.metadata.name)
    spec = stateful_set.spec
    start = spec.ordinals.start if spec.ordinals else 0
    # Absent replicas are 1, as the API server has it: an address is kept in doubt.
    return number is not None and start <= number < start + (1 if spec.replicas is None else spec.replicas)


def _goes_on(instance: VirtualMachineInstance | None, machine: VirtualMachine | None, node: str = "") -> bool:
    """Whether a virtual machine runs or can be started again; both objects have its name, None for what is gone.

    One that is being deleted is not valid, unless it still runs on another node than `node`, that of its claim: the
    target of a live migration got the claim, and the migration failed. The source's end is its own, which the end of
    the target's pod says nothing about.
    """
    leaving = instance is not None and instance.metadata.deletion_timestamp is not None
    if instance is not None and not leaving:
        return True
    if instance is not None:
        status = instance.status
        if node and status.node_name not in ("", node) and status.phase not in ("Succeeded", "Failed"):
            return True
        owner = controller_of(instance.metadata)
        if owner is None or owner.kind != VirtualMachine.TYPE.kind:
            return False
    return machine is not None and machine.metadata.deletion_timestamp is None


def replicas(application: Scalable) -> int:
    """How many pods the application is meant to have."""
    if isinstance(application, DaemonSet):
        return application.status.desired_number_scheduled
    if isinstance(application, CronJob):
        return _parallel(application.spec.job_template.spec)
    if isinstance(application, Job):
        return _parallel(application.spec)
    return application.spec.replicas or 0


def _parallel(job: JobSpec) -> int:
    """Completions if set, else parallelism, else 1; 0 counts as 1."""
    number = job.parallelism if job.completions is None else job.completions
    return number or 1
