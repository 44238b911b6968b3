"""SpiderCoordinator: how pods of this cluster reach overlay pods, services and their node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, field

from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import Route

DEFAULT_NAME = "default"
"""The one that there is normally; what to look for is a setting."""

Mode = Literal["auto", "underlay", "overlay", "disabled"]
PodCIDRType = Literal["auto", "cluster", "calico", "cilium", "none"]
Phase = Literal["Synced", "NotReady"]

VETH_MTU = 1500
"""Bytes; upstream's default."""
HOST_RULE_TABLE = 500
"""Upstream's default."""

_Mode = Annotated[Mode | None, Meta(extra_json_schema={"default": "auto"})]
_OnByDefault = Annotated[bool | None, Meta(extra_json_schema={"default": True})]
_ZeroByDefault = Annotated[int | None, Meta(extra_json_schema={"default": 0})]
_Table = Annotated[int | None, Meta(extra_json_schema={"default": HOST_RULE_TABLE})]
_AtLeastOne = Annotated[int, Meta(ge=1)]


class CoordinatorSpec(Struct, frozen=True, kw_only=True):
    """What `spec` of a SpiderCoordinator and `spec.coordinator` of a SpiderMultusConfig have in common."""

    mode: _Mode = None
    """How pods reach their node: by a veth pair of our own (underlay), over the overlay's NIC, found out, or not."""
    pod_cidr_type: PodCIDRType | None = field(default=None, name="podCIDRType")
    """Where the networks of overlay pods are found out from."""
    hijack_cidr: list[str] | None = field(default=None, name="hijackCIDR")
    """Further networks that pods reach through their node, addresses or CIDRs."""
    policy_routes: list[Route] | None = None
    """Routes of every pod over its own NIC."""
    pod_mac_prefix: str | None = field(default=None, name="podMACPrefix")
    """First two bytes of MAC addresses made from the pod's address, `0a:1b`; empty leaves the NIC's own."""
    tune_pod_routes: _OnByDefault = None
    """Move the routes of further NICs to tables of their own."""
    pod_default_route_nic: str | None = field(default=None, name="podDefaultRouteNIC")
    """The NIC that keeps the pod's default route; empty: the first one."""
    host_rule_table: _Table = None
    """The node's routing table that holds the routes to its pods."""
    pod_rp_filter: _ZeroByDefault = field(default=None, name="podRPFilter")
    """Reverse path filter inside the pod: 0 off, 1 strict, 2 loose, negative leaves it alone."""
    tx_queue_len: _ZeroByDefault = None
    """Transmit queue length of the pod's NIC in packets; 0 leaves it alone."""
    veth_link_address: str | None = None
    """Address put on the pod's end of the veth pair; empty: none."""
    veth_mtu: _AtLeastOne | None = field(default=None, name="vethMTU")
    """MTU of the veth pair in bytes."""


class ClusterCoordinatorSpec(CoordinatorSpec, frozen=True, kw_only=True):
    """`spec` of a SpiderCoordinator."""

    detect_ip_conflict: bool | None = field(default=None, name="detectIPConflict")
    """For pools that do not say: ask the network whether somebody uses an address before a pod gets it."""
    detect_gateway: bool | None = None
    """For pools that do not say: refuse pods whose gateway does not answer."""


class CoordinatorStatus(Struct, frozen=True, kw_only=True):
    """What the controller found out; the nodes' agents hand it to every pod."""

    phase: Phase
    """Synced, or NotReady: then no pod is attached."""
    reason: str | None = None
    """Why it is not ready."""
    overlay_pod_cidr: list[str] | None = field(default=None, name="overlayPodCIDR")
    """Networks of the cluster's overlay pods."""
    service_cidr: list[str] | None = field(default=None, name="serviceCIDR")
    """Networks of the cluster's services."""


class Coordinator(Resource, frozen=True, kw_only=True):
    """How pods of this cluster reach overlay pods, services and their node."""

    TYPE: ClassVar[Kind] = Kind(
        GROUP,
        VERSION,
        "SpiderCoordinator",
        "spidercoordinators",
        namespaced=False,
        short="scc",
        status_subresource=True,
    )
    spec: ClusterCoordinatorSpec = field(default_factory=ClusterCoordinatorSpec)
    status: CoordinatorStatus | None = None


class CoordinatorUnusableError(Exception):
    """There is no configuration to attach pods by; the text is upstream's."""


def chosen_of(coordinators: Iterable[Coordinator], name: str = DEFAULT_NAME) -> Coordinator | None:
    """The one that counts, whatever its status: that called `name`, else the first in the order of names."""
    return min(coordinators, key=lambda each: (each.metadata.name != name, each.metadata.name), default=None)


def in_force(coordinators: Iterable[Coordinator], name: str = DEFAULT_NAME) -> Coordinator:
    """The one that nodes go by, as `chosen_of` says.

    Upstream takes any; there should be one. Raises CoordinatorUnusableError if there is none, or it is not Synced.
    """
    chosen = chosen_of(coordinators, name)
    if chosen is None:
        raise CoordinatorUnusableError("coordinator config not found")
    if chosen.status is None or chosen.status.phase != "Synced":
        reason = chosen.status.reason if chosen.status else None
        raise CoordinatorUnusableError(
            f"spidercoordinator: {chosen.metadata.name} no ready" + (f": {reason}" if reason else "")
        )
    return chosen


def node_config(coordinator: Coordinator, default_route_nic: str = "") -> dict[str, Any]:
    """What the agent answers to `GET /v1/coordinator/config`: spec and status in one, members of upstream's schema.

    `default_route_nic` is the pod's annotation `ipam.spidernet.io/default-route-nic`, which goes before the spec. The
    mode `disabled` is given as `disable`, the only spelling that upstream's plugin knows. No list is null: upstream's
    plugin refuses that.
    """
    spec, status = coordinator.spec, coordinator.status
    return {
        "mode": plugin_mode(spec.mode or "auto"),
        "overlayPodCIDR": list((status and status.overlay_pod_cidr) or ()),
        "serviceCIDR": list((status and status.service_cidr) or ()),
        "hijackCIDR": list(spec.hijack_cidr or ()),
        "policyRoutes": [{"dst": route.dst, "gw": route.gw} for route in spec.policy_routes or ()],
        "podMACPrefix": spec.pod_mac_prefix or "",
        "tunePodRoutes": True if spec.tune_pod_routes is None else spec.tune_pod_routes,
        "podDefaultRouteNIC": default_route_nic or spec.pod_default_route_nic or "",
        "vethLinkAddress": spec.veth_link_address or "",
        "vethMTU": spec.veth_mtu or VETH_MTU,
        "hostRuleTable": spec.host_rule_table if (spec.host_rule_table or 0) > 0 else HOST_RULE_TABLE,
        "podRPFilter": spec.pod_rp_filter or 0,
        "txQueueLen": spec.tx_queue_len or 0,
    }


def plugin_mode(mode: str) -> str:
    """A mode as the coordinator plugins spell it: `disable` for `disabled`."""
    return "disable" if mode == "disabled" else mode
