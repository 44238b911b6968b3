"""Admission as users of the API server see it: real webhooks, each refusal to the letter, and what is filled in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from api.claim import Claim
from api.conflicts import pool_conflicts
from api.meta import decode
from api.pool import Pool
from lab.kube.cluster import Cluster
from lab.layout import LabError
from tests.kube.controller_rig import (
    API,
    CONFIGURATIONS,
    KINDS,
    POOLS,
    RESERVED,
    SUBNETS,
    Json,
    Replica,
    Requests,
    controllers,
    eventually,
    manifest,
)


@pytest.fixture(scope="module")
def controller(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with controllers(kube, tmp_path_factory.mktemp("controller")) as launch:
        replica = launch("admission", "--reclaim-enabled=false")  # the claims of this module are nobody's
        eventually(20, lambda: replica.probe() == 200, "the controller is ready")
        configured(Requests(kube))
        yield replica


@pytest.fixture
def ask(kube: Cluster, controller: Replica) -> Iterator[Requests]:
    """Requests; objects that a test leaves are removed."""
    requests = Requests(kube)
    yield requests
    for plural in (POOLS, RESERVED, SUBNETS, "spideripclaims"):
        for item in requests("GET", f"{API}/{plural}")[1]["items"]:
            requests.remove(plural, item["metadata"]["name"])


def configured(ask: Requests) -> None:
    """Return when the API server asks the controller: it learns of a configuration a moment after it is written."""
    wrong, path = manifest(POOLS, "probe", subnet="nonsense"), f"{API}/{POOLS}?dryRun=All"
    eventually(10, lambda: ask("POST", path, wrong)[0] == 422, "the webhook is asked")


def claim(ask: Requests, pool: str, address: str, state: str = "Allocated") -> None:
    body = {
        "apiVersion": API.removeprefix("/apis/"),
        "kind": "SpiderIPClaim",
        "metadata": {"name": address, "labels": {"ipam.spidernet.io/pool": pool}},
        "spec": {
            "address": address,
            "ipVersion": 4,
            "pool": pool,
            "podUID": "u",
            "nic": "eth0",
            "state": state,
            "workload": {"namespace": "web", "name": "front-1"},
        },
    }
    status, answer = ask("POST", f"{API}/spideripclaims", body)
    assert status == 201, answer
    decode(Claim, json.dumps(answer).encode())


def causes(answer: Json) -> list[tuple[str, str]]:
    return [(cause["field"], cause["reason"]) for cause in answer["details"]["causes"]]


def refused(found: tuple[int, Json], plural: str, name: str) -> Json:
    """The answer, which must be an Invalid with everything that clients of Kubernetes expect of one."""
    singular = plural.removesuffix("s")
    status, answer = found
    assert (status, answer.get("reason"), answer.get("code")) == (422, "Invalid", 422), answer
    assert answer["message"].startswith(
        f'admission webhook "{singular}.spiderpool.spidernet.io" denied the request: '
        f'{KINDS[plural]}.spiderpool.spidernet.io "{name}" is invalid: '
    )
    assert answer["details"]["name"] == name
    assert answer["details"]["kind"] == KINDS[plural]
    for cause in answer["details"]["causes"]:
        assert f"{cause['field']}: {cause['message']}" in answer["message"]
    return answer


V4: dict[str, Any] = {"subnet": "10.7.0.0/24", "ips": ["10.7.0.10-10.7.0.20"]}
INVALID_POOLS: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "no network",
        {"subnet": "nonsense"},
        "spec.ipVersion",
        "is not generated correctly, 'spec.subnet' may be invalid",
    ),
    ("no network", {"subnet": "10.7.0.0"}, "spec.subnet", "is not a CIDR"),
    ("family", {"subnet": "10.7.0.0/24", "ipVersion": 6}, "spec.subnet", "is not an IPv6 CIDR"),
    (
        "unformatted",
        {"subnet": "10.7.0.1/24"},
        "spec.subnet",
        "unformatted subnet 10.7.0.1/24, please change it to 10.7.0.0/24",
    ),
    (
        "nested network",
        {"subnet": "10.8.0.0/25"},
        "spec.subnet",
        "overlap with IPPool there which 'spec.subnet' is 10.8.0.0/24",
    ),
    ("outside", {**V4, "ips": ["10.7.1.1"]}, "spec.ips[0]", "does not match base subnet: 10.7.0.0/24"),
    ("outside", {**V4, "excludeIPs": ["10.7.1.1"]}, "spec.excludeIPs[0]", "does not match base subnet"),
    ("reversed", {**V4, "ips": ["10.7.0.9-10.7.0.1"]}, "spec.ips[0]", "is reversed"),
    ("no range", {**V4, "ips": ["10.7.0.0/28"]}, "spec.ips[0]", "is not an IP address"),
    ("other family", {**V4, "ips": ["fd00::1"]}, "spec.ips[0]", "is not of family IPv4"),
    (
        "addresses taken",
        {"subnet": "10.8.0.0/24", "ips": ["10.8.0.5-10.8.0.12"]},
        "spec.ips",
        "overlap with IPPool there in IP ranges [10.8.0.10-10.8.0.20]",
    ),
    (
        "gateway outside",
        {**V4, "gateway": "10.9.0.1"},
        "spec.gateway",
        "not pertains to the 'spec.subnet' 10.7.0.0/24",
    ),
    ("gateway no address", {**V4, "gateway": "gw"}, "spec.gateway", "is not an IP address"),
    ("gateway within", {**V4, "gateway": "10.7.0.15"}, "spec.ips[0]", "conflicts with 'spec.gateway' 10.7.0.15"),
    (
        "gateway spelt otherwise",
        {"subnet": "fd07::/64", "ips": ["fd07:0::a"], "gateway": "fd07::0a"},
        "spec.ips[0]",
        "conflicts with 'spec.gateway'",
    ),
    (
        "default route",
        {**V4, "routes": [{"dst": "0.0.0.0/0", "gw": "10.7.0.1"}]},
        "spec.routes[0].dst",
        "please specify 'spec.gateway' to configure the default route",
    ),
    (
        "default route",
        {"subnet": "fd07::/64", "routes": [{"dst": "::/0", "gw": "fd07::1"}]},
        "spec.routes[0].dst",
        "please specify 'spec.gateway'",
    ),
    (
        "route twice",
        {**V4, "routes": [{"dst": "10.1.0.0/16", "gw": "10.7.0.1"}, {"dst": "10.1.0.0/16", "gw": "10.7.0.1"}]},
        "spec.routes[1].dst",
        "duplicate of spec.routes[0].dst",
    ),
    (
        "route's family",
        {**V4, "routes": [{"dst": "fd00::/64", "gw": "10.7.0.1"}]},
        "spec.routes[0].dst",
        "is not an IPv4 CIDR",
    ),
    (
        "route's next hop",
        {**V4, "routes": [{"dst": "10.1.0.0/16", "gw": "10.1.0.1"}]},
        "spec.routes[0].gw",
        "not pertains to the 'spec.subnet'",
    ),
    ("empty affinity", {**V4, "podAffinity": {}}, "spec.podAffinity", "empty podAffinity is invalid for SpiderIPPool"),
    ("affinity", {**V4, "podAffinity": {"matchLabels": {"a b": "c"}}}, "spec.podAffinity.matchLabels", "a b"),
]


class TestPools:
    @pytest.mark.upstream("D00001", "D00003")
    @pytest.mark.parametrize(
        ("spec", "field", "text"), [row[1:] for row in INVALID_POOLS], ids=[row[0] for row in INVALID_POOLS]
    )
    def test_what_is_refused_at_creation(self, ask: Requests, spec: dict[str, Any], field: str, text: str) -> None:
        status, answer = ask.create(POOLS, "there", subnet="10.8.0.0/24", ips=["10.8.0.10-10.8.0.20"])
        assert status == 201, answer
        answer = refused(ask.create(POOLS, "new", **spec), POOLS, "new")
        (message,) = (each["message"] for each in answer["details"]["causes"] if each["field"] == field)
        assert text in message
        assert ask("GET", f"{API}/{POOLS}/new")[0] == 404

    def test_everything_wrong_is_named_at_once_and_as_kubectl_shows_faults(self, kube: Cluster, ask: Requests) -> None:
        wrong = manifest(POOLS, "new", **V4, gateway="10.9.0.1", podAffinity={})
        with pytest.raises(LabError) as caught:
            kube.kubectl("create", "-f", "-", stdin=json.dumps(wrong))
        text = str(caught.value)
        assert 'The SpiderIPPool "new" is invalid' in text
        assert '* spec.gateway: Invalid value: "10.9.0.1"' in text
        assert "* spec.podAffinity: Invalid value" in text

    def test_a_name_that_is_taken(self, ask: Requests) -> None:
        assert ask.create(POOLS, "there", **V4)[0] == 201
        status, answer = ask.create(POOLS, "there", **V4)
        assert (status, answer["reason"]) == (409, "AlreadyExists")
        assert 'spiderippools.spiderpool.spidernet.io "there" already exists' in answer["message"]

    def test_the_schema_speaks_before_us(self, ask: Requests) -> None:
        status, answer = ask.create(POOLS, "new", subnet="10.7.0.0/24", ipVersion=5)
        assert status == 422
        assert "admission webhook" not in answer["message"]
        assert causes(answer) == [("spec.ipVersion", "FieldValueNotSupported")]

    @pytest.mark.parametrize(
        ("patch", "field", "text"),
        [
            ({"ipVersion": 6}, "spec.ipVersion", "is not changeable"),
            ({"subnet": "10.9.0.0/24"}, "spec.subnet", "is not changeable"),
            ({"ips": ["10.7.0.10-10.7.0.14"]}, "spec.ips", "remove an IP address 10.7.0.15 that is being used by"),
            ({"excludeIPs": ["10.7.0.15"]}, "spec.ips", "10.7.0.15 that is being used by Pod web/front-1"),
            ({"ips": ["10.7.0.10-10.7.0.40"]}, "spec.ips", "overlap with IPPool other"),
            ({"gateway": "10.7.0.15"}, "spec.ips[0]", "conflicts with 'spec.gateway'"),
            ({"gateway": "10.1.0.15"}, "spec.gateway", "not pertains to the 'spec.subnet'"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
    )
    @pytest.mark.upstream("S00003", "S00004", "D00004")
    def test_what_is_refused_at_update(self, ask: Requests, patch: dict[str, Any], field: str, text: str) -> None:
        assert ask.create(POOLS, "p", **V4)[0] == 201
        assert ask.create(POOLS, "other", subnet="10.7.0.0/24", ips=["10.7.0.30-10.7.0.35"])[0] == 201
        claim(ask, "p", "10.7.0.15")
        answer = refused(ask.merge(POOLS, "p", {"spec": patch}), POOLS, "p")
        assert any(cause["field"] == field and text in cause["message"] for cause in answer["details"]["causes"]), (
            answer
        )
        assert answer["details"]["uid"]

    def test_what_nobody_has_may_go(self, ask: Requests) -> None:
        assert ask.create(POOLS, "p", **V4)[0] == 201
        claim(ask, "p", "10.7.0.15")
        claim(ask, "p", "10.7.0.20", "Quarantined")
        status, answer = ask.merge(POOLS, "p", {"spec": {"ips": ["10.7.0.15", "10.7.0.12-10.7.0.14"]}})
        assert (status, answer["spec"]["ips"]) == (200, ["10.7.0.12-10.7.0.15"])

    def test_a_terminating_pool_cannot_be_changed_but_let_go(self, ask: Requests) -> None:
        assert ask.create(POOLS, "p", **V4)[0] == 201
        claim(ask, "p", "10.7.0.15")  # so that our own finalizer stays
        ask.merge(POOLS, "p", {"metadata": {"finalizers": ["test/keeps", "spiderpool.spidernet.io"]}})
        ask("DELETE", f"{API}/{POOLS}/p")
        for patch in ({"spec": {"disable": True}}, {"metadata": {"labels": {"a": "b"}}}):
            status, answer = ask.merge(POOLS, "p", patch)
            assert (status, answer["reason"], answer["code"]) == (403, "Forbidden", 403), answer
            assert answer["message"].endswith(
                'spiderippools.spiderpool.spidernet.io "p" is forbidden: cannot update a terminating IPPool'
            )
        assert ask.merge(POOLS, "p", {"metadata": {"finalizers": ["spiderpool.spidernet.io"]}})[0] == 200
        assert ask.merge(POOLS, "p", {"metadata": {"finalizers": None}})[0] == 200
        assert ask("GET", f"{API}/{POOLS}/p")[0] == 404

    def test_what_is_filled_in(self, ask: Requests) -> None:
        status, answer = ask.create(POOLS, "p", subnet="fd07::/64", ips=["fd07::9", "fd07::1-fd07::8", "fd07::3"])
        assert status == 201, answer
        assert answer["metadata"]["finalizers"] == ["spiderpool.spidernet.io"]
        assert answer["metadata"]["labels"] == {"ipam.spidernet.io/ippool-cidr": "fd07---64"}
        assert answer["spec"]["ipVersion"] == 6
        assert answer["spec"]["ips"] == ["fd07::1-fd07::9"]
        # One range is left as it was typed; what is there already stays; a lost finalizer comes back.
        status, answer = ask.merge(POOLS, "p", {"metadata": {"finalizers": None, "labels": {"own": "label"}}})
        assert answer["metadata"]["finalizers"] == ["spiderpool.spidernet.io"]
        assert answer["metadata"]["labels"] == {"own": "label", "ipam.spidernet.io/ippool-cidr": "fd07---64"}

    @pytest.mark.upstream("D00017")
    def test_a_huge_pool_costs_no_more_than_a_small_one(self, ask: Requests) -> None:
        began = time.monotonic()
        status, answer = ask.create(
            POOLS, "p", subnet="fd07::/64", ips=["fd07::1-fd07::ffff:ffff:ffff:ffff", "fd07::2"]
        )
        assert (status, answer["spec"].get("ips")) == (201, ["fd07::1-fd07::ffff:ffff:ffff:ffff"]), answer
        assert time.monotonic() - began < 2

    def test_a_pool_inherits_from_its_subnet_and_stays_within(self, ask: Requests) -> None:
        status, answer = ask.create(
            SUBNETS,
            "s",
            subnet="10.6.0.0/24",
            ips=["10.6.0.10-10.6.0.99"],
            gateway="10.6.0.1",
            routes=[{"dst": "10.1.0.0/16", "gw": "10.6.0.2"}],
        )
        assert status == 201, answer
        status, made = ask.create(POOLS, "p", subnet="10.6.0.0/24", ips=["10.6.0.10"])
        assert status == 201, made
        assert made["spec"]["gateway"] == "10.6.0.1"
        assert made["spec"]["routes"] == answer["spec"]["routes"]
        assert made["metadata"]["labels"]["ipam.spidernet.io/owner-spider-subnet"] == "s"
        (owner,) = made["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == (
            "SpiderSubnet",
            "s",
            answer["metadata"]["uid"],
            True,
        )
        outside = refused(ask.create(POOLS, "q", subnet="10.6.0.0/24", ips=["10.6.0.5-10.6.0.9"]), POOLS, "q")
        assert "that are not contained in controller Subnet" in outside["message"]
        outside = refused(ask.merge(POOLS, "p", {"spec": {"ips": ["10.6.0.5"]}}), POOLS, "p")
        assert "that are not contained in controller Subnet" in outside["message"]

    @pytest.mark.upstream("I00010")
    def test_a_hundred_at_the_same_moment_leave_one_that_is_usable(self, kube: Cluster, ask: Requests) -> None:
        requests = [Requests(kube) for _ in range(20)]

        def create(i: int) -> int:
            return requests[i % 20].create(POOLS, f"c{i}", **V4)[0]

        with ThreadPoolExecutor(20) as threads:
            statuses = list(threads.map(create, range(100)))
        assert set(statuses) <= {201, 422}
        there = [decode(Pool, json.dumps(item).encode()) for item in ask("GET", f"{API}/{POOLS}")[1]["items"]]
        assert len(there) == statuses.count(201)
        usable = [pool for pool in there if pool.metadata.name not in pool_conflicts(there)]
        assert len(usable) == 1
        assert usable[0].metadata.creation_timestamp == min(
            pool.metadata.creation_timestamp for pool in there if pool.metadata.creation_timestamp
        )


class TestReservedAddresses:
    @pytest.mark.parametrize(
        ("spec", "field", "text"),
        [
            ({}, "spec.ipVersion", "is not generated correctly, 'spec.ips' is empty or 'spec.ips[0]' may be invalid"),
            ({"ips": ["nonsense"]}, "spec.ipVersion", "is not generated correctly"),
            ({"ips": ["10.0.0.9-10.0.0.1"]}, "spec.ips[0]", "is reversed"),
            ({"ips": ["10.0.0.1", "fd00::1"]}, "spec.ips[1]", "is not of family IPv4"),
            ({"ips": ["10.0.0.1"], "ipVersion": 6}, "spec.ips[0]", "is not of family IPv6"),
        ],
    )
    def test_what_is_refused_at_creation(self, ask: Requests, spec: dict[str, Any], field: str, text: str) -> None:
        answer = refused(ask.create(RESERVED, "r", **spec), RESERVED, "r")
        assert any(cause["field"] == field and text in cause["message"] for cause in answer["details"]["causes"]), (
            answer
        )

    def test_what_is_filled_in_and_what_may_change(self, ask: Requests) -> None:
        status, answer = ask.create(RESERVED, "r", ips=["10.0.0.7", "10.0.0.5-10.0.0.6"])
        assert (status, answer["spec"]) == (201, {"ipVersion": 4, "ips": ["10.0.0.5-10.0.0.7"]})
        assert "finalizers" not in answer["metadata"]
        status, answer = ask.create(RESERVED, "empty", ipVersion=4)
        assert status == 201, answer
        answer = refused(ask.merge(RESERVED, "r", {"spec": {"ipVersion": 6, "ips": ["fd00::1"]}}), RESERVED, "r")
        assert ("spec.ipVersion", "FieldValueForbidden") in causes(answer)
        assert "is not changeable" in answer["message"]
        assert ask.merge(RESERVED, "r", {"spec": {"ips": ["10.0.0.9"]}})[0] == 200
        assert ask("DELETE", f"{API}/{RESERVED}/r")[0] == 200

    def test_a_terminating_one_cannot_be_changed(self, ask: Requests) -> None:
        assert ask.create(RESERVED, "r", ips=["10.0.0.7"])[0] == 201
        ask.merge(RESERVED, "r", {"metadata": {"finalizers": ["test/keeps"]}})
        ask("DELETE", f"{API}/{RESERVED}/r")
        status, answer = ask.merge(RESERVED, "r", {"spec": {"ips": ["10.0.0.8"]}})
        assert (status, answer["reason"]) == (403, "Forbidden")
        assert "cannot update a terminating ReservedIP" in answer["message"]
        assert ask.merge(RESERVED, "r", {"metadata": {"finalizers": None}})[0] == 200


def test_nothing_but_the_configurations_needs_us_for_other_kinds(kube: Cluster, controller: Replica) -> None:
    ask = Requests(kube)
    for kind in ("mutatingwebhookconfigurations", "validatingwebhookconfigurations"):
        status, found = ask("GET", f"{CONFIGURATIONS}/{kind}/spiderpool-controller")
        assert status == 200
        for hook in found["webhooks"]:
            assert hook["failurePolicy"] == "Fail"
            assert hook["sideEffects"] == "None"
            assert hook["admissionReviewVersions"] == ["v1"]
            (rule,) = hook["rules"]
            assert rule["apiGroups"] == ["spiderpool.spidernet.io"]
            assert "/" not in rule["resources"][0]
            singular = rule["resources"][0].removesuffix("s")
            assert hook["name"] == f"{singular}.spiderpool.spidernet.io"
            verb = kind.removesuffix("ingwebhookconfigurations") + "e"
            path = f"/{verb}-spiderpool-spidernet-io-v2beta1-{singular}"
            assert hook["clientConfig"]["url"] == f"https://127.0.0.1:{controller.webhook}{path}"
