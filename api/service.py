"""The parts of Kubernetes' Service and EndpointSlice that the dataplane reads (never written by us)."""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import Kind, Resource, Struct

SERVICE_NAME_LABEL = "kubernetes.io/service-name"


class ServicePort(Struct, frozen=True, kw_only=True):
    """`spec.ports[]`. `target_port` is resolved by the EndpointSlice controller, we match by `name`."""

    port: int
    name: str = ""
    protocol: str = field(default="TCP")
    target_port: int | str | None = None
    node_port: int | None = None


class ServiceSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Service."""

    type: str = field(default="ClusterIP")
    cluster_ip: str | None = field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    ports: list[ServicePort] | None = None
    selector: dict[str, str] | None = None
    session_affinity: str | None = None


class Service(Resource, frozen=True, kw_only=True):
    """v1 Service."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Service", "services", namespaced=True, short="svc", status_subresource=True)
    spec: ServiceSpec


class EndpointConditions(Struct, frozen=True, kw_only=True):
    """`endpoints[].conditions`; absent means ready (discovery/v1)."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class SliceEndpoint(Struct, frozen=True, kw_only=True):
    """`endpoints[]`: one backend; the first address is the one to use."""

    addresses: list[str]
    conditions: EndpointConditions | None = None
    node_name: str | None = None


class SlicePort(Struct, frozen=True, kw_only=True):
    """`ports[]`."""

    port: int | None = None
    name: str = ""
    protocol: str = field(default="TCP")


class EndpointSlice(Resource, frozen=True, kw_only=True):
    """discovery.k8s.io/v1 EndpointSlice."""

    TYPE: ClassVar[Kind] = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", namespaced=True)
    address_type: str
    endpoints: list[SliceEndpoint] | None = None
    """null is written by Go for an empty list."""
    ports: list[SlicePort] | None = None
