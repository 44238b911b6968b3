"""Of pools and subnets that conflict, the younger give way: the same ones wherever it is asked, and quickly."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.conflicts import pool_conflicts, subnet_conflicts
from api.pool import Pool
from api.subnet import Subnet
from api.validate.network import network_of
from api.validate.pool import pool_addresses

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def meta(name: str, born: int, uid: str = "") -> dict[str, Any]:
    return {"name": name, "uid": uid or f"uid-{name}", "creationTimestamp": EPOCH + timedelta(seconds=born)}


def pool(name: str, born: int = 0, *ips: str, subnet: str = "10.0.0.0/24", uid: str = "", **spec: Any) -> Pool:
    return msgspec.convert(
        {"metadata": meta(name, born, uid), "spec": {"subnet": subnet, "ips": list(ips), **spec}}, Pool
    )


def subnet(name: str, born: int, cidr: str) -> Subnet:
    return msgspec.convert({"metadata": meta(name, born), "spec": {"subnet": cidr}}, Subnet)


@pytest.mark.parametrize(
    ("pools", "losers"),
    [
        ([pool("a", 1, "10.0.0.1-10.0.0.9"), pool("b", 2, "10.0.0.10")], {}),
        ([pool("a", 1, "10.0.0.1-10.0.0.9"), pool("b", 2, "10.0.0.9-10.0.0.12")], {"b": "10.0.0.9"}),
        ([pool("a", 2, "10.0.0.1-10.0.0.9"), pool("b", 1, "10.0.0.9-10.0.0.12")], {"a": "IPPool b, which is older"}),
        # born in the same second: the UID decides
        ([pool("a", 1, "10.0.0.1", uid="z"), pool("b", 1, "10.0.0.1", uid="y")], {"a": "IPPool b"}),
        # excluded addresses are not the pool's
        ([pool("a", 1, "10.0.0.1-10.0.0.9", excludeIPs=["10.0.0.5"]), pool("b", 2, "10.0.0.5")], {}),
        ([pool("a", 1), pool("b", 2)], {}),
        # networks that overlap, with no address in common
        (
            [pool("a", 1, "10.0.0.1"), pool("b", 2, "10.0.0.200", subnet="10.0.0.128/25")],
            {"b": "'spec.subnet' 10.0.0.128/25 overlaps with 10.0.0.0-10.0.0.255, the network of the older IPPool a"},
        ),
        ([pool("a", 1, "fd00::1", subnet="fd00::/64"), pool("b", 2, "10.0.0.1")], {}),
        (
            [pool("a", 1, "fd00::1-fd00::ffff", subnet="fd00::/64"), pool("b", 2, "fd00:0::5", subnet="fd00::/64")],
            {"b": "fd00::5"},
        ),
        # b gave way to a, so it is in nobody's way
        ([pool("a", 1, "10.0.0.1"), pool("b", 2, "10.0.0.1-10.0.0.2"), pool("c", 3, "10.0.0.2")], {"b": "IPPool a"}),
        ([pool("odd", 1, "10.0.0.1", subnet="nonsense"), pool("b", 2, "10.0.0.1")], {}),
        ([pool("a", 1, "rubbish", "10.0.0.1"), pool("b", 2, "10.0.0.1")], {"b": "IPPool a"}),
    ],
)  # fmt: skip
def test_the_younger_gives_way(pools: list[Pool], losers: dict[str, str]) -> None:
    for order in (pools, pools[::-1]):
        found = pool_conflicts(order)
        assert found.keys() == losers.keys()
        for name, text in losers.items():
            assert text in found[name]


def test_subnets_may_not_even_be_equal() -> None:
    cidrs = ["10.1.0.0", "10.0.1.0/24", "10.0.1.0/24", "10.0.0.0/16", "10.1.0.0/16"]
    found = subnet_conflicts(subnet(name, born, cidrs[born]) for born, name in reversed([*enumerate("oabcd")]))
    assert found.keys() == {"b", "c"}
    assert "Subnet a, which is older" in found["b"]
    assert "Subnet a, which is older" in found["c"]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 12), st.sampled_from([24, 25, 26])), max_size=12
    )
)
@settings(deadline=None)
def test_the_usable_ones_do_not_conflict_and_the_others_do(made: list[tuple[int, int, int, int]]) -> None:
    pools = [
        pool(f"p{i}", born, f"10.0.0.{low}-10.0.0.{low + size}", subnet=f"10.0.0.0/{length}")
        for i, (born, low, size, length) in enumerate(made)
    ]
    losers = pool_conflicts(pools)

    def conflict(one: Pool, other: Pool) -> bool:
        return network_of(one.spec.subnet) != network_of(other.spec.subnet) or bool(
            pool_addresses(one.spec) & pool_addresses(other.spec)
        )

    usable = [each for each in pools if each.metadata.name not in losers]
    assert not any(conflict(a, b) for a in usable for b in usable if a is not b)
    for each in pools:
        if each.metadata.name in losers:
            key = (each.metadata.creation_timestamp, each.metadata.uid)
            assert any(
                conflict(each, other) and (other.metadata.creation_timestamp, other.metadata.uid) < key
                for other in usable
            )


def test_many_pools_cost_little() -> None:
    pools = [
        pool(f"p{i}", i % 97, f"10.{i >> 8}.{i & 255}.1-10.{i >> 8}.{i & 255}.99", subnet="10.0.0.0/8")
        for i in range(5_000)
    ]
    pool_conflicts(pools)  # texts are parsed once
    began = time.process_time()
    assert pool_conflicts(pools) == {}
    assert time.process_time() - began < 1.0
