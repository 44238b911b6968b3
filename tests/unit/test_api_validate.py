"""Rules of pools, reservations and claims beyond the examples: each error with its path, at interval cost."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from api.claim import Claim
from api.meta import Resource
from api.pool import Pool
from api.reservedip import ReservedIP
from api.service import EndpointSlice, Service
from api.validate import Surroundings, defaulted, errors
from api.validate.fields import FieldError, invalid, not_supported, refusal, required
from api.validate.pool import pool_addresses


def pool(name: str = "p", **spec: Any) -> Pool:
    return defaulted(msgspec.convert({"metadata": {"name": name}, "spec": {"subnet": "10.0.0.0/24", **spec}}, Pool))


def reserved(**spec: Any) -> ReservedIP:
    return defaulted(msgspec.convert({"metadata": {"name": "r"}, "spec": spec}, ReservedIP))


def claim(name: str = "10.0.0.5", **spec: Any) -> Claim:
    whole = {"address": "10.0.0.5", "ipVersion": 4, "pool": "p", "podUID": "u", "nic": "eth0", **spec}
    return defaulted(msgspec.convert({"metadata": {"name": name}, "spec": whole}, Claim))


def terminating(resource: Resource) -> Any:
    return replace(resource, metadata=replace(resource.metadata, deletion_timestamp=datetime.now(UTC)))


def found(new: Resource, old: Resource | None = None, **around: Any) -> list[tuple[str, str]]:
    return [(error.path, error.type) for error in errors(new, old, Surroundings(**around))]


def test_every_error_is_reported_with_its_path() -> None:
    broken = pool(
        ips=["10.0.0.9-10.0.0.1", "10.0.1.7", "fd00::1", "10.0.0.1"],
        excludeIPs=["10.0.0.0/30"],
        gateway="10.0.0.1",
        routes=[
            {"dst": "10.1.0.0", "gw": "10.0.0.2"},
            {"dst": "10.2.0.0/16", "gw": "10.9.9.9"},
            {"dst": "10.2.3.4/16", "gw": "10.0.0.2"},
            {"dst": "10.2.0.0/0", "gw": "nowhere"},
        ],
        podAffinity={
            "matchLabels": {"a b": "c"},
            "matchExpressions": [
                {"key": "k", "operator": "In"},
                {"key": "k", "operator": "Exists", "values": ["v"]},
                {"key": "k", "operator": "in", "values": ["-"]},
            ],
        },
    )
    assert found(broken) == [
        ("spec.ips[0]", "Invalid"),
        ("spec.ips[2]", "Invalid"),
        ("spec.ips[1]", "Invalid"),
        ("spec.excludeIPs[0]", "Invalid"),
        ("spec.ips[3]", "Invalid"),
        ("spec.routes[0].dst", "Invalid"),
        ("spec.routes[1].gw", "Invalid"),
        ("spec.routes[2].dst", "Invalid"),
        ("spec.routes[3].dst", "Invalid"),
        ("spec.routes[3].gw", "Invalid"),
        ("spec.podAffinity.matchLabels", "Invalid"),
        ("spec.podAffinity.matchExpressions[0].values", "Required"),
        ("spec.podAffinity.matchExpressions[1].values", "Forbidden"),
        ("spec.podAffinity.matchExpressions[2].operator", "Invalid"),
        ("spec.podAffinity.matchExpressions[2].values[0]", "Invalid"),
    ]


@pytest.mark.parametrize("ranges", [["10.0.0.9-10.0.0.1"], ["10.0.0.9-10.0.0.1", "10.0.0.20"]])
def test_a_reversed_range_is_refused_at_creation(ranges: list[str]) -> None:
    (error,) = errors(pool(ips=ranges), None, Surroundings())
    assert error.path == "spec.ips[0]"
    assert "reversed" in error.detail


@pytest.mark.parametrize(
    ("subnet", "version", "expected"),
    [
        ("garbage", None, [("spec.ipVersion", "Invalid"), ("spec.subnet", "Invalid")]),
        ("10.0.0.0", None, [("spec.ipVersion", "Invalid"), ("spec.subnet", "Invalid")]),
        ("10.0.0.0/255.255.255.0", None, [("spec.ipVersion", "Invalid"), ("spec.subnet", "Invalid")]),
        ("10.0.0.0/33", 4, [("spec.subnet", "Invalid")]),
        ("fe80::%eth0/64", 6, [("spec.subnet", "Invalid")]),
        ("fd00::/64", 4, [("spec.subnet", "Invalid")]),
        ("fd00::1/64", 6, [("spec.subnet", "Invalid")]),
    ],
)
def test_malformed_subnets(subnet: str, version: int | None, expected: list[tuple[str, str]]) -> None:
    assert found(pool(subnet=subnet, ipVersion=version)) == expected


def test_a_disabled_family_is_refused() -> None:
    (error,) = errors(pool(subnet="fd00::/64"), None, Surroundings(families={4}))
    assert str(error) == "spec.ipVersion: Forbidden: IPv6 is disabled"
    assert found(reserved(ips=["10.0.0.1"]), families={6}) == [("spec.ipVersion", "Forbidden")]


def test_the_gateway_counts_by_number_and_may_be_excluded() -> None:
    v6 = {"subnet": "fd00::/64", "gateway": "fd00::1"}
    assert found(pool(**v6, ips=["fd00:0::0001"])) == [("spec.ips[0]", "Invalid")]
    assert found(pool(**v6, ips=["fd00::1-fd00::9"], excludeIPs=["fd00::1"])) == []
    assert found(pool(gateway="10.0.1.1")) == [("spec.gateway", "Invalid")]
    assert found(pool(gateway="fd00::1")) == [("spec.gateway", "Invalid")]


def test_a_48_costs_what_a_28_costs() -> None:
    others = [pool(f"p{i}", subnet="fd00::/48", ips=[f"fd00:0:0:{i:x}::-fd00:0:0:{i:x}:ffff::"]) for i in range(200)]
    started = time.monotonic()
    huge = pool("huge", subnet="fd00::/48", ips=["fd00:0:0:1000::-fd00:0:0:ffff::", "fd00:0:0:200::-fd00:0:0:2ff::"])
    assert found(huge, pools=others) == []
    assert huge.spec.ips == ["fd00:0:0:200::-fd00:0:0:2ff::", "fd00:0:0:1000::-fd00:0:0:ffff::"]
    wide = pool("wide", subnet="fd00::/48", ips=["fd00::-fd00:0:0:ffff:ffff:ffff:ffff:ffff"])
    assert len(errors(wide, None, Surroundings(pools=others))) == 200
    assert time.monotonic() - started < 2


numbers = st.integers(0, 30)
spans = st.lists(st.tuples(numbers, numbers).map(sorted), max_size=4)


def texts(parts: list[list[int]]) -> list[str]:
    return [f"10.0.0.{low}-10.0.0.{high}" for low, high in parts]


def members(parts: list[list[int]]) -> set[int]:
    return {n for low, high in parts for n in range(low, high + 1)}


@given(spans, spans, spans, spans)
def test_overlap_is_that_of_the_sets(
    ips: list[list[int]], cut: list[list[int]], theirs: list[list[int]], their_cut: list[list[int]]
) -> None:
    mine = pool("mine", ips=texts(ips), excludeIPs=texts(cut))
    other = pool("other", ips=texts(theirs), excludeIPs=texts(their_cut))
    shared = (members(ips) - members(cut)) & (members(theirs) - members(their_cut))
    assert found(mine, pools=[mine, other]) == ([("spec.ips", "Forbidden")] if shared else [])
    assert pool_addresses(mine.spec).count == len(members(ips) - members(cut))


@given(spans, spans, st.sets(numbers, max_size=5))
def test_an_update_may_drop_what_nobody_holds(before: list[list[int]], after: list[list[int]], held: set[int]) -> None:
    old, new = pool(ips=texts(before)), pool(ips=texts(after))
    claims = [claim(f"10.0.0.{n}", address=f"10.0.0.{n}") for n in held]
    dropped = {f"10.0.0.{n}" for n in (members(before) - members(after)) & held}
    refused = errors(new, old, Surroundings(claims=claims))
    assert {error.detail.split()[4] for error in refused} == dropped


def test_only_what_holds_an_address_of_this_pool_keeps_it() -> None:
    old, new = pool(ips=["10.0.0.1-10.0.0.9"]), pool(ips=["10.0.0.1"])
    quarantine = {"reason": "answered", "mac": "02:00:00:00:00:01", "until": "2030-01-01T00:00:00Z"}
    free = [claim(pool="another"), claim(state="Quarantined", podUID="", quarantine=quarantine)]
    assert found(new, old, claims=free) == []
    assert found(pool(ips=["10.0.0.1-10.0.0.9"], excludeIPs=["10.0.0.5"]), old, claims=[claim()]) == [
        ("spec.ips", "Forbidden")
    ]


def test_many_addresses_in_use_do_not_flood_the_answer() -> None:
    claims = [claim(f"10.0.0.{n}", address=f"10.0.0.{n}") for n in range(1, 201)]
    refused = errors(pool(), pool(ips=["10.0.0.1-10.0.0.200"]), Surroundings(claims=claims))
    assert len(refused) == 11
    assert "190 more" in refused[-1].detail


def test_subnet_and_family_never_change() -> None:
    old = pool()
    assert found(pool(subnet="10.0.1.0/24"), old) == [("spec.subnet", "Forbidden")]
    moved = found(pool(subnet="fd00::/64"), old)
    assert moved == [("spec.ipVersion", "Forbidden"), ("spec.subnet", "Forbidden")]
    assert "is not changeable" in errors(pool(subnet="10.0.1.0/24"), old, Surroundings())[0].detail
    assert found(reserved(ips=["fd00::1"]), reserved(ips=["10.0.0.1"])) == [("spec.ipVersion", "Forbidden")]


def test_an_update_is_not_blamed_for_an_overlap_that_was_there() -> None:
    rival, old = pool("rival", ips=["10.0.0.1-10.0.0.9"]), pool(ips=["10.0.0.5-10.0.0.20"])
    assert found(pool(ips=["10.0.0.8-10.0.0.20"], disable=True), old, pools=[rival, old]) == []
    assert found(pool(ips=["10.0.0.4-10.0.0.20"]), old, pools=[rival, old]) == [("spec.ips", "Forbidden")]


def test_a_terminating_pool_may_only_lose_its_finalizer() -> None:
    old = terminating(pool(ips=["10.0.0.9"]))
    assert defaulted(old) is old
    (error,) = errors(old, old, Surroundings())
    assert "cannot update a terminating IPPool" in str(error)
    assert found(replace(old, metadata=replace(old.metadata, finalizers=[])), old) == []
    gone = terminating(reserved(ips=["10.0.0.1"]))
    assert found(gone, gone) == [("metadata.deletionTimestamp", "Forbidden")]


def test_what_somebody_else_stored_malformed_does_not_break_the_check() -> None:
    odd = [
        msgspec.convert({"metadata": {"name": "odd"}, "spec": {"subnet": subnet, "ips": ips}}, Pool)
        for subnet, ips in (("nonsense", ["10.0.0.1"]), ("10.0.0.0/24", ["10.0.0.9-10.0.0.1", "x"]), ("fd00::/64", []))
    ]
    assert found(pool(ips=["10.0.0.1-10.0.0.20"]), pools=odd) == []


def test_lists_of_one_stay_as_typed_and_longer_ones_are_merged() -> None:
    assert pool(subnet="fd00::/64", ips=["FD00::0001"]).spec.ips == ["FD00::0001"]
    assert pool(ips=["10.0.0.3", "10.0.0.2", "10.0.0.2-10.0.0.3"]).spec.ips == ["10.0.0.2-10.0.0.3"]
    assert pool(ips=["10.0.0.3", "bad"]).spec.ips == ["10.0.0.3", "bad"]
    assert pool(ips=[]).spec.ips == []


def test_reservations_check_each_range() -> None:
    broken = reserved(ips=["10.0.0.1", "fd00::1", "10.0.0.9-10.0.0.2"])
    assert found(broken) == [("spec.ips[1]", "Invalid"), ("spec.ips[2]", "Invalid")]


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("10.0.0.6", {}, [("metadata.name", "Invalid")]),
        ("10.0.0.5", {"address": "10.0.0.5/24"}, [("spec.address", "Invalid")]),
        ("fd00--5", {"address": "FD00::5", "ipVersion": 6}, [("spec.address", "Invalid")]),
        ("10.0.0.5", {"ipVersion": 6}, [("spec.ipVersion", "Invalid")]),
        ("10.0.0.5", {"podUID": ""}, [("spec.podUID", "Required")]),
        ("10.0.0.5", {"podUID": "", "containerID": "c"}, []),
        ("10.0.0.5", {"state": "Quarantined"}, [("spec.quarantine", "Required")]),
        ("10.0.0.5", {"domain": "blue"}, [("spec.domain", "NotSupported")]),
        ("10.0.0.5", {"setSize": 0, "pool": ""}, [("spec.pool", "Required"), ("spec.setSize", "Invalid")]),
    ],
)
def test_claims(name: str, spec: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert found(claim(name, **spec)) == expected


def test_a_claim_changes_hands_but_not_its_address() -> None:
    assert found(claim(podUID="other"), claim()) == []
    moved = claim("10.0.0.6", address="10.0.0.6", pool="q")
    assert found(moved, claim()) == [("spec.address", "Forbidden"), ("spec.pool", "Forbidden")]


def test_claim_labels_follow_the_spec() -> None:
    held = claim(node="node-1", pool="p" * 70)
    assert held.metadata.labels["ipam.spidernet.io/node"] == "node-1"
    assert held.metadata.labels["ipam.spidernet.io/identity"] == "pod.u"
    assert len(held.metadata.labels["ipam.spidernet.io/pool"]) <= 63
    lost = replace(held, metadata=replace(held.metadata, labels={}))
    assert [path for path, _ in found(lost)] == [
        f"metadata.labels[ipam.spidernet.io/{k}]" for k in ("pool", "node", "identity")
    ]


def test_the_text_form_is_that_of_kubernetes() -> None:
    assert str(required("spec.subnet")) == "spec.subnet: Required value"
    assert str(not_supported("spec.ipVersion", 5, [4, 6])) == (
        'spec.ipVersion: Unsupported value: 5: supported values: "4", "6"'
    )
    assert str(invalid("a", 'quo"te', "why")) == 'a: Invalid value: "quo\\"te": why'
    assert len(str(invalid("a", "x" * 10**6, "why"))) < 400
    both: list[FieldError] = [required("a"), required("b")]
    assert refusal("SpiderIPPool", "spiderpool.spidernet.io", "web", both) == (
        'SpiderIPPool.spiderpool.spidernet.io "web" is invalid: [a: Required value, b: Required value]'
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"], "ports": [{"port": 80}]}, []),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, []),
        ({"ports": [{"port": 53, "name": "a"}, {"port": 53, "name": "b", "protocol": "UDP"}]}, []),
        ({"clusterIP": "10.96.0.999"}, [("spec.clusterIP", "Invalid")]),
        ({"clusterIPs": ["10.96.0.1", "fe80::1%eth0"]}, [("spec.clusterIPs[1]", "Invalid")]),
        ({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.2"]}, [("spec.clusterIPs[0]", "Invalid")]),
        ({"type": "Nodeport"}, [("spec.type", "NotSupported")]),
        (
            {"ports": [{"port": 0, "protocol": "tcp"}]},
            [("spec.ports[0].port", "Invalid"), ("spec.ports[0].protocol", "NotSupported")],
        ),
        ({"ports": [{"port": 1}, {"port": 2, "name": "b"}]}, [("spec.ports[0].name", "Required")]),
        (
            {"ports": [{"port": 1, "name": "a"}, {"port": 1, "name": "a"}]},
            [("spec.ports[1].port", "Invalid"), ("spec.ports[1].name", "Invalid")],
        ),
    ],
)
def test_services(spec: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    service = msgspec.convert({"metadata": {"name": "s", "namespace": "n"}, "spec": spec}, Service)
    assert found(service) == found(service, service) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::1"]}], "ports": [{"port": 65535}, {}]}, []),
        ({"addressType": "FQDN", "endpoints": [{"addresses": ["host.example"]}]}, []),
        ({"addressType": "ipv4"}, [("addressType", "NotSupported")]),
        (
            {"addressType": "IPv4", "endpoints": [{"addresses": []}, {"addresses": ["fd00::1", "x"]}]},
            [
                ("endpoints[0].addresses", "Required"),
                ("endpoints[1].addresses[0]", "Invalid"),
                ("endpoints[1].addresses[1]", "Invalid"),
            ],
        ),
        ({"addressType": "IPv4", "ports": [{"port": 65536}]}, [("ports[0].port", "Invalid")]),
    ],
)
def test_endpoint_slices(body: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    part = msgspec.convert({"metadata": {"name": "s", "namespace": "n"}, **body}, EndpointSlice)
    assert found(part) == expected
