"""The ledgers: writing them, and what the rest of the room must know of subnets and their pools from the caches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TypeVar
from weakref import WeakValueDictionary

from msgspec.structs import replace

from api import ledger
from api.autopools import Application, application_of
from api.claim import Claim, claim_name
from api.condition import Condition
from api.pool import Pool
from api.ranges import Family, IPSet, to_address
from api.reservedip import ReservedIP
from api.subnet import Subnet, SubnetStatus
from api.validate.network import network_of
from api.validate.pool import pool_addresses
from api.validate.ranges import lenient_net
from api.validate.subnet import family_of, subnet_addresses
from controller.caches import Cache
from store.port import Store

INT64_MAX = 2**63 - 1

K = TypeVar("K")


class Locks:
    """One lock for each subnet: those who change its ledger take turns, or all but one of them would fail."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, subnet: str) -> asyncio.Lock:
        """The lock of a subnet, by name; hold on to it while it is locked."""
        return self._locks.setdefault(subnet, asyncio.Lock())


class Index:
    """Pools by network and by application, from the cache; of use as hints, never to free anything."""

    def __init__(self) -> None:
        self._by_network: dict[str, dict[str, Pool]] = {}
        self._by_application: dict[Application, dict[str, Pool]] = {}

    def changed(self, old: Pool | None, new: Pool | None) -> None:
        """Take in a change of the cache."""
        if old is not None:
            _drop(self._by_network, network_key(old), old)
            _drop(self._by_application, application_of(old), old)
        if new is not None:
            _put(self._by_network, network_key(new), new)
            _put(self._by_application, application_of(new), new)

    def of_network(self, network: str) -> Iterable[Pool]:
        """Pools with the network."""
        return self._by_network.get(network, {}).values()

    def of_application(self, application: Application) -> Iterable[Pool]:
        """Automatic pools of an application and its forerunners."""
        return self._by_application.get(application, {}).values()


def _put(table: dict[K, dict[str, Pool]], key: K | None, pool: Pool) -> None:
    if key is not None:
        table.setdefault(key, {})[pool.metadata.name] = pool


def _drop(table: dict[K, dict[str, Pool]], key: K | None, pool: Pool) -> None:
    if key is not None and key in table:
        table[key].pop(pool.metadata.name, None)
        if not table[key]:
            del table[key]


def network_key(resource: Pool | Subnet) -> str | None:
    """The network in canonical form; None if it is malformed."""
    network = network_of(resource.spec.subnet)
    return None if network is None else str(network)


def free_addresses(
    subnet: Subnet, grants: Mapping[str, ledger.Grant], pools: Iterable[Pool], reserved: Cache[ReservedIP]
) -> IPSet:
    """What the subnet can give: neither granted, nor in a pool that the ledger has not seen yet, nor reserved."""
    family = family_of(subnet.spec)
    taken = [ledger.granted(grants, family), *(pool_addresses(pool.spec) for pool in pools)]
    kept = (lenient_net(each.spec.ips, (), family) for each in reserved.values() if each.spec.ip_version == family)
    return subnet_addresses(subnet.spec) - ledger.union(family, [*taken, *kept])


def is_claimed(claims: Cache[Claim], family: Family, number: int) -> bool:
    """Whether a claim holds the address, as far as is known: it would be of no use to a pool."""
    return claims.get(claim_name(to_address(family, number))) is not None


def written_status(
    subnet: Subnet, grants: Mapping[str, ledger.Grant], conditions: list[Condition] | None = None
) -> SubnetStatus:
    """The status that says so; without `conditions` they stay as they are."""
    old = subnet.status or SubnetStatus()
    return replace(
        old,
        controlled_ip_pools=ledger.dump(grants),
        total_ip_count=min(subnet_addresses(subnet.spec).count, INT64_MAX),
        allocated_ip_count=min(ledger.granted(grants, family_of(subnet.spec)).count, INT64_MAX),
        conditions=old.conditions if conditions is None else conditions,
    )


async def write_ledger(
    store: Store, subnet: Subnet, grants: Mapping[str, ledger.Grant], conditions: list[Condition] | None = None
) -> Subnet:
    """The subnet with this ledger. Raises ConflictError if it is not in the version of `subnet` any more."""
    status = written_status(subnet, grants, conditions)
    if status == subnet.status:
        return subnet
    return await store.update_status(replace(subnet, status=status))
