"""Admission of SpiderIPPools: what is read for a decision, and when; the rules are in `api.validate.pool`."""

from __future__ import annotations

from api.claim import LABEL_POOL, Claim, label_value
from api.pool import Pool
from api.validate.pool import (
    created_pool_errors,
    default_pool,
    deleted_pool_denial,
    pool_addresses,
    updated_pool_denial,
    updated_pool_errors,
)
from api.validate.verdict import Denial, Verdict
from controller.admission.rules import Context, Rules
from store.port import Query, Store


async def _default(new: Pool, old: Pool | None, context: Context) -> Pool:  # noqa: ARG001 (the same for every kind)
    return default_pool(new)


async def _validate(new: Pool, old: Pool | None, context: Context) -> Verdict:
    families = context.features.families
    if old is None:
        others = (await context.store.list(Pool)).items
        if any(other.metadata.name == new.metadata.name for other in others):
            return Denial("AlreadyExists", "")
        return created_pool_errors(new, others=others, families=families)
    if not context.by_us and (denial := updated_pool_denial(old, new)):
        return denial
    # Lists grow with the cluster; most updates, a finalizer's or an annotation's, change no address and need none.
    before, after = pool_addresses(old.spec), pool_addresses(new.spec)
    return updated_pool_errors(
        old,
        new,
        others=(await context.store.list(Pool)).items if after - before else (),
        claims=await _claims(context.store, new) if before - after else (),
        families=families,
    )


async def _validate_deletion(old: Pool, context: Context) -> Verdict:
    if not context.features.guard_deletion:
        return []
    return deleted_pool_denial(old, await _claims(context.store, old)) or []


async def _claims(store: Store, pool: Pool) -> list[Claim]:
    return (await store.list(Claim, Query(labels={LABEL_POOL: label_value(pool.metadata.name)}))).items


ADMISSION = Rules(Pool, _default, _validate, _validate_deletion)
