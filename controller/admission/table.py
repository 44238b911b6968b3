"""Which kinds are admitted, and by what: one line for each."""

from __future__ import annotations

from controller.admission import pool, reservedip, subnet
from controller.admission.rules import Entry
from controller.caches import Caches
from controller.coordinator import admission as coordinator
from controller.multus import admission as multus
from controller.settings import Settings


def table(settings: Settings, caches: Caches) -> tuple[Entry, ...]:
    """What this installation admits. Asks for caches, so call it before they run."""
    entries: list[Entry] = [pool.ADMISSION, subnet.ADMISSION, reservedip.ADMISSION]
    if settings.coordinator.enabled:
        entries.append(coordinator.ADMISSION)
    if settings.multus.enabled:
        entries.append(multus.ADMISSION)
    if settings.injection.enabled:
        entries.append(multus.pod_injection(settings.injection, caches, settings.pod.namespace))
    return tuple(entries)
