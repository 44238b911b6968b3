"""`spiderpoolctl apply`: make the store's objects what the files say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from msgspec import UNSET
from msgspec.structs import replace

from api.claim import LABEL_POOL, Claim, label_value
from api.kinds import OWN
from api.meta import ObjectMeta, R, Resource
from api.pool import Pool
from api.validate import Surroundings, defaulted, errors
from api.validate.pool import pool_addresses
from cli.manifests import Given
from cli.naming import CliError, identifier
from store import rules
from store.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError, UncertainError
from store.port import Query, Store

Outcome = Literal["created", "configured", "unchanged"]

_AT_ONCE = 256
"""Writes under way together: enough for the store to share one fsync among many."""

_ATTEMPTS = 10
"""Tries per object: whoever writes an object's status between our reading and our writing costs one."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One object on its way into the store."""

    given: Given
    stored: Resource | None
    """What was there when we looked."""
    wanted: Resource


async def apply(store: Store, objects: list[Given], say: Callable[[str], None]) -> None:
    """Create or update every object; `say` gets one line for each, in the files' order.

    All are checked before the first is written, against the store and against one another: if one is wrong, nothing
    is written and CliError names every problem. Members absent in the file are removed from `spec`; labels,
    annotations, finalizers and owners are added to what is there, since others may have set them. `status` is left
    alone where it is a subresource.
    """
    steps = await _plan(store, objects)
    for start in range(0, len(steps), _AT_ONCE):
        batch = steps[start : start + _AT_ONCE]
        results = await asyncio.gather(*(_write(store, step) for step in batch), return_exceptions=True)
        for step, result in zip(batch, results, strict=True):
            if not isinstance(result, BaseException):
                say(f"{identifier(type(step.wanted), step.wanted.metadata.name)} {result}")
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise failures[0]


def check_cluster(objects: Iterable[Given]) -> None:
    """Raises CliError for kinds that a cluster has more members of than we know: writing them would lose those."""
    problems = [
        f"{given.place}: it belongs to Kubernetes, use kubectl apply"
        for given in objects
        if type(given.resource) not in OWN
    ]
    if problems:
        raise CliError(*problems)


async def _plan(store: Store, objects: list[Given]) -> list[_Step]:
    kinds = {type(given.resource) for given in objects} | {Pool}
    present = {_key(found): found for kind in kinds for found in (await store.list(kind)).items}
    pools = {found.metadata.name: found for found in present.values() if isinstance(found, Pool)}
    problems: list[str] = []
    steps = []
    for given in objects:
        stored = present.get(_key(given.resource))
        step = _Step(given, stored, desired(given.resource, stored))
        problems += await _faults(store, step, pools.values())
        steps.append(step)
        if isinstance(step.wanted, Pool):
            pools[step.wanted.metadata.name] = step.wanted
    if problems:
        raise CliError(*problems, "nothing was changed")
    return steps


async def _write(store: Store, step: _Step) -> Outcome:
    for _ in range(_ATTEMPTS):
        if step.wanted == step.stored:
            return "unchanged"
        try:
            if step.stored is None:
                await store.create(step.wanted)
                return "created"
            await store.update(step.wanted)
        except ConflictError as error:
            if step.given.resource.metadata.uid or step.given.resource.metadata.resource_version:
                raise CliError(f"{step.given.place}: {error}") from None
        except (AlreadyExistsError, NotFoundError, UncertainError):
            pass  # somebody was faster, or our answer got lost: look again
        else:
            return "configured"
        step = await _look_again(store, step)
    raise CliError(f"{step.given.place}: changed by others {_ATTEMPTS} times in a row, try again")


async def _look_again(store: Store, step: _Step) -> _Step:
    """The step from what is there now. Raises CliError if that speaks against it."""
    asked = step.given.resource
    stored: Resource | None = None
    with suppress(NotFoundError):
        stored = await store.get(type(asked), asked.metadata.name, asked.metadata.namespace)
    again = _Step(step.given, stored, desired(asked, stored))
    faults = await _faults(store, again, (await store.list(Pool)).items)
    if faults:
        raise CliError(*faults)
    return again


def desired(wanted: R, stored: R | None) -> R:
    """What the store should hold, if the user wants `wanted` and there is `stored`."""
    if stored is None:
        own = wanted.metadata
        metadata = ObjectMeta(
            name=own.name,
            namespace=own.namespace,
            labels=own.labels,
            annotations=own.annotations,
            finalizers=own.finalizers,
            owner_references=own.owner_references,
        )
        return defaulted(replace(wanted, metadata=metadata))
    mine, theirs = wanted.metadata, stored.metadata
    metadata = replace(
        theirs,
        uid=mine.uid or theirs.uid,
        resource_version=mine.resource_version or theirs.resource_version,
        labels={**theirs.labels, **mine.labels},
        annotations={**theirs.annotations, **mine.annotations},
        finalizers=[*theirs.finalizers, *(f for f in mine.finalizers if f not in theirs.finalizers)],
        owner_references=[
            *(o for o in theirs.owner_references if o.uid not in {m.uid for m in mine.owner_references}),
            *mine.owner_references,
        ],
    )
    result = replace(wanted, metadata=metadata)
    status = getattr(stored, "status", UNSET) if wanted.TYPE.status_subresource else UNSET
    return defaulted(result if status is UNSET else replace(result, status=status))


def _key(resource: Resource) -> tuple[str, str, str]:
    return resource.TYPE.kind, resource.metadata.namespace, resource.metadata.name


async def _faults(store: Store, step: _Step, pools: Iterable[Pool]) -> list[str]:
    """Everything that speaks against taking the step."""
    around = Surroundings(pools=pools, claims=await _claims(store, step.wanted, step.stored))
    faults = [*_broken_rules(step.wanted), *map(str, errors(step.wanted, step.stored, around))]
    return [f"{step.given.place}: {fault}" for fault in faults]


def _broken_rules(wanted: Resource) -> Iterator[str]:
    try:
        rules.check(wanted)
    except InvalidError as error:
        yield str(error).partition(" is invalid: ")[2] or str(error)  # the place names the object already


async def _claims(store: Store, wanted: Resource, stored: Resource | None) -> list[Claim]:
    """The claims on a pool that gets smaller; nobody asks for them otherwise."""
    if not isinstance(wanted, Pool) or not isinstance(stored, Pool):
        return []
    if pool_addresses(stored.spec) <= pool_addresses(wanted.spec):
        return []
    return (await store.list(Claim, Query(labels={LABEL_POOL: label_value(wanted.metadata.name)}))).items
