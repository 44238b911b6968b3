"""Defaulting and validation of a SpiderSubnet, and what a subnet means for the pools in it.

The rules are upstream's, with the differences that `api.validate.pool` has: every error is reported, and an update is
blamed only for what it changes.

What admission must know: for a subnet's creation all subnets and pools, read from the authority; where it is to lose
addresses, or to be deleted under guard, the pools of its network, for the ledger in its status is behind by what was
just made, and anybody may have emptied it. For a pool's creation and update the subnets with the
pool's network (`subnet_of`), read from the authority, since an automatic pool is changed right after its ledger; and
`inherited` comes after `default_pool`, if the feature is on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from msgspec.structs import replace

from api import ledger
from api.apps import controller_of
from api.meta import FINALIZER
from api.pool import Pool, PoolSpec
from api.ranges import Family, IPSet
from api.subnet import (
    LABEL_OWNER_SUBNET,
    LABEL_SUBNET_CIDR,
    Subnet,
    SubnetSpec,
    is_automatic,
    label_text,
    owner_reference,
)
from api.validate import ranges
from api.validate.fields import FieldError, forbidden, invalid
from api.validate.network import defaulted, gateway_errors, listed, network_of, range_errors, route_errors
from api.validate.pool import pool_addresses
from api.validate.verdict import Denial, terminating_denial


def default_subnet(subnet: Subnet) -> Subnet:
    """The subnet with finalizer, `ipVersion`, CIDR label and merged ranges; a terminating one stays as it is.

    Never fails: what cannot be derived stays absent, and validation says so.
    """
    return defaulted(subnet, LABEL_SUBNET_CIDR)


def created_subnet_errors(
    subnet: Subnet,
    *,
    others: Iterable[Subnet] = (),
    pools: Iterable[Pool] = (),
    families: Collection[Family] = ranges.BOTH,
) -> list[FieldError]:
    """All that is wrong with a new subnet, defaulted by `default_subnet`; `others` and `pools` are all there are."""
    return [
        *ranges.version_errors(subnet.spec.ip_version, "'spec.subnet'", families),
        *_network_errors(subnet, others, pools),
        *_spec_errors(subnet.spec),
    ]


def updated_subnet_errors(
    old: Subnet, new: Subnet, *, pools: Iterable[Pool] = (), families: Collection[Family] = ranges.BOTH
) -> list[FieldError]:
    """All that is wrong with the change from `old` to `new`, which `default_subnet` has seen.

    `pools` are at least those of the network, if addresses are dropped.
    """
    if ranges.is_terminating(old):
        denial = updated_subnet_denial(old, new)
        return [forbidden("metadata.deletionTimestamp", denial.detail)] if denial else []
    return [
        *ranges.immutable_errors("spec.ipVersion", old.spec.ip_version, new.spec.ip_version),
        *ranges.immutable_errors("spec.subnet", old.spec.subnet, new.spec.subnet),
        *ranges.version_errors(new.spec.ip_version, "'spec.subnet'", families),
        *_spec_errors(new.spec),
        *_in_use_errors(old, new, pools),
    ]


def updated_subnet_denial(old: Subnet, new: Subnet) -> Denial | None:
    """Why a terminating subnet may not be changed so; None for one that is not terminating."""
    return terminating_denial(old, new, "Subnet", FINALIZER)


def deleted_subnet_denial(subnet: Subnet, pools: Iterable[Pool]) -> Denial | None:
    """Why the subnet cannot be deleted, where deletion is guarded: pools, at least those of its network, have addresses
    of it.
    """
    count = ledger.union(family_of(subnet.spec), _taken(subnet, pools).values()).count
    return Denial("Forbidden", f"cannot delete a Subnet with allocated IPs({count})") if count else None


def inherited(pool: Pool, subnets: Iterable[Subnet]) -> Pool:
    """The pool as one of the subnet that has its network; defaulted before by `default_pool`.

    It gets the subnet as its controller, and its gateway, routes and detection if it names none (no member; an empty
    list of routes is one). A pool that is the subnet's already, or terminating, stays as it is: later changes of the
    subnet are no pool's.
    """
    subnet = subnet_of(pool, subnets)
    if subnet is None or ranges.is_terminating(pool) or ranges.is_terminating(subnet):
        return pool
    meta, owner = pool.metadata, controller_of(pool.metadata)
    label = {LABEL_OWNER_SUBNET: label_text(subnet.metadata.name)}
    if owner is not None and owner.uid == subnet.metadata.uid:
        if label.items() <= meta.labels.items():
            return pool
        return replace(pool, metadata=replace(meta, labels={**meta.labels, **label}))
    if owner is not None and owner.kind != subnet.TYPE.kind:
        return pool  # somebody else manages it: an object has one controller
    spec = pool.spec
    if spec.gateway is None:
        spec = replace(spec, gateway=subnet.spec.gateway)
    if spec.routes is None and subnet.spec.routes:
        spec = replace(spec, routes=subnet.spec.routes)
    if spec.detect_ip_conflict is None:
        spec = replace(spec, detect_ip_conflict=subnet.spec.detect_ip_conflict)
    if spec.detect_gateway is None:
        spec = replace(spec, detect_gateway=subnet.spec.detect_gateway)
    others = [reference for reference in meta.owner_references if not reference.controller]
    references = [*others, owner_reference(subnet)]
    metadata = replace(meta, labels={**meta.labels, **label}, owner_references=references)
    return replace(pool, metadata=metadata, spec=spec)


def subnet_of(pool: Pool, subnets: Iterable[Subnet]) -> Subnet | None:
    """The subnet with the pool's network; of several, which only unguarded writes can bring about, the oldest."""
    network = network_of(pool.spec.subnet)
    found = [each for each in subnets if network is not None and network_of(each.spec.subnet) == network]
    return min(found, key=lambda each: (each.metadata.creation_timestamp, each.metadata.uid), default=None)


def owned_pool_errors(old: Pool | None, new: Pool, subnet: Subnet | None) -> list[FieldError]:
    """What a pool may not have for its subnet's sake; `old` is None at its creation, `subnet` `subnet_of` the pool.

    An automatic pool has what the ledger says, or nothing: it is changed right after the ledger, by whom does not
    matter. Other pools take their addresses from the subnet, and none that is another pool's by the ledger.
    """
    family = family_of(new.spec)
    after = pool_addresses(new.spec)
    before = IPSet(family) if old is None else pool_addresses(old.spec)
    if subnet is None or not after or after == before:
        return []
    grants = ledger_of(subnet)
    if is_automatic(new):
        grant = grants.get(new.metadata.name)
        if grant is not None and after in (grant.ips, grant.pool):
            return []
        text = f"it's illegal to update AutoPool.Spec.IPs: they are what SpiderSubnet {subnet.metadata.name} gives it"
        return [forbidden("spec.ips", text)]
    errors = []
    added = after - before
    if outside := added - subnet_addresses(subnet.spec):
        text = (
            f"add some IP ranges {listed(outside.to_ranges())} that are not contained in controller Subnet "
            f"{subnet.metadata.name}, total IP addresses of an IPPool are jointly determined by 'spec.ips' and "
            "'spec.excludeIPs'"
        )
        errors.append(forbidden("spec.ips", text))
    for name, grant in grants.items():
        if name != new.metadata.name and grant.application and (shared := grant.ips & added):
            text = f"overlap with IPPool {name} in IP ranges {listed(shared.to_ranges())}, they are given to it"
            errors.append(forbidden("spec.ips", text))
    return errors


def subnet_addresses(spec: SubnetSpec) -> IPSet:
    """The addresses a subnet has: `ips` without `excludeIPs`. Malformed ranges count as absent."""
    return ranges.lenient_net(spec.ips, spec.exclude_ips, family_of(spec))


def family_of(spec: SubnetSpec | PoolSpec) -> Family:
    """The family of the addresses; 4 if neither the network nor `ipVersion` tells."""
    network = network_of(spec.subnet)
    return network.version if network is not None else spec.ip_version or 4


def ledger_of(subnet: Subnet) -> dict[str, ledger.Grant]:
    """What the subnet's addresses are given to."""
    return ledger.parse(subnet.status.controlled_ip_pools if subnet.status else None, family_of(subnet.spec))


def _network_errors(subnet: Subnet, others: Iterable[Subnet], pools: Iterable[Pool]) -> Iterator[FieldError]:
    spec, network = subnet.spec, network_of(subnet.spec.subnet)
    if network is None:
        yield invalid("spec.subnet", spec.subnet, "is not a CIDR 'address/length'")
        return
    if spec.ip_version not in {None, network.version}:
        yield invalid("spec.subnet", spec.subnet, f"is not an IPv{spec.ip_version} CIDR")
        return
    if spec.subnet != str(network):
        yield invalid("spec.subnet", spec.subnet, f"unformatted subnet {spec.subnet}, please change it to {network}")
        return
    for other in others:
        theirs = network_of(other.spec.subnet)
        if other.metadata.name != subnet.metadata.name and theirs is not None and theirs.overlaps(network):
            text = f"overlap with Subnet {other.metadata.name} which 'spec.subnet' is {other.spec.subnet}"
            yield invalid("spec.subnet", spec.subnet, text)
    total = subnet_addresses(spec)
    for pool in pools:
        theirs = network_of(pool.spec.subnet)
        if theirs is None or not theirs.overlaps(network):
            continue
        name = pool.metadata.name
        if theirs != network:
            text = f"overlap with SpiderIPPool {name} which 'spec.subnet' is {pool.spec.subnet}"
            yield invalid("spec.subnet", spec.subnet, text)
        elif outside := pool_addresses(pool.spec) - total:
            text = (
                f"SpiderIPPool {name} owns some IP addresses that SpiderSubnet {subnet.metadata.name} can't control: "
                f"{listed(outside.to_ranges())}"
            )
            yield invalid("spec.subnet", spec.subnet, text)


def _spec_errors(spec: SubnetSpec) -> Iterator[FieldError]:
    network = network_of(spec.subnet)
    if network is None or spec.ip_version not in {None, network.version}:
        return
    ips = ranges.parse_list(spec.ips, network.version, "spec.ips")
    excluded = ranges.parse_list(spec.exclude_ips, network.version, "spec.excludeIPs")
    yield from range_errors(ips, spec.ips, network, "spec.ips")
    yield from range_errors(excluded, spec.exclude_ips, network, "spec.excludeIPs")
    yield from gateway_errors(spec, network, ips, excluded)
    yield from route_errors(spec.routes or (), network)


def _taken(subnet: Subnet, pools: Iterable[Pool]) -> dict[str, IPSet]:
    """The addresses that each pool has of the subnet, or is about to get, by name."""
    family, network = family_of(subnet.spec), network_of(subnet.spec.subnet)
    found = {name: grant.ips for name, grant in ledger_of(subnet).items()}
    for pool in pools:
        if network is not None and network_of(pool.spec.subnet) == network:
            name = pool.metadata.name
            found[name] = ledger.union(family, (found.get(name, IPSet(family)), pool_addresses(pool.spec)))
    return found


def _in_use_errors(old: Subnet, new: Subnet, pools: Iterable[Pool]) -> Iterator[FieldError]:
    dropped = subnet_addresses(old.spec) - subnet_addresses(new.spec)
    if not dropped:
        return
    for name, taken in sorted(_taken(old, pools).items()):
        if shared := dropped & taken:
            text = (
                f"remove some IP ranges {listed(shared.to_ranges())} that is being used by IPPool {name}, "
                "total IP addresses of a Subnet are jointly determined by 'spec.ips' and 'spec.excludeIPs'"
            )
            yield forbidden("spec.ips", text)
