"""Addresses that outlive pods: StatefulSets' pods over nodes, restarts, scaling and changed annotations."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from api.claim import LABEL_WORKLOAD, Claim
from api.core import Pod
from api.endpoint import Endpoint
from api.pool import Pool
from lab.kube.cluster import Cluster
from plugins.errors import ExhaustedError, NoPoolError, PodGoneError
from plugins.ipam.pods import PodFacts, Pods
from plugins.ipam.settings import IpamSettings
from tests.integration.ipam_rig import addresses, running, until
from tests.kube.ipam_pods import IPPOOLS, NETWORKS, World, pools, world

TEMPLATE = "template"


async def settled(ipam: Any) -> None:
    async def idle() -> bool:
        return bool(ipam._endpoints.idle)

    await until(idle)


def annotated(annotations: dict[str, str]) -> dict[str, Any]:
    return {TEMPLATE: {"metadata": {"annotations": annotations}}}


@pytest.mark.upstream("E00003", "L00008")
def test_a_pod_made_anew_on_another_node_has_the_same_addresses(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node("node1") as one, there.node("node2") as two:
            v4, v6 = await there.pool("v4", 10, 99), await there.pool("v6", 16, 153, v6=True)
            await there.stateful_set("db", 2, pools(v4, v6=(v6,)))
            first = await there.bound("db-0", "node1")
            other = await there.bound("db-1", "node1")
            given = await one.add(first.call())
            await one.add(other.call())
            claim = (await there.claims())[addresses(given)[0]]
            workload = claim.spec.workload
            assert workload is not None
            assert workload.controller is not None
            assert (workload.name, workload.pod, workload.controller.kind) == ("db-0", "", "StatefulSet")
            assert (workload.controller.name, workload.controller.api_version) == ("db", "apps/v1")
            await settled(one)

            await there.delete_pod(first)
            second = await there.bound("db-0", "node2", not_=first.uid)
            await one.delete(first.call("DEL"))
            assert await two.add(second.call()) == given
            held = await there.claims()
            assert len(held) == 4
            for address in addresses(given):
                spec = held[address].spec
                assert (spec.pod_uid, spec.node, spec.container_id) == (second.uid, "node2", f"box-{second.uid}")
                assert LABEL_WORKLOAD in held[address].metadata.labels
            await one.delete(first.call("DEL"))  # it comes late, and again
            await two.delete(first.call("DEL"))
            await two.delete(first.call("DEL", container=f"box-{second.uid}"))
            assert set(addresses(given)) <= (await there.claims()).keys()

            await settled(two)
            endpoint = await there.endpoint("db-0")
            assert endpoint is not None
            assert endpoint.status is not None
            assert (endpoint.status.current.uid, endpoint.status.current.node) == (second.uid, "node2")
            assert endpoint.status.owner_controller_type == "StatefulSet"
            assert endpoint.status.owner_controller_name == "db"
            assert not endpoint.metadata.owner_references
            assert not endpoint.metadata.finalizers

    asyncio.run(main())


def test_without_an_endpoint_the_claims_are_found_by_their_label(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node1")
            given = await ipam.add(first.call())
            await settled(ipam)
            await there.store.inner.delete(Endpoint, "db-0", there.namespace)
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            assert await ipam.add(second.call()) == given
            assert list(await there.claims()) == addresses(given)

    asyncio.run(main())


def test_an_endpoint_that_lies_gives_nobody_an_address(kube: Cluster) -> None:
    """It names another pod's address: the claim says whose that is."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 2, pools(v4))
            first, other = await there.bound("db-0", "node1"), await there.bound("db-1", "node1")
            given, others = await ipam.add(first.call()), await ipam.add(other.call())
            await settled(ipam)
            endpoint = await there.endpoint("db-0")
            assert endpoint is not None
            assert endpoint.status is not None
            entry = replace(endpoint.status.current.ips[0], ipv4=f"{addresses(others)[0]}/24")
            status = replace(endpoint.status, current=replace(endpoint.status.current, ips=[entry]))
            await there.store.inner.update(replace(endpoint, status=status))
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            assert await ipam.add(second.call()) == given
            assert (await there.claims())[addresses(others)[0]].spec.pod_uid == other.uid

    asyncio.run(main())


@pytest.mark.upstream("G00011")
def test_scaling_down_frees_and_scaling_up_again_gives(kube: Cluster) -> None:
    """Two StatefulSets share a pool that is just large enough."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 13)
            for name in ("a", "b"):
                await there.stateful_set(name, 2, pools(v4))
            started = {name: await there.bound(name, "node1") for name in ("a-0", "a-1", "b-0", "b-1")}
            given = {name: addresses(await ipam.add(pod.call()))[0] for name, pod in started.items()}
            assert len(set(given.values())) == 4
            await settled(ipam)
            await there.patch_stateful_set("a", {"replicas": 1})

            async def leaves() -> bool:
                return not await there.ask("GET", there.path("/api/v1", "pods", "a-1"), missing_ok=True)

            await until(leaves, 20)
            await ipam.delete(started["a-1"].call("DEL"))
            assert set(await there.claims()) == set(given.values()) - {given["a-1"]}
            await settled(ipam)
            assert await there.endpoint("a-1") is None
            await there.patch_stateful_set("b", {"replicas": 3})
            third = await there.bound("b-2", "node1")
            assert addresses(await ipam.add(third.call())) == [given["a-1"]]
            await there.patch_stateful_set("a", {"replicas": 2})
            again = await there.bound("a-1", "node1")
            with pytest.raises(ExhaustedError, match=f"NIC eth0 of pod {there.namespace}/a-1: all IP addresses used"):
                await ipam.add(again.call())

    asyncio.run(main())


@pytest.mark.upstream("A00009")
def test_a_changed_annotation_moves_a_stateful_pod(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            old, new = await there.pool("old", 10, 19), await there.pool("new", 30, 39)
            v6 = await there.pool("v6", 16, 25, v6=True)
            await there.stateful_set("db", 1, pools(old, v6=(v6,)))
            first = await there.bound("db-0", "node1")
            before = addresses(await ipam.add(first.call()))
            await settled(ipam)
            await there.patch_stateful_set("db", annotated(pools(new, v6=(v6,))))
            second = await there.bound("db-0", "node1", not_=first.uid)
            await ipam.delete(first.call("DEL"))
            after = addresses(await ipam.add(second.call()))
            assert after[0] in {there.address(number) for number in range(30, 40)}
            assert after[1] == before[1]
            held = await there.claims()
            assert set(held) == set(after)
            assert {claim.spec.set_size for claim in held.values()} == {2}

            # One family less, and a disabled pool: what is named stays, though it may not serve.
            pool = await there.store.inner.get(Pool, new)
            await there.store.inner.update(replace(pool, spec=replace(pool.spec, disable=True)))
            await there.patch_stateful_set("db", annotated(pools(new)))
            third = await there.bound("db-0", "node1", not_=second.uid)
            assert addresses(await ipam.add(third.call())) == after[:1]
            assert set(await there.claims()) == {after[0]}

            # What cannot be served gives nothing up.
            await there.patch_stateful_set("db", annotated(pools("none")))
            fourth = await there.bound("db-0", "node1", not_=third.uid)
            with pytest.raises(NoPoolError, match="none: there is no such pool"):
                await ipam.add(fourth.call())
            assert set(await there.claims()) == {after[0]}

    asyncio.run(main())


@pytest.mark.upstream("A00010", "A00017")
def test_two_nics_by_networks_restart_and_move(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node("node1") as one, there.node("node2") as two:
            p0, p1, p2 = await there.pool("p0", 10, 19), await there.pool("p1", 30, 39), await there.pool("p2", 50, 59)

            def nics(second: str) -> dict[str, str]:
                items = [{"interface": "eth0", "ipv4": [p0]}, {"interface": "net1", "ipv4": [second]}]
                return {IPPOOLS: json.dumps(items), NETWORKS: "kube-system/second@net1"}

            await there.stateful_set("db", 1, nics(p1))
            first = await there.bound("db-0", "node1")
            eth0, net1 = await one.add(first.call()), await one.add(first.call(nic="net1"))
            assert addresses(net1)[0] in {there.address(number) for number in range(30, 40)}
            await settled(one)
            endpoint = await there.endpoint("db-0")
            assert endpoint is not None
            assert endpoint.status is not None
            assert [entry.interface for entry in endpoint.status.current.ips] == ["eth0", "net1"]

            await there.delete_pod(first)
            second = await there.bound("db-0", "node2", not_=first.uid)
            assert await two.add(second.call()) == eth0
            await settled(two)
            there.store.counts.clear()
            assert await two.add(second.call(nic="net1")) == net1
            assert there.store.counts["list", "SpiderIPClaim"] == 0, "the endpoint had the hint"

            await there.patch_stateful_set("db", annotated(nics(p2)))
            third = await there.bound("db-0", "node1", not_=second.uid)
            assert await one.add(third.call()) == eth0
            moved = addresses(await one.add(third.call(nic="net1")))
            assert moved[0] in {there.address(number) for number in range(50, 60)}
            assert set(await there.claims()) == {*addresses(eth0), *moved}
            for nic in ("net1", "eth0"):
                await one.delete(third.call("DEL", nic=nic))
                await one.delete(first.call("DEL", nic=nic))
            assert set(await there.claims()) == {*addresses(eth0), *moved}

    asyncio.run(main())


@pytest.mark.upstream("A00018")
def test_two_nics_without_names_restart_and_move(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            p0, p1, p2 = await there.pool("p0", 10, 19), await there.pool("p1", 30, 39), await there.pool("p2", 50, 59)

            def nics(*names: str) -> dict[str, str]:
                return {IPPOOLS: json.dumps([{"ipv4": [name]} for name in names]), NETWORKS: "kube-system/second"}

            await there.stateful_set("db", 1, nics(p0, p1))
            first = await there.bound("db-0", "node1")
            eth0, net1 = await ipam.add(first.call()), await ipam.add(first.call(nic="net1"))
            await settled(ipam)
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            assert (await ipam.add(second.call()), await ipam.add(second.call(nic="net1"))) == (eth0, net1)
            await there.patch_stateful_set("db", annotated(nics(p2, p1)))
            third = await there.bound("db-0", "node1", not_=second.uid)
            moved, kept = await ipam.add(third.call()), await ipam.add(third.call(nic="net1"))
            assert addresses(moved)[0] in {there.address(number) for number in range(50, 60)}
            assert kept == net1
            assert set(await there.claims()) == {*addresses(moved), *addresses(net1)}

    asyncio.run(main())


def test_a_crash_between_take_over_and_answer(kube: Cluster) -> None:
    """The second of two claims is not taken over any more; the next agent completes the set with the same addresses."""

    async def main() -> None:
        async with world(kube) as there:
            v4, v6 = await there.pool("v4", 10, 99), await there.pool("v6", 16, 153, v6=True)
            await there.stateful_set("db", 1, pools(v4, v6=(v6,)))
            async with there.node("node1") as ipam:
                first = await there.bound("db-0", "node1")
                given = await ipam.add(first.call())
                await settled(ipam)
            await there.delete_pod(first)
            second = await there.bound("db-0", "node2", not_=first.uid)
            for crashes in (1, 2):
                async with there.node("node2") as ipam:
                    reached = asyncio.Event()

                    async def hang(_: Any, reached: asyncio.Event = reached) -> None:
                        reached.set()
                        await asyncio.Event().wait()

                    there.store.after["update", Claim] = hang
                    adding = asyncio.create_task(ipam.add(second.call()))
                    await reached.wait()
                    adding.cancel()
                    await asyncio.wait([adding])
                    there.store.after.clear()
                holders = [claim.spec.pod_uid for claim in (await there.claims()).values()]
                assert holders.count(second.uid) == crashes
            async with there.node("node2") as ipam:
                assert await ipam.add(second.call()) == given
            assert set(await there.claims()) == set(addresses(given))

    asyncio.run(main())


def test_a_pod_that_is_gone_takes_nothing_from_its_successor(kube: Cluster) -> None:
    """An ADD that was delayed, on an agent whose cache still shows the pod, comes after the successor's."""

    class Stale(Pods):
        """Its cache has fallen behind."""

        facts: PodFacts | None = None

        async def find(self, namespace: str, name: str, uid: str) -> PodFacts | None:
            return self.facts or await super().find(namespace, name, uid)

    async def main() -> None:
        async with world(kube) as there, there.node("node2") as two:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 1, pools(v4))
            stale = Stale(there.store, "node1", IpamSettings())
            async with running(there.store, node="node1", pods=stale) as one:
                first = await there.bound("db-0", "node1")
                stale.facts = await stale.find(there.namespace, "db-0", first.uid)
                await there.delete_pod(first)
                second = await there.bound("db-0", "node2", not_=first.uid)
                given = await two.add(second.call())
                with pytest.raises(PodGoneError, match="is gone"):
                    await one.add(first.call())
                (claim,) = (await there.claims()).values()
                assert ([claim.spec.address], claim.spec.pod_uid) == (addresses(given), second.uid)

    asyncio.run(main())


def test_a_failed_add_keeps_what_was_retained(kube: Cluster) -> None:
    """IPv6 was added to the annotation, and there is none: the IPv4 address waits for the next try."""

    async def main() -> None:
        async with world(kube) as there, there.node(settings=IpamSettings(partial_grace=0.4)) as ipam:
            v4, v6 = await there.pool("v4", 10, 99), await there.pool("v6", 16, 16, v6=True)
            blocker = await there.pod("blocker", pools(v6=(v6,)))
            await ipam.add(blocker.call())
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node1")
            given = await ipam.add(first.call())
            await settled(ipam)
            await there.patch_stateful_set("db", annotated(pools(v4, v6=(v6,))))
            second = await there.bound("db-0", "node1", not_=first.uid)
            for _ in range(2):
                with pytest.raises(ExhaustedError):
                    await ipam.add(second.call())
                await ipam.delete(second.call("DEL"))
            since = asyncio.get_running_loop().time()

            async def grace_is_over() -> bool:
                return asyncio.get_running_loop().time() > since + 1.0

            await until(grace_is_over)
            assert set(addresses(given)) < (await there.claims()).keys()
            await there.delete_pod(blocker)
            await ipam.delete(blocker.call("DEL"))
            again = addresses(await ipam.add(second.call()))
            assert again == [*addresses(given), there.address(16, v6=True)]

    asyncio.run(main())


def test_switched_off_nothing_is_retained(kube: Cluster) -> None:
    async def main() -> None:
        off = IpamSettings(enable_statefulset=False)
        async with world(kube) as there, there.node() as ipam, there.node("node2", settings=off) as without:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node2")
            await without.add(first.call())
            (claim,) = (await there.claims()).values()
            assert LABEL_WORKLOAD not in claim.metadata.labels
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            await without.delete(first.call("DEL"))
            assert not await there.claims()
            await ipam.add(second.call())
            assert len(await there.claims()) == 1

    asyncio.run(main())


def test_requests_of_a_take_over(kube: Cluster) -> None:
    """One write for each address, and a few reads; the endpoint's write comes after the answer."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4, v6 = await there.pool("v4", 10, 99), await there.pool("v6", 16, 153, v6=True)
            await there.stateful_set("db", 1, pools(v4, v6=(v6,)))
            first = await there.bound("db-0", "node1")
            await ipam.add(first.call())
            await settled(ipam)
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            await knows(ipam, there, second.name, second.uid)
            there.store.counts.clear()
            await ipam.add(second.call())
            assert there.store.counts == {
                ("update", "SpiderIPClaim"): 2,
                ("get", "SpiderEndpoint"): 1,
                ("get", "SpiderIPClaim"): 2,
                ("get", "Pod"): 1,
            }
            await settled(ipam)
            assert there.store.counts["update", "SpiderEndpoint"] == 1

    asyncio.run(main())


async def knows(ipam: Any, there: World, name: str, uid: str) -> None:
    """Return when the agent's cache has the pod, so that its ADD need not read it."""

    async def cached() -> bool:
        pod: Pod | None = ipam._pods._pods.get(name, there.namespace)
        return pod is not None and pod.metadata.uid == uid

    await until(cached)
