"""The rooms of the controller, built from their settings."""

from __future__ import annotations

from controller.adoption.adopt import AdoptionRoom
from controller.adoption.decide import Switches
from controller.coordinator.room import CoordinatorRoom
from controller.multus.room import MultusRoom
from controller.reclaim.reclaim import Reclaim
from controller.room import Desk, Room
from controller.settings import Settings
from controller.status.pools import PoolStatusRoom
from controller.subnets.room import Subnets


def build(desk: Desk, settings: Settings) -> dict[str, Room]:
    """Every duty of the leader by name. Each asks for its caches when it is built."""
    rooms: dict[str, Room] = {
        "reclaim": Reclaim(desk, settings.reclaim, settings.provider),
        "pool-status": PoolStatusRoom(desk, settings.status),
    }
    if settings.adoption.enabled:
        kept = Switches(settings.reclaim.stateful_sets, settings.reclaim.virtual_machines)
        rooms["adoption"] = AdoptionRoom(desk, settings.adoption, kept)
    if settings.subnets.enabled:
        rooms["subnets"] = Subnets(desk, settings.subnets)
    if settings.multus.enabled:
        rooms["multus"] = MultusRoom(desk, settings.multus)
    if settings.coordinator.enabled:
        rooms["coordinator"] = CoordinatorRoom(desk, settings.coordinator)
    return rooms
