"""SpiderSubnet: the addresses of one network that pools are cut from, by hand or automatically."""

from __future__ import annotations

import hashlib
import re
from typing import ClassVar

from msgspec import field

from api.claim import label_value
from api.condition import Condition
from api.meta import GROUP, VERSION, Kind, OwnerReference, Resource, Struct
from api.pool import Count, IPVersion, Pool, Route

LABEL_SUBNET_CIDR = "ipam.spidernet.io/subnet-cidr"
"""Label of a subnet with its network; `api.pool.cidr_label` gives the value."""
LABEL_OWNER_SUBNET = "ipam.spidernet.io/owner-spider-subnet"
"""Label of a pool with the subnet that it belongs to; `label_text` gives the value."""

LABEL_APP_NAME = "ipam.spidernet.io/owner-application-name"
"""Label of a pool that the controller made for an application; no other pool has it."""
AFFINITY = tuple(f"ipam.spidernet.io/app-{part}" for part in ("api-group", "api-version", "kind", "namespace", "name"))
"""All that `spec.podAffinity.matchLabels` of such a pool has. It names the application and no pod's labels."""

_is_label = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?").fullmatch

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
    detect_ip_conflict: bool | None = field(default=None, name="detectIPConflict")
    """Whether pods' addresses are asked for on the network first; pools that do not say inherit it likewise."""
    detect_gateway: bool | None = None
    """Whether gateways must answer; pools that do not say inherit it likewise."""


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


def is_automatic(pool: Pool) -> bool:
    """Whether the controller made the pool for an application."""
    return LABEL_APP_NAME in pool.metadata.labels


def label_text(text: str) -> str:
    """The label value that stands for any text: itself if it can be one, else a hash."""
    if _is_label(text):
        return label_value(text)
    return f"x.{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:48]}"


def owner_reference(subnet: Subnet) -> OwnerReference:
    """What a pool of the subnet has in `metadata.ownerReferences`."""
    return OwnerReference(
        api_version=subnet.TYPE.api_version,
        kind=subnet.TYPE.kind,
        name=subnet.metadata.name,
        uid=subnet.metadata.uid,
        controller=True,
        block_owner_deletion=True,
    )


def is_ready(subnet: Subnet) -> bool:
    """Whether pools are cut from it."""
    conditions = (subnet.status.conditions if subnet.status else None) or ()
    return any(condition.type == READY and condition.status == "True" for condition in conditions)
