"""What the caller and the SpiderEndpoint are told about claims. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from api.claim import Claim
from api.endpoint import EndpointIP
from api.pool import Route
from api.ranges import Family
from plugins.cni import Result, ResultIP, ResultRoute
from plugins.errors import NoPoolError
from plugins.ipam.candidates import PoolFacts

_DEFAULT: Mapping[Family, str] = {4: "0.0.0.0/0", 6: "::/0"}


def result_of(
    claims: Mapping[Family, Claim], pool_of: Callable[[str], PoolFacts | None], *, clean_gateway: bool
) -> tuple[Result, EndpointIP]:
    """The CNI result for the claims, IPv4 first, and the endpoint's entry for the NIC.

    A pool's routes come before its default route, which is left out with `clean_gateway` or without a gateway.
    Raises NoPoolError if a claim's pool is gone, since its prefix length and gateway are then unknown.
    """
    ips: list[ResultIP] = []
    routes: list[ResultRoute] = []
    members: dict[str, str | None] = {}
    endpoint_routes: list[Route] = []
    gateways = False
    for family, claim in sorted(claims.items()):
        pool = pool_of(claim.spec.pool)
        if pool is None or pool.family != family or pool.problem:
            raise NoPoolError(
                "the pool of an address that is claimed is gone",
                f"{claim.spec.address} of pool {claim.spec.pool}: restore the pool, or delete the pod",
            )
        ips.append(ResultIP(pool.cidr(claim.spec.address), pool.gateway))
        routes += [ResultRoute(route.dst, route.gw) for route in pool.routes]
        endpoint_routes += pool.routes
        if pool.gateway and not clean_gateway:
            routes.append(ResultRoute(_DEFAULT[family], pool.gateway))
        gateways = gateways or bool(pool.gateway)
        members |= {
            f"ipv{family}": pool.cidr(claim.spec.address),
            f"ipv{family}_pool": pool.name,
            f"ipv{family}_gateway": pool.gateway or None,
        }
    nic = next((claim.spec.nic for claim in claims.values()), "")
    entry = EndpointIP(
        interface=nic,
        ipv4=members.get("ipv4"),
        ipv6=members.get("ipv6"),
        ipv4_pool=members.get("ipv4_pool"),
        ipv6_pool=members.get("ipv6_pool"),
        ipv4_gateway=members.get("ipv4_gateway"),
        ipv6_gateway=members.get("ipv6_gateway"),
        clean_gateway=clean_gateway if gateways else None,
        vlan=0,
        routes=endpoint_routes or None,
    )
    return Result(ips=tuple(ips), routes=tuple(routes)), entry
