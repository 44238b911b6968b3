"""SpiderEndpoint: what one pod got. A view that the pod's own agent writes; claims decide, endpoints tell."""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import Route


class EndpointIP(Struct, frozen=True, kw_only=True):
    """One NIC of the pod; addresses in CIDR form."""

    interface: str
    ipv4: str | None = None
    ipv6: str | None = None
    ipv4_pool: str | None = None
    ipv6_pool: str | None = None
    vlan: int | None = None
    ipv4_gateway: str | None = None
    ipv6_gateway: str | None = None
    clean_gateway: bool | None = None
    routes: list[Route] | None = None
    mac: str | None = None


class EndpointCurrent(Struct, frozen=True, kw_only=True):
    """`status.current`."""

    uid: str
    node: str
    ips: list[EndpointIP]


class EndpointStatus(Struct, frozen=True, kw_only=True):
    """`status`; written by ordinary update, the kind has no status subresource."""

    current: EndpointCurrent
    owner_controller_type: str
    owner_controller_name: str


class Endpoint(Resource, frozen=True, kw_only=True):
    """SpiderEndpoint."""

    TYPE: ClassVar[Kind] = Kind(GROUP, VERSION, "SpiderEndpoint", "spiderendpoints", namespaced=True, short="se")
    status: EndpointStatus | None = field(default=None)
