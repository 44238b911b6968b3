"""`spiderpoolctl delete`: ask for the end of objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from api.claim import LABEL_POOL, Claim, label_value
from api.meta import R, Resource
from api.pool import Pool
from cli.naming import CliError, identifier
from store.errors import ConflictError, NotFoundError
from store.port import Query, Store

_NAMED_CLAIMS = 3
"""How many of a pool's addresses a message names."""


async def delete(
    store: Store, targets: Iterable[tuple[type[Resource], str, str]], say: Callable[[str], None], *, missing_ok: bool
) -> None:
    """Delete each target (kind, name, namespace); `say` gets one line for each that was there.

    The object that is deleted is the one that was read (uid precondition), not one that took its name meanwhile.
    Raises CliError, after all targets were tried, that names those that could not be deleted.
    """
    problems = []
    for kind, name, namespace in targets:
        try:
            say(await _delete_one(store, kind, name, namespace))
        except NotFoundError:
            if not missing_ok:
                problems.append(
                    f"{identifier(kind, name)} not found{f' in namespace {namespace}' if namespace else ''}"
                )
        except ConflictError as error:
            problems.append(f"{identifier(kind, name)}: {error}")
    if problems:
        raise CliError(*problems)


async def _delete_one(store: Store, kind: type[Resource], name: str, namespace: str) -> str:
    found = await store.get(kind, name, namespace)
    await store.delete(kind, name, namespace, uid=found.metadata.uid)
    left = await _still_there(store, found)
    if left is None:
        return f"{identifier(kind, name)} deleted"
    return f"{identifier(kind, name)} is terminating: {await _reason(store, left)}"


async def _still_there(store: Store, resource: R) -> R | None:
    try:
        left = await store.get(type(resource), resource.metadata.name, resource.metadata.namespace)
    except NotFoundError:
        return None
    return left if left.metadata.uid == resource.metadata.uid else None


async def _reason(store: Store, left: Resource) -> str:
    """What a terminating object waits for."""
    finalizers = f"finalizer {', '.join(left.metadata.finalizers)}"
    if not isinstance(left, Pool):
        return f"it waits for {finalizers}"
    query = Query(labels={LABEL_POOL: label_value(left.metadata.name)})
    held = sorted(claim.spec.address for claim in (await store.list(Claim, query)).items)
    if not held:
        return f"no address is claimed, it goes soon ({finalizers})"
    shown = ", ".join(held[:_NAMED_CLAIMS]) + (", …" if len(held) > _NAMED_CLAIMS else "")
    return f"{len(held)} of its addresses are claimed ({shown}), it goes with the last of them ({finalizers})"
