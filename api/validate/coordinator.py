"""Defaulting and validation of a SpiderCoordinator, and of the same members inside a SpiderMultusConfig.

The rules, their order and the paths are upstream's (`spec.extraCIDR` is what it calls `spec.hijackCIDR`), with these
differences: addresses in a SpiderMultusConfig's lists are completed to CIDRs too, since the plugin takes nothing else;
a prefix of MAC addresses must be hexadecimal all through; the node's own routing tables are refused, as the plugin
would refuse them for every pod. Nothing of the surroundings is needed, and an update is judged as a creation is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from typing import get_args

from msgspec.structs import replace

from api.coordinator import HOST_RULE_TABLE, VETH_MTU, Coordinator, CoordinatorSpec, PodCIDRType
from api.meta import FINALIZER
from api.pool import Route
from api.ranges import Address, Network, parse_network
from api.validate.fields import FieldError, invalid, not_supported

POD_CIDR_TYPES: tuple[str, ...] = get_args(PodCIDRType)
_RP_FILTERS = ("0", "1", "2")
_OWN_TABLES = (253, 254, 255)
"""default, main and local (/etc/iproute2/rt_tables)."""

_mac_prefix = re.compile(r"([0-9a-fA-F]{2}):[0-9a-fA-F]{2}").fullmatch


def default_coordinator(coordinator: Coordinator) -> Coordinator:
    """The object as admission stores it; a terminating one gets no finalizer."""
    spec = _with_plain_defaults(coordinator.spec)
    mtu = VETH_MTU if spec.veth_mtu is None else spec.veth_mtu
    spec = replace(spec, veth_link_address=spec.veth_link_address or "", veth_mtu=mtu)
    metadata = coordinator.metadata
    if metadata.deletion_timestamp is None and FINALIZER not in metadata.finalizers:
        metadata = replace(metadata, finalizers=[*metadata.finalizers, FINALIZER])
    return replace(coordinator, metadata=metadata, spec=spec)


def default_network_coordinator(spec: CoordinatorSpec | None) -> CoordinatorSpec:
    """`spec.coordinator` of a SpiderMultusConfig with everything that has a default; the MTU has none there."""
    full = _with_plain_defaults(spec or CoordinatorSpec())
    return replace(
        full,
        veth_link_address=full.veth_link_address or "",
        pod_mac_prefix=full.pod_mac_prefix or "",
        pod_default_route_nic=full.pod_default_route_nic or "",
    )


def coordinator_errors(coordinator: Coordinator) -> list[FieldError]:
    """The first thing that is wrong with an object that `default_coordinator` has seen, created or updated."""
    spec = coordinator.spec
    if spec.pod_cidr_type is None:
        return [not_supported("spec.podCIDRType", "", POD_CIDR_TYPES)]
    return list(first(spec_errors(spec, "spec")))


def spec_errors(spec: CoordinatorSpec, path: str) -> Iterator[FieldError]:
    """Everything that is wrong with the members at `path`, in the order in which upstream looks."""
    if spec.pod_cidr_type is not None and spec.pod_cidr_type not in POD_CIDR_TYPES:
        yield not_supported(f"{path}.podCIDRType", spec.pod_cidr_type, POD_CIDR_TYPES)
    for i, text in enumerate(spec.hijack_cidr or ()):
        if _network(text) is None:
            yield invalid(f"{path}.extraCIDR[{i}]", text, f"hijackCIDR[{i}] is neither an IP address nor a CIDR")
    for i, route in enumerate(spec.policy_routes or ()):
        yield from _route_errors(route, f"{path}.policyRoutes[{i}]")
    if spec.pod_mac_prefix:
        yield from _mac_errors(spec.pod_mac_prefix, f"{path}.podMACPrefix")
    if (spec.tx_queue_len or 0) < 0:
        yield invalid(f"{path}.txQueueLen", spec.tx_queue_len, "txQueueLen can't be less than 0")
    if (spec.pod_rp_filter or 0) > 2:  # negative: leave it alone
        yield not_supported(f"{path}.podRPFilter", spec.pod_rp_filter, _RP_FILTERS)
    if spec.veth_link_address and _address(spec.veth_link_address) is None:
        yield invalid(f"{path}.vethLinkAddress", spec.veth_link_address, "vethLinkAddress is an invalid IP address")
    if spec.veth_mtu is not None and spec.veth_mtu <= 0:
        yield invalid(f"{path}.vethMTU", spec.veth_mtu, "vethMTU must be greater than 0")
    if spec.host_rule_table in _OWN_TABLES:
        yield invalid(f"{path}.hostRuleTable", spec.host_rule_table, "253, 254 and 255 are the node's own tables")


def first(errors: Iterator[FieldError]) -> Iterator[FieldError]:
    """At most the first of them: upstream reports one, and what follows is often its consequence."""
    error = next(errors, None)
    if error is not None:
        yield error


def _with_plain_defaults(spec: CoordinatorSpec) -> CoordinatorSpec:
    return replace(
        spec,
        mode=spec.mode or "auto",
        tune_pod_routes=True if spec.tune_pod_routes is None else spec.tune_pod_routes,
        host_rule_table=HOST_RULE_TABLE if spec.host_rule_table is None else spec.host_rule_table,
        pod_rp_filter=spec.pod_rp_filter or 0,
        tx_queue_len=spec.tx_queue_len or 0,
        hijack_cidr=[_completed(text) for text in spec.hijack_cidr] if spec.hijack_cidr else None,
        policy_routes=[replace(route, dst=_completed(route.dst)) for route in spec.policy_routes]
        if spec.policy_routes
        else None,
    )


def _completed(text: str) -> str:
    """An address as a CIDR of itself; anything else as it is, validation will judge it."""
    address = _address(text) if "/" not in text else None
    return text if address is None else f"{address}/{address.max_prefixlen}"


def _route_errors(route: Route, path: str) -> Iterator[FieldError]:
    target, gateway = _network(route.dst), _address(route.gw)
    if target is None:
        yield invalid(f"{path}.dst", route.dst, "is neither an IP address nor a CIDR")
    elif gateway is None:
        yield invalid(f"{path}.gw", route.gw, "gw is an invalid IP address")
    elif target.version != gateway.version:
        yield invalid(path, {"dst": route.dst, "gw": route.gw}, "dst and gw must use the same IP family")


def _mac_errors(prefix: str, path: str) -> Iterator[FieldError]:
    match = _mac_prefix(prefix)
    if match is None:
        yield invalid(path, prefix, "not a valid MAC prefix, two bytes such as 0a:1b")
    elif int(match[1], 16) & 1:
        yield invalid(path, prefix, "not a unicast MAC: the lowest bit of the first byte must be 0")


def _network(text: str) -> Network | None:
    try:
        return parse_network(_completed(text))
    except ValueError:
        return None


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return None if getattr(address, "scope_id", None) else address
