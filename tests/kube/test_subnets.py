"""Subnets and automatic pools on a real API server, with the real controllers that make ReplicaSets and Pods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from api.autopools import LABEL_APP_UID, LABEL_RECLAIM
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec, Route
from api.reservedip import ReservedIP, ReservedIPSpec
from api.subnet import LABEL_OWNER_SUBNET, Subnet, SubnetSpec, SubnetStatus, is_ready
from api.validate.pool import default_pool
from controller.subnets.settings import SubnetSettings
from lab.kube.cluster import Cluster
from tests.kube.subnet_rig import DEFAULTS, Rig, asking, rig, room, template, workload

V4 = "10.40.0.0/16"
V6 = "fd40::/64"
RANGE = "10.40.0.10-10.40.0.49"
"""40 addresses."""

CLONE_SETS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "clonesets.apps.kruise.io"},
    "spec": {
        "group": "apps.kruise.io",
        "scope": "Namespaced",
        "names": {"kind": "CloneSet", "listKind": "CloneSetList", "plural": "clonesets", "singular": "cloneset"},
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


@pytest.fixture(name="own", scope="module")
def with_nodes_and_clone_sets(kube: Cluster) -> Iterator[Cluster]:
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}} for name in ("fake-1", "fake-2")]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [CLONE_SETS, *nodes]})
    kube.kubectl("apply", "-f", "-", stdin=text)
    kube.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/clonesets.apps.kruise.io")
    yield kube
    kube.kubectl("delete", "-f", "-", stdin=text)


@pytest.mark.upstream("I00003", "I00013", "I00014", "E00010")
@pytest.mark.parametrize("kind", ["Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob"])
def test_each_kind_of_controller_has_its_pools(own: Cluster, kind: str) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            v4 = await it.subnet(V4, [RANGE], gateway="10.40.0.1", routes=[Route(dst="10.9.0.0/16", gw="10.40.0.2")])
            v6 = await it.subnet(V6, ["fd40::10-fd40::4f"])
            pods = 2 if kind == "DaemonSet" else 3
            asked = asking({"ipv4": [v4], "ipv6": [v6]}, number="+1")
            await it.apply(workload(kind, "app", asked, pods))
            await it.becomes(it.sizes, {"app/eth0/4": pods + 1, "app/eth0/6": pods + 1})
            (four,) = await it.pools(v4)
            uid = json.loads(await it.kubectl("get", kind, "app", "-n", it.namespace, "-o", "json"))["metadata"]["uid"]
            assert four.metadata.name == f"auto4-app-eth0-{uid[-12:-7]}"
            assert four.metadata.annotations["ipam.spidernet.io/ippool-ip-number"] == "+1"
            assert four.spec.gateway == "10.40.0.1"
            assert four.spec.routes == [Route(dst="10.9.0.0/16", gw="10.40.0.2")]
            assert four.spec.ips == [f"10.40.0.10-10.40.0.{10 + pods}"]
            group, version = ("batch" if "Job" in kind else "apps"), "v1"
            assert four.spec.pod_affinity is not None
            assert four.spec.pod_affinity.match_labels == {
                "ipam.spidernet.io/app-api-group": group,
                "ipam.spidernet.io/app-api-version": version,
                "ipam.spidernet.io/app-kind": kind,
                "ipam.spidernet.io/app-namespace": it.namespace,
                "ipam.spidernet.io/app-name": "app",
            }
            status = (await it.store.get(Subnet, v4)).status
            assert status is not None
            assert json.loads(status.controlled_ip_pools or "") == {
                four.metadata.name: {
                    "ips": four.spec.ips,
                    "application": f"{group}_{version}_{kind}_{it.namespace}_app",
                }
            }
            if kind in ("Deployment", "ReplicaSet", "StatefulSet"):
                await it.apply(workload(kind, "app", asked, 8))
                await it.becomes(it.sizes, {"app/eth0/4": 9, "app/eth0/6": 9})
                await it.apply(workload(kind, "app", asked, 1))
                await it.becomes(it.sizes, {"app/eth0/4": 2, "app/eth0/6": 2})
            await it.delete(kind, "app")
            await it.becomes(it.sizes, {})
            await it.frees(v4, 40)
            await it.frees(v6, 64)

    asyncio.run(scenario())


@pytest.mark.upstream("I00008", "I00006")
def test_rapid_scaling_converges_and_no_address_is_lost(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            asked = asking({"ipv4": [subnet]}, number="+2")
            names = ["a", "b", "c"]
            for size in (1, 9, 0, 7, 3, 10, 2, 5):
                await it.apply(*(workload("Deployment", name, asked, size) for name in names))
            await it.becomes(it.sizes, {f"{name}/eth0/4": 7 for name in names})
            await it.frees(subnet, 40 - 21)
            versions = {p.metadata.name: p.metadata.resource_version for p in await it.pools()}
            ledger = (await it.store.get(Subnet, subnet)).metadata.resource_version
            await asyncio.sleep(1)  # what comes to rest stays at rest
            assert {p.metadata.name: p.metadata.resource_version for p in await it.pools()} == versions
            assert (await it.store.get(Subnet, subnet)).metadata.resource_version == ledger
            for name in names:
                await it.delete("Deployment", name)
            await it.frees(subnet, 40)

    asyncio.run(scenario())


@pytest.mark.upstream("I00008")
def test_a_shrinking_pool_keeps_what_pods_have(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            asked = asking({"ipv4": [subnet]})
            await it.apply(workload("Deployment", "app", asked, 6))
            await it.becomes(it.sizes, {"app/eth0/4": 6})
            (pool,) = await it.pools()
            await it.take(pool.metadata.name, 0, 2, 3, 5)
            await it.apply(workload("Deployment", "app", asked, 2))
            await it.becomes(it.sizes, {"app/eth0/4": 4})
            assert (await it.pools())[0].spec.ips == ["10.40.0.10", "10.40.0.12-10.40.0.13", "10.40.0.15"]
            await it.frees(subnet, 36)
            await it.give_back(pool.metadata.name, 2)
            await it.becomes(it.sizes, {"app/eth0/4": 2})
            assert (await it.pools())[0].spec.ips == ["10.40.0.13", "10.40.0.15"]
            await it.frees(subnet, 38)

    asyncio.run(scenario())


@pytest.mark.upstream("I00004", "I00011", "I00020")
def test_reserved_excluded_and_given_addresses_are_not_given(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            spec = ReservedIPSpec(ip_version=4, ips=["10.40.0.11-10.40.0.12"])
            await it.store.create(ReservedIP(metadata=ObjectMeta(name=it.namespace), spec=spec))
            try:
                subnet = await it.subnet(V4, ["10.40.0.10-10.40.0.19"], exclude_ips=["10.40.0.14"])
                await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]}, number="5"), 1))
                await it.becomes(it.sizes, {"app/eth0/4": 5})
                assert (await it.pools())[0].spec.ips == [
                    "10.40.0.10",
                    "10.40.0.13",
                    "10.40.0.15-10.40.0.17",
                ]
                await it.apply(workload("Deployment", "more", asking({"ipv4": [subnet]}, number="+2"), 1))
                await it.told("InsufficientIPs", "more")
                (event,) = await it.events("InsufficientIPs")
                assert "insufficient subnet FreeIPs, required '3' but only left '2'" in event.message
            finally:
                await it.store.delete(ReservedIP, it.namespace)
            await it.becomes(it.sizes, {"app/eth0/4": 5, "more/eth0/4": 3})
            await it.consistent(subnet)

    asyncio.run(scenario())


@pytest.mark.upstream("I00015", "I00016", "I00019")
def test_a_retained_pool_serves_the_next_of_its_name_and_kind(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            kept = asking({"ipv4": [subnet]}, number="3", reclaim="false")
            await it.apply(workload("Deployment", "app", kept))
            await it.becomes(it.sizes, {"app/eth0/4": 3})
            (first,) = await it.pools()
            await it.delete("Deployment", "app")
            await it.apply(workload("StatefulSet", "app", asking({"ipv4": [subnet]}, number="2")))
            await it.becomes(lambda: count(it), 2)
            assert (await it.store.get(Pool, first.metadata.name)).metadata.labels == first.metadata.labels
            await it.delete("StatefulSet", "app")
            await it.becomes(lambda: count(it), 1)
            await it.frees(subnet, 37)
            await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]}, number="4")))
            await it.becomes(it.sizes, {"app/eth0/4": 4})
            (again,) = await it.pools()
            assert again.metadata.name == first.metadata.name
            assert again.metadata.labels[LABEL_APP_UID] != first.metadata.labels[LABEL_APP_UID]
            assert again.metadata.labels[LABEL_RECLAIM] == "true"
            await it.delete("Deployment", "app")
            await it.becomes(it.sizes, {})
            # And one whose application is gone, by its label.
            await it.apply(workload("Deployment", "other", kept))
            await it.becomes(it.sizes, {"other/eth0/4": 3})
            await it.delete("Deployment", "other")
            await it.until(lambda: gone(it, "Deployment", "other"))
            await asyncio.sleep(0.5)
            assert await it.sizes() == {"other/eth0/4": 3}
            (pool,) = await it.pools()
            await it.kubectl("label", "sp", pool.metadata.name, "--overwrite", f"{LABEL_RECLAIM}=true")
            await it.becomes(it.sizes, {})
            await it.frees(subnet, 40)

    asyncio.run(scenario())


async def count(it: Rig) -> int:
    return len([pool for pool in await it.pools() if pool.metadata.deletion_timestamp is None])


async def gone(it: Rig, kind: str, name: str) -> bool:
    return not await it.kubectl("get", kind, name, "-n", it.namespace, "--ignore-not-found", "-o", "name")


@pytest.mark.upstream("I00012", "I00021", "I00017")
def test_several_nics_two_namespaces_and_a_very_long_name(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it, rig(own, None) as other:
            first = await it.subnet(V4, [RANGE])
            second = await it.subnet("10.41.0.0/24", ["10.41.0.1-10.41.0.40"])
            asked = asking({"interface": "eth0", "ipv4": [first]}, {"interface": "net1", "ipv4": [second]}, number="2")
            long = "a" * 40 + "." + "b" * 190
            await it.apply(workload("Deployment", "app", asked), workload("ReplicaSet", long, asked))
            await other.apply(workload("Deployment", "app", asked))
            wanted = {f"{name}/{nic}/4": 2 for name in ("app", long) for nic in ("eth0", "net1")}
            await it.becomes(it.sizes_by_name, wanted)
            await it.becomes(other.sizes, {f"app/{nic}/4": 2 for nic in ("eth0", "net1")})
            assert all(len(pool.metadata.name) <= 253 for pool in await it.pools())
            await it.delete("ReplicaSet", long)
            await it.becomes(it.sizes, {f"app/{nic}/4": 2 for nic in ("eth0", "net1")})
            await it.frees(first, 36)
            await it.frees(second, 36)

    asyncio.run(scenario())


def test_what_cannot_be_is_told_on_the_application(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            first, second = await it.subnet(V4, [RANGE]), await it.subnet("10.41.0.0/24", ["10.41.0.1-10.41.0.40"])
            both = asking({"interface": "eth0", "ipv4": [first]}, {"interface": "net1", "ipv4": [first]})
            await it.apply(
                workload("Deployment", "twice", both),
                workload("Deployment", "nowhere", asking({"ipv4": ["no-such"]})),
                workload("Deployment", "family", asking({"ipv6": [first]})),
                workload("Deployment", "number", asking({"ipv4": [first]}, number="++1")),
                workload("Deployment", "host", asking({"ipv4": [first]}), hostNetwork=True),
                workload("Deployment", "moves", asking({"ipv4": [first]})),
            )
            await it.told("WrongInput", "twice")
            await it.told("SubnetNotFound", "nowhere")
            await it.told("WrongSubnet", "family")
            await it.told("WrongInput", "number")
            await it.becomes(it.sizes, {"moves/eth0/4": 1})
            await it.apply(workload("Deployment", "moves", asking({"ipv4": [second]})))
            (pool,) = await it.pools()
            await it.told("ApplicationSubnetChanged", pool.metadata.name)
            await it.told("ApplicationSubnetChanged", "moves")
            assert await it.sizes() == {"moves/eth0/4": 1}
            # What was waited for is seen when it comes.
            spec = SubnetSpec(subnet="10.42.0.0/24", ip_version=4, ips=["10.42.0.1-10.42.0.9"])
            await it.store.create(Subnet(metadata=ObjectMeta(name="no-such"), spec=spec))
            await it.becomes(it.sizes, {"moves/eth0/4": 1, "nowhere/eth0/4": 1})

    asyncio.run(scenario())


def clone_pod(name: str, uid: str, wanted: dict[str, str], owner: str = "clones", kind: str = "CloneSet") -> Any:
    made = template(wanted)
    version = "apps.kruise.io/v1alpha1"
    reference = {"apiVersion": version, "kind": kind, "name": owner, "uid": uid, "controller": True}
    metadata = {**made["metadata"], "name": name, "ownerReferences": [reference]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": made["spec"]}


@pytest.mark.upstream("T00002", "T00004", "T00005")
def test_third_parties_controllers(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            fixed = asking({"ipv4": [subnet]}, number="3")
            uid = await clone_set(it, "clones")
            await it.apply(clone_pod("p1", uid, fixed), clone_pod("p2", uid, fixed))
            await it.becomes(it.sizes, {"clones/eth0/4": 3})
            (pool,) = await it.pools()
            assert pool.metadata.labels["ipam.spidernet.io/owner-application-gv"] == "apps.kruise.io_v1alpha1"
            assert pool.metadata.annotations["ipam.spidernet.io/ippool-ip-number"] == "3"
            # Without pods, but with its controller, it stays: scaled to none is not gone.
            await it.delete("pod", "p1", "--force")
            await it.delete("pod", "p2", "--force")
            await it.until(lambda: gone(it, "pod", "p2"))
            await asyncio.sleep(0.5)
            assert await it.sizes() == {"clones/eth0/4": 3}
            await it.delete("cloneset", "clones")
            await it.becomes(it.sizes, {})
            await it.frees(subnet, 40)
            # Retained for the next of the name.
            uid = await clone_set(it, "kept")
            await it.apply(clone_pod("k1", uid, asking({"ipv4": [subnet]}, number="2", reclaim="false"), "kept"))
            await it.becomes(it.sizes, {"kept/eth0/4": 2})
            (pool,) = await it.pools()
            await it.delete("cloneset", "kept")
            # The garbage collector takes half a minute to learn of a new kind, unless it has done so before.
            await it.delete("pod", "k1", "--force", "--ignore-not-found")
            await it.until(lambda: gone(it, "pod", "k1"))
            uid = await clone_set(it, "kept")
            await it.apply(clone_pod("k2", uid, fixed, "kept"))
            await it.becomes(it.sizes, {"kept/eth0/4": 3})
            assert (await it.pools())[0].metadata.name == pool.metadata.name
            # How many pods it is to have is not known.
            uid = await clone_set(it, "flexible")
            await it.apply(clone_pod("f1", uid, asking({"ipv4": [subnet]}, number="+1"), "flexible"))
            await it.told("WrongInput", "flexible")
            (event,) = (e for e in await it.events("WrongInput") if e.involved_object.name == "flexible")
            assert "only supports fixed auto-created IPPool IP Number" in event.message
            # A kind that the server does not know: whether the application is gone cannot be told.
            await it.apply(clone_pod("g1", "g", fixed, "ghost", kind="Ghost"))
            await it.until(lambda: has_pool(it, "ghost/eth0/4"))
            await it.delete("pod", "g1", "--force")
            name = next(p.metadata.name for p in await it.pools() if "-ghost-" in p.metadata.name)
            await it.told("ApplicationUnknown", name)
            assert await has_pool(it, "ghost/eth0/4")

    asyncio.run(scenario())


async def has_pool(it: Rig, key: str) -> bool:
    return key in await it.sizes()


async def clone_set(it: Rig, name: str) -> str:
    await it.apply({"apiVersion": "apps.kruise.io/v1alpha1", "kind": "CloneSet", "metadata": {"name": name}})
    return await it.kubectl("get", "cloneset", name, "-n", it.namespace, "-o", "jsonpath={.metadata.uid}")


@pytest.mark.upstream("I00005", "I00007", "D00008")
def test_pools_made_by_hand_are_adopted_and_counted(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            route = Route(dst="10.9.0.0/16", gw="10.40.0.2")
            subnet = await it.subnet(V4, [RANGE], gateway="10.40.0.1", routes=[route])
            spec = PoolSpec(subnet=V4, ips=["10.40.0.10-10.40.0.19"])
            own_gateway = PoolSpec(subnet=V4, ips=["10.40.0.20"], gateway="10.40.0.9", routes=[])
            await it.store.create(default_pool(Pool(metadata=ObjectMeta(name="hand"), spec=spec)))
            await it.store.create(default_pool(Pool(metadata=ObjectMeta(name="other"), spec=own_gateway)))
            await it.frees(subnet, 29)
            hand, other = await it.store.get(Pool, "hand"), await it.store.get(Pool, "other")
            assert (hand.spec.gateway, hand.spec.routes) == ("10.40.0.1", [route])
            assert other.spec.gateway == "10.40.0.9"
            assert hand.metadata.labels[LABEL_OWNER_SUBNET] == subnet
            assert [(o.name, o.controller) for o in hand.metadata.owner_references] == [(subnet, True)]
            # Later changes of the subnet are no pool's.
            there = await it.store.get(Subnet, subnet)
            await it.store.update(replace(there, spec=replace(there.spec, gateway="10.40.0.3")))
            await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]}, number="2")))
            await it.becomes(it.sizes, {"app/eth0/4": 2})
            assert (await it.pools())[0].spec.gateway == "10.40.0.3"
            assert (await it.pools())[0].spec.ips == ["10.40.0.21-10.40.0.22"]
            assert (await it.store.get(Pool, "hand")).spec.gateway == "10.40.0.1"
            await it.kubectl("delete", "sp", "hand", "other", "--wait=false")
            await it.frees(subnet, 38)

    asyncio.run(scenario())


@pytest.mark.upstream("I00022")
def test_a_dirty_status_is_cleaned(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]}, number="3")))
            await it.becomes(it.sizes, {"app/eth0/4": 3})
            (pool,) = await it.pools()
            clean = (await it.store.get(Subnet, subnet)).status
            assert clean is not None
            dirty = {
                "ghost": {"ips": ["10.40.0.30-10.40.0.40"]},
                pool.metadata.name: {"ips": ["10.40.0.10-10.40.0.20"], "application": "x"},
            }
            for text in (json.dumps(dirty), "not json", None):
                there = await it.store.get(Subnet, subnet)
                status = SubnetStatus(controlled_ip_pools=text, total_ip_count=1, allocated_ip_count=7)
                await it.store.update_status(replace(there, status=status))
                await it.until(lambda: same_ledger(it, subnet, clean))
                await it.frees(subnet, 37)
                assert await it.sizes() == {"app/eth0/4": 3}

    asyncio.run(scenario())


async def same_ledger(it: Rig, subnet: str, wanted: SubnetStatus) -> bool:
    status = (await it.store.get(Subnet, subnet)).status
    return status is not None and status.controlled_ip_pools == wanted.controlled_ip_pools and bool(status.conditions)


def test_a_subnet_goes_with_its_pools_once_they_are_empty(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            subnet = await it.subnet(V4, [RANGE])
            spec = PoolSpec(subnet=V4, ips=["10.40.0.40"])
            await it.store.create(default_pool(Pool(metadata=ObjectMeta(name="hand"), spec=spec)))
            await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]}, number="3")))
            await it.frees(subnet, 36)
            (pool,) = await it.pools()
            await it.take(pool.metadata.name, 0)
            await it.kubectl("delete", "ss", subnet, "--wait=false")
            await it.until(lambda: gone(it, "sp", "hand"))
            await it.apply(workload("Deployment", "late", asking({"ipv4": [subnet]})))
            await it.told("SubnetTerminating", "late")
            assert (await it.store.get(Pool, pool.metadata.name)).metadata.deletion_timestamp is not None
            await it.give_back(pool.metadata.name)
            await it.until(lambda: gone(it, "ss", subnet))
            await it.until(lambda: gone(it, "sp", pool.metadata.name))

    asyncio.run(scenario())


def test_who_takes_over_finds_what_happened_meanwhile(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own, None) as it:
            async with room(it.store):
                subnet = await it.subnet(V4, [RANGE])
                await it.apply(
                    workload("Deployment", "goes", asking({"ipv4": [subnet]}, number="3")),
                    workload("Deployment", "grows", asking({"ipv4": [subnet]})),
                )
                await it.becomes(it.sizes, {"goes/eth0/4": 3, "grows/eth0/4": 1})
            await it.delete("Deployment", "goes")
            await it.apply(workload("Deployment", "grows", asking({"ipv4": [subnet]}), 5))
            await it.apply(workload("Deployment", "comes", asking({"ipv4": [subnet]}), 2))
            async with room(it.store):
                await it.becomes(it.sizes, {"comes/eth0/4": 2, "grows/eth0/4": 5})
                await it.frees(subnet, 33)

    asyncio.run(scenario())


def test_nonsense_is_not_used_though_nobody_refused_it(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            spec = SubnetSpec(subnet=V4, ip_version=4, ips=["10.40.0.9-10.40.0.1", RANGE], gateway="gw")
            made = await it.store.create(Subnet(metadata=ObjectMeta(name="nonsense"), spec=spec))

            async def told() -> str:
                status = (await it.store.get(Subnet, "nonsense")).status
                return next((each.message for each in (status.conditions if status else None) or ()), "")

            text = await it.until(told)
            assert "spec.ips[0]" in text
            assert "spec.gateway" in text
            await it.apply(workload("Deployment", "app", asking({"ipv4": ["nonsense"]})))
            await it.told("SubnetNotReady", "app")
            there = await it.store.get(Subnet, "nonsense")
            await it.store.update(replace(there, spec=replace(made.spec, ips=[RANGE], gateway=None)))
            await it.becomes(it.sizes, {"app/eth0/4": 1})

    asyncio.run(scenario())


@pytest.mark.upstream("I00009")
def test_of_many_equal_subnets_one_is_used(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            spec = SubnetSpec(subnet=V4, ip_version=4, ips=[RANGE])
            names = [f"equal-{number}" for number in range(100)]
            await asyncio.gather(
                *(it.store.create(Subnet(metadata=ObjectMeta(name=name), spec=spec)) for name in names)
            )

            async def ready() -> list[bool]:
                return sorted(is_ready(each) for each in (await it.store.list(Subnet)).items)

            await it.becomes(ready, [False] * 99 + [True])
            (winner,) = [s.metadata.name for s in (await it.store.list(Subnet)).items if is_ready(s)]
            await it.apply(
                workload("Deployment", "a", asking({"ipv4": [winner]})),
                workload("Deployment", "b", asking({"ipv4": [next(n for n in names if n != winner)]})),
            )
            await it.becomes(it.sizes, {"a/eth0/4": 1})
            await it.told("SubnetNotReady", "b")
            await asyncio.gather(*(it.store.delete(Subnet, name) for name in names if name != winner))
            await it.becomes(ready, [True])

    asyncio.run(scenario())


@pytest.mark.upstream("I00024")
def test_automatic_pools_can_be_switched_off(own: Cluster) -> None:
    async def scenario() -> None:
        async with rig(own, SubnetSettings(auto_pools=False, settle=0.05)) as it:
            subnet = await it.subnet(V4, [RANGE])
            await it.apply(workload("Deployment", "app", asking({"ipv4": [subnet]})))
            await asyncio.sleep(1)
            assert await it.sizes() == {}

    asyncio.run(scenario())


def test_the_clusters_spare_number_and_switched_off_families(own: Cluster) -> None:
    async def scenario() -> None:
        settings = SubnetSettings(spare_addresses=2, enable_ipv6=False, settle=0.05)
        async with rig(own, settings) as it:
            v4, v6 = await it.subnet(V4, [RANGE]), await it.subnet(V6, ["fd40::10-fd40::4f"])
            asked = asking({"ipv4": [v4], "ipv6": [v6]})
            await it.apply(workload("Deployment", "app", asked, 2))
            await it.becomes(it.sizes, {"app/eth0/4": 4})
            assert (await it.pools())[0].metadata.annotations["ipam.spidernet.io/ippool-ip-number"] == "+2"
            assert DEFAULTS.spare_addresses == 0

    asyncio.run(scenario())
