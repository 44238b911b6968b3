"""Metrics of subnets, by the names that upstream documents and its dashboards show. The leader has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from api.subnet import Subnet
from api.validate.subnet import ledger_of
from controller.caches import Cache

SUBNETS = Gauge("spiderpool_total_subnet_counts", "SpiderSubnets")
TOTAL = Gauge("spiderpool_debug_subnet_total_ip_counts", "Addresses of a SpiderSubnet", ["SpiderSubnet"])
AVAILABLE = Gauge(
    "spiderpool_debug_subnet_available_ip_counts", "Addresses of a SpiderSubnet that no pool has", ["SpiderSubnet"]
)
POOLS = Gauge("spiderpool_debug_subnet_ippool_counts", "Pools with addresses of a SpiderSubnet", ["SpiderSubnet"])
_PER_SUBNET = (TOTAL, AVAILABLE, POOLS)


@contextmanager
def shown(subnets: Cache[Subnet]) -> Iterator[None]:
    """Show what the statuses of `subnets` say, as long as the context lasts."""
    end = subnets.listen(_changed)
    try:
        yield
    finally:
        end()
        SUBNETS.set(0)
        for gauge in _PER_SUBNET:
            gauge.clear()


def _changed(old: Subnet | None, new: Subnet | None) -> None:
    if new is None:
        if old is not None:
            SUBNETS.dec()
            for gauge in _PER_SUBNET:
                gauge.remove(old.metadata.name)
        return
    if old is None:
        SUBNETS.inc()
    elif old.status == new.status:
        return
    status, name = new.status, new.metadata.name
    total = (status.total_ip_count if status else None) or 0
    taken = (status.allocated_ip_count if status else None) or 0
    TOTAL.labels(name).set(total)
    AVAILABLE.labels(name).set(max(0, total - taken))
    POOLS.labels(name).set(len(ledger_of(new)))
