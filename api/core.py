"""Kubernetes' own objects as far as this project reads them: pods, namespaces and nodes.

All are partial (`Kind.partial`): the members that nobody here reads are dropped on decoding, so the store refuses to
write them. Source: Kubernetes API reference, core/v1.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import Kind, Resource, Struct, Timestamp

READY = "Ready"
"""Type of the condition that tells whether a node works."""


class ResourceRequirements(Struct, frozen=True, kw_only=True):
    """`spec.containers[].resources`."""

    limits: dict[str, str | int] | None = None
    requests: dict[str, str | int] | None = None


class Container(Struct, frozen=True, kw_only=True):
    """`spec.containers[]`."""

    name: str
    resources: ResourceRequirements = ResourceRequirements()


class PodSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Pod."""

    node_name: str = ""
    """Empty until the pod is scheduled."""
    host_network: bool = False
    restart_policy: str = "Always"
    termination_grace_period_seconds: int | None = None
    containers: list[Container] = field(default_factory=list)


class PodIP(Struct, frozen=True, kw_only=True):
    """`status.podIPs[]`."""

    ip: str = ""


class ContainerStateTerminated(Struct, frozen=True, kw_only=True):
    """`status.containerStatuses[].state.terminated`."""

    finished_at: Timestamp | None = None


class ContainerState(Struct, frozen=True, kw_only=True):
    """`status.containerStatuses[].state`."""

    terminated: ContainerStateTerminated | None = None


class ContainerStatus(Struct, frozen=True, kw_only=True):
    """`status.containerStatuses[]`."""

    name: str = ""
    state: ContainerState = ContainerState()


class PodCondition(Struct, frozen=True, kw_only=True):
    """`status.conditions[]` of a Pod, of which only the time is of interest."""

    last_transition_time: Timestamp | None = None


class PodStatus(Struct, frozen=True, kw_only=True):
    """`status` of a Pod."""

    phase: str = ""
    """Pending, Running, Succeeded, Failed or Unknown."""
    reason: str = ""
    pod_ips: list[PodIP] = field(default_factory=list, name="podIPs")
    container_statuses: list[ContainerStatus] = field(default_factory=list)
    conditions: list[PodCondition] = field(default_factory=list)


class Pod(Resource, frozen=True, kw_only=True):
    """A pod."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Pod", "pods", namespaced=True, status_subresource=True, partial=True)
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class Namespace(Resource, frozen=True, kw_only=True):
    """A namespace, of which only labels and annotations are of interest."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Namespace", "namespaces", namespaced=False, partial=True)


class NodeCondition(Struct, frozen=True, kw_only=True):
    """`status.conditions[]` of a Node."""

    type: str
    status: str


class NodeStatus(Struct, frozen=True, kw_only=True):
    """`status` of a Node."""

    conditions: list[NodeCondition] = field(default_factory=list)


class Node(Resource, frozen=True, kw_only=True):
    """A node."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Node", "nodes", namespaced=False, partial=True)
    status: NodeStatus = NodeStatus()

    @property
    def ready(self) -> bool:
        """Whether the condition Ready is True."""
        return any(c.type == READY and c.status == "True" for c in self.status.conditions)


class ConfigMap(Resource, frozen=True, kw_only=True):
    """A config map's text data."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "ConfigMap", "configmaps", namespaced=True, partial=True)
    data: dict[str, str] = field(default_factory=dict)
