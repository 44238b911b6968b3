"""SpiderIPPool: a named set of addresses of one subnet, and who may use it."""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import field

from api.meta import GROUP, VERSION, Kind, Resource, Struct

IPVersion = Literal[4, 6]


class Route(Struct, frozen=True, kw_only=True):
    """A route that pods of the pool get: `dst` is a CIDR, `gw` an address of the same family."""

    dst: str
    gw: str


class Requirement(Struct, frozen=True, kw_only=True):
    """One expression of a label selector (metav1.LabelSelectorRequirement)."""

    key: str
    operator: str
    values: list[str] | None = None


class LabelSelector(Struct, frozen=True, kw_only=True):
    """metav1.LabelSelector: all members must match; an empty selector matches everything."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None


class PoolSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderIPPool; `ipVersion` and `subnet` are immutable."""

    subnet: str
    ip_version: IPVersion | None = None
    ips: list[str] | None = None
    exclude_ips: list[str] | None = field(default=None, name="excludeIPs")
    gateway: str | None = None
    routes: list[Route] | None = None
    pod_affinity: LabelSelector | None = None
    namespace_affinity: LabelSelector | None = None
    namespace_name: list[str] | None = None
    node_affinity: LabelSelector | None = None
    node_name: list[str] | None = None
    multus_name: list[str] | None = None
    default: bool | None = None
    disable: bool | None = None


class PoolStatus(Struct, frozen=True, kw_only=True):
    """A view of the pool's claims. No decision reads it."""

    allocated_ips: str | None = field(default=None, name="allocatedIPs")
    total_ip_count: int | None = field(default=None, name="totalIPCount")
    allocated_ip_count: int | None = field(default=None, name="allocatedIPCount")


class Pool(Resource, frozen=True, kw_only=True):
    """SpiderIPPool."""

    TYPE: ClassVar[Kind] = Kind(
        GROUP, VERSION, "SpiderIPPool", "spiderippools", namespaced=False, short="sp", status_subresource=True
    )
    spec: PoolSpec
    status: PoolStatus | None = None
