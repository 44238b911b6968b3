"""What admission may decide about one object: nothing to object to, faults of fields, or a denial of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from api.meta import Resource
from api.validate.fields import FieldError


@dataclass(frozen=True, slots=True)
class Denial:
    """The request is refused whatever its fields say: another status than Invalid."""

    reason: Literal["Forbidden", "AlreadyExists"]
    """Forbidden becomes HTTP status 403, AlreadyExists 409."""
    detail: str
    """Why, for Forbidden: `cannot update a terminating IPPool`."""


Verdict = Denial | list[FieldError]
"""An empty list admits the object."""


def terminating_denial(old: Resource, new: Resource, what: str, finalizer: str = "") -> Denial | None:
    """Why `old`, which somebody deleted, may not become `new`; `what` is how messages name the kind.

    It may lose finalizers, and anything once `finalizer`, which keeps it, is off. To let go of other finalizers, as
    upstream does not, matters: the garbage collector's `foregroundDeletion` would stay for good.
    """
    if old.metadata.deletion_timestamp is None:
        return None
    before, after = set(old.metadata.finalizers), set(new.metadata.finalizers)
    if finalizer and finalizer not in after:
        return None
    if after < before and getattr(old, "spec", None) == getattr(new, "spec", None):
        return None
    return Denial("Forbidden", f"cannot update a terminating {what}")
