"""A pool's status as its claims have it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from api.claim import Claim
from api.pool import Pool, PoolSpec
from api.views import pool_status, total_ip_count

UID = "0b7f7a52-9a1e-4c39-8a60-7f2f0a5d1c11"


def pool(**spec: Any) -> Pool:
    return msgspec.convert({"metadata": {"name": "p"}, "spec": {"subnet": "10.0.0.0/16", "ipVersion": 4, **spec}}, Pool)


def claim(address: str, **spec: Any) -> Claim:
    whole = {"address": address, "ipVersion": 4, "pool": "p", "podUID": UID, **spec}
    return msgspec.convert({"metadata": {"name": address}, "spec": whole}, Claim)


def test_upstreams_text() -> None:
    workload = {"namespace": "web", "name": "front-1"}
    held = [
        claim("10.0.0.9", workload=workload),
        claim("10.0.0.10", workload=workload),
        claim("10.0.0.3", podUID="", containerID="c1"),
    ]
    status = pool_status(pool(ips=["10.0.0.1-10.0.0.20"], excludeIPs=["10.0.0.2"]), held)
    assert status.allocated_ips == (
        f'{{"10.0.0.10":{{"pod":"web/front-1","podUid":"{UID}"}},'
        '"10.0.0.3":{"pod":"c1","podUid":""},'
        f'"10.0.0.9":{{"pod":"web/front-1","podUid":"{UID}"}}}}'
    )
    assert (status.allocated_ip_count, status.total_ip_count) == (3, 19)


def test_an_empty_pool_has_no_text_but_counts() -> None:
    status = pool_status(pool(), [])
    assert (status.allocated_ips, status.allocated_ip_count, status.total_ip_count) == (None, 0, 0)


def test_a_quarantined_address_counts_but_has_no_pod() -> None:
    quarantine = {"reason": "answered", "mac": "02:00:00:00:00:01", "until": "2030-01-01T00:00:00Z"}
    held = [claim("10.0.0.1"), claim("10.0.0.2", state="Quarantined", quarantine=quarantine)]
    status = pool_status(pool(ips=["10.0.0.1-10.0.0.9"]), held)
    assert list(json.loads(status.allocated_ips or "")) == ["10.0.0.1"]
    assert status.allocated_ip_count == 2


@pytest.mark.parametrize(("count", "shown"), [(4, True), (5, True), (6, False)])
def test_above_the_cap_only_the_counts_stay(count: int, shown: bool) -> None:
    held = [claim(f"10.0.0.{n}") for n in range(count)]
    status = pool_status(pool(ips=["10.0.0.0-10.0.0.9"]), held, cap=5)
    assert (status.allocated_ips is not None) == shown
    assert status.allocated_ip_count == count


def test_totals_saturate() -> None:
    assert total_ip_count(PoolSpec(subnet="fd00::/48", ips=["fd00::-fd00::ffff"])) == 65536
    half = PoolSpec(subnet="fd00::/64", ips=["fd00::-fd00::7fff:ffff:ffff:fffe"])
    assert total_ip_count(half) == 2**63 - 1
    everything = PoolSpec(subnet="fd00::/48", ips=["fd00::-fd00:0:0:ffff:ffff:ffff:ffff:ffff"])
    assert total_ip_count(everything) == 2**63 - 1


def test_a_malformed_pool_keeps_its_claims_in_view() -> None:
    for broken in (pool(ips=["10.0.0.9-10.0.0.1"]), pool(subnet="x", ipVersion=None)):
        with pytest.raises(ValueError, match=r"reversed|not a CIDR"):
            total_ip_count(broken.spec)
        status = pool_status(broken, [claim("10.0.0.9")])
        assert (status.total_ip_count, status.allocated_ip_count) == (None, 1)
