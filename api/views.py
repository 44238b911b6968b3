"""Views: what people see of a pool, computed from its claims. No decision reads them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

from api.claim import Claim
from api.condition import Condition, Truth, updated
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool, PoolSpec, PoolStatus
from api.ranges import IPSet, parse_address, parse_network
from api.validate.pool import spec_family
from api.validate.selectors import selector_errors

_INT64_MAX = 2**63 - 1

SHOWN_ADDRESSES = 5000
"""Above so many allocated addresses `allocatedIPs` is left out: the text would outgrow what an object may hold."""

READY = "Ready"
"""Type of the condition that tells whether pods can get addresses of a pool."""


def has_foreign_records(pool: Pool) -> bool:
    """Whether upstream's records of the pool are the truth, and claims are not yet: nothing of ours may use it."""
    records = pool.status.allocated_ips if pool.status is not None else None
    return bool(records) and not is_marked(pool)


def is_marked(pool: Pool) -> bool:
    """Whether claims are authoritative for the pool."""
    return pool.metadata.annotations.get(ANNOTATION_CLAIMS) == CLAIMS_AUTHORITATIVE


def total_ip_count(spec: PoolSpec) -> int:
    """The addresses of `ips` without `excludeIPs`, but no more than the largest int64.

    Raises ValueError for a spec that validation would not have let through.
    """
    family = spec_family(spec)
    if family is None:
        raise ValueError(f"{spec.subnet!r} is not a CIDR 'address/length'")
    count = (IPSet.parse(spec.ips or (), family) - IPSet.parse(spec.exclude_ips or (), family)).count
    return min(count, _INT64_MAX)


def spec_problem(spec: PoolSpec) -> str:
    """Why a pool with this spec cannot be used at all; empty if it can. For pools that nobody validated."""
    try:
        network = parse_network(spec.subnet)
        addresses = IPSet.parse(spec.ips or (), network.version)
        addresses -= IPSet.parse(spec.exclude_ips or (), network.version)
    except ValueError as error:
        return str(error)
    if not addresses <= IPSet.of_network(str(network)):
        return f"its ranges leave its subnet {spec.subnet}"
    try:
        for text in (spec.gateway, *(route.gw for route in spec.routes or ())):
            if text:
                parse_address(text, network.version)
        for route in spec.routes or ():
            if parse_network(route.dst).version != network.version:
                return f"its route to {route.dst} is of another family than its subnet"
    except ValueError as error:
        return str(error)
    selectors = {
        "podAffinity": spec.pod_affinity,
        "namespaceAffinity": None if spec.namespace_name else spec.namespace_affinity,
        "nodeAffinity": None if spec.node_name else spec.node_affinity,
    }
    for name, selector in selectors.items():
        for fault in selector_errors(selector, f"spec.{name}") if selector is not None else ():
            return str(fault)
    return ""


def pool_status(pool: Pool, claims: Collection[Claim], *, conflict: str = "", cap: int = SHOWN_ADDRESSES) -> PoolStatus:
    """The status of `pool`, all of whose claims are `claims`; `conflict` says why another pool goes first.

    `allocatedIPs` names pods, so a quarantined address is not in it; `allocatedIPCount` counts it, since nobody can
    have it: total minus allocated is what is left. `pod` is `namespace/name`, or the container id where there is no
    pod. A malformed spec leaves the total out. Upstream's records stay, as long as claims are not authoritative.
    """
    known = pool.status or PoolStatus()
    try:
        total = total_ip_count(pool.spec)
    except ValueError:
        total = None
    foreign = has_foreign_records(pool)
    count = (known.allocated_ip_count or 0) if foreign else len(claims)
    return PoolStatus(
        allocated_ips=known.allocated_ips if foreign else allocated_ips(claims, cap),
        total_ip_count=total,
        allocated_ip_count=count,
        conditions=updated(known.conditions, readiness(pool, total, count, conflict)),
    )


def allocated_ips(claims: Iterable[Claim], cap: int = SHOWN_ADDRESSES) -> str | None:
    """The text of `allocatedIPs`; None if there is nothing to show, or more than `cap` addresses."""
    allocated: dict[str, dict[str, str]] = {}
    for claim in claims:
        if claim.spec.state == "Allocated":
            if len(allocated) == cap:
                return None
            allocated[claim.spec.address] = {"pod": _pod(claim), "podUid": claim.spec.pod_uid}
    return json.dumps(allocated, sort_keys=True, separators=(",", ":")) if allocated else None


def readiness(pool: Pool, total: int | None, count: int, conflict: str) -> Condition:
    """Whether pods can get addresses of the pool, and the first reason why not."""
    status: Truth = "False"
    if pool.metadata.deletion_timestamp is not None:
        reason, message = "Terminating", f"The pool is being deleted and waits for {count} addresses in use."
    elif problem := spec_problem(pool.spec):
        reason, message = "InvalidSpec", f"The pool cannot be used: {problem}."
    elif has_foreign_records(pool):
        reason = "UpstreamRecords"
        message = (
            "status.allocatedIPs has records of another Spiderpool that are not adopted yet: the pool is not used."
        )
    elif conflict:
        reason, message = "Overlap", f"The pool is not used: {conflict}."
    elif pool.spec.disable:
        reason, message = "Disabled", "spec.disable is set: addresses are released and not allocated."
    elif total is not None and count >= total:
        reason, message = "Exhausted", f"All {total} addresses are in use." if total else "The pool has no addresses."
    else:
        status, reason, message = "True", "Usable", "Pods can get addresses."
    return Condition(
        type=READY, status=status, reason=reason, message=message, observed_generation=pool.metadata.generation
    )


def overlaps(pools: Mapping[str, IPSet]) -> set[tuple[str, str]]:
    """Pairs of pools, in order of name, that have addresses in common. Costs a sort and the pairs it finds."""
    found: set[tuple[str, str]] = set()
    for family in (4, 6):
        open_until: list[tuple[int, str]] = []
        for low, high, name in sorted(_intervals(pools, family)):
            open_until = [(end, other) for end, other in open_until if end >= low]
            found.update((min(name, other), max(name, other)) for _, other in open_until if other != name)
            open_until.append((high, name))
    return found


def _intervals(pools: Mapping[str, IPSet], family: int) -> Iterable[tuple[int, int, str]]:
    return (
        (low, high, name)
        for name, addresses in pools.items()
        if addresses.family == family
        for low, high in addresses.intervals
    )


def _pod(claim: Claim) -> str:
    workload = claim.spec.workload
    return f"{workload.namespace}/{workload.name}" if workload and workload.name else claim.spec.container_id
