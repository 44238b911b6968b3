"""Which kinds are admitted, and by what: one line for each."""

from __future__ import annotations

from controller.admission import pool, reservedip
from controller.admission.rules import Entry

TABLE: tuple[Entry, ...] = (
    pool.ADMISSION,
    reservedip.ADMISSION,
)
