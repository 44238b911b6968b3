"""Admission of SpiderCoordinators; the rules are in `api.validate.coordinator`, and need nothing but the object."""

from __future__ import annotations

from api.coordinator import Coordinator
from api.validate.coordinator import coordinator_errors, default_coordinator
from api.validate.verdict import Verdict
from controller.admission.rules import Context, Rules


async def _default(new: Coordinator, old: Coordinator | None, context: Context) -> Coordinator:  # noqa: ARG001
    return default_coordinator(new)


async def _validate(new: Coordinator, old: Coordinator | None, context: Context) -> Verdict:  # noqa: ARG001
    if new.metadata.deletion_timestamp is not None:
        return []  # it may lose its finalizer, whatever is wrong with it
    return coordinator_errors(new)


ADMISSION = Rules(Coordinator, _default, _validate)
