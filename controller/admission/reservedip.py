"""Admission of SpiderReservedIPs."""

from __future__ import annotations

from api.reservedip import ReservedIP
from api.validate.reservedip import (
    created_reserved_ip_errors,
    default_reserved_ip,
    updated_reserved_ip_denial,
    updated_reserved_ip_errors,
)
from api.validate.verdict import Verdict
from controller.admission.rules import Context, Rules


async def _default(new: ReservedIP, old: ReservedIP | None, context: Context) -> ReservedIP:  # noqa: ARG001 (the same for every kind)
    return default_reserved_ip(new)


async def _validate(new: ReservedIP, old: ReservedIP | None, context: Context) -> Verdict:
    families = context.features.families
    if old is None:
        return created_reserved_ip_errors(new, families=families)
    return updated_reserved_ip_denial(old, new) or updated_reserved_ip_errors(old, new, families=families)


ADMISSION = Rules(ReservedIP, _default, _validate)
