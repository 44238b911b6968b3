"""SpiderEndpoint: what one pod got. A view that the pod's own agent writes; claims decide, endpoints tell."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, field

from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import Route

Vlan = Annotated[int | None, Meta(extra_json_schema={"default": 0, "minimum": 0, "maximum": 4094})]


class EndpointIP(Struct, frozen=True, kw_only=True):
    """One NIC of the pod; addresses in CIDR form."""

    interface: str
    """Name of the NIC in the pod; empty while it is not known."""
    ipv4: str | None = None
    """IPv4 address with prefix length."""
    ipv6: str | None = None
    """IPv6 address with prefix length."""
    ipv4_pool: str | None = None
    """Pool of the IPv4 address."""
    ipv6_pool: str | None = None
    """Pool of the IPv6 address."""
    vlan: Vlan = None
    """VLAN ID given by an infrastructure provider; 0 without one."""
    ipv4_gateway: str | None = None
    """Next hop of the IPv4 default route."""
    ipv6_gateway: str | None = None
    """Next hop of the IPv6 default route."""
    clean_gateway: bool | None = None
    """The NIC has no default route although the pool has a gateway."""
    routes: list[Route] | None = None
    """Routes of the NIC besides the default route."""
    mac: str | None = None
    """MAC address given by an infrastructure provider."""


class EndpointCurrent(Struct, frozen=True, kw_only=True):
    """`status.current`."""

    uid: str
    """UID of the pod."""
    node: str
    """Node that the pod runs on."""
    ips: list[EndpointIP]
    """The pod's NICs."""


class EndpointStatus(Struct, frozen=True, kw_only=True):
    """`status`; written by ordinary update, the kind has no status subresource."""

    current: EndpointCurrent
    owner_controller_type: str
    """Kind of the pod's top controller; `Pod` if it has none."""
    owner_controller_name: str
    """Name of the pod's top controller."""


class Endpoint(Resource, frozen=True, kw_only=True):
    """What one pod got: its NICs, addresses and routes."""

    TYPE: ClassVar[Kind] = Kind(GROUP, VERSION, "SpiderEndpoint", "spiderendpoints", namespaced=True, short="se")
    status: EndpointStatus | None = field(default=None)
