"""What upstream's endpoints look like that are made of claims."""

from __future__ import annotations

from api.claim import LABEL_WORKLOAD, Claim, ClaimSpec, Controller, Provided, Workload, claim_name
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec, Route
from api.ranges import parse_address
from controller.adoption.hand_back import endpoint_of

A = Pool(
    metadata=ObjectMeta(name="a"),
    spec=PoolSpec(subnet="10.1.0.0/16", gateway="10.1.0.1", routes=[Route(dst="10.9.0.0/16", gw="10.1.0.2")]),
)
SIX = Pool(metadata=ObjectMeta(name="six"), spec=PoolSpec(subnet="fd01::/64"))
POOLS = {"a": A, "six": SIX}
SET = Controller(api_version="apps/v1", kind="StatefulSet", name="db", uid="s")


def claim(address: str, pool: str, nic: str = "eth0", static: bool = False, provided: Provided | None = None) -> Claim:
    parsed = parse_address(address, 6 if ":" in address else 4)
    return Claim(
        metadata=ObjectMeta(name=claim_name(parsed), labels={LABEL_WORKLOAD: "w.x"} if static else {}),
        spec=ClaimSpec(
            address=address,
            ip_version=parsed.version,
            pool=pool,
            pod_uid="u",
            nic=nic,
            node="n",
            workload=Workload(namespace="ns", name="p", controller=SET if static else None),
            provided=provided,
        ),
    )


def endpoint(*entries: EndpointIP, uid: str = "u") -> Endpoint:
    current = EndpointCurrent(uid=uid, node="n", ips=list(entries))
    status = EndpointStatus(current=current, owner_controller_type="Pod", owner_controller_name="p")
    return Endpoint(metadata=ObjectMeta(name="p", namespace="ns", resource_version="7"), status=status)


def entries_of(made: Endpoint) -> list[EndpointIP]:
    assert made.status is not None
    return made.status.current.ips


def test_both_families_and_what_the_provider_said() -> None:
    provided = Provided(subnet="10.1.0.0/16", parent_mac="", mac="0a:00:00:00:00:01", vlan=7)
    made = endpoint_of(("ns", "p"), [claim("fd01::5", "six"), claim("10.1.0.5", "a", provided=provided)], None, POOLS)
    assert entries_of(made) == [
        EndpointIP(
            interface="eth0",
            ipv4="10.1.0.5/16",
            ipv6="fd01::5/64",
            ipv4_pool="a",
            ipv6_pool="six",
            ipv4_gateway="10.1.0.1",
            clean_gateway=False,
            routes=[Route(dst="10.9.0.0/16", gw="10.1.0.2")],
            mac="0a:00:00:00:00:01",
            vlan=7,
        )
    ]
    assert [owner.uid for owner in made.metadata.owner_references] == ["u"]


def test_what_is_known_better_stays() -> None:
    known = EndpointIP(interface="eth0", ipv4="10.1.0.5/16", ipv4_pool="a", clean_gateway=True)
    made = endpoint_of(("ns", "p"), [claim("10.1.0.5", "a")], endpoint(known), POOLS)
    assert entries_of(made) == [
        EndpointIP(interface="eth0", ipv4="10.1.0.5/16", ipv4_pool="a", clean_gateway=True, vlan=0)
    ]
    assert made.metadata.resource_version == "7"


def test_addresses_of_pools_that_were_never_adopted_stay() -> None:
    known = endpoint(
        EndpointIP(interface="eth0", ipv4="10.1.0.5/16", ipv4_pool="a", ipv6="fd02::5/64", ipv6_pool="theirs"),
        EndpointIP(interface="net1", ipv4="10.2.0.5/16", ipv4_pool="theirs"),
        EndpointIP(interface="net2", ipv4="10.1.0.9/16", ipv4_pool="a"),
    )
    made = entries_of(endpoint_of(("ns", "p"), [claim("10.1.0.6", "a")], known, POOLS))
    assert [(entry.interface, entry.ipv4, entry.ipv6) for entry in made] == [
        ("eth0", "10.1.0.6/16", "fd02::5/64"),
        ("net1", "10.2.0.5/16", None),
    ]
    other = entries_of(endpoint_of(("ns", "p"), [claim("10.1.0.6", "a")], endpoint(uid="other"), POOLS))
    assert [entry.interface for entry in other] == ["eth0"]


def test_a_static_workload_has_no_owner() -> None:
    made = endpoint_of(("ns", "p"), [claim("10.1.0.5", "a", static=True)], None, POOLS)
    assert made.metadata.owner_references == []
    assert made.status is not None
    assert (made.status.owner_controller_type, made.status.owner_controller_name) == ("StatefulSet", "db")
