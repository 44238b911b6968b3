"""What an operator may set about adoption."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least


@dataclass(frozen=True)
class AdoptionSettings:
    """Pools that upstream has served are taken over when none of its agents is left: the addresses in their status
    become claims. Times are in seconds."""

    enabled: bool = True
    """Take over; else such pools stay unused."""
    retry: float = 10.0
    """Between two looks whether upstream's agents have gone."""
    workers: int = 16
    """How many claims are written at the same time."""

    def __post_init__(self) -> None:
        at_least(0.05, retry=self.retry)
        at_least(1, workers=self.workers)
