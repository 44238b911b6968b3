"""Which pools may serve, in which order, and what is said about the others."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import pytest

from api.annotations import PoolNames
from api.autopools import Application, affinity
from api.meta import ObjectMeta
from api.pool import LabelSelector, Pool, PoolSpec, Requirement
from api.subnet import LABEL_APP_NAME
from plugins.errors import InvalidConfigError, NoPoolError
from plugins.ipam.candidates import Asker, Candidates, PoolFacts, expand, pool_facts, select


def make(
    name: str, subnet: str = "10.0.0.0/24", *, terminating: bool = False, labels: Any = None, **spec: Any
) -> PoolFacts:
    deleted = datetime.now(UTC) if terminating else None
    spec.setdefault("ips", ["fd00::1-fd00::9"] if ":" in subnet else ["10.0.0.1-10.0.0.9"])
    meta = ObjectMeta(name=name, deletion_timestamp=deleted, labels=labels or {})
    return pool_facts(Pool(metadata=meta, spec=PoolSpec(subnet=subnet, **spec)))


APP = Application("apps/v1", "Deployment", "web", "shop")
KNOWN = Asker(
    node="node1",
    namespace="web",
    pod_labels={"app": "shop"},
    namespace_labels={"tier": "front"},
    node_labels={"zone": "a"},
    application=APP,
    network="kube-system/macvlan",
    installation="kube-system",
)
"""A pod of a cluster."""
UNKNOWN = Asker(node="node1", namespace="web")
"""A container of a machine without Kubernetes."""


def chosen(
    *pools: PoolFacts,
    v4: tuple[str, ...] = (),
    v6: tuple[str, ...] = (),
    asker: Asker = UNKNOWN,
    families: Any = (4, 6),
    conflicts: Any = None,
) -> tuple[Candidates, ...]:
    known = {pool.name: pool for pool in pools}
    named = expand(PoolNames(v4, v6), known)
    return select(
        named=named,
        source="the test",
        nic="net1",
        asker=asker,
        families=families,
        pools=known,
        conflicts=conflicts or {},
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
    with pytest.raises(NoPoolError, match=r"no pool selection rules of any type are specified.*spec\.default"):
        chosen(make("a"))


def test_every_refusal_has_its_reason() -> None:
    selector = LabelSelector(match_labels={"a": "b"})
    wrong = LabelSelector(match_expressions=[Requirement(key="a", operator="Like")])
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
        "not a valid label selector operator": make("q3", node_affinity=wrong),
        "no such pool": make("q4"),
    }
    found = dict(pools)
    del found["no such pool"]
    listed = tuple(pool.name for pool in pools.values())
    for asker in (KNOWN, UNKNOWN):
        with pytest.raises(NoPoolError) as raised:
            chosen(*found.values(), v4=listed, asker=asker)
        assert raised.value.msg == "no IPPool available"
        assert "all IPv4 IPPools of net1, named by the test, filtered out: " in raised.value.details
        for reason, pool in pools.items():
            told = [part for part in raised.value.details.split(", ") if f"{pool.name}: " in part]
            if reason.startswith("not a valid"):
                assert "spec.nodeAffinity.matchExpressions[0].operator" in told[0]
            else:
                assert reason in told[0], told


@pytest.mark.upstream("D00013", "D00016")
def test_names_go_before_affinities() -> None:
    selector = LabelSelector(match_labels={"a": "b"})
    pool = make("a", node_name=["node1"], node_affinity=selector, namespace_name=["web"], namespace_affinity=selector)
    for asker in (KNOWN, UNKNOWN):
        assert names(chosen(pool, v4=("a",), asker=asker)) == [["a"]]
    assert not pool.looks_at


def test_any_namespace_will_do_where_none_is_asked() -> None:
    pool = make("a", namespace_name=["shop"])
    assert names(chosen(pool, v4=("a",), asker=Asker("node1"))) == [["a"]]


FITTING: dict[str, dict[str, Any]] = {
    "pod": {"pod_affinity": LabelSelector(match_labels={"app": "shop"})},
    "node": {"node_name": ["node0", "node1"]},
    "zone": {"node_affinity": LabelSelector(match_labels={"zone": "a"})},
    "space": {"namespace_name": ["web"]},
    "tier": {"namespace_affinity": LabelSelector(match_expressions=[Requirement(key="tier", operator="Exists")])},
    "net": {"multus_name": ["x/y", "kube-system/macvlan"]},
    "bare net": {"multus_name": ["macvlan"]},
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "pod": ({"pod_affinity": LabelSelector(match_labels={"app": "bank"})}, "podAffinity does not match"),
    "zone": ({"node_affinity": LabelSelector(match_labels={"zone": "b"})}, "nodeAffinity does not match"),
    "tier": ({"namespace_affinity": LabelSelector(match_labels={"tier": "back"})}, "namespaceAffinity does not match"),
    "net": ({"multus_name": ["web/macvlan"]}, "multusName does not list kube-system/macvlan"),
}


@pytest.mark.parametrize("spec", FITTING.values(), ids=FITTING)
def test_what_fits_may_serve(spec: dict[str, Any]) -> None:
    assert names(chosen(make("a", **spec), v4=("a",), asker=KNOWN)) == [["a"]]


@pytest.mark.parametrize(("spec", "reason"), OTHERS.values(), ids=OTHERS)
def test_what_does_not_fit_may_not(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoPoolError, match=reason):
        chosen(make("a", **spec), v4=("a",), asker=KNOWN)


def test_an_unknown_network_concerns_pools_with_multus_name_alone() -> None:
    asker = Asker("node1", "web", {}, {}, {}, APP, network="", network_problem="nobody told")
    pools = [make("a"), make("b", multus_name=["m"])]
    found = chosen(*pools, v4=("a", "b"), asker=asker)
    assert names(found) == [["a"]]
    assert found[0].passed_over == ("b: multusName cannot be judged, nobody told",)


def test_an_automatic_pool_is_its_applications() -> None:
    labels = {LABEL_APP_NAME: "shop"}
    own = make("own", labels=labels, pod_affinity=LabelSelector(match_labels=affinity(APP)))
    same_name = make(
        "same-name", labels=labels, pod_affinity=LabelSelector(match_labels=affinity(APP._replace(kind="StatefulSet")))
    )
    found = chosen(own, same_name, v4=("own", "same-name"), asker=KNOWN)
    assert names(found) == [["own"]]
    assert "was made for apps_v1_StatefulSet_web_shop" in found[0].passed_over[0]


def test_core_controllers_have_automatic_pools_too() -> None:
    app = Application("v1", "ReplicationController", "web", "rc")
    pool = make("a", labels={LABEL_APP_NAME: "rc"}, pod_affinity=LabelSelector(match_labels=affinity(app)))
    asker = Asker("node1", "web", {}, {}, {}, app)
    assert names(chosen(pool, v4=("a",), asker=asker)) == [["a"]]


def test_the_masters_subnet() -> None:
    pools = [make("a"), make("b", "10.9.0.0/16", ips=["10.9.0.1"])]
    masters = frozenset({ip_address("10.9.5.5"), ip_address("fe80::1")})
    found = chosen(*pools, v4=("a", "b"), asker=Asker("node1", "web", masters=masters))
    assert names(found) == [["b"]]
    assert "match_master_subnet" in found[0].passed_over[0]
    with pytest.raises(NoPoolError, match="none"):
        chosen(*pools, v4=("a",), asker=Asker("node1", "web", masters=frozenset()))


def test_a_pool_that_gives_way_to_an_older_one() -> None:
    found = chosen(make("a"), make("b"), v4=("a", "b"), conflicts={"a": "b is older"})
    assert names(found) == [["b"]]
    assert found[0].passed_over == ("a: b is older",)


def test_the_specific_come_first_and_listed_order_decides_the_rest() -> None:
    order = ["pod", "node", "zone", "space", "tier", "net"]
    pools = [make("c"), make("a"), *(make(name, **FITTING[name]) for name in order)]
    found = chosen(*pools, v4=("c", "net", "tier", "a", "space", "zone", "node", "pod"), asker=KNOWN)
    assert names(found) == [[*order, "c", "a"]]


def test_patterns_expand_in_place_and_name_their_own_family_only() -> None:
    pools = [make("web-2"), make("web-1"), make("web-6", V6), make("x")]
    assert names(chosen(*pools, v4=("x", "web-*"))) == [["x", "web-1", "web-2"]]
    assert names(chosen(*pools, v4=("web-[12]",))) == [["web-1", "web-2"]]
    assert names(chosen(*pools, v4=("web-[^1]",))) == names(chosen(*pools, v4=("web-[!1]",))) == [["web-2"]]
    assert chosen(*pools, v4=("x", "db-*"))[0].passed_over == ("db-*: matches no IPv4 pool",)


@pytest.mark.parametrize("listed", [("a", "*"), ("a", "a"), ("?", "a")])
def test_a_pool_that_comes_up_twice_is_a_mistake(listed: tuple[str, ...]) -> None:
    with pytest.raises(InvalidConfigError, match=r"wrong input: duplicate IPPool a specified for NIC net1 by the test"):
        chosen(make("a"), v4=listed)


def test_one_family_without_a_pool_fails_the_nic() -> None:
    with pytest.raises(NoPoolError, match=r"IPv6 IPPools of net1.*: b: there is no such pool"):
        chosen(make("a"), v4=("a",), v6=("b",))


def test_a_thousand_refusals_are_not_told_one_by_one() -> None:
    pools = [make(f"p{i}", disable=True) for i in range(1000)]
    with pytest.raises(NoPoolError) as raised:
        chosen(*pools, v4=("*",))
    assert raised.value.details.endswith("and 950 others")


def test_excluded_addresses_are_not_in_the_pool() -> None:
    pool = make("a", exclude_ips=["10.0.0.2-10.0.0.8"])
    assert pool.addresses.to_ranges() == ["10.0.0.1", "10.0.0.9"]
    assert pool.cidr("10.0.0.1") == "10.0.0.1/24"
