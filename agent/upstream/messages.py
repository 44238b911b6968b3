"""What travels over upstream's API, member by member. Pure.

Source: upstream api/v1/agent/openapi.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_interface
from typing import Any

import msgspec

from api.claim import Claim
from api.endpoint import Endpoint, EndpointIP


class _Args(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    container_id: str = msgspec.field(name="containerID")
    pod_namespace: str
    pod_name: str
    pod_uid: str = msgspec.field(name="podUID")


class AddArgs(_Args, frozen=True, rename="camel", kw_only=True):
    """IpamAddArgs."""

    if_name: str
    net_namespace: str
    default_ipv4_pools: list[str] | None = msgspec.field(name="defaultIPv4IPPool", default=None)
    default_ipv6_pools: list[str] | None = msgspec.field(name="defaultIPv6IPPool", default=None)
    clean_gateway: bool | None = None
    match_master_subnet: bool | None = None


class DelArgs(_Args, frozen=True, rename="camel", kw_only=True):
    """IpamDelArgs."""

    if_name: str
    net_namespace: str | None = None


class BatchDelArgs(_Args, frozen=True, rename="camel", kw_only=True):
    """IpamBatchDelArgs."""

    net_namespace: str | None = None
    is_release_conflict_ips: bool | None = msgspec.field(name="isReleaseConflictIPs", default=None)


class CoordinatorArgs(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """GetCoordinatorArgs: which pod asks."""

    pod_name: str = ""
    pod_namespace: str = ""


VERSION = "1.0.0"
"""cniVersion of the calls that requests are turned into; nobody sees it."""


def call_of(command: str, args: AddArgs | DelArgs) -> tuple[dict[str, str], dict[str, Any]]:
    """Environment and configuration of the CNI call that a request stands for."""
    names = (
        ("K8S_POD_NAMESPACE", args.pod_namespace),
        ("K8S_POD_NAME", args.pod_name),
        ("K8S_POD_UID", args.pod_uid),
    )
    env = {
        "SPIDERPOOL_PLUGIN": "spiderpool",
        "SPIDERPOOL_CNI_VERSION": VERSION,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": args.container_id,
        "CNI_IFNAME": args.if_name,
        "CNI_NETNS": args.net_namespace or "",
        "CNI_ARGS": ";".join(f"{name}={value}" for name, value in names if value),
    }
    ipam: dict[str, Any] = {"type": "spiderpool"}
    if isinstance(args, AddArgs):
        ipam |= {
            "default_ipv4_ippool": args.default_ipv4_pools or [],
            "default_ipv6_ippool": args.default_ipv6_pools or [],
            "clean_gateway": bool(args.clean_gateway),
            "match_master_subnet": bool(args.match_master_subnet),
        }
    return env, {"cniVersion": VERSION, "ipam": ipam}


def add_response(nic: str, result: Mapping[str, Any], claims: Mapping[str, Claim]) -> dict[str, Any]:
    """IpamAddResponse for a CNI result; `claims` by address, without prefix length.

    Both detection flags are false: what is switched on here has been asked already, before the answer, and the
    executable would only ask again.
    """
    ips: list[dict[str, Any]] = []
    for given in result["ips"]:
        address = ip_interface(given["address"])
        item: dict[str, Any] = {
            "version": address.version,
            "address": given["address"],
            "nic": nic,
            "gateway": given.get("gateway", ""),
            "vlan": 0,
            "enableGatewayDetection": False,
            "enableIPConflictDetection": False,
        }
        claim = claims.get(str(address.ip))
        if claim is not None:
            item["ipPool"] = claim.spec.pool
            provided = claim.spec.provided
            if provided is not None:
                item |= {"vlan": provided.vlan or 0} | ({"mac": provided.mac} if provided.mac else {})
        ips.append(item)
    routes = [{"ifName": nic, "dst": route["dst"], "gw": route.get("gw", "")} for route in result["routes"]]
    return {"ips": ips, "routes": routes}


def endpoint_status(endpoint: Endpoint) -> dict[str, Any]:
    """WorkloadEndpointStatus."""
    current = endpoint.status.current if endpoint.status else None
    return {
        "podNamespace": endpoint.metadata.namespace,
        "podName": endpoint.metadata.name,
        "podUID": current.uid if current else "",
        "node": current.node if current else "",
        "interfaces": [_interface(ip) for ip in (current.ips if current else ())],
    }


def _interface(ip: EndpointIP) -> dict[str, Any]:
    members = {
        "interface": ip.interface,
        "ipv4": ip.ipv4,
        "ipv6": ip.ipv6,
        "mac": ip.mac,
        "vlan": ip.vlan,
        "ipv4Pool": ip.ipv4_pool,
        "ipv6Pool": ip.ipv6_pool,
        "ipv4Gateway": ip.ipv4_gateway,
        "ipv6Gateway": ip.ipv6_gateway,
    }
    routes = [{"ifName": ip.interface, "dst": route.dst, "gw": route.gw} for route in ip.routes or ()]
    return {name: value for name, value in members.items() if value} | {"routes": routes}


def nics_of(claims: Iterable[Claim], args: BatchDelArgs) -> list[str]:
    """NICs for which the container, and the pod if it is known, holds addresses."""
    found = {
        claim.spec.nic
        for claim in claims
        if claim.spec.state == "Allocated"
        and claim.spec.container_id == args.container_id
        and (not args.pod_uid or claim.spec.pod_uid == args.pod_uid)
    }
    return sorted(found)
