"""Which pools give way to older ones, known without looking at all pools at every change."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from api.conflicts import pool_conflicts
from api.pool import Pool, PoolSpec
from api.ranges import Family, Interval, IPSet
from api.validate.network import network_of
from api.validate.pool import pool_addresses


class Conflicts:
    """What `api.conflicts.pool_conflicts` says of all pools.

    As long as there are no conflicts, a change is compared with its neighbours alone, and nobody's age matters. While
    there are some, which an administrator should not leave so, all pools are looked at once after each change.
    """

    def __init__(self, pools: Callable[[], Iterable[Pool]]) -> None:
        self._pools = pools
        self._found: dict[str, str] | None = {}
        """None: not known."""
        self._networks: dict[Family, Counter[Interval]] = {4: Counter(), 6: Counter()}
        """How many pools have a network. This and what follows is kept only while there are no conflicts."""
        self._bounds: dict[Family, list[Interval]] = {4: [], 6: []}
        """The networks, sorted."""
        self._taken: dict[Family, list[Interval]] = {4: [], 6: []}
        """All pools' ranges, sorted."""

    def changed(self, old: Pool | None, new: Pool | None) -> None:
        """A pool came, went or changed; it may also be another one of the same name."""
        if self._found is None or (old is not None and new is not None and _extent(old) == _extent(new)):
            return
        if self._found:
            self._found = None
            return
        if old is not None:
            self._remove(old.spec)
        if new is not None and not self._add(new.spec):
            self._found = None

    def now(self) -> Mapping[str, str]:
        """The pools that may not be used, each with the reason."""
        if self._found is None:
            pools = list(self._pools())
            self._found = pool_conflicts(pools)
            if not self._found:
                for family in (4, 6):
                    self._networks[family].clear()
                    self._bounds[family].clear()
                    self._taken[family].clear()
                for pool in pools:
                    self._add(pool.spec)
        return self._found

    def _add(self, spec: PoolSpec) -> bool:
        """Whether the pool conflicts with none; otherwise what is kept is of no use any more."""
        place = _place(spec)
        if place is None:
            return True
        family, whole, addresses = place
        if not self._networks[family][whole]:
            if _meets(self._bounds[family], whole):
                return False
            insort(self._bounds[family], whole)
        self._networks[family][whole] += 1
        for part in addresses.intervals:
            if _meets(self._taken[addresses.family], part):
                return False
            insort(self._taken[addresses.family], part)
        return True

    def _remove(self, spec: PoolSpec) -> None:
        place = _place(spec)
        if place is None:
            return
        family, whole, addresses = place
        self._networks[family][whole] -= 1
        if not self._networks[family][whole]:
            del self._networks[family][whole]
            del self._bounds[family][bisect_left(self._bounds[family], whole)]
        for part in addresses.intervals:
            del self._taken[addresses.family][bisect_left(self._taken[addresses.family], part)]


def _extent(pool: Pool) -> tuple[object, ...]:
    """What decides, the pool's age included: that follows from its UID."""
    return pool.metadata.uid, pool.spec.subnet, pool.spec.ips, pool.spec.exclude_ips


def _place(spec: PoolSpec) -> tuple[Family, Interval, IPSet] | None:
    network = network_of(spec.subnet)
    if network is None:
        return None
    whole = (int(network.network_address), int(network.broadcast_address))
    return network.version, whole, pool_addresses(spec)


def _meets(intervals: list[Interval], new: Interval) -> bool:
    """Whether `new` has something in common with one of the intervals, which are sorted and disjoint."""
    at = bisect_right(intervals, (new[1], new[1])) - 1
    if at + 1 < len(intervals) and intervals[at + 1][0] <= new[1]:
        return True
    return at >= 0 and intervals[at][1] >= new[0]
