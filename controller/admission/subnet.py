"""Admission of SpiderSubnets; the rules are in `api.validate.subnet`."""

from __future__ import annotations

from api.pool import Pool
from api.subnet import Subnet
from api.validate.subnet import (
    created_subnet_errors,
    default_subnet,
    deleted_subnet_denial,
    subnet_addresses,
    updated_subnet_denial,
    updated_subnet_errors,
)
from api.validate.verdict import Denial, Verdict
from controller.admission.rules import Context, Rules


async def _default(new: Subnet, old: Subnet | None, context: Context) -> Subnet:  # noqa: ARG001 (the same for every kind)
    # Nobody would take the finalizer off where subnets are switched off.
    return default_subnet(new) if context.features.subnets else new


async def _validate(new: Subnet, old: Subnet | None, context: Context) -> Verdict:
    families = context.features.families
    if old is not None:
        if denial := updated_subnet_denial(old, new):
            return denial
        dropped = subnet_addresses(old.spec) - subnet_addresses(new.spec)
        pools = (await context.store.list(Pool)).items if dropped else ()
        return updated_subnet_errors(old, new, pools=pools, families=families)
    if not context.features.subnets:
        return Denial("Forbidden", "SpiderSubnets are switched off in this installation (enableSpiderSubnet)")
    others = (await context.store.list(Subnet)).items
    if any(other.metadata.name == new.metadata.name for other in others):
        return Denial("AlreadyExists", "")
    pools = (await context.store.list(Pool)).items
    return created_subnet_errors(new, others=others, pools=pools, families=families)


async def _validate_deletion(old: Subnet, context: Context) -> Verdict:
    if not context.features.guard_deletion:
        return []
    return deleted_subnet_denial(old, (await context.store.list(Pool)).items) or []


ADMISSION = Rules(Subnet, _default, _validate, _validate_deletion)
