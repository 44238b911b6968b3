"""What the caller and the SpiderEndpoint are told about claims. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from msgspec.structs import replace

from api.annotations import FIRST_NIC
from api.claim import Claim
from api.endpoint import EndpointIP
from api.pool import Route
from api.ranges import Family
from plugins.cni import Result, ResultIP, ResultRoute
from plugins.errors import NoPoolError
from plugins.ipam.candidates import PoolFacts

PoolOf = Callable[[str], PoolFacts | None]
"""A pool by its name."""


@dataclass(frozen=True, slots=True)
class Given:
    """What an ADD gave."""

    result: Result
    entry: EndpointIP
    """The NIC's entry in the SpiderEndpoint: addresses, pools, gateways, routes; MAC and VLAN by a provider."""
    claims: tuple[Claim, ...]
    unreachable: list[Route]
    """Routes of the pod whose gateway is in no subnet of the NICs that it has so far."""


_DEFAULT: Mapping[Family, str] = {4: "0.0.0.0/0", 6: "::/0"}


def result_of(
    claims: Mapping[Family, Claim],
    pool_of: PoolOf,
    *,
    clean_gateway: bool,
    routes: Sequence[Route] = (),
) -> tuple[Result, EndpointIP]:
    """The CNI result for the claims, IPv4 first, and the endpoint's entry for the NIC.

    A pool's routes come first, then those of `routes` of the family, then the default route, which is left out with
    `clean_gateway` or without a gateway. Raises NoPoolError if a claim's pool is gone, since its prefix length and
    gateway are then unknown.
    """
    ips: list[ResultIP] = []
    given: list[ResultRoute] = []
    entry = EndpointIP(interface=next((claim.spec.nic for claim in claims.values()), ""), vlan=0)
    told: list[Route] = []
    for family, claim in sorted(claims.items()):
        pool = pool_of(claim.spec.pool)
        if pool is None or pool.family != family or pool.problem:
            raise NoPoolError(
                "the pool of an address that is claimed is gone",
                f"{claim.spec.address} of pool {claim.spec.pool}: restore the pool, or delete the pod",
            )
        cidr, gateway = pool.cidr(claim.spec.address), pool.gateway or None
        ips.append(ResultIP(cidr, pool.gateway))
        own = [*pool.routes, *(route for route in routes if ip_address(route.gw).version == family)]
        given += [ResultRoute(route.dst, route.gw) for route in own]
        told += own
        if pool.gateway and not clean_gateway:
            given.append(ResultRoute(_DEFAULT[family], pool.gateway))
        if gateway is not None:
            entry = replace(entry, clean_gateway=clean_gateway)
        if family == 4:
            entry = replace(entry, ipv4=cidr, ipv4_pool=pool.name, ipv4_gateway=gateway)
        else:
            entry = replace(entry, ipv6=cidr, ipv6_pool=pool.name, ipv6_gateway=gateway)
        provided = claim.spec.provided
        if provided is not None and provided.mac:
            entry = replace(entry, mac=provided.mac, vlan=provided.vlan or 0)
    return Result(ips=tuple(ips), routes=tuple(given)), replace(entry, routes=told or None)


def routes_for(
    nic: str, mine: Iterable[Claim], others: Iterable[Claim], routes: Iterable[Route], pool_of: PoolOf
) -> tuple[Route, ...]:
    """Those of the pod's `routes` that are the NIC's: their gateway is in its subnet, and in that of no NIC before it.

    `others` are the claims of the pod's other NICs. The first NIC is eth0, and the others follow by their names, so
    that an ADD that is repeated gives what it gave.
    """
    before = [claim for claim in others if _rank(claim.spec.nic) < _rank(nic)]
    own = list(mine)
    return tuple(route for route in routes if _reaches(route, own, pool_of) and not _reaches(route, before, pool_of))


def unreachable(routes: Iterable[Route], claims: Iterable[Claim], pool_of: PoolOf) -> list[Route]:
    """Those of the pod's `routes` whose gateway is in no subnet of its NICs."""
    every = list(claims)
    return [route for route in routes if not _reaches(route, every, pool_of)]


def _reaches(route: Route, claims: Iterable[Claim], pool_of: PoolOf) -> bool:
    gateway = ip_address(route.gw)
    pools = (pool_of(claim.spec.pool) for claim in claims)
    return any(pool is not None and not pool.problem and gateway in pool.network for pool in pools)


def _rank(nic: str) -> tuple[bool, int, str]:
    return nic != FIRST_NIC, len(nic), nic
