"""Upstream's documented metric names, which its dashboards and alert rules ask for."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

import plugins.ipam.metrics
import store.metrics  # noqa: F401 (registers)

A, R = "spiderpool_ipam_allocation", "spiderpool_ipam_release"
COUNTERS = [
    f"{A}_counts",
    f"{A}_failure_counts",
    f"{A}_update_ippool_conflict_counts",
    f"{A}_err_internal_counts",
    f"{A}_err_no_available_pool_counts",
    f"{A}_err_retries_exhausted_counts",
    f"{A}_err_ip_used_out_counts",
    f"{R}_counts",
    f"{R}_failure_counts",
    f"{R}_update_ippool_conflict_counts",
    f"{R}_err_retries_exhausted_counts",
    f"{R}_err_internal_counts",
]
STATISTICS = [
    f"{prefix}_{statistic}_{kind}duration_seconds"
    for prefix in (A, R)
    for kind in ("", "limit_")
    for statistic in ("average", "max", "min", "latest")
]
HISTOGRAMS = [f"{prefix}_{kind}duration_seconds" for prefix in (A, R) for kind in ("", "limit_")]


@pytest.mark.parametrize("name", [f"{name}_total" for name in COUNTERS] + STATISTICS)
def test_exported_from_the_start(name: str) -> None:
    assert REGISTRY.get_sample_value(name) is not None


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets(name: str) -> None:
    for bound in ("0.1", "0.3", "0.5", "1.0", "3.0", "5.0", "7.0", "10.0", "15.0", "+Inf"):
        assert REGISTRY.get_sample_value(f"{name}_bucket", {"le": bound}) is not None


def test_statistics() -> None:
    given = plugins.ipam.metrics.Durations("spt_metric_names", "a test", "limit_")
    for seconds in (2.0, 1.0, 3.0):
        given.observe(seconds)
    for name, value in (("average", 2.0), ("max", 3.0), ("min", 1.0), ("latest", 3.0)):
        assert REGISTRY.get_sample_value(f"spt_metric_names_{name}_limit_duration_seconds") == value
