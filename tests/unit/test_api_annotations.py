"""What pods and namespaces may say in annotations, and how a mistake in one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import annotations as notes
from api.annotations import AnnotationError, IPNumber, NetworkSelection, NicPools, NicSubnets, PoolNames
from api.pool import Route


def said(key: str, value: object) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value)}


@pytest.mark.parametrize(
    "parse", [notes.ippool, notes.ippools, notes.subnets, notes.ip_number], ids=lambda parse: parse.__name__
)
def test_nothing_said_is_none(parse: Callable[[dict[str, str]], object]) -> None:
    assert parse({"other": "x"}) is None


def test_nothing_said_is_the_default() -> None:
    assert notes.routes({}) == () == notes.networks({}, "ns")
    assert notes.default_network({}, "kube-system") is None
    assert notes.namespace_pools({}) == PoolNames()
    assert notes.ippool_reclaim({}) is True


@pytest.mark.upstream("A00002")
def test_unknown_members_and_other_cases_are_tolerated() -> None:
    value = {"IPv4": ["a"], "ipv6": None, "nics": ["eth0"], "gw": "10.0.0.1", "dist": [{"x": 1}]}
    assert notes.ippool(said(notes.IPPOOL, value)) == PoolNames(("a",), ())
    item = {"interface": "net1", "ipv4": ["a", "b-*"], "cleanGateway": True, "dist": 1}
    assert notes.ippools(said(notes.IPPOOLS, [item])) == (
        NicPools("net1", PoolNames(("a", "b-*")), clean_gateway=True),
    )
    route = {"dst": "10.0.0.0/16", "gw": "192.168.1.1", "metric": 5}
    assert notes.routes(said(notes.ROUTES, [route])) == (Route(dst="10.0.0.0/16", gw="192.168.1.1"),)


def test_routes_are_canonical_and_of_both_families() -> None:
    value = [{"dst": "10.1.2.3/16", "gw": "10.0.0.1"}, {"dst": "FD00:0::/48", "gw": "fd01::0:1"}]
    found = notes.routes(said(notes.ROUTES, value))
    assert found == (Route(dst="10.1.0.0/16", gw="10.0.0.1"), Route(dst="fd00::/48", gw="fd01::1"))


WRONG: list[tuple[Callable[..., Any], str, object, str]] = [
    (notes.ippool, notes.IPPOOL, "", "is not valid JSON"),
    (notes.ippool, notes.IPPOOL, "{", "is not valid JSON"),
    (notes.ippool, notes.IPPOOL, "[" * 100_000, "is not valid JSON"),
    (notes.ippool, notes.IPPOOL, [], "expected `object`"),
    (notes.ippool, notes.IPPOOL, {}, "names no pool"),
    (notes.ippool, notes.IPPOOL, None, "names no pool"),
    (notes.ippool, notes.IPPOOL, {"ipv4": "a"}, ".ipv4: expected `array"),
    (notes.ippool, notes.IPPOOL, {"ipv6": ["a", ""]}, ".ipv6[1]: is empty"),
    (notes.ippool, notes.IPPOOL, {"ipv4": [5]}, ".ipv4[0]: expected `str`"),
    (notes.ippools, notes.IPPOOLS, {}, "expected `array`"),
    (notes.ippools, notes.IPPOOLS, [], "is empty"),
    (notes.ippools, notes.IPPOOLS, [{"interface": "eth0"}], "[0]: names no pool"),
    (notes.ippools, notes.IPPOOLS, [{"interface": "a", "ipv4": ["p"]}, {"ipv4": ["q"]}], "[1].interface: is missing"),
    (notes.ippools, notes.IPPOOLS, [{"interface": "a", "ipv4": ["p"]}] * 2, "[1].interface: 'a' comes up twice"),
    (notes.ippools, notes.IPPOOLS, [{"ipv4": ["p"], "cleangateway": "no"}], "[0].cleangateway: expected `bool"),
    (notes.routes, notes.ROUTES, [{"dst": "10.0.0.0", "gw": "10.0.0.1"}], "[0].dst: "),
    (notes.routes, notes.ROUTES, [{"dst": "10.0.0.0/8", "gw": "fd00::1"}], "[0].gw: "),
    (notes.routes, notes.ROUTES, [{"gw": "10.0.0.1"}], "[0].dst: "),
    (notes.subnets, notes.SUBNET, {"interface": "eth0"}, "names no subnet"),
    (notes.subnets, notes.SUBNET, {"ipv4": [""]}, ".ipv4[0]: is empty"),
    (notes.subnets, notes.SUBNETS, [], "is empty"),
    (notes.subnets, notes.SUBNETS, [{"ipv4": ["a"]}, {"interface": "b", "ipv4": ["c"]}], "[0].interface: is missing"),
    (
        notes.subnets,
        notes.SUBNETS,
        [{"interface": "a", "ipv4": ["s"]}, {"interface": "b", "ipv4": ["s"]}],
        "[1].ipv4: 's' comes up twice",
    ),
    (notes.subnets, notes.SUBNETS, [{"interface": "a", "ipv4": ["s"]}] * 2, "[1].interface: 'a' comes up twice"),
    (notes.ip_number, notes.IP_NUMBER, "++1", "is '++1'"),
    (notes.ip_number, notes.IP_NUMBER, "-1", "is '-1'"),
    (notes.ip_number, notes.IP_NUMBER, "", "is ''"),
    (notes.ip_number, notes.IP_NUMBER, "٣", "is '٣'"),
    (notes.ip_number, notes.IP_NUMBER, "9" * 5000, "is '999"),
    (notes.ippool_reclaim, notes.RECLAIM, "yes", "is 'yes'"),
    (notes.namespace_pools, notes.NAMESPACE_IPV4, "pool", "is not valid JSON"),
    (notes.namespace_pools, notes.NAMESPACE_IPV6, ["a", ""], "[1]: is empty"),
]


@pytest.mark.upstream("A00003", "A00014")
@pytest.mark.parametrize(("parse", "key", "value", "problem"), WRONG)
def test_a_mistake_is_told_with_its_place_and_what_is_allowed(
    parse: Callable[[dict[str, str]], object], key: str, value: object, problem: str
) -> None:
    text = "null" if value is None else value
    with pytest.raises(AnnotationError) as raised:
        parse(said(key, text))
    assert str(raised.value).startswith(f"{key}: ")
    assert problem in str(raised.value)
    assert "; allowed: " in str(raised.value)


def test_subnets_go_before_subnet() -> None:
    both = said(notes.SUBNET, {"ipv4": ["s"]}) | said(notes.SUBNETS, [{"interface": "net1", "ipv6": ["t"]}])
    demand = notes.subnets(both)
    assert demand is not None
    assert (demand.key, demand.items) == (notes.SUBNETS, (NicSubnets("net1", "", "t"),))
    assert demand.of("net1") is not None
    assert demand.of("eth0") is None


def test_one_subnet_is_of_the_first_nic_and_the_first_of_each_list() -> None:
    demand = notes.subnets(said(notes.SUBNET, {"ipv4": ["s", "ignored"], "ipv6": ["t"]}))
    assert demand is not None
    assert demand.items == (NicSubnets("eth0", "s", "t"),)


@pytest.mark.parametrize(("text", "number"), [("5", IPNumber(5, flexible=False)), ("+0", IPNumber(0, flexible=True))])
def test_numbers(text: str, number: IPNumber) -> None:
    assert notes.ip_number({notes.IP_NUMBER: text}) == number
    assert number.wanted(3) == (3 if number.flexible else 5)


@pytest.mark.parametrize(("text", "value"), [("false", False), ("0", False), ("T", True), ("True", True)])
def test_reclaim_is_a_boolean_of_go(text: str, value: bool) -> None:
    assert notes.ippool_reclaim({notes.RECLAIM: text}) is value


def test_namespaces_name_pools_for_each_family() -> None:
    both = said(notes.NAMESPACE_IPV4, ["a", "b*"]) | said(notes.NAMESPACE_IPV6, "null")
    assert notes.namespace_pools(both) == PoolNames(("a", "b*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("ns", "a", "")]),
        (" kube-system/a@net1 , b", [("kube-system", "a", "net1"), ("ns", "b", "")]),
        ('[{"name": "a"}, {"name": "b", "namespace": "x", "interface": "e", "mac": "c2:b0:57:49:47:f1", "ips": ["1"]}]',
         [("ns", "a", ""), ("x", "b", "e")]),
        ('[\n  {"name": "a.b",\n   "namespace": "x"}\n]', [("x", "a.b", "")]),
        ("", []),
        ("  ", []),
    ],
)  # fmt: skip
def test_networks_in_both_notations(text: str, expected: list[tuple[str, str, str]]) -> None:
    found = notes.networks({notes.NETWORKS: text}, "ns")
    assert found == tuple(NetworkSelection(*parts) for parts in expected)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,,b", "[1].name"),
        ("a/b/c", "[0].name"),
        ("a@", "[0].interface"),
        ("a@b@c", "[0].interface"),
        ("a@sixteen--letters", "[0].interface"),
        ("UPPER", "[0].name"),
        ('{"name": "a"}', "expected `array`"),
        ('[{"namespace": "a"}]', "[0].name"),
        ('[{"name": 1}]', "[0].name"),
    ],
)
def test_networks_that_multus_would_not_take(text: str, problem: str) -> None:
    with pytest.raises(AnnotationError) as raised:
        notes.networks({notes.NETWORKS: text}, "ns")
    assert problem in str(raised.value)


def test_the_default_network_is_one() -> None:
    found = notes.default_network({notes.DEFAULT_NETWORK: "macvlan"}, "kube-system")
    assert found is not None
    assert found.full_name == "kube-system/macvlan"
    with pytest.raises(AnnotationError, match="names 2 networks"):
        notes.default_network({notes.DEFAULT_NETWORK: "a,b"}, "kube-system")


def test_nics_are_numbered_as_multus_does() -> None:
    further = notes.networks({notes.NETWORKS: "a,b@eth5,c"}, "ns")
    assert [notes.nic_number(nic, further) for nic in ("eth0", "net1", "eth5", "net3")] == [0, 1, 2, 3]
    assert notes.nic_number("net2", further) is None
    assert notes.nic_number("net4", further) is None


PARSERS: list[tuple[str, Callable[[dict[str, str]], object]]] = [
    (notes.IPPOOL, notes.ippool),
    (notes.IPPOOLS, notes.ippools),
    (notes.ROUTES, notes.routes),
    (notes.SUBNET, notes.subnets),
    (notes.SUBNETS, notes.subnets),
    (notes.IP_NUMBER, notes.ip_number),
    (notes.RECLAIM, notes.ippool_reclaim),
    (notes.NAMESPACE_IPV4, notes.namespace_pools),
    (notes.NETWORKS, lambda found: notes.networks(found, "ns")),
    (notes.DEFAULT_NETWORK, lambda found: notes.default_network(found, "ns")),
]
WORDS = st.sampled_from(["ipv4", "ipv6", "interface", "cleangateway", "dst", "gw", "name", "namespace", "IPV4"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("10.0.0.0/8"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(PARSERS), st.text(max_size=30) | JSON.map(json.dumps))
def test_whatever_it_says_there_is_no_other_error(which: Any, text: str) -> None:
    key, parse = which
    try:
        parse({key: text})
    except AnnotationError as error:
        assert error.key == key  # noqa: PT017
