"""Taking addresses back, against a real API server and its controllers; pods are made by hand, and no kubelet runs."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import signal
from collections.abc import AsyncGenerator, Iterator
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from api.apps import StatefulSet
from api.claim import LABEL_IDENTITY, Claim, Controller, Provided, identity_label
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import FINALIZER, ObjectMeta, R, now
from api.pool import PoolStatus
from lab.kube.cluster import Cluster
from lab.kube.components import SERVER
from store.port import EVERYTHING, Event, Listing, Query, Store
from store.provider import ProviderSettings
from tests.kube.conftest import running
from tests.kube.reclaim_rig import QUICK, Api, api, is_gone, leading, left, new_claim, opened, pool, stays, until
from tests.kube.reclaim_rig import until_gone as gone

_numbers = itertools.count(1)
NOBODY = "99999999-9999-4999-8999-99999999999{}"


@pytest.fixture(name="server", scope="module")
def a_cluster_of_its_own() -> Iterator[Cluster]:
    with running() as cluster:
        yield cluster


def address() -> str:
    number = next(_numbers)
    return f"10.7.{number // 250}.{number % 250 + 1}"


async def held(store: Store, namespace: str, name: str, uid: str, **more: Any) -> Claim:
    """A claim of that pod, in the store."""
    return await store.create(new_claim(address(), namespace=namespace, name=name, uid=uid, **more))


@pytest.mark.upstream("G00001", "G00002")
def test_a_namespace_goes_with_its_addresses_and_others_stay(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.namespace("gone")
            await admin.namespace("stays")
            doomed = [await held(rooms.store, "gone", f"p{i}", await admin.pod("gone", f"p{i}")) for i in range(40)]
            doomed += [await held(rooms.store, "gone", "p0", doomed[0].spec.pod_uid, nic="net1")]
            kept = [await held(rooms.store, "stays", f"p{i}", await admin.pod("stays", f"p{i}")) for i in range(3)]
            current = EndpointCurrent(uid=doomed[0].spec.pod_uid, node="n", ips=[EndpointIP(interface="eth0")])
            status = EndpointStatus(current=current, owner_controller_type="Pod", owner_controller_name="p0")
            meta = ObjectMeta(name="p0", namespace="gone", finalizers=[FINALIZER])
            await rooms.store.create(Endpoint(metadata=meta, status=status))
            await admin.call("DELETE", "/api/v1/namespaces/gone")
            await gone(rooms.store, *doomed)
            await stays(rooms.store, *kept, seconds=0.3)

            async def namespace_is_gone() -> bool:
                names = (await admin.call("GET", "/api/v1/namespaces"))["items"]
                return all(item["metadata"]["name"] != "gone" for item in names)

            await until(namespace_is_gone, 30)  # which upstream's finalizer would have kept

    asyncio.run(main())


@pytest.mark.upstream("G00004")
def test_a_deletion_frees_after_its_time_and_a_forced_one_when_the_kubelet_may_be_through(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.node("polite")
            forced = await held(
                rooms.store, "default", "forced", await admin.pod("default", "forced", node="polite", grace=2)
            )
            polite = await held(rooms.store, "default", "polite", await admin.pod("default", "polite", node="polite"))
            rude = await held(rooms.store, "default", "rude", await admin.pod("default", "rude", node="polite"))
            await admin.delete_pod("default", "forced")
            await admin.delete_pod("default", "polite", grace=600)
            await admin.delete_pod("default", "rude", grace=3)
            await stays(rooms.store, forced, polite, rude, seconds=1.2)
            await gone(rooms.store, forced)  # nobody knew of its kubelet
            await gone(rooms.store, rude)  # its pod is still there, and past its time
            assert "rude" in await admin.pods("default")
            await stays(rooms.store, polite, seconds=0.3)
            await admin.delete_pod("default", "polite")
            await admin.delete_pod("default", "rude")
            await stays(rooms.store, polite, seconds=0.7)  # it had 600 s, of which most are left
            await rooms.store.delete(Claim, polite.metadata.name)

    asyncio.run(main())


@pytest.mark.upstream("G00005", "G00007")
def test_dirty_records_are_cleaned_and_live_pods_are_not_by_mistake(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store, api(server) as admin:
            uid = await admin.pod("default", "clean")
            await admin.phase("default", "clean", "Running")
            right = await held(store, "default", "clean", uid)
            other_name = await held(store, "default", "called-otherwise", uid, nic="net1")
            other_namespace = await held(store, "kube-system", "clean", uid, nic="net2")
            nameless = await store.create(new_claim(address(), uid=uid, nic="net3"))
            wrong_uid = await held(store, "default", "clean", NOBODY.format(1))
            wrong_name = await held(store, "default", "nobody", NOBODY.format(2))
            wrong_both = await store.create(new_claim(address(), uid=NOBODY.format(3), pool="there-is-no-such-pool"))
            async with leading(server) as rooms:
                await gone(store, wrong_uid, wrong_name, wrong_both)
                rooms.reclaim.scan()
                await stays(store, right, other_name, other_namespace, nameless)
                await admin.delete_pod("default", "clean")
                await gone(store, right, other_name, other_namespace, nameless)

    asyncio.run(main())


@pytest.mark.upstream("G00006")
def test_finished_pods_give_their_addresses_back_while_they_are_still_there(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.node("jobs")
            claims = {}
            for name in ("won", "lost", "lately", "works"):
                uid = await admin.pod("default", name, node="jobs", grace=1 if name != "lately" else 600)
                claims[name] = await held(rooms.store, "default", name, uid)
            await admin.phase("default", "works", "Running")
            await admin.phase("default", "won", "Succeeded", ended=30)
            await admin.phase("default", "lost", "Failed", ended=0)
            await admin.phase("default", "lately", "Succeeded", ended=0)
            await gone(rooms.store, claims["won"], claims["lost"])
            assert set(claims) <= set(await admin.pods("default"))

            async def told() -> bool:
                return any(reason == "AddressReleased" for reason, _ in await admin.events("default", "won"))

            await until(told)
            rooms.reclaim.scan()
            await stays(rooms.store, claims["lately"], claims["works"])
            for name in claims:
                await admin.delete_pod("default", name)
            await gone(rooms.store, *claims.values())

    asyncio.run(main())


@pytest.mark.upstream("G00009")
def test_nodes_that_are_lost(server: Cluster) -> None:
    async def main() -> None:
        settings = dataclasses.replace(QUICK, ended_on_ready_node=False)
        async with leading(server, settings) as rooms, api(server) as admin:
            await admin.node("sick")
            await admin.node("well")
            claims = {}
            for name in ("sick", "well"):
                uid = await admin.pod("default", f"on-{name}", node=name, grace=1)
                claims[name] = await held(rooms.store, "default", f"on-{name}", uid, node=name)
                await admin.phase("default", f"on-{name}", "Running")
                await admin.delete_pod("default", f"on-{name}", grace=1)
            running_there = await held(
                rooms.store, "default", "up", await admin.pod("default", "up", node="sick", grace=1)
            )
            await admin.phase("default", "up", "Running")
            await asyncio.sleep(1.5)  # past the grace period and its delay
            await stays(rooms.store, *claims.values(), seconds=0.5)
            await admin.node("well")  # or after ten seconds Kubernetes would call it lost
            await admin.node("sick", ready=False)
            await gone(rooms.store, claims["sick"])
            await stays(rooms.store, claims["well"], running_there)
            for name in ("on-sick", "on-well", "up"):
                await admin.delete_pod("default", name)
            await gone(rooms.store, claims["well"], running_there)

    asyncio.run(main())


def test_lost_nodes_are_left_to_their_return_if_that_is_wanted(server: Cluster) -> None:
    async def main() -> None:
        settings = dataclasses.replace(QUICK, ended_on_lost_node=False)
        async with leading(server, settings) as rooms, api(server) as admin:
            await admin.node("away", ready=False)
            claim = await held(rooms.store, "default", "waits", await admin.pod("default", "waits", node="away"))
            await admin.delete_pod("default", "waits", grace=1)
            await asyncio.sleep(1.5)
            await stays(rooms.store, claim, seconds=0.5)
            await admin.node("away", ready=True)
            await gone(rooms.store, claim)
            await admin.delete_pod("default", "waits")

    asyncio.run(main())


def test_containers_without_a_pod_are_their_agents_until_the_node_is_gone(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.node("machine")
            claim = await rooms.store.create(new_claim(address(), node="machine", container="c1"))
            by_hand = await rooms.store.create(new_claim(address(), node="machine", container=""))
            rooms.reclaim.scan()
            await stays(rooms.store, claim, by_hand)
            await admin.call("DELETE", "/api/v1/nodes/machine")
            await stays(rooms.store, claim, seconds=0.3)
            await gone(rooms.store, claim)
            await stays(rooms.store, by_hand, seconds=0.2)
            await rooms.store.delete(Claim, by_hand.metadata.name)

    asyncio.run(main())


def test_quarantines_end_even_if_nothing_else_is_reclaimed(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server, dataclasses.replace(QUICK, enabled=False)) as rooms:
            soon = await rooms.store.create(new_claim(address(), until=now() + timedelta(seconds=1)))
            later = await rooms.store.create(new_claim(address(), until=now() + timedelta(seconds=600)))
            leaked = await held(rooms.store, "default", "nobody", NOBODY.format(4))
            await gone(rooms.store, soon)
            await stays(rooms.store, later, leaked)
            for claim in (later, leaked):
                await rooms.store.delete(Claim, claim.metadata.name)

    asyncio.run(main())


@pytest.mark.upstream("G00010")
def test_a_stateful_set_keeps_what_its_pods_will_want_again(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.node("stateful")
            path = "/apis/apps/v1/namespaces/default/statefulsets"
            made = await admin.call("POST", path, stateful_set("db", 3, "stateful"))
            top = Controller(api_version="apps/v1", kind="StatefulSet", name="db", uid=made["metadata"]["uid"])
            claims, uids = {}, {}
            for name in ("db-0", "db-1", "db-2"):
                uids[name] = await there(admin, name)
                claims[name] = await held(rooms.store, "default", name, uids[name], controller=top, static=name)
            await admin.delete_pod("default", "db-0")
            assert await there(admin, "db-0", other_than=uids["db-0"])
            await stays(rooms.store, *claims.values())
            await admin.call("PATCH", f"{path}/db", {"spec": {"replicas": 1}}, **{"Content-Type": MERGE})
            await kubelet(admin, "db-1", "db-2")
            await gone(rooms.store, claims["db-1"], claims["db-2"])
            await stays(rooms.store, claims["db-0"])
            await admin.phase("default", "db-0", "Running")  # up, and it did not take over what the claim holds
            await gone(rooms.store, claims["db-0"])
            uid = await there(admin, "db-0")
            again = await held(rooms.store, "default", "db-0", uid, controller=top, static="db-0")
            await admin.call("DELETE", f"{path}/db")
            await stays(rooms.store, again, seconds=0.3)
            await kubelet(admin, "db-0")
            await gone(rooms.store, again)

    asyncio.run(main())


@pytest.mark.upstream("G00003", "G00012")
def test_every_kind_of_workload_and_all_of_them_from_one_pool(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            await admin.namespace("kinds")
            await admin.node("any")
            pods: dict[str, Any] = {
                "metadata": {"labels": {"app": "x"}},
                "spec": {"containers": [{"name": "c", "image": "none"}], "terminationGracePeriodSeconds": 1},
            }
            once = {**pods, "spec": {**pods["spec"], "restartPolicy": "Never"}}
            select = {"selector": {"matchLabels": {"app": "x"}}}
            workloads = {
                "apps/v1/namespaces/kinds/deployments": {"replicas": 2, **select, "template": pods},
                "apps/v1/namespaces/kinds/replicasets": {"replicas": 2, **select, "template": pods},
                "apps/v1/namespaces/kinds/daemonsets": {**select, "template": pods},
                "batch/v1/namespaces/kinds/jobs": {"parallelism": 2, "template": once},
            }
            for path, spec in workloads.items():
                name = path.rpartition("/")[2]
                labels = json.loads(json.dumps(spec).replace('"app": "x"', f'"app": "{name}"'))
                await admin.call("POST", f"/apis/{path}", {"metadata": {"name": name}, "spec": labels})
            stateful = stateful_set("statefulsets", 2, "")
            await admin.call("POST", "/apis/apps/v1/namespaces/kinds/statefulsets", stateful)
            paths = {*workloads, "apps/v1/namespaces/kinds/statefulsets"}

            async def all_there() -> bool:
                kinds = {name.partition("-")[0] for name in await admin.pods("kinds")}
                return kinds == {path.rpartition("/")[2] for path in paths}

            await until(all_there)
            claims = []
            for name, item in (await admin.pods("kinds")).items():
                top = Controller(api_version="apps/v1", kind="StatefulSet", name="statefulsets", uid="u")
                is_static = name.startswith("statefulsets")
                more: Any = {"controller": top, "static": name} if is_static else {}
                claims.append(await held(rooms.store, "kinds", name, item["metadata"]["uid"], **more))
            await stays(rooms.store, *claims, seconds=0.3)
            for path in paths:
                background = {"propagationPolicy": "Background"}
                await admin.call("DELETE", f"/apis/{path}/{path.rpartition('/')[2]}", background)
            await gone(rooms.store, *claims, seconds=40)
            await admin.call("DELETE", "/api/v1/namespaces/kinds")
            await admin.call("DELETE", "/api/v1/nodes/any")

    asyncio.run(main())


def test_an_endpoint_that_tells_of_released_addresses_goes_with_them(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms:
            top = Controller(api_version="apps/v1", kind="StatefulSet", name="no-such", uid="u")
            uid = NOBODY.format(5)
            claim = new_claim(
                address(), namespace="default", name="no-such-0", uid=uid, controller=top, static="no-such-0"
            )
            nic = EndpointIP(interface="eth0", ipv4=f"{claim.spec.address}/16", ipv4_pool="p")
            status = EndpointStatus(
                current=EndpointCurrent(uid=uid, node="n", ips=[nic]),
                owner_controller_type="StatefulSet",
                owner_controller_name="no-such",
            )
            meta = ObjectMeta(name="no-such-0", namespace="default", finalizers=[FINALIZER])
            await rooms.store.create(Endpoint(metadata=meta, status=status))
            await rooms.store.create(claim)
            await gone(rooms.store, claim)
            await until(lambda: is_gone(rooms.store, Endpoint, "no-such-0", "default"))

    asyncio.run(main())


def test_outdated_endpoints_are_cleaned_if_that_is_wanted(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store, api(server) as admin:
            uid = await admin.pod("default", "alive")
            claim = await held(store, "default", "claimed", NOBODY.format(6), container="x")
            foreign = await pool(store, "upstreams", "10.44.0.1-10.44.0.9")
            records = json.dumps({"10.44.0.1": {"pod": "default/recorded", "podUid": NOBODY.format(7)}})
            await store.update_status(replace(foreign, status=PoolStatus(allocated_ips=records)))
            for name, of, nic in (
                ("alive", uid, EndpointIP(interface="eth0")),
                ("outdated", NOBODY.format(8), EndpointIP(interface="eth0", ipv4="10.9.9.9/16", ipv4_pool="x")),
                (
                    "recorded",
                    NOBODY.format(7),
                    EndpointIP(interface="eth0", ipv4="10.44.0.1/16", ipv4_pool="upstreams"),
                ),
            ):
                status = EndpointStatus(
                    current=EndpointCurrent(uid=of, node="n", ips=[nic]),
                    owner_controller_type="Pod",
                    owner_controller_name=name,
                )
                meta = ObjectMeta(name=name, namespace="default", finalizers=[FINALIZER])
                await store.create(Endpoint(metadata=meta, status=status))
            async with leading(server) as rooms:
                await gone(store, claim)
                rooms.reclaim.scan()
                await asyncio.sleep(0.3)
                assert len((await store.list(Endpoint, Query(namespace="default"))).items) == 3
            async with leading(server, dataclasses.replace(QUICK, clean_outdated_endpoints=True)):
                await until(lambda: is_gone(store, Endpoint, "outdated", "default"))
                await asyncio.sleep(0.3)
                names = {each.metadata.name for each in (await store.list(Endpoint, Query(namespace="default"))).items}
                assert names == {"alive", "recorded"}
            for name in names:
                found = await store.get(Endpoint, name, "default")
                await store.update(replace(found, metadata=replace(found.metadata, finalizers=[])))
                await store.delete(Endpoint, name, "default")
            await admin.delete_pod("default", "alive")

    asyncio.run(main())


def test_virtual_machines_keep_their_addresses_until_they_are_gone(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            for plural, kind in (("virtualmachines", "VirtualMachine"), ("virtualmachineinstances", MACHINE)):
                await define(admin, plural, kind)
            path = "/apis/kubevirt.io/v1/namespaces/default/virtualmachines"
            body = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "vm"}}
            await until(lambda: served(admin, path))
            await admin.call("POST", path, body)
            top = Controller(api_version="kubevirt.io/v1", kind=MACHINE, name="vm", uid="u")
            uid = await admin.pod("default", "virt-launcher-vm-x")
            claim = await held(rooms.store, "default", "virt-launcher-vm-x", uid, controller=top, static="vm")
            await admin.delete_pod("default", "virt-launcher-vm-x")
            rooms.reclaim.scan()
            await stays(rooms.store, claim)
            await admin.call("DELETE", f"{path}/vm")
            rooms.reclaim.scan()  # the kinds came after the start: their cache looks for them now and then only
            await gone(rooms.store, claim)

    asyncio.run(main())


def test_what_was_taken_over_in_the_last_moment_stays(server: Cluster) -> None:
    class Meddler(Through):
        """Before the claim's deletion its successor takes it over."""

        done = False

        async def delete(
            self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
        ) -> None:
            if kind is Claim and name == contested.metadata.name and not self.done:
                self.done = True
                current = await self.inner.get(Claim, name)
                labels = {**current.metadata.labels, LABEL_IDENTITY: identity_label(successor, "")}
                meta = replace(current.metadata, labels=labels)
                await self.inner.update(replace(current, metadata=meta, spec=replace(current.spec, pod_uid=successor)))
            await self.inner.delete(kind, name, namespace, uid=uid, resource_version=resource_version)

    contested = new_claim(address(), namespace="default", name="heir", uid=NOBODY.format(9))
    successor = ""

    async def main() -> None:
        nonlocal successor
        async with api(server) as admin, opened(server) as store:
            successor = await admin.pod("default", "heir")
            await store.create(contested)
            meddlers: list[Meddler] = []

            def meddle(inner: Store) -> Store:
                meddlers.append(Meddler(inner))
                return meddlers[0]

            async with leading(server, wrap=meddle):
                await until(lambda: truth(meddlers[0].done))
                await stays(store, contested)
                assert (await store.get(Claim, contested.metadata.name)).spec.pod_uid == successor
                await admin.delete_pod("default", "heir")
                await gone(store, contested)

    asyncio.run(main())


def test_the_infrastructure_provider_is_told_first(server: Cluster) -> None:
    async def main() -> None:
        told: list[Any] = []

        async def answer(request: web.BaseRequest) -> web.Response:
            told.append(json.loads(await request.read()))
            return web.Response(status=503 if len(told) < 3 else 200)

        runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = ProviderSettings(server_url=f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            async with leading(server, provider=provider) as rooms:
                claim = new_claim(address(), namespace="default", name="bound", uid=NOBODY.format(0))
                bound = Provided(subnet="10.7.0.0/16", parent_mac="02:00:00:00:00:02")
                claim = await rooms.store.create(replace(claim, spec=replace(claim.spec, provided=bound)))
                await until(lambda: truth(bool(told)))
                assert await left(rooms.store, [claim])
                await gone(rooms.store, claim)
                assert len(told) == 3
                assert told[0]["ipAddress"] == claim.spec.address
        finally:
            await runner.cleanup()

    asyncio.run(main())


def test_the_infrastructure_provider_keeps_what_a_successor_took_over(server: Cluster) -> None:
    class Meddler(Through):
        """Between the judgement, of which the StatefulSet is read last, and the release the successor takes it over."""

        async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
            if kind is StatefulSet and not told and name == "db":
                claim = await self.inner.get(Claim, contested.metadata.name)
                if claim.spec.pod_uid != successor:
                    labels = {**claim.metadata.labels, LABEL_IDENTITY: identity_label(successor, "")}
                    claim = replace(claim, metadata=replace(claim.metadata, labels=labels))
                    await self.inner.update(replace(claim, spec=replace(claim.spec, pod_uid=successor)))
                    done.append(name)
            return await self.inner.get(kind, name, namespace)

    told: list[Any] = []
    done: list[str] = []
    top = Controller(api_version="apps/v1", kind="StatefulSet", name="db", uid="u")
    contested = new_claim(
        address(), namespace="default", name="db-0", uid=NOBODY.format(8), controller=top, static="db-0"
    )
    bound = Provided(subnet="10.7.0.0/16", parent_mac="02:00:00:00:00:02")
    contested = replace(contested, spec=replace(contested.spec, provided=bound))
    successor = ""

    async def main() -> None:
        nonlocal successor

        async def answer(request: web.BaseRequest) -> web.Response:
            told.append(json.loads(await request.read()))
            return web.Response()

        runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = ProviderSettings(server_url=f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            async with api(server) as admin, opened(server) as store:
                successor = await admin.pod("default", "db-0")
                claim = await store.create(contested)
                async with leading(server, wrap=Meddler, provider=provider):
                    await until(lambda: truth(bool(done)))
                    await stays(store, claim)
                    assert not told
                    await admin.delete_pod("default", "db-0")
                    await gone(store, claim)
                    assert [each["podUID"] for each in told] == [successor]
        finally:
            await runner.cleanup()

    asyncio.run(main())


@pytest.mark.upstream("G00008")
def test_a_leader_that_is_replaced_again_and_again_finishes_the_work(server: Cluster) -> None:
    async def main() -> None:
        dice = random.Random(7)
        async with opened(server) as store, api(server) as admin:
            alive = [await held(store, "default", f"a{i}", await admin.pod("default", f"a{i}")) for i in range(5)]
            made = [new_claim(address(), namespace="default", name=f"leak{i}", uid=f"leak-{i}") for i in range(300)]
            await asyncio.gather(*(store.create(claim) for claim in made))
            slow = dataclasses.replace(QUICK, rate=150, workers=4)
            reigns = 0
            while await left(store, made):
                assert reigns < 40
                async with leading(server, slow):
                    await asyncio.sleep(dice.uniform(0.05, 0.8))
                reigns += 1
            assert reigns > 2
            await stays(store, *alive, seconds=0.2)
            for i in range(5):
                await admin.delete_pod("default", f"a{i}")
            async with leading(server):
                await gone(store, *alive)

    asyncio.run(main())


def test_an_api_server_that_is_killed_in_the_middle(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store, api(server) as admin:
            alive = await held(store, "default", "alive", await admin.pod("default", "alive"))
            made = [new_claim(address(), namespace="default", name=f"leak{i}", uid=f"leak-{i}") for i in range(300)]
            await asyncio.gather(*(store.create(claim) for claim in made))
            async with leading(server, dataclasses.replace(QUICK, rate=150)):

                async def begun() -> bool:
                    return len(await left(store, made)) < 280

                await until(begun)
                await asyncio.to_thread(server.stop, SERVER, signal.SIGKILL)
                await asyncio.to_thread(server.start, SERVER)
                await gone(store, *made, seconds=60)
                await stays(store, alive, seconds=0.2)
                await admin.delete_pod("default", "alive")
                await gone(store, alive)

    asyncio.run(main())


MACHINE = "VirtualMachineInstance"
MERGE = "application/merge-patch+json"


def stateful_set(name: str, replicas: int, node: str) -> dict[str, Any]:
    labels = {"app": name}
    return {
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    **({"nodeName": node} if node else {}),
                    "containers": [{"name": "c", "image": "none"}],
                    "terminationGracePeriodSeconds": 1,
                },
            },
        },
    }


async def there(admin: Api, name: str, other_than: str = "") -> str:
    """The UID of a pod that a controller makes, once it is there."""
    found = ""

    async def look() -> bool:
        nonlocal found
        found = (await admin.pods("default")).get(name, {}).get("metadata", {}).get("uid", "")
        return bool(found) and found != other_than

    await until(look)
    return found


async def kubelet(admin: Api, *names: str) -> None:
    """Confirm the deletions of pods that their controller deletes."""
    waiting = set(names)

    async def confirmed() -> bool:
        for name, item in (await admin.pods("default")).items():
            if name in waiting and "deletionTimestamp" in item["metadata"]:
                await admin.delete_pod("default", name)
                waiting.discard(name)
        return not waiting

    await until(confirmed)


async def define(admin: Api, plural: str, kind: str) -> None:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"}
    spec = {"group": "kubevirt.io", "scope": "Namespaced", "names": names, "versions": [version]}
    body = {"metadata": {"name": f"{plural}.kubevirt.io"}, "spec": spec}
    await admin.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)


async def served(admin: Api, path: str) -> bool:
    try:
        await admin.call("GET", path)
    except AssertionError:
        return False
    return True


async def truth(value: bool) -> bool:
    return value


class Through(Store):
    """A store that does what another one does."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        return await self.inner.get(kind, name, namespace)

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        return await self.inner.list(kind, query)

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        return self.inner.watch(kind, query, since)

    async def create(self, resource: R) -> R:
        return await self.inner.create(resource)

    async def update(self, resource: R) -> R:
        return await self.inner.update(resource)

    async def update_status(self, resource: R) -> R:
        return await self.inner.update_status(resource)

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        await self.inner.delete(kind, name, namespace, uid=uid, resource_version=resource_version)

    async def close(self) -> None:
        await self.inner.close()
