"""What the network is asked about a pool's addresses: as the pool says, the cluster, or else the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from api.coordinator import ClusterCoordinatorSpec
from api.pool import PoolSpec
from plugins.ipam.candidates import PoolFacts
from plugins.ipam.settings import IpamSettings


class Questions(NamedTuple):
    """What is asked."""

    conflict: bool
    """Whether somebody uses an address."""
    gateway: bool
    """Whether the pool's gateway is there."""


def questions(pool: PoolSpec | None, cluster: ClusterCoordinatorSpec | None, settings: IpamSettings) -> Questions:
    """For each question the first that says anything counts: the pool, the SpiderCoordinator, the agent's setting."""
    said = [each for each in (pool, cluster) if each is not None]
    conflicts = [each.detect_ip_conflict for each in said] + [settings.enable_ip_conflict_detection]
    gateways = [each.detect_gateway for each in said] + [settings.enable_gateway_detection]
    return Questions(
        conflict=next(answer for answer in conflicts if answer is not None),
        gateway=next(answer for answer in gateways if answer is not None),
    )


class Policy:
    """What is asked for each pool, as of now."""

    def __init__(
        self,
        settings: IpamSettings,
        pool: Callable[[str], PoolFacts | None],
        cluster: Callable[[], ClusterCoordinatorSpec | None],
    ) -> None:
        """`pool` knows pools by name, `cluster` the SpiderCoordinator that counts."""
        self._settings = settings
        self._pool = pool
        self._cluster = cluster

    def of(self, pool: str) -> Questions:
        """The questions about addresses of the pool of that name; one that is gone says nothing."""
        facts = self._pool(pool)
        return questions(facts.spec if facts is not None else None, self._cluster(), self._settings)
