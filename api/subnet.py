"""SpiderSubnet: the addresses of one network that pools are cut from, by hand or automatically."""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.condition import Condition
from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import Count, IPVersion, Route

LABEL_SUBNET_CIDR = "ipam.spidernet.io/subnet-cidr"
"""Label of a subnet with its network; `api.pool.cidr_label` gives the value."""
LABEL_OWNER_SUBNET = "ipam.spidernet.io/owner-spider-subnet"
"""Label of a pool with the subnet that it belongs to; `api.autopools.label_text` gives the value."""

READY = "Ready"
"""Type of the condition that tells whether pools are cut from the subnet."""


class SubnetSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderSubnet; `ipVersion` and `subnet` are immutable."""

    subnet: str
    """The network of the addresses, a CIDR in canonical form. Immutable; no two subnets overlap."""
    ip_version: IPVersion | None = None
    """Address family; derived from `subnet`. Immutable."""
    ips: list[str] | None = None
    """Ranges to cut pools from, `a` or `a-b`. Several are merged and sorted."""
    exclude_ips: list[str] | None = field(default=None, name="excludeIPs")
    """Ranges taken out of `ips`."""
    gateway: str | None = None
    """Next hop of the default route; pools that name none inherit it when they become the subnet's."""
    routes: list[Route] | None = None
    """Further routes; pools that name none inherit them when they become the subnet's."""


class SubnetStatus(Struct, frozen=True, kw_only=True):
    """What the subnet's addresses are given to. `controlledIPPools` is written before any pool that it names."""

    controlled_ip_pools: str | None = field(default=None, name="controlledIPPools")
    """JSON text, pool to its addresses and application; absent when no pool has any. `api.ledger` reads it."""
    total_ip_count: Count | None = field(default=None, name="totalIPCount")
    """Addresses of `ips` without `excludeIPs`; no more than the largest int64."""
    allocated_ip_count: Count | None = field(default=None, name="allocatedIPCount")
    """Addresses that are given to pools, whether pods have them or not."""
    conditions: list[Condition] | None = None
    """Whether pools are cut from the subnet (Ready), and why not."""


class Subnet(Resource, frozen=True, kw_only=True):
    """The addresses of one network that pools are cut from."""

    TYPE: ClassVar[Kind] = Kind(
        GROUP, VERSION, "SpiderSubnet", "spidersubnets", namespaced=False, short="ss", status_subresource=True
    )
    spec: SubnetSpec
    status: SubnetStatus | None = None
