"""SpiderReservedIP: addresses that are never chosen for new allocations, whatever pool they are in."""

from __future__ import annotations

from typing import ClassVar

from api.meta import GROUP, VERSION, Kind, Resource, Struct
from api.pool import IPVersion


class ReservedIPSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderReservedIP; `ipVersion` is derived from `ips[0]` and immutable."""

    ip_version: IPVersion | None = None
    ips: list[str] | None = None


class ReservedIP(Resource, frozen=True, kw_only=True):
    """SpiderReservedIP."""

    TYPE: ClassVar[Kind] = Kind(GROUP, VERSION, "SpiderReservedIP", "spiderreservedips", namespaced=False, short="sr")
    spec: ReservedIPSpec
