"""What a DEL, a GC and a restart of the agent do to claims of pods that are alive, going or gone, and of machines."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from api.annotations import MIGRATION
from api.claim import Claim
from api.core import Pod
from api.endpoint import Endpoint
from lab.kube.cluster import Cluster
from plugins.errors import ExhaustedError, PodGoneError, TryAgainLaterError
from store.errors import UnavailableError
from tests.integration.ipam_rig import addresses, until
from tests.kube.ipam_pods import IPPOOLS, NETWORKS, Started, World, define_kubevirt, pools, world
from tests.kube.test_ipam_retained import knows, settled


@pytest.fixture(scope="module")
def kubevirt(kube: Cluster) -> Cluster:
    define_kubevirt(kube)
    return kube


def test_a_sandbox_that_is_made_anew_keeps_the_addresses(kube: Cluster) -> None:
    """kubelet's order, and the wrong one: DEL before or after the next sandbox's ADD. Nothing is freed by the old."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            pod = await there.pod("a", pools(v4))
            given = await ipam.add(pod.call(container="one"))
            await ipam.delete(pod.call("DEL", container="one"))
            assert list(await there.claims()) == addresses(given)
            assert await ipam.add(pod.call(container="two")) == given
            assert await ipam.add(pod.call(container="three")) == given
            for container in ("two", "one"):
                await ipam.delete(pod.call("DEL", container=container))
            await ipam.gc(collect(("another", "eth0")))
            (claim,) = (await there.claims()).values()
            assert claim.spec.container_id == "three"
            await there.delete_pod(pod, seconds=30)
            await ipam.delete(pod.call("DEL", container="two"))
            assert await there.claims()
            await ipam.delete(pod.call("DEL", container="three"))
            assert not await there.claims()

    asyncio.run(main())


def test_gc_releases_only_what_no_pod_needs(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 1, pools(v4))
            gone, alive = await there.pod("gone", pools(v4)), await there.pod("alive", pools(v4))
            static = await there.bound("db-0", "node1")
            given = [addresses(await ipam.add(pod.call()))[0] for pod in (gone, alive, static)]
            await there.delete_pod(gone)
            await there.delete_pod(static)
            await ipam.gc(collect())
            assert set(await there.claims()) == set(given[1:])

    asyncio.run(main())


def collect(*valid: tuple[str, str]) -> Any:
    """A GC of the network that the pods' calls name."""
    items = [{"containerID": container, "ifname": nic} for container, nic in valid]
    base = Started("", "", "").call("GC", config={"cni.dev/valid-attachments": items})
    return dataclasses.replace(base, container_id="", ifname="")


@pytest.mark.upstream("G00004")
def test_a_pod_of_the_same_name_is_another_pod(kube: Cluster) -> None:
    """Deleted at once and made anew: no address passes, and the old one's DEL, which is late, frees its own alone."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            first = await there.pod("a", pools(v4))
            old = addresses(await ipam.add(first.call()))
            await settled(ipam)
            await there.delete_pod(first)
            second = await there.pod("a", pools(v4))
            new = addresses(await ipam.add(second.call()))
            assert old != new
            with pytest.raises(PodGoneError, match=f"failed to get Pod {there.namespace}/a"):
                await ipam.add(first.call())
            await ipam.delete(first.call("DEL"))
            assert list(await there.claims()) == new
            await settled(ipam)

            async def told() -> bool:
                endpoint = await there.endpoint("a")
                status = endpoint.status if endpoint is not None else None
                return status is not None and status.current.uid == second.uid

            await until(told)

    asyncio.run(main())


@pytest.mark.upstream("G00002")
def test_a_namesake_in_another_namespace_keeps_its_address(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as one, world(kube) as two, one.node() as ipam:
            v4 = await one.pool("v4", 10, 99)
            for there in (one, two):
                await there.stateful_set("db", 1, pools(v4))
            first, namesake = await one.bound("db-0", "node1"), await two.bound("db-0", "node1")
            given, others = await ipam.add(first.call()), await ipam.add(namesake.call())
            await one.patch_stateful_set("db", {"replicas": 0})

            async def leaves() -> bool:
                return not await one.ask("GET", one.path("/api/v1", "pods", "db-0"), missing_ok=True)

            await until(leaves, 20)
            await ipam.delete(first.call("DEL"))
            assert list(await one.claims()) == addresses(others)
            assert await ipam.add(namesake.call()) == others
            assert given != others

    asyncio.run(main())


@pytest.mark.upstream("A00016")
def test_retries_for_one_nics_exhausted_pool_leave_the_other_pools_alone(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            large, small = await there.pool("large", 10, 99), await there.pool("small", 110, 110)
            blocker = await there.pod("blocker", pools(small))
            await ipam.add(blocker.call())
            items = [{"interface": "eth0", "ipv4": [large]}, {"interface": "net1", "ipv4": [small]}]
            pod = await there.pod("a", {IPPOOLS: json.dumps(items), NETWORKS: "kube-system/second"})
            seen = set()
            for turn in range(4):
                seen.add(addresses(await ipam.add(pod.call(container=f"box{turn}")))[0])
                with pytest.raises(ExhaustedError, match=f"NIC net1 of pod {there.namespace}/a"):
                    await ipam.add(pod.call(container=f"box{turn}", nic="net1"))
                for nic in ("net1", "eth0"):
                    await ipam.delete(pod.call("DEL", container=f"box{turn}", nic=nic))
                assert len(await there.claims()) == 2
            assert len(seen) == 1
            await there.delete_pod(blocker)
            await ipam.delete(blocker.call("DEL"))
            assert addresses(await ipam.add(pod.call(container="last"))) == list(seen)
            assert addresses(await ipam.add(pod.call(container="last", nic="net1"))) == [there.address(110)]

    asyncio.run(main())


def test_a_del_that_cannot_ask_frees_nothing_and_is_tried_again(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4 = await there.pool("v4", 10, 99)
            pod = await there.pod("a", pools(v4))
            await ipam.add(pod.call())
            await there.delete_pod(pod)

            async def away(_: Any) -> None:
                raise UnavailableError("away")

            there.store.before["get", Pod] = away
            with pytest.raises(TryAgainLaterError, match="away"):
                await ipam.delete(pod.call("DEL"))
            assert len(await there.claims()) == 1
            there.store.before = {("delete", Claim): away}
            with pytest.raises(TryAgainLaterError, match="away"):
                await ipam.delete(pod.call("DEL"))
            there.store.before.clear()
            await ipam.delete(pod.call("DEL"))
            assert not await there.claims()

    asyncio.run(main())


def test_endpoints_are_repaired_at_the_start_and_go_with_their_pod(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there:
            v4 = await there.pool("v4", 10, 99)
            await there.stateful_set("db", 1, pools(v4))
            async with there.node() as ipam:
                pods = {"a": await there.pod("a", pools(v4)), "b": await there.pod("b", pools(v4))}
                pods["db-0"] = await there.bound("db-0", "node1")
                given = {name: addresses(await ipam.add(pod.call()))[0] for name, pod in pods.items()}
                await settled(ipam)
            right = await there.endpoint("b")
            for name in ("a", "db-0"):
                await there.store.inner.delete(Endpoint, name, there.namespace)

            async with there.node() as ipam:

                async def repaired() -> bool:
                    return all([await there.endpoint(name) is not None for name in pods])

                await until(repaired)
                for name, pod in pods.items():
                    endpoint = await there.endpoint(name)
                    assert endpoint is not None
                    assert endpoint.status is not None
                    (entry,) = endpoint.status.current.ips
                    assert (entry.ipv4, entry.ipv4_pool) == (f"{given[name]}/24", v4)
                    assert (endpoint.status.current.uid, endpoint.status.current.node) == (pod.uid, "node1")
                    owners = [(owner.kind, owner.name, owner.uid) for owner in endpoint.metadata.owner_references]
                    assert owners == ([] if name == "db-0" else [("Pod", name, pod.uid)])
                assert await there.endpoint("b") == right
                there.store.counts.clear()
                await there.delete_pod(pods["a"])
                await ipam.delete(pods["a"].call("DEL"))

                async def gone() -> bool:
                    return await there.endpoint("a") is None

                await until(gone, 60)  # the collector looks for new kinds every 30 s
                assert not [key for key in there.store.counts if key[1] == "SpiderEndpoint"]

    asyncio.run(main())


def test_requests_of_an_add_and_a_del(kube: Cluster) -> None:
    """One write for each address on the critical path, and nothing read; one for the endpoint, after the answer."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            v4, v6 = await there.pool("v4", 10, 99), await there.pool("v6", 16, 153, v6=True)
            warm = await there.pod("warm", pools(v4, v6=(v6,)))
            await ipam.add(warm.call())
            pods = [await there.pod(f"p{number}", pools(v4, v6=(v6,))) for number in range(10)]
            await knows(ipam, there, pods[-1].name, pods[-1].uid)
            await settled(ipam)
            there.store.counts.clear()
            await asyncio.gather(*(ipam.add(pod.call()) for pod in pods))
            await settled(ipam)
            assert there.store.counts == {("create", "SpiderIPClaim"): 20, ("create", "SpiderEndpoint"): 10}

            async def broken(_: Any) -> None:
                raise UnavailableError("away")

            there.store.before = dict.fromkeys([("create", Endpoint), ("update", Endpoint), ("get", Endpoint)], broken)
            there.store.counts.clear()
            await ipam.add(pods[0].call(nic="net1", v4=(v4,)))  # it needs no endpoint
            there.store.before.clear()
            await settled(ipam)
            assert there.store.counts["update", "SpiderEndpoint"] >= 1
            for pod in pods:
                await there.delete_pod(pod)
            there.store.counts.clear()
            await asyncio.gather(*(ipam.delete(pod.call("DEL")) for pod in pods))
            await settled(ipam)
            assert there.store.counts == {("delete", "SpiderIPClaim"): 20, ("get", "Pod"): 10}
            there.store.counts.clear()
            await asyncio.gather(*(ipam.delete(pod.call("DEL")) for pod in pods))  # kubelet says it more than once
            assert not there.store.counts

    asyncio.run(main())


# Virtual machines


async def machine(there: World, name: str) -> Any:
    """A VirtualMachine with its instance; the instance as an owner."""
    owner = await there.virtual("VirtualMachine", name)
    return await there.virtual("VirtualMachineInstance", name, owner)


@pytest.mark.upstream("F00001", "F00003")
def test_a_virtual_machine_restarts_with_its_addresses_on_all_nics(kubevirt: Cluster) -> None:
    async def main() -> None:
        async with world(kubevirt) as there, there.node("node1") as one, there.node("node2") as two:
            p0, p1 = await there.pool("p0", 10, 99), await there.pool("p1", 110, 199)
            items = [{"interface": "eth0", "ipv4": [p0]}, {"interface": "net1", "ipv4": [p1]}]
            nics = {IPPOOLS: json.dumps(items), NETWORKS: "kube-system/second"}
            instance = await machine(there, "vm")
            first = await there.pod("virt-launcher-vm-aaaaa", nics, "node1", instance)
            given = await one.add(first.call()), await one.add(first.call(nic="net1"))
            await settled(one)
            endpoint = await there.endpoint("vm")
            assert endpoint is not None
            assert endpoint.status is not None
            assert endpoint.status.owner_controller_type == "VirtualMachineInstance"
            assert len(endpoint.status.current.ips) == 2
            assert not endpoint.metadata.owner_references
            for claim in (await there.claims()).values():
                assert claim.spec.workload is not None
                assert (claim.spec.workload.name, claim.spec.workload.pod) == ("vm", first.name)

            # A second pod without a migration has to wait for the first.
            second = await there.pod("virt-launcher-vm-bbbbb", nics, "node2", instance)
            with pytest.raises(TryAgainLaterError, match=f"pod {there.namespace}/{first.name} with UID {first.uid}"):
                await two.add(second.call())
            await there.delete_pod(first, seconds=60)
            with pytest.raises(TryAgainLaterError, match="still in use"):
                await two.add(second.call())
            await there.delete_pod(first)
            await one.delete(first.call("DEL"))
            assert (await two.add(second.call()), await two.add(second.call(nic="net1"))) == given

            # Stopped: the instance goes, the machine stays, and so do its addresses; deleted, they go.
            await there.delete_virtual("VirtualMachineInstance", "vm")
            await there.delete_pod(second)
            await two.delete(second.call("DEL"))
            assert len(await there.claims()) == 2
            await there.delete_virtual("VirtualMachine", "vm")
            for nic in ("eth0", "net1"):
                await two.delete(second.call("DEL", nic=nic))
            assert not await there.claims()
            await settled(two)
            assert await there.endpoint("vm") is None

    asyncio.run(main())


@pytest.mark.upstream("F00002")
def test_live_migration_shares_the_address_and_the_source_frees_nothing(kubevirt: Cluster) -> None:
    async def main() -> None:
        async with world(kubevirt) as there, there.node("node1") as one, there.node("node2") as two:
            v4 = await there.pool("v4", 10, 99)
            instance = await machine(there, "vm")
            source = await there.pod("virt-launcher-vm-aaaaa", pools(v4), "node1", instance)
            given = await one.add(source.call())
            migrating = pools(v4) | {MIGRATION: "move"}
            target = await there.pod("virt-launcher-vm-bbbbb", migrating, "node2", instance)
            with pytest.raises(TryAgainLaterError, match="still in use"):
                await two.add(target.call())  # there is no such migration
            await there.virtual("VirtualMachineInstanceMigration", "move")
            assert await two.add(target.call()) == given
            (claim,) = (await there.claims()).values()
            assert (claim.spec.pod_uid, claim.spec.node) == (target.uid, "node2")

            # It fails: the target goes, the source stays, and so does the address; a new sandbox takes it back.
            await there.delete_pod(target)
            await two.delete(target.call("DEL"))
            assert list(await there.claims()) == addresses(given)
            assert await one.add(source.call(container="again")) == given

            # It succeeds: the source goes, in its own time.
            final = await there.pod("virt-launcher-vm-ccccc", migrating, "node2", instance)
            assert await two.add(final.call()) == given
            await there.delete_pod(source)
            for container in ("again", f"box-{source.uid}"):
                await one.delete(source.call("DEL", container=container))
            (claim,) = (await there.claims()).values()
            assert claim.spec.pod_uid == final.uid

    asyncio.run(main())


def test_a_virtual_machine_and_a_stateful_pod_of_one_name_keep_apart(kubevirt: Cluster) -> None:
    async def main() -> None:
        async with world(kubevirt) as there, there.node("node1") as ipam:
            v4 = await there.pool("v4", 10, 99)
            instance = await machine(there, "db-0")
            launcher = await there.pod("virt-launcher-db-0-aaaaa", pools(v4), "node1", instance)
            machines = await ipam.add(launcher.call())
            await settled(ipam)
            await there.delete_pod(launcher)
            await ipam.delete(launcher.call("DEL"))
            await there.stateful_set("db", 1, pools(v4))
            pod = await there.bound("db-0", "node1")
            pods = await ipam.add(pod.call())
            assert addresses(pods) != addresses(machines)
            following = await there.pod("virt-launcher-db-0-bbbbb", pools(v4), "node1", instance)
            assert await ipam.add(following.call()) == machines

    asyncio.run(main())
