"""What a write does to an object: the Kubernetes API's semantics as pure functions of old and new state.

`stored` is the object as the store holds it, `version` the resourceVersion that the write gets if it changes anything.
Source: k8s.io/apiserver `pkg/registry/rest/{create,update,delete}.go`, `pkg/registry/generic/registry/store.go`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple, cast
from uuid import uuid4

import msgspec
from msgspec.structs import replace

from api.meta import ObjectMeta, R, Resource, decode, encode
from store.errors import ConflictError, InvalidError, NotFoundError
from store.rules import OBJECT_BYTES


class Written(NamedTuple):
    """An object and its JSON."""

    resource: Resource
    data: bytes


class Change(NamedTuple):
    """A write's effect: the object's next state, and whether it goes away with it (then it is its last state)."""

    next: Written
    removed: bool


def create(resource: R, version: str, now: datetime) -> Change:
    """The object that `create` makes of `resource`. Raises InvalidError."""
    metadata = replace(
        resource.metadata,
        uid=str(uuid4()),
        resource_version=version,
        generation=1,
        creation_timestamp=now,
        deletion_timestamp=None,
        deletion_grace_period_seconds=None,
    )
    if resource.TYPE.status_subresource:
        return Change(_written(_with_status(resource, metadata, None)), removed=False)
    return Change(_written(replace(resource, metadata=metadata)), removed=False)


def update(stored: R, resource: R, version: str) -> Change | None:
    """The effect of `update`; None if nothing changes. Raises ConflictError, InvalidError."""
    old, new = stored.metadata, resource.metadata
    require(stored, uid=new.uid, resource_version=new.resource_version)
    _require_unchanged("creationTimestamp", old.creation_timestamp, new.creation_timestamp)
    _require_unchanged("deletionTimestamp", old.deletion_timestamp, new.deletion_timestamp)
    if old.deletion_timestamp:
        added = [finalizer for finalizer in new.finalizers if finalizer not in old.finalizers]
        if added:
            raise InvalidError(
                f"{title(stored)} is invalid: metadata.finalizers: no new finalizers can be added "
                f"while the object is being deleted, found {added}"
            )
    metadata = replace(
        new,
        uid=old.uid,
        resource_version=old.resource_version,
        generation=old.generation,
        creation_timestamp=old.creation_timestamp,
        deletion_timestamp=old.deletion_timestamp,
        deletion_grace_period_seconds=old.deletion_grace_period_seconds,
    )
    if stored.TYPE.status_subresource:
        candidate = _written(_with_status(resource, metadata, getattr(stored, "status", None))).resource
    else:
        candidate = _written(replace(resource, metadata=metadata)).resource
    if candidate == stored:
        return None
    generation = old.generation
    if generation is not None and replace(candidate, metadata=old) != stored:
        generation += 1
    metadata = replace(candidate.metadata, resource_version=version, generation=generation)
    removed = old.deletion_timestamp is not None and not metadata.finalizers
    return Change(_written(replace(candidate, metadata=metadata)), removed)


def update_status(stored: R, resource: R, version: str) -> Change | None:
    """The effect of `update_status`; None if nothing changes. Raises ConflictError, InvalidError, NotFoundError."""
    if not stored.TYPE.status_subresource:
        raise NotFoundError(f"{stored.TYPE.kind} has no status subresource")
    require(stored, uid=resource.metadata.uid, resource_version=resource.metadata.resource_version)
    status = getattr(resource, "status", None)
    candidate = _written(_with_status(stored, stored.metadata, status)).resource
    if candidate == stored:
        return None
    metadata = replace(stored.metadata, resource_version=version)
    return Change(_written(replace(candidate, metadata=metadata)), removed=False)


def delete(stored: Resource, version: str, now: datetime, *, uid: str, resource_version: str) -> Change | None:
    """The effect of `delete`; None if the object is being deleted already. Raises ConflictError."""
    require(stored, uid=uid, resource_version=resource_version)
    metadata = stored.metadata
    if not metadata.finalizers:
        return Change(_written(replace(stored, metadata=replace(metadata, resource_version=version))), removed=True)
    if metadata.deletion_timestamp:
        return None
    generation = None if metadata.generation is None else metadata.generation + 1
    metadata = replace(
        metadata,
        resource_version=version,
        generation=generation,
        deletion_timestamp=now,
        deletion_grace_period_seconds=0,
    )
    return Change(_written(replace(stored, metadata=metadata)), removed=False)


def require(stored: Resource, *, uid: str, resource_version: str) -> None:
    """Raise ConflictError unless `stored` has this uid and resourceVersion; empty ones match anything."""
    metadata = stored.metadata
    if uid and uid != metadata.uid:
        raise ConflictError(f"{title(stored)}: uid {uid} was named, the stored object's is {metadata.uid}")
    if resource_version and resource_version != metadata.resource_version:
        raise ConflictError(
            f"{title(stored)}: resourceVersion {resource_version} was named, "
            f"the object has been modified since, to {metadata.resource_version}"
        )


def _require_unchanged(member: str, old: datetime | None, new: datetime | None) -> None:
    if new is not None and new != old:
        raise InvalidError(f"metadata.{member}: is immutable and the store's to set")


def _with_status(resource: R, metadata: ObjectMeta, status: object) -> R:
    if hasattr(resource, "status"):
        return replace(resource, metadata=metadata, status=status)
    return replace(resource, metadata=metadata)


def _written(resource: Resource) -> Written:
    """`resource` as JSON and as read back from it: structs are not validated when built, and what cannot be read back
    would block every later list of the kind. Raises InvalidError.
    """
    try:
        data = encode(resource)
        back = decode(type(resource), data)
    except (msgspec.MsgspecError, TypeError, UnicodeEncodeError) as error:
        raise InvalidError(f"{title(resource)} is invalid: {error}") from error
    if len(data) > OBJECT_BYTES:
        raise InvalidError(f"{title(resource)} is invalid: {len(data)} bytes are too long, at most {OBJECT_BYTES}")
    return Written(cast(Any, back), data)


def title(resource: Resource) -> str:
    """How messages name an object: its kind, namespace and name."""
    metadata = resource.metadata
    name = f"{metadata.namespace}/{metadata.name}" if metadata.namespace else metadata.name
    return f"{resource.TYPE.kind} {name!r}"
