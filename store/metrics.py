"""Metrics that agent and controller both have, by the names that upstream documents and its dashboards show."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

RELEASE_CONFLICTS = Counter(
    "spiderpool_ipam_release_update_ippool_conflict_counts", "Claims changed by others while being released"
)

POOLS = Gauge("spiderpool_total_ippool_counts", "SpiderIPPools")
TOTAL = Gauge("spiderpool_debug_ippool_total_ip_counts", "Addresses of a SpiderIPPool", ["SpiderIPPool"])
AVAILABLE = Gauge(
    "spiderpool_debug_ippool_available_ip_counts", "Addresses of a SpiderIPPool without a claim", ["SpiderIPPool"]
)
QUARANTINED = Gauge("spiderpool_ippool_quarantined_ip_counts", "Addresses in quarantine", ["SpiderIPPool"])
STRAYS = Gauge("spiderpool_ippool_stray_claims", "Claims on addresses that their pool does not have", ["SpiderIPPool"])
PER_POOL = (TOTAL, AVAILABLE, QUARANTINED, STRAYS)
