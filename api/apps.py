"""Controllers of pods as far as this project reads them. All are partial, as in `api.core`.

Source: Kubernetes API reference, apps/v1 and batch/v1; KubeVirt API reference, kubevirt.io/v1.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.core import PodSpec
from api.meta import Kind, ObjectMeta, OwnerReference, Resource, Struct


class TemplateMeta(Struct, frozen=True, kw_only=True):
    """`metadata` of a pod template."""

    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


class PodTemplate(Struct, frozen=True, kw_only=True):
    """`spec.template`."""

    metadata: TemplateMeta = TemplateMeta()
    spec: PodSpec = PodSpec()


class ScaledSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Deployment or ReplicaSet."""

    replicas: int | None = None
    template: PodTemplate = PodTemplate()


class Ordinals(Struct, frozen=True, kw_only=True):
    """`spec.ordinals` of a StatefulSet."""

    start: int = 0


class StatefulSetSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a StatefulSet."""

    replicas: int | None = None
    ordinals: Ordinals | None = None
    template: PodTemplate = PodTemplate()


class DaemonSetSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a DaemonSet."""

    template: PodTemplate = PodTemplate()


class DaemonSetStatus(Struct, frozen=True, kw_only=True):
    """`status` of a DaemonSet."""

    desired_number_scheduled: int = 0


class JobSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Job."""

    parallelism: int | None = None
    completions: int | None = None
    template: PodTemplate = PodTemplate()


class JobTemplate(Struct, frozen=True, kw_only=True):
    """`spec.jobTemplate` of a CronJob."""

    spec: JobSpec = JobSpec()


class CronJobSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a CronJob."""

    job_template: JobTemplate = JobTemplate()


class Deployment(Resource, frozen=True, kw_only=True):
    """A Deployment."""

    TYPE: ClassVar[Kind] = Kind("apps", "v1", "Deployment", "deployments", namespaced=True, partial=True)
    spec: ScaledSpec = ScaledSpec()


class ReplicaSet(Resource, frozen=True, kw_only=True):
    """A ReplicaSet."""

    TYPE: ClassVar[Kind] = Kind("apps", "v1", "ReplicaSet", "replicasets", namespaced=True, partial=True)
    spec: ScaledSpec = ScaledSpec()


class StatefulSet(Resource, frozen=True, kw_only=True):
    """A StatefulSet."""

    TYPE: ClassVar[Kind] = Kind("apps", "v1", "StatefulSet", "statefulsets", namespaced=True, partial=True)
    spec: StatefulSetSpec = StatefulSetSpec()


class DaemonSet(Resource, frozen=True, kw_only=True):
    """A DaemonSet."""

    TYPE: ClassVar[Kind] = Kind("apps", "v1", "DaemonSet", "daemonsets", namespaced=True, partial=True)
    spec: DaemonSetSpec = DaemonSetSpec()
    status: DaemonSetStatus = DaemonSetStatus()


class Job(Resource, frozen=True, kw_only=True):
    """A Job."""

    TYPE: ClassVar[Kind] = Kind("batch", "v1", "Job", "jobs", namespaced=True, partial=True)
    spec: JobSpec = JobSpec()


class CronJob(Resource, frozen=True, kw_only=True):
    """A CronJob."""

    TYPE: ClassVar[Kind] = Kind("batch", "v1", "CronJob", "cronjobs", namespaced=True, partial=True)
    spec: CronJobSpec = CronJobSpec()


class VirtualMachine(Resource, frozen=True, kw_only=True):
    """A KubeVirt VirtualMachine: only whether it is there."""

    TYPE: ClassVar[Kind] = Kind("kubevirt.io", "v1", "VirtualMachine", "virtualmachines", namespaced=True, partial=True)


class VirtualMachineInstanceStatus(Struct, frozen=True, kw_only=True):
    """`status` of a VirtualMachineInstance."""

    node_name: str = ""
    """Where it runs; during a live migration the source."""
    phase: str = ""
    """Pending, Scheduling, Scheduled, Running, Succeeded, Failed or Unknown."""


class VirtualMachineInstance(Resource, frozen=True, kw_only=True):
    """A KubeVirt VirtualMachineInstance: whether it is there, who owns it, and where it runs."""

    TYPE: ClassVar[Kind] = Kind(
        "kubevirt.io", "v1", "VirtualMachineInstance", "virtualmachineinstances", namespaced=True, partial=True
    )
    status: VirtualMachineInstanceStatus = VirtualMachineInstanceStatus()


class VirtualMachineInstanceMigration(Resource, frozen=True, kw_only=True):
    """A KubeVirt live migration: only whether it is there."""

    TYPE: ClassVar[Kind] = Kind(
        "kubevirt.io",
        "v1",
        "VirtualMachineInstanceMigration",
        "virtualmachineinstancemigrations",
        namespaced=True,
        partial=True,
    )


def controller_of(metadata: ObjectMeta) -> OwnerReference | None:
    """The owner that is the controller; None if there is none."""
    return next((owner for owner in metadata.owner_references if owner.controller), None)
