"""Which of several pools, or subnets, that conflict may not be used.

Replicas of the controller admit without knowing of one another, so two that conflict can be created at the same
moment. Nobody can undo that, but everybody can agree on it: the younger (by creation time, then by UID) gives way.
Whoever gives way does not count any more, as if it had been refused: what conflicts with it alone is usable.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from api.meta import ObjectMeta
from api.pool import Pool
from api.ranges import Family, Interval, IPSet, Network, range_text
from api.subnet import Subnet
from api.validate.network import network_of
from api.validate.pool import pool_addresses

_NEVER = datetime.max.replace(tzinfo=UTC)


def pool_conflicts(pools: Iterable[Pool]) -> dict[str, str]:
    """The pools that may not be used, by name, each with a sentence that says why. `pools` are all there are.

    Two conflict if their networks overlap without being the same, or if they have an address in common. A pool whose
    network or ranges are malformed conflicts by what is well-formed in it.
    """
    networks: dict[Family, _Taken] = {4: _Taken(), 6: _Taken()}
    addresses: dict[Family, _Taken] = {4: _Taken(), 6: _Taken()}
    conflicts: dict[str, str] = {}
    for pool in sorted(pools, key=_age):
        name, network = pool.metadata.name, network_of(pool.spec.subnet)
        if network is None:
            continue
        whole, own = _interval(network), pool_addresses(pool.spec)
        rival = networks[network.version].first([whole])
        if rival is not None and rival[0] != whole:
            (low, high), other = rival
            theirs = range_text(network.version, (low, high))
            conflicts[name] = f"'spec.subnet' {network} overlaps with {theirs}, the network of the older IPPool {other}"
            continue
        shared = addresses[own.family].first(own.intervals)
        if shared is not None:
            text = _shared(own, shared[0])
            conflicts[name] = f"overlap with IPPool {shared[1]}, which is older, in IP ranges {text}"
            continue
        if rival is None:
            networks[network.version].add([whole], name)
        addresses[own.family].add(own.intervals, name)
    return conflicts


def subnet_conflicts(subnets: Iterable[Subnet]) -> dict[str, str]:
    """The same for subnets, of which two conflict if their networks have an address in common."""
    networks: dict[Family, _Taken] = {4: _Taken(), 6: _Taken()}
    conflicts: dict[str, str] = {}
    for subnet in sorted(subnets, key=_age):
        name, network = subnet.metadata.name, network_of(subnet.spec.subnet)
        if network is None:
            continue
        whole = _interval(network)
        rival = networks[network.version].first([whole])
        if rival is not None:
            conflicts[name] = f"'spec.subnet' {network} overlaps with the one of Subnet {rival[1]}, which is older"
        else:
            networks[network.version].add([whole], name)
    return conflicts


class _Taken:
    """Disjoint intervals and who has them, sorted: a new one is compared with its neighbours only."""

    def __init__(self) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        self._names: list[str] = []

    def first(self, intervals: Sequence[Interval]) -> tuple[Interval, str] | None:
        """An interval that has something in common with `intervals`, and who has it."""
        for low, high in intervals:
            at = bisect_right(self._lows, high) - 1
            if at >= 0 and self._highs[at] >= low:
                return (self._lows[at], self._highs[at]), self._names[at]
        return None

    def add(self, intervals: Sequence[Interval], name: str) -> None:
        """Take `intervals`, of which `first` found nothing."""
        for low, high in intervals:
            at = bisect_right(self._lows, low)
            self._lows.insert(at, low)
            self._highs.insert(at, high)
            self._names.insert(at, name)


class _Dated(Protocol):
    @property
    def metadata(self) -> ObjectMeta: ...


def _age(resource: _Dated) -> tuple[datetime, str, str]:
    meta = resource.metadata
    return meta.creation_timestamp or _NEVER, meta.uid, meta.name


def _interval(network: Network) -> Interval:
    return int(network.network_address), int(network.broadcast_address)


def _shared(own: IPSet, theirs: Interval) -> str:
    return ", ".join((own & IPSet(own.family, [theirs])).to_ranges())
