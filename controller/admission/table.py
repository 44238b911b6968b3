"""Which kinds are admitted, and by what: one line for each."""

from __future__ import annotations

from controller.admission import pool, reservedip
from controller.admission.rules import Entry, Features


def table(features: Features) -> tuple[Entry, ...]:  # noqa: ARG001 (kinds that can be switched off ask it)
    """What this installation admits."""
    return (pool.ADMISSION, reservedip.ADMISSION)
