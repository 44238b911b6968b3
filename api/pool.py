"""SpiderIPPool: a named set of addresses of one subnet, and who may use it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from api.condition import Condition
from api.meta import GROUP, VERSION, Kind, Resource, Struct

IPVersion = Literal[4, 6]
Count = Annotated[int, Meta(ge=0)]
OffByDefault = Annotated[bool | None, Meta(extra_json_schema={"default": False})]

LABEL_CIDR = "ipam.spidernet.io/ippool-cidr"
"""Label with the pool's subnet; `cidr_label` gives the value."""


ANNOTATION_CLAIMS = "ipam.spidernet.io/claims"
"""Annotation with which a pool says that claims are authoritative for it, and `status.allocatedIPs` a view of them.

A pool without it whose status has records was served by upstream last: those are the truth until they are adopted.
"""
CLAIMS_AUTHORITATIVE = "authoritative"
"""Its value."""

ANNOTATION_SCAN = "ipam.spidernet.io/scan-requested"
"""Annotation of any pool that asks the leading controller, whenever its value changes, to look at all claims."""


class Route(Struct, frozen=True, kw_only=True):
    """A route that pods of the pool get: `dst` is a CIDR, `gw` an address of the same family."""

    dst: str
    """Destination, a CIDR."""
    gw: str
    """Next hop, an address inside the subnet."""


class Requirement(Struct, frozen=True, kw_only=True):
    """One expression of a label selector (metav1.LabelSelectorRequirement)."""

    key: str
    """The label's key."""
    operator: str
    """In, NotIn, Exists or DoesNotExist."""
    values: list[str] | None = None
    """Required for In and NotIn, forbidden for the others."""


class LabelSelector(Struct, frozen=True, kw_only=True):
    """metav1.LabelSelector: all members must match; an empty selector matches everything."""

    match_labels: dict[str, str] | None = None
    """Labels that must be there with these values."""
    match_expressions: list[Requirement] | None = None
    """Expressions that must all hold."""


Selector = Annotated[LabelSelector | None, Meta(extra_json_schema={"x-kubernetes-map-type": "atomic"})]
"""Server-side apply replaces a selector as a whole: one merged of two would select what nobody asked for."""


class PoolSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderIPPool; `ipVersion` and `subnet` are immutable."""

    subnet: str
    """The network of the addresses, a CIDR in canonical form. Immutable."""
    ip_version: IPVersion | None = None
    """Address family; derived from `subnet`. Immutable."""
    ips: list[str] | None = None
    """Ranges to allocate from, `a` or `a-b`. Several are merged and sorted; may be empty."""
    exclude_ips: list[str] | None = field(default=None, name="excludeIPs")
    """Ranges taken out of `ips`."""
    gateway: str | None = None
    """Next hop of the default route; an address of the subnet outside the net ranges."""
    routes: list[Route] | None = None
    """Further routes that pods of the pool get."""
    pod_affinity: Selector = None
    """Only pods that match may use the pool; must not be empty."""
    namespace_affinity: Selector = None
    """Only pods of namespaces that match may use the pool; ignored beside `namespaceName`."""
    namespace_name: list[str] | None = None
    """Only pods of these namespaces may use the pool."""
    node_affinity: Selector = None
    """Only pods on nodes that match may use the pool; ignored beside `nodeName`."""
    node_name: list[str] | None = None
    """Only pods on these nodes may use the pool."""
    multus_name: list[str] | None = None
    """Only NICs of these NetworkAttachmentDefinitions may use the pool, each `namespace/name` or `name`."""
    default: OffByDefault = None
    """Used by pods that name no pool."""
    disable: OffByDefault = None
    """No new allocations; releases go on."""
    detect_ip_conflict: bool | None = field(default=None, name="detectIPConflict")
    """Ask the network whether somebody uses an address before a pod gets it; absent: as the cluster has it."""
    detect_gateway: bool | None = None
    """Refuse pods whose gateway does not answer; absent: as the cluster has it."""


class PoolStatus(Struct, frozen=True, kw_only=True):
    """A view of the pool's claims. No decision reads it."""

    allocated_ips: str | None = field(default=None, name="allocatedIPs")
    """JSON text, address to pod and pod UID; absent when empty or above 5000 addresses."""
    total_ip_count: Count | None = field(default=None, name="totalIPCount")
    """Addresses of `ips` without `excludeIPs`; no more than the largest int64."""
    allocated_ip_count: Count | None = field(default=None, name="allocatedIPCount")
    """Addresses that are claimed, quarantined ones included."""
    conditions: list[Condition] | None = None
    """Whether pods can get addresses of the pool (type Ready), and if not, why."""


class Pool(Resource, frozen=True, kw_only=True):
    """A named set of addresses of one subnet, and who may use it."""

    TYPE: ClassVar[Kind] = Kind(
        GROUP, VERSION, "SpiderIPPool", "spiderippools", namespaced=False, short="sp", status_subresource=True
    )
    spec: PoolSpec
    status: PoolStatus | None = None


def cidr_label(subnet: str) -> str:
    """The value of `LABEL_CIDR` for a subnet: `172.18.0.0/16` gives `172-18-0-0-16`, `fd00::/64` gives `fd00---64`."""
    return subnet.translate(str.maketrans("./:", "---"))
