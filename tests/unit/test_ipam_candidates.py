"""Which pools may serve, in which order, and what is said about the others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from api.meta import ObjectMeta
from api.pool import LabelSelector, Pool, PoolSpec
from plugins.errors import InvalidConfigError, NoPoolError
from plugins.ipam.candidates import Candidates, PoolFacts, pool_facts, select
from plugins.ipam.config import IpamConfig


def make(name: str, subnet: str = "10.0.0.0/24", *, terminating: bool = False, **spec: Any) -> PoolFacts:
    deleted = datetime.now(UTC) if terminating else None
    spec.setdefault("ips", ["fd00::1-fd00::9"] if ":" in subnet else ["10.0.0.1-10.0.0.9"])
    return pool_facts(
        Pool(metadata=ObjectMeta(name=name, deletion_timestamp=deleted), spec=PoolSpec(subnet=subnet, **spec))
    )


def chosen(
    *pools: PoolFacts,
    v4: tuple[str, ...] = (),
    v6: tuple[str, ...] = (),
    namespace: str | None = "web",
    families: Any = (4, 6),
) -> tuple[Candidates, ...]:
    return select(
        config=IpamConfig(ipv4_pools=v4, ipv6_pools=v6),
        namespace=namespace,
        node="node1",
        families=families,
        pools={pool.name: pool for pool in pools},
        defaults=[pool for pool in pools if pool.spec.default],
    )


def names(found: tuple[Candidates, ...]) -> list[list[str]]:
    return [[pool.name for pool in candidates.pools] for candidates in found]


V6 = "fd00::/64"


def test_lists_go_before_defaults() -> None:
    pools = [make("a"), make("b", default=True)]
    assert names(chosen(*pools, v4=("a",))) == [["a"]]
    assert names(chosen(*pools)) == [["b"]]


def test_a_source_of_one_family_gives_that_family_only() -> None:
    pools = [make("a4"), make("a6", V6), make("d4", default=True), make("d6", V6, default=True)]
    assert names(chosen(*pools, v6=("a6",))) == [["a6"]]
    assert names(chosen(*pools)) == [["d4"], ["d6"]]
    assert [c.family for c in chosen(*pools)] == [4, 6]


def test_a_family_that_is_off_is_left_out() -> None:
    pools = [make("a4"), make("a6", V6)]
    assert names(chosen(*pools, v4=("a4",), v6=("a6",), families=(4,))) == [["a4"]]
    with pytest.raises(NoPoolError, match="IPv6 is disabled"):
        chosen(*pools, v6=("a6",), families=(4,))


def test_nothing_selected() -> None:
    with pytest.raises(NoPoolError, match=r"spec\.default"):
        chosen(make("a"))


def test_every_refusal_has_its_reason() -> None:
    selector = LabelSelector(match_labels={"a": "b"})
    pools = {
        "being deleted": make("p1", terminating=True),
        "disabled": make("p2", disable=True),
        "of IPv6": make("p3", V6),
        "nodeName does not list node node1": make("p4", node_name=["node2"]),
        "nodeAffinity": make("p5", node_affinity=selector),
        "namespaceName does not list namespace 'web'": make("p6", namespace_name=["shop"]),
        "namespaceAffinity": make("p7", namespace_affinity=selector),
        "podAffinity": make("p8", pod_affinity=selector),
        "multusName": make("p9", multus_name=["m"]),
        "invalid": make("q1", ips=["10.0.0.9-10.0.0.1"]),
        "leave its subnet": make("q2", ips=["10.0.1.9"]),
        "no such pool": make("q3"),
    }
    found = dict(pools)
    del found["no such pool"]
    listed = tuple(pool.name for pool in pools.values())
    with pytest.raises(NoPoolError) as raised:
        chosen(*found.values(), v4=listed)
    for reason, pool in pools.items():
        told = next(part for part in raised.value.details.split(", p") if pool.name[1:] + ":" in part)
        assert reason in raised.value.details, told


def test_names_go_before_affinities() -> None:
    selector = LabelSelector(match_labels={"a": "b"})
    pool = make("a", node_name=["node1"], node_affinity=selector, namespace_name=["web"], namespace_affinity=selector)
    assert names(chosen(pool, v4=("a",))) == [["a"]]


def test_any_namespace_will_do_where_none_is_asked() -> None:
    pool = make("a", namespace_name=["shop"])
    assert names(chosen(pool, v4=("a",), namespace=None)) == [["a"]]


def test_the_specific_come_first_and_listed_order_decides_the_rest() -> None:
    pools = [make("c"), make("a"), make("ns", namespace_name=["web"]), make("node", node_name=["node1"])]
    assert names(chosen(*pools, v4=("c", "a", "ns", "node"))) == [["node", "ns", "c", "a"]]


def test_patterns_expand_in_place_and_name_their_own_family_only() -> None:
    pools = [make("web-2"), make("web-1"), make("web-6", V6), make("x")]
    assert names(chosen(*pools, v4=("x", "web-*"))) == [["x", "web-1", "web-2"]]
    assert names(chosen(*pools, v4=("web-[12]",))) == [["web-1", "web-2"]]
    assert chosen(*pools, v4=("x", "db-*"))[0].passed_over == ("db-*: matches no IPv4 pool",)


def test_a_pool_that_comes_up_twice_is_a_mistake() -> None:
    with pytest.raises(InvalidConfigError, match=r"default_ipv4_ippool.*'a' comes up twice"):
        chosen(make("a"), v4=("a", "*"))


def test_one_family_without_a_pool_fails_the_nic() -> None:
    with pytest.raises(NoPoolError, match="IPv6: b: there is no such pool"):
        chosen(make("a"), v4=("a",), v6=("b",))


def test_excluded_addresses_are_not_in_the_pool() -> None:
    pool = make("a", exclude_ips=["10.0.0.2-10.0.0.8"])
    assert pool.addresses.to_ranges() == ["10.0.0.1", "10.0.0.9"]
    assert pool.cidr("10.0.0.1") == "10.0.0.1/24"
