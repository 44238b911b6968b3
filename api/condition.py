"""Conditions of a status in the standard form: what is so of an object now, since when, and why.

Source: Kubernetes API conventions, "Typical status properties"; k8s.io/apimachinery `metav1.Condition`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from api.meta import Struct, Timestamp, now

Truth = Literal["True", "False", "Unknown"]


class Condition(Struct, frozen=True, kw_only=True):
    """One thing that is so, or not so, of the object now."""

    type: str
    """What is so, in CamelCase; one condition of each type."""
    status: Truth
    """Whether it is so: True, False or Unknown."""
    reason: str
    """Why, for programs: one word in CamelCase."""
    message: str = ""
    """Why, for people."""
    last_transition_time: Timestamp | None = None
    """Since when the status is what it is."""
    observed_generation: int | None = None
    """The generation of the object that this was seen in."""


def updated(conditions: Iterable[Condition] | None, *wanted: Condition) -> list[Condition]:
    """`conditions` with `wanted` in them, by type; the time stays where the status does."""
    found = {condition.type: condition for condition in conditions or ()}
    for condition in wanted:
        old = found.get(condition.type)
        kept = old.last_transition_time if old is not None and old.status == condition.status else None
        found[condition.type] = replace(condition, last_transition_time=kept or condition.last_transition_time or now())
    return [found[name] for name in sorted(found)]
