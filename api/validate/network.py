"""Rules that pools and subnets share: their ranges, gateway and routes lie in their network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_address
from typing import TypeVar

from msgspec.structs import replace

from api.meta import FINALIZER, ObjectMeta
from api.pool import Pool, PoolSpec, Route, cidr_label
from api.ranges import IPSet, Network, parse_address, parse_network
from api.subnet import Subnet, SubnetSpec
from api.validate import ranges
from api.validate.fields import FieldError, invalid

N = TypeVar("N", Pool, Subnet)

_NAMED_RANGES = 5
"""How many ranges one error shows."""


@lru_cache(maxsize=4096)
def network_of(subnet: str) -> Network | None:
    """The network of a CIDR; None if it is malformed."""
    try:
        return parse_network(subnet)
    except ValueError:
        return None


def defaulted(resource: N, label: str) -> N:
    """A pool or subnet with finalizer, `ipVersion`, merged ranges, and its network as the value of `label`."""
    if ranges.is_terminating(resource):
        return resource
    metadata: ObjectMeta = resource.metadata
    spec = resource.spec
    if FINALIZER not in metadata.finalizers:
        metadata = replace(metadata, finalizers=[*metadata.finalizers, FINALIZER])
    network = network_of(spec.subnet)
    if network is not None:
        metadata = replace(metadata, labels={**metadata.labels, label: cidr_label(spec.subnet)})
        if spec.ip_version is None:
            spec = replace(spec, ip_version=network.version)
    spec = replace(
        spec,
        ips=ranges.merged(spec.ips, spec.ip_version),
        exclude_ips=ranges.merged(spec.exclude_ips, spec.ip_version),
    )
    return replace(resource, metadata=metadata, spec=spec)


def range_errors(parsed: ranges.Parsed, texts: list[str] | None, network: Network, path: str) -> Iterator[FieldError]:
    """Ranges at `path` that are malformed or leave the network."""
    yield from parsed.errors
    low, high = int(network.network_address), int(network.broadcast_address)
    for i, (first, last) in parsed.intervals:
        if first < low or last > high:
            yield invalid(f"{path}[{i}]", (texts or ())[i], f"does not match base subnet: {network}")


def gateway_errors(
    spec: PoolSpec | SubnetSpec, network: Network, ips: ranges.Parsed, excluded: ranges.Parsed
) -> Iterator[FieldError]:
    """A gateway outside of the network, or inside of the addresses."""
    if spec.gateway is None:
        return
    fault = _not_in_subnet(spec.gateway, network)
    if fault:
        yield invalid("spec.gateway", spec.gateway, fault)
        return
    gateway = int(ip_address(spec.gateway))
    if gateway not in IPSet(network.version, (part for _, part in excluded.intervals)):
        for i, (first, last) in ips.intervals:
            if first <= gateway <= last:
                text = f"conflicts with 'spec.gateway' {spec.gateway}, add it to 'spec.excludeIPs' or narrow the range"
                yield invalid(f"spec.ips[{i}]", (spec.ips or ())[i], text)


def route_errors(routes: Iterable[Route], network: Network) -> Iterator[FieldError]:
    """Routes that are malformed, doubled or default, or whose next hop is outside of the network."""
    seen: dict[Network, int] = {}
    for i, route in enumerate(routes):
        path = f"spec.routes[{i}]"
        target = network_of(route.dst)
        if target is None or target.version != network.version:
            yield invalid(f"{path}.dst", route.dst, f"is not an IPv{network.version} CIDR")
        elif target.prefixlen == 0:
            yield invalid(f"{path}.dst", route.dst, "please specify 'spec.gateway' to configure the default route")
        elif target in seen:
            yield invalid(f"{path}.dst", route.dst, f"duplicate of spec.routes[{seen[target]}].dst")
        else:
            seen[target] = i
        fault = _not_in_subnet(route.gw, network)
        if fault:
            yield invalid(f"{path}.gw", route.gw, fault)


def _not_in_subnet(text: str, network: Network) -> str:
    """Why `text` is no next hop in `network`; empty if it is one."""
    try:
        address = parse_address(text, network.version)
    except ValueError as error:
        return str(error)
    return "" if address in network else f"not pertains to the 'spec.subnet' {network} of IPPool"


def listed(texts: list[str]) -> str:
    """The first of some ranges, for a sentence."""
    shown = texts[:_NAMED_RANGES]
    return f"[{' '.join(shown)}{' …' if len(texts) > len(shown) else ''}]"
