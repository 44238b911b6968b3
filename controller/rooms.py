"""The rooms of the controller, built from their settings."""

from __future__ import annotations

from controller.room import Desk, Room
from controller.settings import Settings


def build(desk: Desk, settings: Settings) -> dict[str, Room]:  # noqa: ARG001 (the rooms take them)
    """Every duty of the leader by name. Each asks for its caches when it is built."""
    return {}
