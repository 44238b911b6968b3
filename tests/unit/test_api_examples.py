"""Manifests as users write them: what is stored, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec
import pytest

from api.claim import Claim, claim_name
from api.manifest import parse
from api.meta import Resource, encode
from api.pool import Pool
from api.ranges import to_address
from api.reservedip import ReservedIP
from api.validate import Surroundings, defaulted, errors
from api.validate.fields import FieldError

R = TypeVar("R", bound=Resource)

WEB_V4 = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata:
  name: web-v4
spec:
  subnet: 172.30.40.0/24
  ips:
    - 172.30.40.120
    - 172.30.40.10-172.30.40.60
    - 172.30.40.61-172.30.40.99
  excludeIPs:
    - 172.30.40.50-172.30.40.54
  vlan: 12                         # a member of an older version
  podAffinity:
    matchExpressions:
      - {key: tier, operator: In, values: [web, edge]}
  namespaceAffinity:
    matchLabels: {team: shop}
  namespaceName: [web]
  nodeAffinity:
    matchLabels: {zone: a}
  nodeName: [node-1, node-2]
  multusName:
    - macvlan-web
    - web/macvlan-lab
"""

WEB_V6 = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderIPPool
metadata: {name: web-v6}
spec:
  subnet: "fd00:40::/64"
  ips: ["fd00:40::10-fd00:40::4f"]
  gateway: "fd00:40::1"
"""

PRINTERS = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderReservedIP
metadata: {name: printers}
spec:
  ips:
    - 172.30.40.11
    - 172.30.40.90-172.30.40.95
"""

ENDPOINT = """
apiVersion: spiderpool.spidernet.io/v2beta1
kind: SpiderEndpoint
metadata:
  name: front-7c9d8-x2lqp
  namespace: web
  finalizers: [spiderpool.spidernet.io]
  ownerReferences:
    - {apiVersion: v1, kind: Pod, name: front-7c9d8-x2lqp, uid: 0b7f7a52-9a1e-4c39-8a60-7f2f0a5d1c11}
status:
  ownerControllerType: Deployment
  ownerControllerName: front
  current:
    uid: 0b7f7a52-9a1e-4c39-8a60-7f2f0a5d1c11
    node: node-1
    ips:
      - interface: eth0
        ipv4: 172.30.40.10/24
        ipv4Pool: web-v4
        ipv4Gateway: 172.30.40.1
        ipv6: fd00:40::10/64
        ipv6Pool: web-v6
        ipv6Gateway: "fd00:40::1"
        cleanGateway: false
        vlan: 0
        routes:
          - {dst: 10.90.0.0/16, gw: 172.30.40.2}
      - interface: net1
        ipv4: 172.31.0.7/24
        ipv4Pool: storage-v4
"""


def read(text: str) -> Resource:
    (entry,) = parse(text.encode())
    assert entry.errors == ()
    assert entry.resource is not None
    return entry.resource


def pool(name: str = "other", **spec: Any) -> Pool:
    document = {"metadata": {"name": name}, "spec": {"subnet": "172.30.40.0/24", **spec}}
    return defaulted(msgspec.convert(document, Pool))


def reserved(**spec: Any) -> ReservedIP:
    return defaulted(msgspec.convert({"metadata": {"name": "r"}, "spec": spec}, ReservedIP))


def claim(address: str, pool_name: str = "web-v4", **spec: Any) -> Claim:
    version = 6 if ":" in address else 4
    whole = {
        "address": address,
        "ipVersion": version,
        "pool": pool_name,
        "podUID": "0b7f7a52-9a1e-4c39-8a60-7f2f0a5d1c11",
        "workload": {"namespace": "web", "name": "front-7c9d8-x2lqp"},
        **spec,
    }
    return defaulted(msgspec.convert({"metadata": {"name": address.replace(":", "-")}, "spec": whole}, Claim))


def created(resource: Resource, others: Iterable[Pool] = (), **around: Any) -> list[FieldError]:
    return errors(resource, None, Surroundings(pools=others, **around))


@pytest.fixture(name="web")
def web_fixture() -> Pool:
    found = defaulted(read(WEB_V4))
    assert isinstance(found, Pool)
    return found


def test_a_pool_is_stored_with_everything_derived(web: Pool) -> None:
    assert created(web) == []
    assert msgspec.json.decode(encode(web)) == {
        "apiVersion": "spiderpool.spidernet.io/v2beta1",
        "kind": "SpiderIPPool",
        "metadata": {
            "name": "web-v4",
            "finalizers": ["spiderpool.spidernet.io"],
            "labels": {"ipam.spidernet.io/ippool-cidr": "172-30-40-0-24"},
        },
        "spec": {
            "ipVersion": 4,
            "subnet": "172.30.40.0/24",
            "ips": ["172.30.40.10-172.30.40.99", "172.30.40.120"],
            "excludeIPs": ["172.30.40.50-172.30.40.54"],
            "podAffinity": {"matchExpressions": [{"key": "tier", "operator": "In", "values": ["web", "edge"]}]},
            "namespaceAffinity": {"matchLabels": {"team": "shop"}},
            "namespaceName": ["web"],
            "nodeAffinity": {"matchLabels": {"zone": "a"}},
            "nodeName": ["node-1", "node-2"],
            "multusName": ["macvlan-web", "web/macvlan-lab"],
            "default": False,
            "disable": False,
        },
    }
    assert defaulted(web) == web, "defaulting what is stored changes nothing"


def test_a_minimal_ipv6_pool(web: Pool) -> None:
    v6 = defaulted(read(WEB_V6))
    assert isinstance(v6, Pool)
    assert created(v6, [web]) == []
    assert v6.spec.ip_version == 6
    assert v6.spec.ips == ["fd00:40::10-fd00:40::4f"]
    assert v6.metadata.labels == {"ipam.spidernet.io/ippool-cidr": "fd00-40---64"}


def test_a_reservation_is_stored_as_it_is_but_for_its_family() -> None:
    stored = defaulted(read(PRINTERS))
    assert isinstance(stored, ReservedIP)
    assert created(stored) == []
    assert stored.spec.ip_version == 4
    assert stored.spec.ips == ["172.30.40.11", "172.30.40.90-172.30.40.95"]
    assert (stored.metadata.finalizers, stored.metadata.labels) == ([], {})


def test_an_endpoint_is_read_whole() -> None:
    stored = msgspec.json.decode(encode(defaulted(read(ENDPOINT))))
    first, second = stored["status"]["current"]["ips"]
    assert first["routes"] == [{"dst": "10.90.0.0/16", "gw": "172.30.40.2"}]
    assert second == {"interface": "net1", "ipv4": "172.31.0.7/24", "ipv4Pool": "storage-v4", "vlan": 0}


REFUSED_POOLS = [
    (
        {"subnet": "172.30.40.5/24"},
        "unformatted subnet 172.30.40.5/24, please change it to 172.30.40.0/24",
    ),
    (
        {"subnet": "FD00:40::/64"},
        'spec.subnet: Invalid value: "FD00:40::/64": unformatted subnet FD00:40::/64, please change it to fd00:40::/64',
    ),
    (
        {"subnet": "172.30.0.0/16"},
        "overlap with IPPool web-v4 which 'spec.subnet' is 172.30.40.0/24",
    ),
    (
        {"subnet": "172.30.40.128/25"},
        "overlap with IPPool web-v4 which 'spec.subnet' is 172.30.40.0/24",
    ),
    (
        {"ips": ["172.30.40.99-172.30.40.110"]},
        "spec.ips: Forbidden: overlap with IPPool web-v4 in IP ranges [172.30.40.10-172.30.40.99]",
    ),
    (
        {"ips": ["172.30.40.1-172.30.40.5"], "gateway": "172.30.40.1"},
        "spec.ips[0]: Invalid value: \"172.30.40.1-172.30.40.5\": conflicts with 'spec.gateway'",
    ),
    (
        {"routes": [{"dst": "0.0.0.0/0", "gw": "172.30.40.2"}]},
        "spec.routes[0].dst: Invalid value: \"0.0.0.0/0\": please specify 'spec.gateway'",
    ),
    ({"podAffinity": {}}, "spec.podAffinity: Invalid value: {}: empty podAffinity is invalid for SpiderIPPool"),
    ({"podAffinity": {"matchLabels": {}}}, "spec.podAffinity: Invalid value: {}: empty podAffinity is invalid"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED_POOLS)
def test_refused_pools(web: Pool, change: dict[str, Any], text: str) -> None:
    (error,) = created(pool(**change), [web])
    assert text in str(error)


def test_excluded_addresses_are_free_for_others(web: Pool) -> None:
    assert created(pool(ips=["172.30.40.53-172.30.40.54"]), [web]) == []


def test_dropping_a_claimed_address_is_refused(web: Pool) -> None:
    held = [claim("172.30.40.10"), claim("172.30.40.120")]
    narrow = pool("web-v4", ips=["172.30.40.11-172.30.40.99", "172.30.40.120"])
    (error,) = errors(narrow, web, Surroundings(pools=[web], claims=held))
    assert str(error) == (
        "spec.ips: Forbidden: remove an IP address 172.30.40.10 that is being used by Pod web/front-7c9d8-x2lqp"
    )


def test_an_empty_reservation_is_refused_unless_it_names_its_family() -> None:
    (error,) = created(reserved(ips=[]))
    assert str(error).startswith(
        "spec.ipVersion: Invalid value: null: is not generated correctly, 'spec.ips' is empty or 'spec.ips[0]'"
    )
    assert created(reserved(ips=[], ipVersion=4)) == []


def test_claim_names_round_trip() -> None:
    held = claim("172.30.40.10")
    assert created(held) == []
    assert held.metadata.name == claim_name(to_address(4, 0xAC1E280A))
