"""Which pools a pod's NICs get addresses of, on a real API server: annotations, affinities, owners, automatic pools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from msgspec import structs

from api import annotations as notes
from api.autopools import Application, affinity, lookup_labels
from api.claim import LABEL_POOL, Claim, label_value
from api.meta import ObjectMeta
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, LabelSelector, Pool, PoolStatus, Requirement
from api.reservedip import ReservedIP, ReservedIPSpec
from lab.kube.cluster import Cluster
from plugins.errors import ExhaustedError, InvalidConfigError, NoPoolError, PodGoneError, TryAgainLaterError
from plugins.ipam.plugin import Ipam
from plugins.ipam.settings import IpamSettings
from store.kube import KubeStore
from store.port import Query
from tests.integration.ipam_rig import call, until
from tests.kube.select_world import SETTINGS, PodOf, Pools, World, on_node

NUMBERS = count(200)
"""Second number of each test's network, so that nobody meets another test's claims."""


@pytest.fixture(scope="module")
def world(kube: Cluster) -> Iterator[World]:
    made = World(kube)
    try:
        made.node(zone="a")
        made.node(zone="b")
        yield made
    finally:
        made.end()


@asynccontextmanager
async def ipam_of(
    world: World, node: int = 0, settings: IpamSettings = SETTINGS
) -> AsyncIterator[tuple[Ipam, KubeStore, Pools]]:
    async with on_node(world.cluster, world.nodes[node], settings) as (ipam, store):
        pools = Pools(store, next(NUMBERS))
        try:
            yield ipam, store, pools
        finally:
            await pools.remove()


def selector(**labels: str) -> LabelSelector:
    return LabelSelector(match_labels=labels)


async def seen(ipam: Ipam, *names: str) -> None:
    """Wait until the agent knows the pools: an ADD that finds a pool waits for nothing."""

    async def known() -> bool:
        return all(ipam._catalog.get(name) is not None for name in names)

    await until(known)


@pytest.mark.upstream("A00004", "A00005", "A00006", "A00007", "A00015")
def test_pod_before_namespace_before_configuration_before_defaults(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            for name in ("items", "pod", "space-1", "conf", "wild-1"):
                await pools.add(name)
            await pools.add("default", default=True)
            await seen(ipam, *pools.made)
            space = world.space("defaults", {}, {notes.NAMESPACE_IPV4: [pools.name("space-*")]})
            items = [{"interface": "eth0", "ipv4": [pools.name("item?")]}]
            single = {"ipv4": [pools.name("pod")]}
            conf = (pools.name("conf"),)
            cases: list[tuple[str, dict[str, object], str, tuple[str, ...]]] = [
                ("items", {notes.IPPOOLS: items, notes.IPPOOL: single}, space, conf),
                ("pod", {notes.IPPOOL: single}, space, conf),
                ("space-1", {}, space, conf),
                ("conf", {}, world.namespace, conf),
                ("wild-1", {}, world.namespace, (pools.name("wild-*"),)),
                ("default", {}, world.namespace, ()),
            ]
            for i, (expected, said, namespace, v4) in enumerate(cases):
                pod = world.pod(f"order-{i}", node=world.nodes[0], said=said, namespace=namespace)
                assert await pools.of(await ipam.add(pod.call(v4=v4))) == [expected]

    asyncio.run(scenario())


AFFINITIES: list[Any] = [
    pytest.param({"node_affinity": selector(zone="a")}, {"node_affinity": selector(zone="b")}, "nodeAffinity",
                 id="node labels", marks=pytest.mark.upstream("L00001", "L00002")),
    pytest.param({"namespace_affinity": LabelSelector(match_expressions=[Requirement(
        key="kubernetes.io/metadata.name", operator="Exists")])}, {"namespace_affinity": selector(tier="back")},
                 "namespaceAffinity", id="namespace labels", marks=pytest.mark.upstream("L00003", "L00004")),
    pytest.param({"pod_affinity": selector(app="shop")}, {"pod_affinity": selector(app="bank")}, "podAffinity",
                 id="pod labels", marks=pytest.mark.upstream("L00005", "L00006")),
    pytest.param({"multus_name": ["kube-system/one"]}, {"multus_name": ["two"]}, "multusName",
                 id="network", marks=pytest.mark.upstream("D00009", "D00010")),
    pytest.param({"node_name": ["NODE"], "node_affinity": selector(zone="b")},
                 {"node_name": ["other"], "node_affinity": selector(zone="a")}, "nodeName",
                 id="node", marks=pytest.mark.upstream("D00011", "D00012", "D00013")),
    pytest.param({"namespace_name": ["SPACE"], "namespace_affinity": selector(no="no")},
                 {"namespace_name": ["other"]}, "namespaceName",
                 id="namespace", marks=pytest.mark.upstream("D00014", "D00015", "D00016")),
]  # fmt: skip


@pytest.mark.parametrize(("match", "mismatch", "field"), AFFINITIES)
def test_a_pool_is_for_whom_it_says(world: World, match: dict[str, Any], mismatch: dict[str, Any], field: str) -> None:
    """A pod that names two pools gets an address of the one that is for it; one that names the other does not run."""
    own = {"NODE": world.nodes[0], "SPACE": world.namespace}
    fits: dict[str, Any] = {
        key: [own.get(v, v) for v in value] if isinstance(value, list) else value for key, value in match.items()
    }

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            await pools.add("other", **mismatch)
            await pools.add("fits", **fits)
            await seen(ipam, *pools.made)
            key = field.lower()
            said: dict[str, object] = {notes.DEFAULT_NETWORK: "kube-system/one"}
            good = {**said, notes.IPPOOL: {"ipv4": [pools.name("other"), pools.name("fits")]}}
            pod = world.pod(f"good-{key}", node=world.nodes[0], said=good, labels={"app": "shop"})
            assert await pools.of(await ipam.add(pod.call())) == ["fits"]
            bad = {**said, notes.IPPOOL: {"ipv4": [pools.name("other")]}}
            pod = world.pod(f"bad-{key}", node=world.nodes[0], said=bad, labels={"app": "shop"})
            with pytest.raises(NoPoolError, match=rf"{pools.name('other')}: {field}"):
                await ipam.add(pod.call())
            assert len(await claims_of(store, pools)) == 1

    asyncio.run(scenario())


async def claims_of(store: KubeStore, pools: Pools) -> list[Claim]:
    return [c for c in (await store.list(Claim)).items if c.spec.pool in pools.made]


@pytest.mark.upstream("L00007")
def test_each_zone_has_its_pool(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world, 0) as (first, _, pools), on_node(world.cluster, world.nodes[1]) as (second, _):
            both = (
                await pools.add("a", node_affinity=selector(zone="a")),
                await pools.add("b", node_name=[world.nodes[1]]),
            )
            for i, (ipam, zone) in enumerate(((first, "a"), (second, "b"))):
                await seen(ipam, *both)
                pod = world.pod(f"zone-{zone}", node=world.nodes[i], said={notes.IPPOOL: {"ipv4": list(both)}})
                assert await pools.of(await ipam.add(pod.call())) == [zone]

    asyncio.run(scenario())


@pytest.mark.upstream("L00009")
def test_one_namespace_has_several_pools_and_one_pool_several_namespaces(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            second = world.space("second", {}, {})
            await pools.add("one", count=1, namespace_name=[world.namespace], default=True)
            await pools.add("two", namespace_name=[world.namespace, second], default=True)
            await seen(ipam, *pools.made)
            found = []
            for i, namespace in enumerate((world.namespace, world.namespace, second)):
                pod = world.pod(f"spaces-{i}", node=world.nodes[0], namespace=namespace)
                found += await pools.of(await ipam.add(pod.call()))
            assert found == ["one", "two", "two"]

    asyncio.run(scenario())


NETWORKS = {notes.DEFAULT_NETWORK: "kube-system/one", notes.NETWORKS: "kube-system/two,three@data"}


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
@pytest.mark.upstream("D00009", "D00010")
def test_each_nic_has_its_item(world: World, named: bool) -> None:
    nics = ("eth0", "net1", "data")

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            networks = ("kube-system/one", "two", f"{world.namespace}/three")
            items: list[dict[str, object]] = []
            for nic, network in zip(nics, networks, strict=True):
                name = await pools.add(nic, multus_name=[network], gateway=f"10.9.{len(items)}.1")
                items.append({"ipv4": [name], "cleangateway": nic == "net1"} | ({"interface": nic} if named else {}))
            await seen(ipam, *pools.made)
            pod = world.pod(f"items-{named}".lower(), node=world.nodes[0], said={notes.IPPOOLS: items, **NETWORKS})
            for nic in reversed(nics):  # whichever comes first: nothing depends on history
                result = await ipam.add(pod.call(nic))
                assert await pools.of(result) == [nic]
                assert any(route["dst"] == "0.0.0.0/0" for route in result["routes"]) == (nic != "net1")
            with pytest.raises(InvalidConfigError, match="wrong input"):
                await ipam.add(pod.call("net2"))

    asyncio.run(scenario())


@pytest.mark.upstream("A00016", "E00008")
def test_one_nics_shortage_leaves_the_others_pools_alone(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            full = await pools.add("full", count=0)
            rich = await pools.add("rich", count=8)
            await seen(ipam, full, rich)
            items = [{"interface": "eth0", "ipv4": [rich]}, {"interface": "net1", "ipv4": [full]}]
            pod = world.pod("shortage", node=world.nodes[0], said={notes.IPPOOLS: items, **NETWORKS})
            given = set()
            for _ in range(3):
                given.add(str((await ipam.add(pod.call()))["ips"]))
                with pytest.raises(ExhaustedError, match=f"{full}: full"):
                    await ipam.add(pod.call("net1"))
            assert len(given) == len(await claims_of(store, pools)) == 1

    asyncio.run(scenario())


@pytest.mark.upstream("A00011", "E00009", "S00001", "S00002")
def test_routes_families_reserved_and_excluded(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            v4 = await pools.add("v4", count=3)
            base = (await store.get(Pool, v4)).spec.subnet.removesuffix("0.0/16")
            gateway = f"{base}9.9"
            spec = structs.replace(
                (await store.get(Pool, v4)).spec, exclude_ips=[f"{base}0.1"], gateway=gateway, routes=None
            )
            await store.update(structs.replace(await store.get(Pool, v4), spec=spec))
            v6 = await pools.add("v6", family=6)
            reserved = ReservedIP(metadata=ObjectMeta(name=pools.name("r")), spec=ReservedIPSpec(ips=[f"{base}0.2"]))
            await store.create(reserved)
            try:
                await until(lambda: yes(lambda: ipam._catalog.reserved[4].count > 0))
                await until(lambda: yes(lambda: getattr(ipam._catalog.get(v4), "gateway", "") == gateway))
                await seen(ipam, v6)
                routes = [{"dst": "10.8.0.0/16", "gw": f"{base}0.7"}, {"dst": "10.9.0.0/16", "gw": "192.0.2.1"}]
                said = {notes.IPPOOL: {"ipv4": [v4]}, notes.ROUTES: routes}
                result = await ipam.add(world.pod("routes", node=world.nodes[0], said=said).call())
                assert [ip["address"] for ip in result["ips"]] == [f"{base}0.3/16"]
                assert result["routes"] == [
                    {"dst": "10.8.0.0/16", "gw": f"{base}0.7"},
                    {"dst": "0.0.0.0/0", "gw": gateway},
                ]
                with pytest.raises(ExhaustedError, match="1 reserved"):
                    await ipam.add(world.pod("routes-2", node=world.nodes[0], said=said).call())
                said = {notes.IPPOOL: {"ipv6": [v6]}}
                result = await ipam.add(world.pod("only-6", node=world.nodes[0], said=said).call(v4=(v4,)))
                assert await pools.of(result) == ["v6"]
            finally:
                await store.delete(ReservedIP, reserved.metadata.name)

    asyncio.run(scenario())


async def yes(condition: Callable[[], bool]) -> bool:
    return condition()


@pytest.mark.upstream("E00007")
def test_a_very_long_manifest(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            await seen(ipam, await pools.add("last"))
            listed = [f"spt-absent-{'x' * 200}-{i}" for i in range(400)]
            said = {notes.IPPOOL: {"ipv4": [*listed, pools.name("last")]}, "example.com/long": "x" * 100_000}
            pod = world.pod("long", node=world.nodes[0], said=said)
            assert await pools.of(await ipam.add(pod.call())) == ["last"]

    asyncio.run(scenario())


@pytest.mark.upstream("A00003")
def test_a_malformed_annotation_keeps_the_pod_from_starting(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            v4 = await pools.add("v4", default=True)
            await seen(ipam, v4)
            wrong: list[dict[str, object]] = [
                {notes.IPPOOL: "v4"},
                {notes.ROUTES: [{"dst": "x"}]},
                {notes.IPPOOLS: "[]"},
            ]
            for i, said in enumerate(wrong):
                pod = world.pod(f"malformed-{i}", node=world.nodes[0], said=said)
                with pytest.raises(InvalidConfigError, match="wrong input: invalid format of annotation") as raised:
                    await ipam.add(pod.call())
                assert next(iter(said)) in raised.value.details

    asyncio.run(scenario())


def test_the_pod_that_is_meant_or_none(world: World) -> None:
    """The cache holds another pod of the name, or none: the API server is asked."""

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, _, pools):
            v4 = (await pools.add("v4", default=True),)
            await seen(ipam, *v4)
            unbound = world.pod("unbound")  # not of this node, so no cache will ever hold it
            assert await pools.of(await ipam.add(unbound.call())) == ["v4"]
            first = world.pod("again", node=world.nodes[0])
            await ipam.add(first.call())
            world.cluster.kubectl("delete", "pod", "again", "-n", world.namespace, "--force")
            second = world.pod("again", node=world.nodes[0])
            assert await pools.of(await ipam.add(second.call())) == ["v4"]
            with pytest.raises(PodGoneError, match=f"its UID is {second.uid}"):
                await ipam.add(first.call())
            with pytest.raises(PodGoneError, match="no such pod"):
                await ipam.add(PodOf(world.namespace, "never", "u").call())
            with pytest.raises(PodGoneError, match="no such pod"):
                await ipam.add(PodOf("nowhere", "again", second.uid).call())
            status = {"status": {"phase": "Failed", "reason": "Evicted"}}
            patch = ("patch", "pod", "again", "-n", world.namespace, "--subresource=status", "--type=merge")
            world.cluster.kubectl(*patch, "-p", json.dumps(status))

            async def is_dead() -> bool:
                try:
                    await ipam._pods.find(world.namespace, "again", second.uid)
                except PodGoneError:
                    return True
                return False

            await until(is_dead)
            with pytest.raises(PodGoneError, match=f"dead Pod {world.namespace}/again, we cannot allocate"):
                await ipam.add(second.call())
            # A container that is no pod of the cluster's gets what is for everybody.
            assert await pools.of(await ipam.add(call("x", v4=(), uid=False, args={"K8S_POD_NAME": ""}))) == ["v4"]

    asyncio.run(scenario())


@pytest.mark.upstream("E00001", "E00002", "E00004", "E00005", "E00006")
def test_pods_of_every_controller_get_addresses_and_claims_tell_which(world: World) -> None:
    """By controllers that make pods of their own: Deployment, ReplicaSet, DaemonSet, Job, CronJob."""
    template: dict[str, Any] = {
        "metadata": {"labels": {"app": "owned"}},
        "spec": {"containers": [{"name": "c", "image": "lab.invalid/none"}], "restartPolicy": "Always"},
    }
    select_ = {"matchLabels": {"app": "owned"}}
    once = {"template": {"spec": {**template["spec"], "restartPolicy": "Never"}}}
    world.make("apps/v1", "Deployment", "deploy", spec={"replicas": 1, "selector": select_, "template": template})
    world.make("apps/v1", "ReplicaSet", "alone", spec={"replicas": 1, "selector": select_, "template": template})
    world.make("apps/v1", "DaemonSet", "each", spec={"selector": select_, "template": template})
    world.make("batch/v1", "Job", "once", spec=once)
    cron = world.make(
        "batch/v1", "CronJob", "often", spec={"schedule": "0 0 1 1 *", "suspend": True, "jobTemplate": {"spec": once}}
    )
    world.cluster.kubectl("create", "job", "often-1", "--from=cronjob/often", "-n", world.namespace)

    def pods() -> dict[str, PodOf]:
        items = json.loads(world.cluster.kubectl("get", "pods", "-n", world.namespace, "-o", "json"))["items"]
        found = {}
        for item in items:
            for owner in item["metadata"].get("ownerReferences", []):
                key = owner["name"] if owner["name"] in ("once", "often-1", "alone", "each") else "deploy"
                found[key] = PodOf(world.namespace, item["metadata"]["name"], item["metadata"]["uid"])
        return found

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            await pools.add("v4", default=True, count=8)
            await pools.add("v6", default=True, count=8, family=6)
            await seen(ipam, *pools.made)
            await until(lambda: yes(lambda: {"deploy", "alone", "each", "once", "often-1"} <= pods().keys()), 30)
            for name, pod in pods().items():
                assert await pools.of(await ipam.add(pod.call())) == ["v4", "v6"]
                claim = next(c for c in await claims_of(store, pools) if c.spec.pod_uid == pod.uid)
                assert claim.spec.workload is not None
                top = claim.spec.workload.controller
                assert top is not None
                expected = {
                    "deploy": ("apps/v1", "Deployment", "deploy"),
                    "alone": ("apps/v1", "ReplicaSet", "alone"),
                    "each": ("apps/v1", "DaemonSet", "each"),
                    "once": ("batch/v1", "Job", "once"),
                    "often-1": ("batch/v1", "CronJob", "often"),
                }[name]
                assert (top.api_version, top.kind, top.name) == expected
                assert name != "often-1" or top.uid == cron["metadata"]["uid"]
            pod = world.pod("orphan", node=world.nodes[0])
            await ipam.add(pod.call())
            claim = next(c for c in await claims_of(store, pools) if c.spec.pod_uid == pod.uid)
            assert claim.spec.workload is not None
            assert claim.spec.workload.controller is not None
            assert claim.spec.workload.controller.kind == "Pod"

    asyncio.run(scenario())


def test_another_spiderpools_records_must_be_adopted_first(world: World) -> None:
    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            name = await pools.add("theirs")
            pool = await store.get(Pool, name)
            records = PoolStatus(allocated_ips='{"10.9.9.9":{"pod":"a/b","podUid":"u"}}')
            await store.update_status(structs.replace(pool, status=records))
            await until(lambda: yes(lambda: getattr(ipam._catalog.get(name), "foreign", False)))
            pod = world.pod("adopted", node=world.nodes[0], said={notes.IPPOOL: {"ipv4": [name]}})
            with pytest.raises(NoPoolError, match="records of another Spiderpool that are not adopted yet"):
                await ipam.add(pod.call())
            pool = await store.get(Pool, name)
            marked = structs.replace(pool.metadata, annotations={ANNOTATION_CLAIMS: CLAIMS_AUTHORITATIVE})
            await store.update(structs.replace(pool, metadata=marked))
            assert await pools.of(await ipam.add(pod.call())) == ["theirs"]  # it looks afresh before it refuses

    asyncio.run(scenario())


class Auto:
    """The controller's part: an application and its automatic pool."""

    def __init__(self, world: World, pools: Pools, store: KubeStore, name: str, replicas: int) -> None:
        labels = {"app": name}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
        spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template, "paused": True}
        made = world.make("apps/v1", "Deployment", name, spec=spec)
        self.uid = made["metadata"]["uid"]
        self._application = Application("apps/v1", "Deployment", world.namespace, name)
        self._world, self._pools, self._store, self._name = world, pools, store, name
        self.owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": self.uid, "controller": True}

    def pod(self, number: int, said: Mapping[str, object]) -> PodOf:
        return self._world.pod(f"{self._name}-{number}", node=self._world.nodes[0], said=said, owners=[self.owner])

    async def pool(self, count_: int, *, nic: str = "eth0", uid: str = "", short: str = "auto") -> str:
        labels = lookup_labels(self._application, uid or self.uid, 4, nic, "subnet-v4")
        pod_affinity = LabelSelector(match_labels=affinity(self._application))
        return await self._pools.add(short, count=count_, labels=labels, pod_affinity=pod_affinity)


@pytest.mark.upstream("E00010")
def test_an_add_waits_for_the_pool_that_the_controller_makes(world: World) -> None:
    said = {notes.SUBNET: {"ipv4": ["subnet-v4"]}, notes.IP_NUMBER: "+1"}

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            app = Auto(world, pools, store, "auto", replicas=2)
            adding = asyncio.create_task(ipam.add(app.pod(0, said).call()))
            await app.pool(3, uid="of-another-application", short="not-mine")
            await app.pool(3, nic="net1", short="not-eth0")
            await seen(ipam, *pools.made)
            await asyncio.sleep(0.1)
            assert not adding.done()
            name = await app.pool(2)  # too few: 2 replicas and one more
            await seen(ipam, name)
            await asyncio.sleep(0.1)
            assert not adding.done()
            pool = await store.get(Pool, name)
            network = pool.spec.subnet.removesuffix("0.0/16")
            grown = structs.replace(pool.spec, ips=[*(pool.spec.ips or []), f"{network}200.1"])
            await store.update(structs.replace(pool, spec=grown))
            async with asyncio.timeout(5):
                assert await pools.of(await adding) == ["auto"]
            # the second needs not wait, and a pod of somebody else may not use the pool
            assert await pools.of(await ipam.add(app.pod(1, said).call())) == ["auto"]
            thief = world.pod("thief", node=world.nodes[0], said={notes.IPPOOL: {"ipv4": [name]}})
            with pytest.raises(NoPoolError, match="it was made for apps_v1_Deployment"):
                await ipam.add(thief.call())

    asyncio.run(scenario())


def test_what_is_awaited_in_vain_is_told(world: World) -> None:
    said = {notes.SUBNETS: [{"interface": "net1", "ipv4": ["subnet-v4"]}], notes.IP_NUMBER: "5"}

    async def scenario() -> None:
        async with ipam_of(world, settings=replace(SETTINGS, auto_pool_wait=0.3)) as (ipam, store, pools):
            app = Auto(world, pools, store, "vain", replicas=1)
            pod = app.pod(0, said)
            with pytest.raises(TryAgainLaterError, match=r"interface=net1.*owner-spider-subnet=subnet-v4"):
                await ipam.add(pod.call("net1"))
            await seen(ipam, await app.pool(2, nic="net1"))
            assert await pools.of(await ipam.add(pod.call("net1"))) == ["auto"]  # too few, but what is there may do
            await seen(ipam, await app.pool(2, nic="net1", short="twin"))
            with pytest.raises(InvalidConfigError, match="several automatic IPPools"):
                await ipam.add(app.pod(1, said).call("net1"))

    asyncio.run(scenario())


@pytest.mark.upstream("I00023", "I00024")
def test_pods_that_get_no_automatic_pool(world: World) -> None:
    said = {notes.SUBNET: {"ipv4": ["subnet-v4"]}}

    async def scenario() -> None:
        async with ipam_of(world) as (ipam, store, pools):
            with pytest.raises(InvalidConfigError, match="doesn't support no-controller pod"):
                await ipam.add(world.pod("lonely", node=world.nodes[0], said=said).call())
            app = Auto(world, pools, store, "off", replicas=1)
        async with ipam_of(world, settings=replace(SETTINGS, enable_auto_pools=False)) as (ipam, store, _):
            with pytest.raises(InvalidConfigError, match="when Auto-Pool feature is disabled"):
                await ipam.add(app.pod(0, said).call())
            assert not (await store.list(Claim, Query(labels={LABEL_POOL: label_value("auto")}))).items

    asyncio.run(scenario())
