"""What a room of the controller is, and what it works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from controller.caches import Caches
from store.port import Store
from store.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Desk:
    """What every room gets."""

    store: Store
    """The API server, uncached."""
    caches: Caches
    """What is watched; ask for kinds in the room's constructor, before the caches run."""
    events: Recorder
    """Tells users, by Events on their objects."""
    namespace: str
    """The one that Spiderpool is installed in."""


class Room(Protocol):
    """One duty of the leading controller. Built by every replica; `run` by the leader alone, possibly several times."""

    async def run(self) -> None:
        """Do the duty until cancelled, beginning with all that is there: nothing is remembered from an earlier run."""
