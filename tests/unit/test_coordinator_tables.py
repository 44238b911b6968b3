"""Which tables, rules and default routes a further NIC gets, and what comes back when it goes."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from socket import AF_INET, AF_INET6
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins.coordinator.config import parse_config
from plugins.coordinator.leaving import BOOT, plan_leaving
from plugins.coordinator.plan import PodNic, Way
from plugins.coordinator.settings import CoordinatorSettings
from plugins.coordinator.tables import FurtherPlan, PodView, free_table, plan_further, sender_rule, table_of
from plugins.errors import InvalidConfigError, WiringError
from plugins.net.rtroute import Prefix, Rule
from plugins.net.rtwhole import Hop, WholeRoute

INDEX = {"eth0": 2, "veth0": 3, "net1": 4, "net2": 5}


def nic(name: str, *addresses: str) -> PodNic:
    given_ = tuple(map(ip_address, addresses))
    return PodNic(name, INDEX[name], bytes(6), 1000, given_, next((a for a in given_ if a.version == 6), None))


ETH0, NET1, NET2 = nic("eth0", "10.0.0.9", "fd00::9"), nic("net1", "10.1.0.9", "fd01::9"), nic("net2", "10.2.0.9")


def route(text: str, *hops: tuple[str, str], table: int = 254, protocol: int = 3, metric: int = 0) -> WholeRoute:
    network = ip_network(text)
    made = tuple(Hop(INDEX[name], ip_address(via) if via else None, 0, 0, b"") for name, via in hops)
    family = AF_INET if network.version == 4 else AF_INET6
    destination = Prefix(network.network_address, network.prefixlen)
    return WholeRoute(family, destination, table, protocol, 0, 1, metric, 0, 0, made, b"")


ETH0_ROUTES = (
    route("10.0.0.0/24", ("eth0", "")),
    route("0.0.0.0/0", ("eth0", "10.0.0.1")),
    route("::/0", ("eth0", "fd00::1"), metric=1024),
)
NET1_ROUTES = (route("10.1.0.0/24", ("net1", "")), route("0.0.0.0/0", ("net1", "10.1.0.1")))


def view(mode: Any, *routes: WholeRoute, cur: PodNic = NET1, rules: tuple[Rule, ...] = ()) -> PodView:
    nics = (ETH0, NET1) if cur is NET1 else (ETH0, NET1, cur)
    lead = INDEX["veth0" if mode == "underlay" else "eth0"]
    return PodView(Way(mode), nics, cur, lead, "eth0", routes, rules)


def plan(seen: PodView, awaited: tuple[str, ...] = (), **members: Any) -> FurtherPlan:
    config = parse_config({"serviceCIDR": ["10.96.0.0/12"], **members}, CoordinatorSettings())
    return plan_further(config, seen, list(map(ip_address, ("10.0.0.2", "fd00::2"))), (4, 6), awaited)


def gone(decided: FurtherPlan) -> set[tuple[str, int]]:
    return {(str(r.destination), hop.ifindex) for d in decided.departures for r in d.gone for hop in r.hops}


@pytest.mark.parametrize(("mode", "own"), [("underlay", 99), ("overlay", 100)])
def test_tables_and_rules(mode: str, own: int) -> None:
    decided = plan(view(mode, *NET1_ROUTES[1:], *ETH0_ROUTES, *NET1_ROUTES[:1]))
    senders = {(str(r.source), r.table) for r in decided.rules if r.source}
    assert senders == {("10.1.0.9/32", 101), ("fd01::9/128", 101), ("10.0.0.9/32", own), ("fd00::9/128", own)}
    copies = [(str(c.destination), c.table) for c in decided.copies]
    assert copies == [
        ("10.1.0.0/24", 101), ("0.0.0.0/0", 101), ("10.0.0.0/24", own), ("0.0.0.0/0", own), ("::/0", own),
    ]  # fmt: skip
    assert gone(decided) == {("0.0.0.0/0", 4)}
    assert decided.departures[0].was_first
    assert {str(w.destination) for w in decided.ways if w.table == 101} == {
        "10.0.0.2/32",
        "fd00::2/128",
        "10.96.0.0/12",
    }
    in_main = {str(w.destination) for w in decided.ways if w.table == 254}
    assert ("10.96.0.0/12" in in_main) == (mode == "overlay"), "the first NIC of an underlay has it already"
    assert all(str(w.source) in ("10.0.0.9", "fd00::9") for w in decided.ways)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", {("0.0.0.0/0", 4)}),
        ("eth0", {("0.0.0.0/0", 4)}),
        ("net1", {("0.0.0.0/0", 2)}),
        ("net7", {("0.0.0.0/0", 4)}),
    ],
)
def test_who_keeps_the_default_route(wanted: str, expected: set[tuple[str, int]]) -> None:
    """Each family by itself: net1 has no IPv6 default route, so eth0 keeps its own."""
    seen = view("overlay", *NET1_ROUTES, *ETH0_ROUTES)
    assert gone(plan(seen, ("net7",), podDefaultRouteNic=wanted)) == expected


def test_a_nic_that_nobody_knows() -> None:
    seen = view("overlay", *NET1_ROUTES, *ETH0_ROUTES)
    with pytest.raises(InvalidConfigError, match="podDefaultRouteNIC: net7 don't exist in pod"):
        plan(seen, podDefaultRouteNic="net7")
    assert plan(seen, podDefaultRouteNic="net7", tunePodRoutes=False).rules == ()
    with pytest.raises(WiringError, match="no usable"):
        plan(replace(seen, nic=replace(NET1, addresses=())))


def test_the_only_default_route_stays() -> None:
    seen = view("overlay", *NET1_ROUTES, ETH0_ROUTES[0])
    assert plan(seen).departures == ()


def test_several_next_hops() -> None:
    six = route("::/0", ("eth0", "fd00::1"), ("net1", "fd01::1"), metric=1024)
    four = route("0.0.0.0/0", ("eth0", "10.0.0.1"), ("net1", "10.1.0.1"))
    of_six, of_four = plan(view("underlay", six)).departures[0], plan(view("underlay", four)).departures[0]
    assert [[hop.ifindex for hop in r.hops] for r in of_six.gone] == [[4]]
    assert of_six.stays is None
    assert of_four.gone == (four,)
    assert of_four.stays is not None
    assert [hop.ifindex for hop in of_four.stays.hops] == [2]


def test_numbers() -> None:
    mine = sender_rule(ip_address("10.1.0.9"), 101)
    assert table_of(NET1, (mine,)) == 101
    assert table_of(NET2, (mine,)) == 0
    assert free_table((), ()) == 101
    assert free_table((), (mine,)) == 102
    assert free_table((route("10.0.0.0/8", ("eth0", ""), table=102),), (mine,)) == 103
    assert free_table((route("10.0.0.0/8", ("net1", ""), table=101, protocol=83),), ()) == 101, "left by a killed ADD"
    foreign = replace_table(mine, 101, protocol=3)
    assert free_table((), (foreign,)) == 102
    assert table_of(NET1, (foreign,)) == 0


def replace_table(rule: Rule, table: int, protocol: int) -> Rule:
    return rule._replace(table=table, protocol=protocol)


@given(st.sets(st.integers(90, 300)))
def test_a_free_table_is_free(taken: set[int]) -> None:
    rules = [sender_rule(ip_address("10.9.9.9"), table) for table in taken]
    table = free_table((), rules)
    assert table >= 101
    assert table not in taken | {253, 254, 255}


def test_what_a_killed_add_left_in_the_table_goes() -> None:
    left = route("10.7.0.0/16", ("net2", ""), table=101, protocol=83)
    assert plan(view("underlay", *ETH0_ROUTES, *NET1_ROUTES, left)).stale == (left,)
    theirs = route("10.7.0.0/16", ("net2", ""), table=102, protocol=83)
    assert plan(view("underlay", *ETH0_ROUTES, *NET1_ROUTES, theirs)).stale == ()


def after(*tables: tuple[PodNic, int]) -> tuple[Rule, ...]:
    return tuple(sender_rule(address, table) for nic_, table in tables for address in nic_.addresses)


def test_leaving_gives_the_default_route_back() -> None:
    held = route("0.0.0.0/0", ("net1", "10.1.0.1"))
    kept = route("0.0.0.0/0", ("eth0", "10.0.0.1"), table=100, protocol=83)
    rules = after((ETH0, 100), (NET1, 101))
    leaving = plan_leaving(((ETH0, NET1), (held, kept), rules), "net1", "eth0", 2)
    assert leaving.returns == (kept._replace(table=254, protocol=BOOT),)
    assert set(leaving.rules) == set(rules), "it was the last further NIC"
    assert leaving.routes == (kept,)
    with_another = plan_leaving(((ETH0, NET1, NET2), (held, kept), rules), "net1", "eth0", 2)
    assert set(with_another.rules) == set(after((NET1, 101)))
    assert with_another.routes == ()


def test_leaving_takes_the_ways_to_the_node_along_with_the_last() -> None:
    way = route("10.0.0.2/32", ("eth0", ""), protocol=83)
    assert plan_leaving(((ETH0, NET1), (way,), ()), "net1", "eth0", 2).neighbours == (ip_address("10.0.0.2"),)
    assert plan_leaving(((ETH0, NET1), (way,), ()), "net1", "eth0", 0).routes == (), "an underlay's are the first NIC's"
    assert plan_leaving(((ETH0, NET1, NET2), (way,), ()), "net1", "eth0", 2).routes == ()


def test_leaving_takes_what_a_killed_addition_left() -> None:
    """Tables that no rule names yet, and neighbours to which there is no route yet; not what others have."""
    orphan = route("10.1.0.0/24", ("net1", ""), table=101, protocol=83)
    other = route("10.2.0.0/24", ("net2", ""), table=102, protocol=83)
    foreign = route("10.3.0.0/24", ("net1", ""), table=103)
    way = route("10.0.0.2/32", ("eth0", ""), protocol=83)
    pod = (ETH0, NET1, NET2), (orphan, other, foreign, way), after((ETH0, 100), (NET2, 102))
    leaving = plan_leaving(pod, "net1", "eth0", 2, (ip_address("10.0.0.2"), ip_address("10.0.0.3")))
    assert leaving.routes == (orphan,)
    assert leaving.neighbours == (ip_address("10.0.0.3"),)


def test_a_nic_that_went_before_its_deletion() -> None:
    rules = after((ETH0, 100), (NET1, 101), (NET2, 102))
    left = route("10.96.0.0/12", ("eth0", "10.0.0.2"), table=101, protocol=83)
    leaving = plan_leaving(((ETH0, NET2), (left,), rules), "net1", "eth0", 2)
    assert set(leaving.rules) == set(after((NET1, 101)))
    assert leaving.routes == (left,)
