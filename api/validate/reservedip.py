"""Defaulting and validation of a SpiderReservedIP.

There is no check for overlaps, neither with pools nor with one another: a reservation only keeps addresses from being
chosen. A reversed range is refused as in pools.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from ipaddress import ip_address

from msgspec.structs import replace

from api.ranges import Family
from api.reservedip import ReservedIP
from api.validate import ranges
from api.validate.fields import FieldError, forbidden
from api.validate.verdict import Denial, terminating_denial


def default_reserved_ip(reserved: ReservedIP) -> ReservedIP:
    """The object with `ipVersion` and merged ranges; a terminating or empty one stays as it is."""
    spec = reserved.spec
    if ranges.is_terminating(reserved) or not spec.ips:
        return reserved
    family = spec.ip_version or _family(spec.ips[0])
    return replace(reserved, spec=replace(spec, ip_version=family, ips=ranges.merged(spec.ips, family)))


def created_reserved_ip_errors(reserved: ReservedIP, *, families: Collection[Family] = ranges.BOTH) -> list[FieldError]:
    """All that is wrong with a new object, defaulted by `default_reserved_ip`."""
    return list(_errors(reserved, families))


def updated_reserved_ip_errors(
    old: ReservedIP, new: ReservedIP, *, families: Collection[Family] = ranges.BOTH
) -> list[FieldError]:
    """All that is wrong with the change from `old` to `new`, which `default_reserved_ip` has seen."""
    if ranges.is_terminating(old):
        denial = updated_reserved_ip_denial(old, new)
        return [forbidden("metadata.deletionTimestamp", denial.detail)] if denial else []
    return [
        *ranges.immutable_errors("spec.ipVersion", old.spec.ip_version, new.spec.ip_version),
        *_errors(new, families),
    ]


def updated_reserved_ip_denial(old: ReservedIP, new: ReservedIP) -> Denial | None:
    """Why a terminating object may not be changed so; None for one that is not terminating."""
    return terminating_denial(old, new, "ReservedIP")


def _errors(reserved: ReservedIP, families: Collection[Family]) -> Iterator[FieldError]:
    version = reserved.spec.ip_version
    yield from ranges.version_errors(version, "'spec.ips' is empty or 'spec.ips[0]'", families)
    if version is not None:
        yield from ranges.parse_list(reserved.spec.ips, version, "spec.ips").errors


def _family(first: str) -> Family | None:
    try:
        return ip_address(first.partition("-")[0]).version
    except ValueError:
        return None
