"""Automatic pools: names, labels, numbers, the ledger, and how a pool comes to its size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from api import ledger
from api.annotations import IPNumber
from api.apps import CronJob, DaemonSet, Deployment, Job, ReplicaSet
from api.autopools import (
    Application,
    Wish,
    affinity,
    application_labels,
    application_of,
    desired_number,
    kin_labels,
    lookup_labels,
    lowest,
    new_pool,
    number_text,
    pool_name,
)
from api.ledger import Grant
from api.meta import ObjectMeta, decode
from api.ranges import IPSet
from api.subnet import Subnet, SubnetSpec, SubnetStatus, label_text
from api.validate.labels import is_subdomain, value_problem
from api.validate.pool import created_pool_errors
from controller.subnets.demand import native_demand, third_party_kind
from controller.subnets.keeper import recomputed
from controller.subnets.plan import Shortage, Step, grown, next_step, released, shrunk, trimmed

SHOP = Application("apps/v1", "Deployment", "web", "shop")
UID = "1c2d3e4f-5a6b-4c7d-8e9f-9f3c1d2e4b5a"


def ips(*numbers: int) -> IPSet:
    return IPSet(4, [(number, number) for number in numbers])


class TestNames:
    @pytest.mark.parametrize(
        ("name", "nic", "family", "expected"),
        [
            ("shop", "eth0", 4, "auto4-shop-eth0-9f3c1"),
            ("shop", "NET1", 6, "auto6-shop-net1-9f3c1"),
            ("Shop.v2", "eth0.100", 4, "auto4-shop.v2-eth0.100-9f3c1"),
        ],
    )
    def test_as_upstreams(self, name: str, nic: str, family: Any, expected: str) -> None:
        assert pool_name(SHOP._replace(name=name), UID, family, nic) == expected

    def test_a_second_name_if_the_first_is_taken(self) -> None:
        assert pool_name(SHOP, UID, 4, "eth0", long=True) == "auto4-shop-eth0-9f3c1d2e4b5a"

    @pytest.mark.upstream("I00017")
    @given(
        name=st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,120}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,120}[a-z0-9])?)?\Z"),
        nic=st.text(st.characters(codec="utf-8", exclude_characters=" /@:"), min_size=1, max_size=15),
        uid=st.one_of(st.uuids().map(str), st.text(max_size=40)),
        long=st.booleans(),
    )
    def test_every_name_is_one(self, name: str, nic: str, uid: str, long: bool) -> None:
        application = SHOP._replace(name=name)
        found = pool_name(application, uid, 4, nic, long=long)
        assert is_subdomain(found), found
        assert len(found) <= 253
        for value in lookup_labels(application, UID, 4, nic, name).values():
            assert not value_problem(value), value

    def test_names_that_look_alike_are_told_apart(self) -> None:
        nics = ["net_1", "net-1", "NET_1", "net+1"]
        assert len({pool_name(SHOP, UID, 4, nic) for nic in nics}) == 4


class TestLabels:
    def test_lookup(self) -> None:
        prefix = "ipam.spidernet.io/"
        assert lookup_labels(SHOP, UID, 4, "eth0", "office-v4") == {
            f"{prefix}owner-application-gv": "apps_v1",
            f"{prefix}owner-application-kind": "Deployment",
            f"{prefix}owner-application-namespace": "web",
            f"{prefix}owner-application-name": "shop",
            f"{prefix}owner-application-uid": UID,
            f"{prefix}owner-spider-subnet": "office-v4",
            f"{prefix}interface": "eth0",
            f"{prefix}ip-version": "IPv4",
        }
        assert kin_labels(SHOP, 4, "eth0").items() < lookup_labels(SHOP, UID, 4, "eth0", "s").items()
        assert application_labels(SHOP).items() < kin_labels(SHOP, 6, "x").items()

    @pytest.mark.parametrize("text", ["eth0", "a" * 63, ""])
    def test_what_can_be_a_label_is_its_own(self, text: str) -> None:
        assert label_text(text) == text

    def test_what_cannot_is_another(self) -> None:
        texts = ["a" * 64, "a" * 65, "-a", "a b", "ä"]
        labels = {label_text(text) for text in texts}
        assert len(labels) == 5
        assert not any(value_problem(label) for label in labels)

    def test_a_pool_tells_its_application(self) -> None:
        subnet = Subnet(
            metadata=ObjectMeta(name="office-v4", uid="s"),
            spec=SubnetSpec(subnet="172.30.40.0/24", ip_version=4, gateway="172.30.40.1"),
        )
        for application in (SHOP, SHOP._replace(name="n" * 240), Application("v1", "Pod", "web", "p")):
            wish = Wish(application, UID, 4, "eth0", "office-v4", 3, "+1", reclaim=True)
            pool = new_pool(wish, subnet, pool_name(application, UID, 4, "eth0"))
            assert application_of(pool) == application
            assert created_pool_errors(pool) == []
            assert pool.spec.ips is None
        assert str(SHOP) == "apps_v1_Deployment_web_shop"
        assert str(Application("v1", "Pod", "web", "p")) == "v1_Pod_web_p"
        assert affinity(Application("v1", "Pod", "web", "p"))["ipam.spidernet.io/app-api-group"] == ""


@pytest.mark.parametrize(
    ("number", "replicas", "spare", "size", "text"),
    [
        (None, 3, 0, 3, "+0"),
        (None, 3, 2, 5, "+2"),
        (IPNumber(1, flexible=True), 3, 2, 4, "+1"),
        (IPNumber(5, flexible=False), 3, 2, 5, "5"),
    ],
)
def test_numbers(number: IPNumber | None, replicas: int, spare: int, size: int, text: str) -> None:
    assert desired_number(number, replicas, spare=spare) == size
    assert number_text(number, spare=spare) == text


class TestLedger:
    UPSTREAM = (
        '{"auto4-shop-eth0-9f3c1":{"ips":["172.30.40.50-172.30.40.52"],"application":"apps_v1_Deployment_web_shop"},'
        '"web-v4":{"ips":["172.30.40.10-172.30.40.49","172.30.40.120"]}}'
    )

    def test_upstreams_text(self) -> None:
        found = ledger.parse(self.UPSTREAM, 4)
        assert found["auto4-shop-eth0-9f3c1"].application == "apps_v1_Deployment_web_shop"
        assert ledger.dump(found) == self.UPSTREAM
        assert ledger.granted(found, 4).count == 44

    @pytest.mark.parametrize("text", [None, "", "{", "[]", '{"a":1}', '{"a":{"ips":3}}', '{"a":{"ips":["x","::1"]}}'])
    def test_dirt_is_nothing(self, text: str | None) -> None:
        assert ledger.parse(text, 4) == {}
        assert ledger.dump(ledger.parse(text, 4)) is None

    @given(st.dictionaries(st.text(max_size=8), st.tuples(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))))
    def test_round_trip(self, content: dict[str, tuple[set[int], set[int]]]) -> None:
        grants = {n: Grant(ips(*have), ips(*(lost & have)), "x") for n, (have, lost) in content.items() if have}
        assert ledger.parse(ledger.dump(grants), 4) == grants


numbers = st.sets(st.integers(0, 30))


class TestPlan:
    def test_lowest(self) -> None:
        free = ips(1, 2, 3, 7)
        assert lowest(free, 2, lambda n: n == 2) == ips(1, 3)
        assert lowest(free, 0, lambda _: False) == ips()
        assert lowest(free, 4, lambda n: n == 2) is None
        assert lowest(IPSet(6, [(0, 2**64)]), 3, lambda _: False) == IPSet(6, [(0, 2)])

    @given(have=numbers, given_=numbers, marked=numbers, size=st.integers(0, 31), held=numbers)
    def test_every_state_comes_to_rest_and_no_step_breaks_what_holds(
        self, have: set[int], given_: set[int], marked: set[int], size: int, held: set[int]
    ) -> None:
        """Whatever a crash left: the steps end, the pool never exceeds the ledger, held addresses stay."""
        grant = Grant(ips(*given_), ips(*(marked & given_)))
        pool, claimed, kept, total = ips(*(have & given_)), ips(*held), ips(), IPSet(4, [(0, 30)])
        held_at_first = pool & claimed
        for _ in range(10):
            match next_step(pool, grant, size, kept=kept):
                case Step.GROW:
                    result = grown(grant, size, total - grant.ips, lambda _: False)
                    assert not isinstance(result, Shortage)
                    grant, pool = result, result.pool
                case Step.WRITE:
                    pool = grant.pool
                case Step.TRIM:
                    grant = trimmed(grant, size, pool)
                case Step.SHRINK:
                    smaller = shrunk(grant, size, claimed)
                    if smaller == grant:
                        break
                    grant, pool = smaller, smaller.pool
                case Step.RELEASE:
                    grant = released(grant, claimed)
                    kept = grant.releasing
                case Step.DONE:
                    break
                case Step.REPAIR:
                    raise AssertionError
            assert pool <= grant.ips
        else:
            raise AssertionError("no rest")
        assert pool == grant.pool
        assert pool.count == size or (pool.count > size and pool <= claimed)
        assert held_at_first <= grant.ips

    def test_shortage(self) -> None:
        assert grown(Grant(ips(1), ips()), 4, ips(2, 3), lambda _: False) == Shortage(required=3, left=2)
        assert isinstance(grown(Grant(ips(1), ips()), 3, ips(2, 3), lambda n: n == 2), Shortage)

    def test_more_than_the_ledger_gives(self) -> None:
        assert next_step(ips(1, 2), Grant(ips(1), ips()), 1, kept=ips()) is Step.REPAIR


def test_a_recomputed_ledger_keeps_what_is_being_given_and_drops_dirt() -> None:
    status = ledger.dump(
        {
            "auto": Grant(ips(1, 2, 9), ips(), "x"),
            "hand": Grant(ips(5), ips()),
            "ghost": Grant(ips(7), ips()),
        }
    )
    subnet = Subnet(
        metadata=ObjectMeta(name="s"),
        spec=SubnetSpec(subnet="0.0.0.0/24", ips=["0.0.0.0-0.0.0.20"]),
        status=SubnetStatus(controlled_ip_pools=status),
    )
    wish = Wish(SHOP, UID, 4, "eth0", "s", 2, "2", reclaim=True)
    auto = replace(new_pool(wish, subnet, "auto"), spec=replace(new_pool(wish, subnet, "auto").spec, ips=["0.0.0.1"]))
    hand = replace(auto, metadata=ObjectMeta(name="hand"), spec=replace(auto.spec, ips=["0.0.0.9", "0.0.0.30"]))
    assert recomputed(subnet, [auto, hand]) == {
        "auto": Grant(ips(1, 2), ips(), str(SHOP)),
        "hand": Grant(ips(9), ips()),
    }


class TestDemand:
    @pytest.mark.parametrize(
        ("kind", "document", "pods"),
        [
            (Deployment, {"spec": {"replicas": 3, "template": {}}}, 3),
            (Deployment, {"spec": {"template": {}}}, 0),
            (DaemonSet, {"spec": {"template": {}}, "status": {"desiredNumberScheduled": 2}}, 2),
            (Job, {"spec": {"completions": 4, "parallelism": 2, "template": {}}}, 4),
            (Job, {"spec": {"parallelism": 0, "template": {}}}, 1),
            (CronJob, {"spec": {"jobTemplate": {"spec": {"completions": 2, "template": {}}}}}, 2),
        ],
    )
    def test_sizes(self, kind: Any, document: Any, pods: int) -> None:
        made = _with(kind, document, {"ipam.spidernet.io/subnet": '{"ipv4":["s"],"ipv6":["t"]}'})
        demand = native_demand(made, {4, 6}, 1)
        assert demand is not None
        assert [(w.family, w.nic, w.subnet, w.size) for w in demand.wishes] == [
            (4, "eth0", "s", pods + 1),
            (6, "eth0", "t", pods + 1),
        ]

    def test_who_asks_for_nothing(self) -> None:
        document: Any = {"spec": {"template": {}}}
        asked = {"ipam.spidernet.io/subnet": '{"ipv4":["s"]}'}
        assert native_demand(_with(Deployment, document, {}), {4}, 0) is None
        host = {"spec": {"template": {"spec": {"hostNetwork": True}}}}
        assert native_demand(_with(Deployment, host, asked), {4}, 0) is None
        above = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d", "uid": "d", "controller": True}
        owned = _with(ReplicaSet, document, asked, owner=above)
        assert native_demand(owned, {4}, 0) is None
        rollout = {**above, "apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout"}
        assert native_demand(_with(ReplicaSet, document, asked, owner=rollout), {4}, 0) is not None
        disabled = native_demand(_with(Deployment, document, asked), {6}, 0)
        assert disabled is not None
        assert disabled.wishes == ()

    def test_the_plurals_of_third_parties(self) -> None:
        plurals = {kind: third_party_kind("a.b/v1", kind).TYPE.plural for kind in ("CloneSet", "Policy", "Box", "Bay")}
        assert plurals == {"CloneSet": "clonesets", "Policy": "policies", "Box": "boxes", "Bay": "bays"}


def _with(kind: Any, document: Any, annotations: dict[str, str], owner: Any = None) -> Any:
    made = json.loads(json.dumps(document))
    spec = made["spec"].get("jobTemplate", {}).get("spec") or made["spec"]
    spec["template"].setdefault("metadata", {})["annotations"] = annotations
    made["metadata"] = {"name": "app", "namespace": "ns", "uid": UID, "ownerReferences": [owner] if owner else []}
    return decode(kind, json.dumps(made).encode())
