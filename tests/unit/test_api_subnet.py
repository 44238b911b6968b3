"""Subnets: defaulting, every refusal with its words, and what they mean for pools."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from api.autopools import Application, affinity
from api.meta import FINALIZER, ObjectMeta, OwnerReference
from api.pool import LABEL_CIDR, LabelSelector, Pool, PoolSpec, Requirement, Route
from api.subnet import LABEL_APP_NAME, LABEL_OWNER_SUBNET, LABEL_SUBNET_CIDR, Subnet, SubnetSpec, SubnetStatus
from api.validate.fields import FieldError
from api.validate.pool import created_pool_errors, default_pool
from api.validate.subnet import (
    created_subnet_errors,
    default_subnet,
    deleted_subnet_denial,
    inherited,
    owned_pool_errors,
    updated_subnet_denial,
    updated_subnet_errors,
)

CIDR = "172.30.40.0/24"
ROUTE = Route(dst="10.90.0.0/16", gw="172.30.40.2")
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def subnet(name: str = "office", status: dict[str, Any] | None = None, uid: str = "u1", **spec: Any) -> Subnet:
    members = {"subnet": CIDR, "ips": ["172.30.40.10-172.30.40.50"], "gateway": "172.30.40.1", **spec}
    text = json.dumps(status) if status is not None else None
    return default_subnet(
        Subnet(
            metadata=ObjectMeta(name=name, uid=uid, creation_timestamp=NOW),
            spec=SubnetSpec(**members),
            status=SubnetStatus(controlled_ip_pools=text),
        )
    )


def pool(name: str = "web", *, labels: dict[str, str] | None = None, **spec: Any) -> Pool:
    members = {"subnet": CIDR, "ips": ["172.30.40.10-172.30.40.20"], **spec}
    return default_pool(Pool(metadata=ObjectMeta(name=name, labels=labels or {}), spec=PoolSpec(**members)))


def terminating(resource: Any) -> Any:
    return replace(resource, metadata=replace(resource.metadata, deletion_timestamp=NOW))


def text(errors: list[FieldError]) -> str:
    return "\n".join(map(str, errors))


def test_defaulting() -> None:
    found = default_subnet(
        Subnet(
            metadata=ObjectMeta(name="s"),
            spec=SubnetSpec(subnet=CIDR, ips=["172.30.40.151-172.30.40.200", "172.30.40.10-172.30.40.150"]),
        )
    )
    assert found.metadata.finalizers == [FINALIZER]
    assert found.metadata.labels == {LABEL_SUBNET_CIDR: "172-30-40-0-24"}
    assert (found.spec.ip_version, found.spec.ips) == (4, ["172.30.40.10-172.30.40.200"])
    assert default_subnet(found) == found
    going = terminating(Subnet(metadata=ObjectMeta(name="s"), spec=SubnetSpec(subnet=CIDR)))
    assert default_subnet(going) == going


@pytest.mark.upstream("D00003")
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (subnet(subnet="nonsense", ips=[]), "spec.ipVersion: Invalid value: null: is not generated correctly"),
        (subnet(subnet="172.30.40.5/24"), "unformatted subnet 172.30.40.5/24, please change it to 172.30.40.0/24"),
        (subnet(ip_version=6), 'spec.subnet: Invalid value: "172.30.40.0/24": is not an IPv6 CIDR'),
        (subnet(ips=["172.30.41.1"]), 'spec.ips[0]: Invalid value: "172.30.41.1": does not match base subnet'),
        (subnet(ips=["172.30.40.9-172.30.40.1"]), "spec.ips[0]"),
        (subnet(exclude_ips=["172.30.41.1"]), "spec.excludeIPs[0]"),
        (subnet(gateway="172.30.41.1"), "spec.gateway: Invalid value"),
        (subnet(gateway="172.30.41.1"), "not pertains to the 'spec.subnet' 172.30.40.0/24"),
        (subnet(gateway="172.30.40.11"), "spec.ips[0]: Invalid value"),
        (subnet(routes=[Route(dst="0.0.0.0/0", gw="172.30.40.2")]), "please specify 'spec.gateway'"),
        (subnet(routes=[ROUTE, ROUTE]), "spec.routes[1].dst"),
        (subnet(routes=[Route(dst="10.0.0.0/8", gw="10.0.0.1")]), "spec.routes[0].gw"),
    ],
)
def test_what_a_new_subnet_may_not_be(made: Subnet, words: str) -> None:
    assert words in text(created_subnet_errors(made))


def test_a_good_subnet() -> None:
    assert created_subnet_errors(subnet(routes=[ROUTE], exclude_ips=["172.30.40.30"]), pools=[pool()]) == []
    assert "IPv4 is disabled" in text(created_subnet_errors(subnet(), families={6}))


@pytest.mark.parametrize("cidr", [CIDR, "172.30.0.0/16", "172.30.40.0/28"])
def test_subnets_do_not_overlap(cidr: str) -> None:
    errors = created_subnet_errors(subnet("other", subnet=cidr, ips=[], gateway=None), others=[subnet()])
    assert f"overlap with Subnet office which 'spec.subnet' is {CIDR}" in text(errors)


def test_pools_that_are_there_already() -> None:
    assert "overlap with SpiderIPPool web" in text(
        created_subnet_errors(subnet(subnet="172.30.0.0/16"), pools=[pool()])
    )
    outside = pool(ips=["172.30.40.45-172.30.40.60"])
    assert "owns some IP addresses that SpiderSubnet office can't control: [172.30.40.51-172.30.40.60]" in text(
        created_subnet_errors(subnet(), pools=[outside])
    )


GIVEN = {"web": {"ips": ["172.30.40.10-172.30.40.20"]}}


@pytest.mark.upstream("I00001", "I00002")
def test_what_an_update_may_do() -> None:
    old = subnet(status=GIVEN)
    more = replace(old, spec=replace(old.spec, ips=["172.30.40.10-172.30.40.99"], gateway="172.30.40.3"))
    assert updated_subnet_errors(old, more) == []
    less = replace(old, spec=replace(old.spec, ips=["172.30.40.10-172.30.40.25"]))
    assert updated_subnet_errors(old, less) == []
    used = replace(old, spec=replace(old.spec, exclude_ips=["172.30.40.12-172.30.40.30"]))
    assert "remove some IP ranges [172.30.40.12-172.30.40.20] that is being used by IPPool web" in text(
        updated_subnet_errors(old, used)
    )
    moved = replace(old, spec=replace(old.spec, subnet="172.30.41.0/24", ips=[], gateway=None))
    assert "spec.subnet: Forbidden: is not changeable" in text(updated_subnet_errors(old, moved))


def test_a_terminating_subnet_only_loses_finalizers() -> None:
    old = terminating(subnet())
    changed = replace(old, spec=replace(old.spec, ips=[]))
    assert "cannot update a terminating Subnet" in text(updated_subnet_errors(old, changed))
    denial = updated_subnet_denial(old, changed)
    assert denial is not None
    assert denial.reason == "Forbidden"
    free = replace(old, metadata=replace(old.metadata, finalizers=[]))
    assert updated_subnet_denial(old, free) is None
    assert updated_subnet_errors(old, free) == []


def test_a_guarded_deletion() -> None:
    assert deleted_subnet_denial(subnet(), []) is None
    elsewhere = pool("far", subnet="172.30.41.0/24", ips=["172.30.41.9"])
    assert deleted_subnet_denial(subnet(), [elsewhere]) is None
    denial = deleted_subnet_denial(subnet(status=GIVEN), [elsewhere])
    assert denial is not None
    assert "allocated IPs(11)" in denial.detail


def test_what_the_ledger_does_not_tell_yet_is_in_use() -> None:
    """A pool was made just now, or somebody emptied the status."""
    there = pool(ips=["172.30.40.18-172.30.40.22"])
    denial = deleted_subnet_denial(subnet(), [there])
    assert denial is not None
    assert "allocated IPs(5)" in denial.detail
    both = deleted_subnet_denial(subnet(status=GIVEN), [there])
    assert both is not None
    assert "allocated IPs(13)" in both.detail
    old = subnet()
    less = replace(old, spec=replace(old.spec, exclude_ips=["172.30.40.20-172.30.40.30"]))
    assert updated_subnet_errors(old, less) == []
    assert "remove some IP ranges [172.30.40.20-172.30.40.22] that is being used by IPPool web" in text(
        updated_subnet_errors(old, less, pools=[there])
    )


@pytest.mark.upstream("D00008")
def test_inheritance() -> None:
    parent = subnet(routes=[ROUTE])
    child = inherited(pool(), [subnet("v6", subnet="fd00::/64", ips=[], gateway=None), parent])
    assert child.metadata.labels == {LABEL_CIDR: "172-30-40-0-24", LABEL_OWNER_SUBNET: "office"}
    (owner,) = child.metadata.owner_references
    assert (owner.kind, owner.name, owner.uid, owner.controller) == ("SpiderSubnet", "office", "u1", True)
    assert (child.spec.gateway, child.spec.routes) == ("172.30.40.1", [ROUTE])
    assert inherited(child, [subnet(gateway="172.30.40.3")]) == child, "only when it becomes the subnet's"
    own = inherited(pool(gateway="172.30.40.9", routes=[]), [parent])
    assert (own.spec.gateway, own.spec.routes) == ("172.30.40.9", [])
    assert inherited(pool(), []) == pool()
    assert inherited(terminating(pool()), [parent]) == terminating(pool())
    assert inherited(pool(), [terminating(parent)]) == pool()
    foreign = OwnerReference(api_version="v1", kind="Other", name="x", uid="x", controller=True)
    managed = replace(pool(), metadata=replace(pool().metadata, owner_references=[foreign]))
    assert inherited(managed, [parent]) == managed
    stale = OwnerReference(api_version="v1", kind="SpiderSubnet", name="office", uid="gone", controller=True)
    again = inherited(replace(pool(), metadata=replace(pool().metadata, owner_references=[stale])), [parent])
    assert [each.uid for each in again.metadata.owner_references] == ["u1"]


AUTO = {LABEL_APP_NAME: "shop"}
APPLICATION = Application("apps/v1", "Deployment", "web", "shop")


def automatic(*ips: str, **spec: Any) -> Pool:
    selector = LabelSelector(match_labels=affinity(APPLICATION))
    return pool("auto4-shop", labels=AUTO, ips=list(ips), **{"pod_affinity": selector, **spec})


@pytest.mark.upstream("I00018")
def test_nobody_changes_an_automatic_pools_addresses() -> None:
    grant = {"ips": ["172.30.40.10-172.30.40.14"], "releasing": ["172.30.40.14"], "application": str(APPLICATION)}
    parent = subnet(status={"auto4-shop": grant})
    old = automatic("172.30.40.10-172.30.40.12")
    for given in (["172.30.40.10-172.30.40.14"], ["172.30.40.10-172.30.40.13"], []):
        assert owned_pool_errors(old, automatic(*given), parent) == []
    for other in (["172.30.40.10-172.30.40.15"], ["172.30.40.10"], ["172.30.40.30"]):
        assert "it's illegal to update AutoPool.Spec.IPs" in text(owned_pool_errors(old, automatic(*other), parent))
    assert owned_pool_errors(old, automatic(*(old.spec.ips or ()), node_name=["a"]), parent) == []
    assert "it's illegal" in text(owned_pool_errors(None, automatic("172.30.40.10"), subnet()))


@pytest.mark.upstream("I00020")
def test_other_pools_stay_within_their_subnet_and_off_given_addresses() -> None:
    grant = {"ips": ["172.30.40.10-172.30.40.14"], "application": str(APPLICATION)}
    parent = subnet(status={"auto4-shop": grant, "web": {"ips": ["172.30.40.15"]}})
    assert owned_pool_errors(None, pool(ips=["172.30.40.15-172.30.40.20"]), parent) == []
    assert owned_pool_errors(None, pool(ips=["172.30.40.60"]), None) == []
    errors = text(owned_pool_errors(None, pool(ips=["172.30.40.14-172.30.40.60"]), parent))
    assert "add some IP ranges [172.30.40.51-172.30.40.60] that are not contained in controller Subnet office" in errors
    assert "overlap with IPPool auto4-shop in IP ranges [172.30.40.14]" in errors
    wrong = pool(ips=["172.30.40.60"])
    mended = pool(ips=["172.30.40.60"], gateway="172.30.40.1")
    assert owned_pool_errors(wrong, mended, parent) == [], "an update is blamed for what it changes"


def test_the_affinity_of_automatic_pools() -> None:
    assert created_pool_errors(automatic("172.30.40.10")) == []
    long = LabelSelector(match_labels=affinity(APPLICATION._replace(name="a" * 200)))
    assert created_pool_errors(automatic("172.30.40.10", pod_affinity=long)) == []
    assert "an automatic pool's affinity has only" in text(
        created_pool_errors(automatic(pod_affinity=LabelSelector(match_labels={"a": "b"})))
    )
    expressions = LabelSelector(match_expressions=[Requirement(key="a", operator="Exists")])
    assert "matchExpressions: Forbidden" in text(created_pool_errors(automatic(pod_affinity=expressions)))
