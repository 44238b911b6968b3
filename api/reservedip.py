"""SpiderReservedIP: addresses that are never chosen for new allocations, whatever pool they are in."""

from __future__ import annotations

from typing import ClassVar

from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import IPVersion


class ReservedIPSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderReservedIP; `ipVersion` is derived from `ips[0]` and immutable."""

    ip_version: IPVersion | None = None
    """Address family; derived from `ips[0]`. Immutable."""
    ips: list[str] | None = None
    """Ranges to keep free, `a` or `a-b`; several are merged and sorted."""


class ReservedIP(Resource, frozen=True, kw_only=True):
    """Addresses that are never chosen for new allocations, whatever pool they are in."""

    TYPE: ClassVar[Kind] = Kind(GROUP, VERSION, "SpiderReservedIP", "spiderreservedips", namespaced=False, short="sr")
    spec: ReservedIPSpec
