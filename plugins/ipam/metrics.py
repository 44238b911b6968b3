"""IPAM's metrics. Names of upstream's documentation where upstream has the thing, so that its dashboards work."""

from __future__ import annotations

import math

from prometheus_client import Counter, Gauge, Histogram

from store.metrics import RELEASE_CONFLICTS

BUCKETS = (0.1, 0.3, 0.5, 1, 3, 5, 7, 10, 15)
"""Seconds; upstream's, which its alert rules and dashboards expect."""


class Durations:
    """A histogram and the running average, maximum, minimum and latest value since the process started."""

    def __init__(self, prefix: str, what: str, kind: str = "") -> None:
        name = f"{kind}duration_seconds"
        self._histogram = Histogram(f"{prefix}_{name}", f"Duration of {what}", buckets=BUCKETS)
        self._average = Gauge(f"{prefix}_average_{name}", f"Average duration of {what}")
        self._maximum = Gauge(f"{prefix}_max_{name}", f"Longest duration of {what}")
        self._minimum = Gauge(f"{prefix}_min_{name}", f"Shortest duration of {what}")
        self._latest = Gauge(f"{prefix}_latest_{name}", f"Latest duration of {what}")
        self._count = 0
        self._sum = 0.0
        self._high = 0.0
        self._low = math.inf

    def observe(self, seconds: float) -> None:
        """Take one more sample in."""
        self._count += 1
        self._sum += seconds
        self._high, self._low = max(self._high, seconds), min(self._low, seconds)
        self._histogram.observe(seconds)
        self._average.set(self._sum / self._count)
        self._maximum.set(self._high)
        self._minimum.set(self._low)
        self._latest.set(seconds)


_A = "spiderpool_ipam_allocation"
_R = "spiderpool_ipam_release"

allocations = Counter(f"{_A}_counts", "IPAM ADDs")
allocation_failures = Counter(f"{_A}_failure_counts", "IPAM ADDs that failed")
allocation_conflicts = Counter(
    f"{_A}_update_ippool_conflict_counts", "Addresses or claims lost to a concurrent writer while allocating"
)
allocation_internal = Counter(f"{_A}_err_internal_counts", "IPAM ADDs that failed for a reason not counted elsewhere")
allocation_no_pool = Counter(f"{_A}_err_no_available_pool_counts", "IPAM ADDs for which no pool was available")
allocation_retries = Counter(f"{_A}_err_retries_exhausted_counts", "IPAM ADDs that gave up and asked for a retry")
allocation_used_out = Counter(f"{_A}_err_ip_used_out_counts", "IPAM ADDs whose pools had no free address")
allocation_duration = Durations(_A, "IPAM ADDs")
allocation_limit_duration = Durations(_A, "the wait of IPAM ADDs for their turn", "limit_")

releases = Counter(f"{_R}_counts", "IPAM DELs")
release_failures = Counter(f"{_R}_failure_counts", "IPAM DELs that failed")
release_conflicts = RELEASE_CONFLICTS
release_retries = Counter(f"{_R}_err_retries_exhausted_counts", "IPAM DELs that gave up and asked for a retry")
release_internal = Counter(f"{_R}_err_internal_counts", "IPAM DELs that failed for a reason not counted elsewhere")
release_duration = Durations(_R, "IPAM DELs")
release_limit_duration = Durations(_R, "the wait of IPAM DELs for their turn", "limit_")

collisions = Counter("spiderpool_ipam_collisions", "Addresses that were taken by another node between view and claim")
address_conflicts = Counter(
    "spiderpool_ipam_address_conflicts", "Addresses that a stranger on the network was found to use"
)
quarantines = Counter("spiderpool_ipam_quarantines", "Addresses put into quarantine")
unreachable_gateways = Counter("spiderpool_ipam_unreachable_gateways", "IPAM ADDs refused since the gateway is silent")
partial_sets = Counter("spiderpool_ipam_partial_sets_collected", "Incomplete sets of claims that were collected")
leftovers = Gauge("spiderpool_ipam_leftover_claims", "Claims of failed ADDs that could not be deleted yet")
endpoints_dropped = Counter("spiderpool_ipam_endpoint_writes_dropped", "SpiderEndpoint writes given up")
