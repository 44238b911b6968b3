"""Views: what people see of a pool, computed from its claims. No decision reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from api.claim import Claim
from api.pool import Pool, PoolSpec, PoolStatus
from api.ranges import IPSet
from api.validate.pool import spec_family

_INT64_MAX = 2**63 - 1

SHOWN_ADDRESSES = 5000
"""Above so many allocated addresses `allocatedIPs` is left out: the text would outgrow what an object may hold."""


def total_ip_count(spec: PoolSpec) -> int:
    """The addresses of `ips` without `excludeIPs`, but no more than the largest int64.

    Raises ValueError for a spec that validation would not have let through.
    """
    family = spec_family(spec)
    if family is None:
        raise ValueError(f"{spec.subnet!r} is not a CIDR 'address/length'")
    count = (IPSet.parse(spec.ips or (), family) - IPSet.parse(spec.exclude_ips or (), family)).count
    return min(count, _INT64_MAX)


def pool_status(pool: Pool, claims: Iterable[Claim], cap: int = SHOWN_ADDRESSES) -> PoolStatus:
    """The status of `pool`; claims on other pools are passed over.

    `allocatedIPs` names pods, so a quarantined address is not in it; `allocatedIPCount` counts it, since nobody can
    have it: total minus allocated is what is left. `pod` is `namespace/name`, or the container id where there is no
    pod. A malformed spec leaves the total out.
    """
    allocated: dict[str, dict[str, str]] = {}
    count = 0
    for claim in claims:
        if claim.spec.pool != pool.metadata.name:
            continue
        count += 1
        if claim.spec.state == "Allocated" and len(allocated) <= cap:
            allocated[claim.spec.address] = {"pod": _pod(claim), "podUid": claim.spec.pod_uid}
    shown = 0 < len(allocated) <= cap
    try:
        total = total_ip_count(pool.spec)
    except ValueError:
        total = None
    return PoolStatus(
        allocated_ips=json.dumps(allocated, sort_keys=True, separators=(",", ":")) if shown else None,
        total_ip_count=total,
        allocated_ip_count=count,
    )


def _pod(claim: Claim) -> str:
    workload = claim.spec.workload
    return f"{workload.namespace}/{workload.name}" if workload and workload.name else claim.spec.container_id
