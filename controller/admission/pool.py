"""Admission of SpiderIPPools: what is read for a decision, and when; the rules are in `api.validate`."""

from __future__ import annotations

from api.claim import LABEL_POOL, Claim, label_value
from api.pool import Pool, cidr_label
from api.subnet import LABEL_OWNER_SUBNET, LABEL_SUBNET_CIDR, Subnet
from api.validate.labels import value_problem
from api.validate.pool import (
    created_pool_errors,
    default_pool,
    deleted_pool_denial,
    pool_addresses,
    updated_pool_denial,
    updated_pool_errors,
)
from api.validate.subnet import inherited, owned_pool_errors, subnet_of
from api.validate.verdict import Denial, Verdict
from controller.admission.rules import Context, Rules
from store.port import Query, Store


async def _default(new: Pool, old: Pool | None, context: Context) -> Pool:
    pool = default_pool(new)
    if not context.features.subnets or _keeps_its_owner(pool, old):
        return pool
    return inherited(pool, await _subnets(context.store, pool))


async def _validate(new: Pool, old: Pool | None, context: Context) -> Verdict:
    # Lists grow with the cluster; most updates, a finalizer's or an annotation's, change no address and need none.
    families, after = context.features.families, pool_addresses(new.spec)
    if old is None:
        others = (await context.store.list(Pool)).items
        if any(other.metadata.name == new.metadata.name for other in others):
            return Denial("AlreadyExists", "")
        changed, errors = bool(after), created_pool_errors(new, others=others, families=families)
    else:
        if denial := updated_pool_denial(old, new):
            return denial
        before = pool_addresses(old.spec)
        changed = before != after
        errors = updated_pool_errors(
            old,
            new,
            others=(await context.store.list(Pool)).items if after - before else (),
            claims=await _claims(context.store, new) if before - after else (),
            families=families,
        )
    if changed and context.features.subnets:
        errors += owned_pool_errors(old, new, subnet_of(new, await _subnets(context.store, new)))
    return errors


async def _validate_deletion(old: Pool, context: Context) -> Verdict:
    if not context.features.guard_deletion:
        return []
    return deleted_pool_denial(old, await _claims(context.store, old)) or []


def _keeps_its_owner(new: Pool, old: Pool | None) -> bool:
    """Whether an update leaves the pool with the subnet that it has, so that nobody needs to look for one."""
    if old is None or LABEL_OWNER_SUBNET not in new.metadata.labels or new.spec.subnet != old.spec.subnet:
        return False
    label = new.metadata.labels[LABEL_OWNER_SUBNET]
    return (
        label == old.metadata.labels.get(LABEL_OWNER_SUBNET)
        and new.metadata.owner_references == old.metadata.owner_references
        and any(owner.controller and owner.kind == Subnet.TYPE.kind for owner in new.metadata.owner_references)
    )


async def _subnets(store: Store, pool: Pool) -> list[Subnet]:
    """The subnets with the pool's network, all of them: there may be several for a moment."""
    label = cidr_label(pool.spec.subnet)
    if value_problem(label):
        return []  # no network
    return (await store.list(Subnet, Query(labels={LABEL_SUBNET_CIDR: label}))).items


async def _claims(store: Store, pool: Pool) -> list[Claim]:
    return (await store.list(Claim, Query(labels={LABEL_POOL: label_value(pool.metadata.name)}))).items


ADMISSION = Rules(Pool, _default, _validate, _validate_deletion)
