"""Settings of the pools' views."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.limits import at_least


@dataclass(frozen=True)
class StatusSettings:
    """How often pools' status is written. Nobody decides by it, so that it may be late. Times are in seconds."""

    interval: float = 2.0
    """Time between two writes of one pool's status at least: a burst of pods costs few writes, not one each."""
    rate: int = 32768
    """How many bytes of one pool's `allocatedIPs` are written in a second at most, on average: every agent watches
    pools, so a pool of 5000 addresses (450 kB) is written every 14 s and no more often."""
    workers: int = 4
    """How many pools are written at a time."""

    def __post_init__(self) -> None:
        at_least(0.01, interval=self.interval)
        at_least(1, rate=self.rate, workers=self.workers)
