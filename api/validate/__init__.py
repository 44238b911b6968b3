"""What admission does: defaulting and validation of each kind, as pure functions.

`defaulted` and `errors` choose by kind; the modules below have the rules. A SpiderEndpoint is checked by its schema
alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

from api.claim import Claim
from api.coordinator import Coordinator
from api.meta import R, Resource
from api.multusconfig import MultusConfig
from api.pool import Pool
from api.ranges import Family
from api.reservedip import ReservedIP
from api.service import EndpointSlice, Service
from api.subnet import Subnet
from api.validate.claim import created_claim_errors, default_claim, updated_claim_errors
from api.validate.coordinator import coordinator_errors, default_coordinator
from api.validate.fields import FieldError
from api.validate.multusconfig import created_multus_config_errors, updated_multus_config_errors
from api.validate.multusdefaults import default_multus_config
from api.validate.pool import created_pool_errors, default_pool, updated_pool_errors
from api.validate.ranges import BOTH
from api.validate.reservedip import created_reserved_ip_errors, default_reserved_ip, updated_reserved_ip_errors
from api.validate.service import endpoint_slice_errors, service_errors
from api.validate.subnet import created_subnet_errors, default_subnet, updated_subnet_errors


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a decision about one object needs to know of others."""

    pools: Iterable[Pool] = ()
    """All pools; the one in question may be among them."""
    subnets: Iterable[Subnet] = ()
    """All subnets, if one of them is in question; it may be among them."""
    claims: Iterable[Claim] = ()
    """At least the claims of the pool in question, if that is an update."""
    families: Collection[Family] = BOTH
    """Enabled address families."""


def defaulted(resource: R) -> R:
    """`resource` as admission would store it; never fails, validation reports what could not be derived."""
    result: Resource = resource
    match resource:
        case Pool():
            result = default_pool(resource)
        case Subnet():
            result = default_subnet(resource)
        case ReservedIP():
            result = default_reserved_ip(resource)
        case Claim():
            result = default_claim(resource)
        case Coordinator():
            result = default_coordinator(resource)
        case MultusConfig():
            result = default_multus_config(resource)
    return cast(R, result)


def errors(new: Resource, old: Resource | None, around: Surroundings) -> list[FieldError]:
    """All that is wrong with creating `new` (if `old` is None) or with changing `old` into it; `new` is defaulted."""
    return _created_errors(new, around) if old is None else _updated_errors(old, new, around)


def _created_errors(new: Resource, around: Surroundings) -> list[FieldError]:
    match new:
        case Pool():
            return created_pool_errors(new, others=around.pools, families=around.families)
        case Subnet():
            return created_subnet_errors(new, others=around.subnets, pools=around.pools, families=around.families)
        case ReservedIP():
            return created_reserved_ip_errors(new, families=around.families)
        case Claim():
            return created_claim_errors(new)
        case MultusConfig():
            return created_multus_config_errors(new)
    return _stateless_errors(new)


def _updated_errors(old: Resource, new: Resource, around: Surroundings) -> list[FieldError]:
    match old, new:
        case Pool(), Pool():
            return updated_pool_errors(old, new, others=around.pools, claims=around.claims, families=around.families)
        case Subnet(), Subnet():
            return updated_subnet_errors(old, new, pools=around.pools, families=around.families)
        case ReservedIP(), ReservedIP():
            return updated_reserved_ip_errors(old, new, families=around.families)
        case Claim(), Claim():
            return updated_claim_errors(old, new)
        case MultusConfig(), MultusConfig():
            return updated_multus_config_errors(old, new)
    return _stateless_errors(new)


def _stateless_errors(new: Resource) -> list[FieldError]:
    """Kinds whose rules do not depend on what was there."""
    match new:
        case Coordinator():
            return coordinator_errors(new)
        case Service():
            return list(service_errors(new))
        case EndpointSlice():
            return list(endpoint_slice_errors(new))
    return []
