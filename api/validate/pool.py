"""Defaulting and validation of a SpiderIPPool.

The rules are upstream's, with these differences: every error is reported and not the first one only; errors about a
range name the range (`spec.ips[2]`); a reversed range is refused at creation as well; whether two spellings mean the
same address is decided by number, not by text; an update is blamed only for what it changes (adding an address that
another pool has, dropping one that is claimed), so that an operator can always mend a pool that is already wrong; and
"in use" means that a claim holds the address, whatever the status says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from api.claim import Claim
from api.meta import FINALIZER
from api.pool import LABEL_CIDR, Pool, PoolSpec
from api.ranges import Family, IPSet, Network, parse_address, range_text
from api.subnet import AFFINITY, is_automatic
from api.validate import ranges
from api.validate.fields import FieldError, forbidden, invalid
from api.validate.network import defaulted, gateway_errors, listed, network_of, range_errors, route_errors
from api.validate.selectors import selector_errors
from api.validate.verdict import Denial, terminating_denial

_NAMED_IN_USE = 10
"""How many addresses in use one refused update names; a pool may have millions."""


def default_pool(pool: Pool) -> Pool:
    """The pool with finalizer, `ipVersion`, CIDR label and merged ranges; a terminating pool stays as it is.

    Never fails: what cannot be derived stays absent, and validation says so.
    """
    return defaulted(pool, LABEL_CIDR)


def created_pool_errors(
    pool: Pool, *, others: Iterable[Pool] = (), families: Collection[Family] = ranges.BOTH
) -> list[FieldError]:
    """All that is wrong with a new pool, defaulted by `default_pool`; `others` are the pools there are."""
    rivals = [other for other in others if other.metadata.name != pool.metadata.name]
    return [
        *ranges.version_errors(pool.spec.ip_version, "'spec.subnet'", families),
        *_subnet_errors(pool.spec, rivals),
        *_spec_errors(pool.spec, IPSet(pool.spec.ip_version or 4), rivals),
        *_affinity_errors(pool),
    ]


def updated_pool_errors(
    old: Pool,
    new: Pool,
    *,
    others: Iterable[Pool] = (),
    claims: Iterable[Claim] = (),
    families: Collection[Family] = ranges.BOTH,
) -> list[FieldError]:
    """All that is wrong with the change from `old` to `new`, which `default_pool` has seen.

    `claims` are at least the pool's own claims. A terminating pool may only lose finalizers.
    """
    if ranges.is_terminating(old):
        denial = updated_pool_denial(old, new)
        return [forbidden("metadata.deletionTimestamp", denial.detail)] if denial else []
    before = pool_addresses(old.spec)
    rivals = [other for other in others if other.metadata.name != new.metadata.name]
    return [
        *ranges.immutable_errors("spec.ipVersion", old.spec.ip_version, new.spec.ip_version),
        *ranges.immutable_errors("spec.subnet", old.spec.subnet, new.spec.subnet),
        *ranges.version_errors(new.spec.ip_version, "'spec.subnet'", families),
        *_spec_errors(new.spec, before, rivals),
        *_affinity_errors(new),
        *_in_use_errors(new, before, claims),
    ]


def updated_pool_denial(old: Pool, new: Pool) -> Denial | None:
    """Why a terminating pool may not be changed so; None for a pool that is not terminating."""
    return terminating_denial(old, new, "IPPool", FINALIZER)


def deleted_pool_denial(pool: Pool, claims: Iterable[Claim]) -> Denial | None:
    """Why the pool cannot be deleted, where deletion is guarded: `claims` are at least the pool's own."""
    held = sum(1 for claim in claims if claim.spec.pool == pool.metadata.name and claim.spec.state == "Allocated")
    return Denial("Forbidden", f"cannot delete an IPPool with allocated IPs({held})") if held else None


def pool_addresses(spec: PoolSpec) -> IPSet:
    """The addresses a pool has: `ips` without `excludeIPs`. Malformed ranges count as absent."""
    return ranges.lenient_net(spec.ips, spec.exclude_ips, spec_family(spec) or 4)


def _subnet_errors(spec: PoolSpec, rivals: Iterable[Pool]) -> Iterator[FieldError]:
    network = network_of(spec.subnet)
    if network is None:
        yield invalid("spec.subnet", spec.subnet, "is not a CIDR 'address/length'")
    elif spec.ip_version not in {None, network.version}:
        yield invalid("spec.subnet", spec.subnet, f"is not an IPv{spec.ip_version} CIDR")
    elif spec.subnet != str(network):
        yield invalid("spec.subnet", spec.subnet, f"unformatted subnet {spec.subnet}, please change it to {network}")
    else:
        for rival in rivals:
            theirs = network_of(rival.spec.subnet)
            if theirs is not None and theirs != network and network.overlaps(theirs):
                text = f"overlap with IPPool {rival.metadata.name} which 'spec.subnet' is {rival.spec.subnet}"
                yield invalid("spec.subnet", spec.subnet, text)


def _spec_errors(spec: PoolSpec, before: IPSet, rivals: Iterable[Pool]) -> Iterator[FieldError]:
    """Everything that does not concern the subnet itself; nothing to go by if that is malformed."""
    network = network_of(spec.subnet)
    if network is not None and spec.ip_version in {None, network.version}:
        family = network.version
        ips = ranges.parse_list(spec.ips, family, "spec.ips")
        excluded = ranges.parse_list(spec.exclude_ips, family, "spec.excludeIPs")
        yield from range_errors(ips, spec.ips, network, "spec.ips")
        yield from range_errors(excluded, spec.exclude_ips, network, "spec.excludeIPs")
        near = [rival for rival in rivals if _is_near(rival, network)]
        yield from _overlap_errors(ranges.net(ips, excluded, family) - before, near)
        yield from gateway_errors(spec, network, ips, excluded)
        yield from route_errors(spec.routes or (), network)


def _affinity_errors(pool: Pool) -> Iterator[FieldError]:
    """The affinity of an automatic pool names its application, in full; any other is a selector of pods."""
    affinity = pool.spec.pod_affinity
    if affinity is None:
        return
    if not (affinity.match_labels or affinity.match_expressions):
        yield invalid("spec.podAffinity", {}, "empty podAffinity is invalid for SpiderIPPool")
    elif not is_automatic(pool):
        yield from selector_errors(affinity, "spec.podAffinity")
    else:
        for key in (affinity.match_labels or {}).keys() - set(AFFINITY):
            text = f"an automatic pool's affinity has only {', '.join(AFFINITY)}"
            yield invalid("spec.podAffinity.matchLabels", key, text)
        if affinity.match_expressions:
            yield forbidden(
                "spec.podAffinity.matchExpressions", "an automatic pool is for one application and no other"
            )


def _is_near(rival: Pool, network: Network) -> bool:
    """Whether the two can have an address in common at all: cheap, for there may be thousands of pools."""
    theirs = network_of(rival.spec.subnet)
    return theirs is not None and theirs.overlaps(network)


def _overlap_errors(added: IPSet, rivals: Iterable[Pool]) -> Iterator[FieldError]:
    for rival in rivals:
        if shared := added & pool_addresses(rival.spec):
            theirs = ranges.parse_list(rival.spec.ips, added.family, "").intervals
            touched = [range_text(added.family, part) for _, part in theirs if shared & IPSet(added.family, [part])]
            yield forbidden(
                "spec.ips",
                f"overlap with IPPool {rival.metadata.name} in IP ranges {listed(touched)}, "
                f"both would have {listed(shared.to_ranges())}",
            )


def _in_use_errors(pool: Pool, before: IPSet, claims: Iterable[Claim]) -> Iterator[FieldError]:
    """Addresses that the update takes out of the pool although a workload has them.

    A quarantined address is nobody's of ours: to drop it may be just what the operator wants.
    """
    dropped = before - pool_addresses(pool.spec)
    if not dropped:
        return
    unnamed = 0
    for named, claim in enumerate(_holders(pool.metadata.name, dropped, claims)):
        if named < _NAMED_IN_USE:
            text = f"remove an IP address {claim.spec.address} that is being used by {holder(claim)}"
            yield forbidden("spec.ips", text)
        else:
            unnamed += 1
    if unnamed:
        yield forbidden("spec.ips", f"remove {unnamed} more IP addresses that are being used")


def _holders(pool: str, dropped: IPSet, claims: Iterable[Claim]) -> Iterator[Claim]:
    for claim in claims:
        if claim.spec.pool == pool and claim.spec.state == "Allocated" and claim.spec.ip_version == dropped.family:
            try:
                address = parse_address(claim.spec.address, dropped.family)
            except ValueError:
                continue  # a claim on no address holds none
            if address in dropped:
                yield claim


def holder(claim: Claim) -> str:
    """Who has the claim's address, for a sentence: `Pod web/front-1`, or `container 4f…`."""
    workload = claim.spec.workload
    if workload is not None and workload.name:
        return f"Pod {workload.namespace}/{workload.name}"
    return f"container {claim.spec.container_id}" if claim.spec.container_id else f"Pod UID {claim.spec.pod_uid}"


def spec_family(spec: PoolSpec) -> Family | None:
    """The family of the pool's addresses; None if the subnet is malformed and `ipVersion` is not there."""
    network = network_of(spec.subnet)
    return spec.ip_version or (network.version if network else None)
