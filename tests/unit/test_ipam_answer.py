"""Which routes are a NIC's, what endpoints hint at, and who is still using an address."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from api.claim import LABEL_WORKLOAD, Claim, ClaimSpec, Controller, Provided, Workload
from api.core import Pod, PodSpec, PodStatus
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec, Route
from plugins.ipam.answer import result_of, routes_for, unreachable
from plugins.ipam.attempt import same_claim
from plugins.ipam.candidates import PoolFacts, pool_facts
from plugins.ipam.endpoints import EndpointWriter, merged, subject_of
from plugins.ipam.held import by_family, set_key
from plugins.ipam.repair import missing_entry, repair
from plugins.ipam.retained import hinted, is_using, split
from store.errors import NotFoundError
from store.port import Store

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def facts(name: str, subnet: str) -> PoolFacts:
    return pool_facts(Pool(metadata=ObjectMeta(name=name), spec=PoolSpec(subnet=subnet)))


POOLS = {name: facts(name, subnet) for name, subnet in (("a", "10.1.0.0/24"), ("b", "10.2.0.0/24"), ("c", "fd01::/64"))}


def claim(nic: str, pool: str, address: str, *, static: bool = False, **spec: Any) -> Claim:
    labels = {LABEL_WORKLOAD: "w.x"} if static else {}
    whole: dict[str, Any] = {"pod_uid": "u1", "workload": Workload(namespace="ns", name="p"), **spec}
    return Claim(
        metadata=ObjectMeta(name=address, labels=labels, resource_version="1"),
        spec=ClaimSpec(address=address, ip_version=6 if ":" in address else 4, pool=pool, nic=nic, **whole),
    )


def endpoint(uid: str, *entries: EndpointIP) -> Endpoint:
    current = EndpointCurrent(uid=uid, node="n", ips=list(entries))
    status = EndpointStatus(current=current, owner_controller_type="Pod", owner_controller_name="p")
    return Endpoint(metadata=ObjectMeta(name="p", namespace="ns"), status=status)


IN_A, IN_B, IN_C, NOWHERE = (Route(dst="0.0.0.0/1", gw=gw) for gw in ("10.1.0.9", "10.2.0.9", "fd01::9", "192.0.2.1"))


@pytest.mark.parametrize(
    ("nic", "mine", "others", "own"),
    [
        ("eth0", [("a", "10.1.0.5")], [], [IN_A]),
        ("net1", [("b", "10.2.0.5"), ("c", "fd01::5")], [("eth0", "a", "10.1.0.5")], [IN_B, IN_C]),
        ("net1", [("a", "10.1.0.6")], [("eth0", "a", "10.1.0.5")], []),
        ("eth0", [("a", "10.1.0.5")], [("net1", "a", "10.1.0.6")], [IN_A]),
        ("net2", [("a", "10.1.0.5")], [("net10", "a", "10.1.0.6")], [IN_A]),
        ("net10", [("a", "10.1.0.5")], [("net2", "a", "10.1.0.6")], []),
        ("eth0", [("gone", "10.1.0.5")], [], []),
    ],
)
def test_routes_of_a_nic(nic: str, mine: Any, others: Any, own: list[Route]) -> None:
    claims = [claim(nic, *each) for each in mine]
    rest = [claim(*each) for each in others]
    assert list(routes_for(nic, claims, rest, [IN_A, IN_B, IN_C, NOWHERE], POOLS.get)) == own


def test_routes_that_no_nic_reaches() -> None:
    claims = [claim("eth0", "a", "10.1.0.5"), claim("net1", "c", "fd01::5")]
    assert unreachable([IN_A, IN_B, IN_C, NOWHERE], claims, POOLS.get) == [IN_B, NOWHERE]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (
            [EndpointIP(interface="eth0", ipv4="10.1.0.5/24", ipv6="fd01::5/64")],
            ["10.1.0.5", "fd01-0000-0000-0000-0000-0000-0000-0005"],
        ),
        ([EndpointIP(interface="net1", ipv4="10.1.0.5/24")], []),
        ([EndpointIP(interface="eth0", ipv4="nonsense")], []),
        ([EndpointIP(interface="eth0", ipv4="10.1.0.5/24", ipv6="10/../x")], []),
        ([EndpointIP(interface="eth0")], []),
        ([], []),
    ],
)
def test_what_an_endpoint_hints_at(entries: list[EndpointIP], names: list[str]) -> None:
    assert hinted(endpoint("u", *entries), "eth0") == names


def test_no_endpoint_hints_at_nothing() -> None:
    assert hinted(None, "eth0") == []
    assert hinted(Endpoint(metadata=ObjectMeta(name="p")), "eth0") == []


@pytest.mark.parametrize(
    ("phase", "deleted", "policy", "using"),
    [
        ("Running", None, "Always", True),
        ("Pending", None, "Always", True),
        ("Running", 10, "Always", True),
        ("Running", -10, "Always", False),
        ("Failed", 10, "Always", False),
        ("Failed", None, "Never", False),
        ("Succeeded", None, "Never", False),
        ("Unknown", None, "Always", True),
    ],
)
def test_who_is_still_using_an_address(phase: str, deleted: int | None, policy: str, using: bool) -> None:
    deletion = None if deleted is None else MOMENT + timedelta(seconds=deleted)
    pod = Pod(
        metadata=ObjectMeta(name="p", deletion_timestamp=deletion),
        spec=PodSpec(restart_policy=policy),
        status=PodStatus(phase=phase),
    )
    assert is_using(pod, MOMENT) is using


def test_what_stays_of_the_retained() -> None:
    claims, _ = by_family([claim("eth0", "a", "10.1.0.5"), claim("eth0", "c", "fd01::5")])
    assert split(claims, {4: ("a", "b"), 6: ("c",)}) == (claims, [])
    assert split(claims, {4: ("b",), 6: ("c",)}) == ({6: claims[6]}, [claims[4]])
    assert split(claims, {4: ("a",)}) == ({4: claims[4]}, [claims[6]])


def test_an_entry_tells_what_the_provider_said() -> None:
    provided = Provided(subnet="10.1.0.0/24", parent_mac="x", mac="02:00:00:00:00:01", vlan=7)
    _, entry = result_of({4: claim("eth0", "a", "10.1.0.5", provided=provided)}, POOLS.get, clean_gateway=False)
    assert (entry.mac, entry.vlan) == ("02:00:00:00:00:01", 7)


def test_a_claim_is_the_same_whatever_the_provider_said_meanwhile() -> None:
    made = claim("eth0", "a", "10.1.0.5", provided=Provided(subnet="10.1.0.0/24", parent_mac="x"))
    answered = claim("eth0", "a", "10.1.0.5", provided=Provided(subnet="10.1.0.0/24", parent_mac="x", mac="y", vlan=7))
    assert same_claim(made)(answered)
    assert not same_claim(made)(claim("eth0", "a", "10.1.0.5", pod_uid="u2"))


def test_a_static_workloads_endpoint_keeps_its_predecessors_entries() -> None:
    before = endpoint("u0", EndpointIP(interface="net1", ipv4="10.2.0.5/24"))
    new: dict[str, EndpointIP | None] = {"eth0": EndpointIP(interface="eth0", ipv4="10.1.0.5/24")}
    for static, nics in ((True, ["net1", "eth0"]), (False, ["eth0"])):
        status = merged(before, subject_of(claim("eth0", "a", "10.1.0.5", static=static)), "n", new)
        assert status is not None
        assert [entry.interface for entry in status.current.ips] == nics
        assert status.current.uid == "u1"


def test_who_owns_an_endpoint() -> None:
    controller = Controller(api_version="apps/v1", kind="Deployment", name="web", uid="d")
    subject = subject_of(
        claim("eth0", "a", "10.1.0.5", workload=Workload(namespace="ns", name="p", controller=controller))
    )
    assert (subject.controller_type, subject.controller_name) == ("Deployment", "web")
    assert subject.owner is not None
    assert (subject.owner.kind, subject.owner.uid) == ("Pod", "u1")
    assert subject_of(claim("eth0", "a", "10.1.0.5", static=True)).owner is None
    assert subject_of(claim("eth0", "a", "10.1.0.5", pod_uid="", container_id="c")).owner is None


@pytest.mark.parametrize(
    ("told", "static", "missing"),
    [
        (None, False, True),
        (endpoint("u1", EndpointIP(interface="eth0", ipv4="10.1.0.5/24")), False, False),
        (endpoint("u1", EndpointIP(interface="eth0", ipv4="10.1.0.6/24")), False, True),
        (endpoint("u1", EndpointIP(interface="net1", ipv4="10.1.0.5/24")), False, True),
        (endpoint("u0", EndpointIP(interface="eth0", ipv4="10.1.0.5/24")), False, True),
        (endpoint("u2", EndpointIP(interface="eth0", ipv4="10.1.0.7/24")), True, False),
    ],
)
def test_which_endpoints_are_repaired(told: Endpoint | None, static: bool, missing: bool) -> None:
    claims = [claim("eth0", "a", "10.1.0.5", static=static)]
    assert (missing_entry(told, claims, POOLS.get) is not None) is missing
    assert missing_entry(told, [claim("eth0", "gone", "10.1.0.5")], POOLS.get) is None
    of_two = [claim("eth0", "a", "10.1.0.5", static=static, set_size=2)]
    assert missing_entry(told, of_two, POOLS.get) is None, "the record of the other family is not adopted yet"


def test_no_endpoint_is_written_for_what_went_while_it_was_looked_at() -> None:
    stays, goes = claim("eth0", "a", "10.1.0.5"), claim("eth0", "a", "10.1.0.6", pod_uid="u2")
    held = {set_key(each): [each] for each in (stays, goes)}
    noted: list[str] = []

    class Looking:
        async def get(self, kind: type[Endpoint], name: str, namespace: str) -> Endpoint:
            held.pop(set_key(goes), None)  # its DEL
            raise NotFoundError(name)

    class Writing:
        def attached(self, given: Claim, entry: EndpointIP) -> None:
            noted.append(given.spec.address)

    asyncio.run(repair(cast("Store", Looking()), cast("EndpointWriter", Writing()), lambda: dict(held), POOLS.get))
    assert noted == ["10.1.0.5"]
