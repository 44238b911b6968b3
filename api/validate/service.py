"""Validation of the parts of Service and EndpointSlice that this package knows.

With Kubernetes its API server does this; on a store without one, whoever writes has to.
Source: k8s.io/kubernetes pkg/apis/core/validation and pkg/apis/discovery/validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from api.service import EndpointSlice, Service
from api.validate.fields import FieldError, invalid, not_supported, required

_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_FAMILIES = {"IPv4": 4, "IPv6": 6}
_ADDRESS_TYPES = (*_FAMILIES, "FQDN")


def service_errors(service: Service) -> Iterator[FieldError]:
    """What is wrong with a Service."""
    spec = service.spec
    if spec.type not in _TYPES:
        yield not_supported("spec.type", spec.type, _TYPES)
    if spec.cluster_ip not in {None, "", "None"}:
        yield from _address_errors("spec.clusterIP", spec.cluster_ip or "", None)
    for i, text in enumerate(spec.cluster_ips or ()):
        if text != "None":
            yield from _address_errors(f"spec.clusterIPs[{i}]", text, None)
    if spec.cluster_ip and spec.cluster_ips and spec.cluster_ips[0] != spec.cluster_ip:
        yield invalid("spec.clusterIPs[0]", spec.cluster_ips[0], "must be the same as 'spec.clusterIP'")
    seen: dict[object, str] = {}
    for i, port in enumerate(spec.ports or ()):
        path = f"spec.ports[{i}]"
        yield from _port_errors(path, port.port, port.protocol)
        if len(spec.ports or ()) > 1 and not port.name:
            yield required(f"{path}.name", "ports need names if there are several")
        for key, member in (((port.protocol, port.port), "port"), (port.name or path, "name")):
            if key in seen:
                yield invalid(f"{path}.{member}", getattr(port, member), f"duplicate of {seen[key]}")
            seen.setdefault(key, path)


def endpoint_slice_errors(part: EndpointSlice) -> Iterator[FieldError]:
    """What is wrong with an EndpointSlice."""
    if part.address_type not in _ADDRESS_TYPES:
        yield not_supported("addressType", part.address_type, _ADDRESS_TYPES)
    for i, endpoint in enumerate(part.endpoints or ()):
        if not endpoint.addresses:
            yield required(f"endpoints[{i}].addresses", "must have at least one address")
        for j, text in enumerate(endpoint.addresses):
            if part.address_type in _FAMILIES:
                yield from _address_errors(f"endpoints[{i}].addresses[{j}]", text, _FAMILIES[part.address_type])
    for i, port in enumerate(part.ports or ()):
        yield from _port_errors(f"ports[{i}]", port.port, port.protocol)


def _address_errors(path: str, text: str, family: int | None) -> Iterator[FieldError]:
    try:
        address = ip_address(text)
    except ValueError:
        address = None
    if address is None or getattr(address, "scope_id", None):
        yield invalid(path, text, "is not an IP address")
    elif family not in {None, address.version}:
        yield invalid(path, text, f"is not an IPv{family} address")


def _port_errors(path: str, number: int | None, protocol: str) -> Iterator[FieldError]:
    if number is not None and not 1 <= number <= 65535:
        yield invalid(f"{path}.port", number, "must be between 1 and 65535")
    if protocol not in _PROTOCOLS:
        yield not_supported(f"{path}.protocol", protocol, _PROTOCOLS)
