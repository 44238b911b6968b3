"""What Services and EndpointSlices ask for: which backends stand behind which frontend. Pure, no kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from api.service import EndpointSlice, Service, SliceEndpoint

PROTOCOLS = {"TCP": 6, "UDP": 17}
"""Protocols that the hooks translate; services of another one (SCTP) are left alone."""

MAPPED = bytes(10) + b"\xff\xff"
"""What an IPv4-mapped IPv6 address begins with."""

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
"""A service with this label is served by the proxy that it names (Kubernetes: well-known labels), not by us."""

_NO_TIME = datetime.max.replace(tzinfo=UTC)


class Frontend(NamedTuple):
    """A service's address, port and protocol. The address is packed: 4 bytes for IPv4, 16 for IPv6."""

    address: bytes
    port: int
    protocol: int


class Backend(NamedTuple):
    """Address (packed, of its frontend's family) and port that serve."""

    address: bytes
    port: int


class Owner(NamedTuple):
    """The Service that a frontend belongs to."""

    namespace: str
    name: str


Backends = tuple[Backend, ...]
"""Sorted, without duplicates."""


def pack_address(text: str) -> bytes | None:
    """`text` as packed address of its family, or None if it is no IP address.

    An IPv4-mapped one is IPv4, as for Kubernetes, which lets it stand in Services and EndpointSlices.
    """
    try:
        return unmapped(inet_pton(AF_INET6 if ":" in text else AF_INET, text))
    except (OSError, ValueError):  # ValueError: a NUL in the text
        return None


def unmapped(address: bytes) -> bytes:
    """A packed address, as IPv4 if it is IPv4-mapped."""
    return address[12:] if address.startswith(MAPPED) else address


def _frontend_addresses(service: Service) -> list[bytes]:
    spec = service.spec
    if spec.type == "ExternalName" or PROXY_NAME in service.metadata.labels:
        return []
    texts = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    return [packed for text in texts if (packed := pack_address(text)) is not None]  # "None" packs to None


def _is_ready(endpoint: SliceEndpoint) -> bool:
    return endpoint.conditions is None or endpoint.conditions.ready is not False


def translate(service: Service, slices: Iterable[EndpointSlice]) -> dict[Frontend, Backends]:
    """The frontends of one service with their backends; a frontend without ready endpoints has none.

    A slice's port belongs to the service's port of the same name and protocol: numbers may differ from slice to
    slice where the target port is a name (KEP-752). An endpoint's first address is the one to use (discovery/v1).
    """
    found: dict[tuple[int, str, str], set[Backend]] = {}
    for part in slices:
        size = {"IPv4": 4, "IPv6": 16}.get(part.address_type)
        ready = [e.addresses[0] for e in part.endpoints or () if e.addresses and _is_ready(e)]
        addresses = [packed for text in ready if (packed := pack_address(text)) is not None and len(packed) == size]
        for port in part.ports or ():
            if size is not None and port.port is not None:
                backends = found.setdefault((size, port.name, port.protocol), set())
                backends.update(Backend(address, port.port) for address in addresses)
    result: dict[Frontend, Backends] = {}
    for address in _frontend_addresses(service):
        for service_port in service.spec.ports or ():
            protocol = PROTOCOLS.get(service_port.protocol)
            if protocol is not None:
                key = (len(address), service_port.name, service_port.protocol)
                result[Frontend(address, service_port.port, protocol)] = tuple(sorted(found.get(key, ())))
    return result


class Desired:
    """What all services together ask for.

    An API server hands out a cluster IP once, but a store without one (or a race) may not: then the older service
    has the frontend, and of equally old ones the first by namespace and name. The others wait for it.
    """

    def __init__(self) -> None:
        self.frontends: dict[Frontend, Backends] = {}
        self._services: dict[Owner, dict[Frontend, Backends]] = {}
        self._ages: dict[Owner, datetime] = {}
        self._claimants: dict[Frontend, list[Owner]] = {}

    def put(self, owner: Owner, service: Service | None, slices: Iterable[EndpointSlice]) -> set[Frontend]:
        """Take in a service's present state (None: it is gone); returns the frontends whose backends changed."""
        old = self._services.pop(owner, {})
        new = translate(service, slices) if service is not None else {}
        if service is not None:
            self._services[owner] = new
            self._ages[owner] = service.metadata.creation_timestamp or _NO_TIME
        for frontend in old.keys() - new.keys():
            self._claimants[frontend].remove(owner)
        for frontend in new.keys() - old.keys():
            self._claimants.setdefault(frontend, []).append(owner)
        changed = {frontend for frontend in old.keys() | new.keys() if self._settle(frontend)}
        if service is None:
            self._ages.pop(owner, None)
        return changed

    def _settle(self, frontend: Frontend) -> bool:
        claimants = self._claimants[frontend]
        before = self.frontends.get(frontend)
        if not claimants:
            del self._claimants[frontend]
            del self.frontends[frontend]
            return True
        claimants.sort(key=lambda owner: (self._ages[owner], owner))
        after = self.frontends[frontend] = self._services[claimants[0]][frontend]
        return after != before

    def owner(self, frontend: Frontend) -> Owner | None:
        """The service that has the frontend."""
        claimants = self._claimants.get(frontend)
        return claimants[0] if claimants else None

    def conflicts(self) -> Mapping[Frontend, tuple[Owner, ...]]:
        """Frontends that several services claim; the first of the services has it."""
        return {frontend: tuple(owners) for frontend, owners in self._claimants.items() if len(owners) > 1}
