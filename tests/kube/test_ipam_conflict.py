"""Strangers that use pods' addresses, on real segments: who moves, who stays, and who is no stranger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from api.annotations import MIGRATION
from lab.kube.cluster import Cluster
from plugins.coordinator.probe.frames import sighting
from plugins.errors import AddressConflictError
from plugins.ipam.settings import IpamSettings
from tests.integration.ipam_rig import addresses
from tests.integration.probe_segment import Answering, Segment, segment
from tests.integration.test_probe import neighbours, until
from tests.kube.ipam_pods import define_kubevirt, pools, world

DETECT = IpamSettings(enable_ip_conflict_detection=True, predecessor_wait=1.0)


@pytest.fixture
def lan() -> Iterator[Segment]:
    with segment() as created:
        yield created


@pytest.mark.upstream("C00018")
def test_a_pod_whose_address_was_stolen_moves_with_its_next_sandbox(kube: Cluster, lan: Segment) -> None:
    """Not within the sandbox that has the address already: that may be in use."""

    async def main() -> None:
        async with world(kube) as there, there.node(settings=DETECT) as ipam:
            v4 = await there.pool("v4", 10, 11)
            pod, first, second = await there.pod("a", pools(v4)), lan.add_host(up=False), lan.add_host(up=False)
            (stolen,) = addresses(await ipam.add(pod.call(container="one", netns_fd=first.fd)))
            lan.add_host(f"{stolen}/24")
            with pytest.raises(AddressConflictError, match="the pod was given it before"):
                await ipam.add(pod.call(container="one", netns_fd=first.fd))
            await ipam.delete(pod.call("DEL", container="one"))
            (moved,) = addresses(await ipam.add(pod.call(container="two", netns_fd=second.fd)))
            assert {stolen, moved} == {there.address(10), there.address(11)}
            held = await there.claims()
            assert (held[stolen].spec.state, held[stolen].spec.pod_uid) == ("Quarantined", "")
            assert (held[moved].spec.state, held[moved].spec.pod_uid) == ("Allocated", pod.uid)

    asyncio.run(main())


@pytest.mark.upstream("C00019")
def test_a_stateful_pod_whose_address_was_stolen_stays_and_says_so(kube: Cluster, lan: Segment) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node(settings=DETECT) as ipam:
            v4 = await there.pool("v4", 10, 11)
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node1")
            nic = lan.add_host(up=False)
            (stolen,) = addresses(await ipam.add(first.call(netns_fd=nic.fd)))
            thief = lan.add_host(f"{stolen}/24")
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            for _ in range(2):
                with pytest.raises(AddressConflictError, match=thief.mac):
                    await ipam.add(second.call(netns_fd=lan.add_host(up=False).fd))
            (claim,) = (await there.claims()).values()
            assert (claim.spec.address, claim.spec.state) == (stolen, "Allocated")

    asyncio.run(main())


def test_a_stateful_pod_made_anew_waits_for_the_old_ones_namespace_to_go(kube: Cluster, lan: Segment) -> None:
    """The old pod is gone from the API, and for a moment its MAC still answers, on another node."""

    async def main() -> None:
        patient = IpamSettings(enable_ip_conflict_detection=True, predecessor_wait=30.0)
        async with world(kube) as there, there.node(settings=patient) as ipam:
            v4 = await there.pool("v4", 10, 11)
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node1")
            old = lan.add_host(up=False)
            (address,) = addresses(await ipam.add(first.call(netns_fd=old.fd)))
            old.ip("address", "add", f"{address}/24", "dev", "eth0")
            await there.delete_pod(first)
            second, new = await there.bound("db-0", "node1", not_=first.uid), lan.add_host(up=False)
            asked = asyncio.Event()

            def listen(frame: bytes) -> list[tuple[float, bytes]]:
                seen = sighting(frame)
                if seen is not None and seen.asking and seen.mac == new.mac:
                    loop.call_soon_threadsafe(asked.set)
                return []

            loop = asyncio.get_running_loop()
            with Answering(lan.add_host(), listen):
                adding = asyncio.create_task(ipam.add(second.call(netns_fd=new.fd)))
                await asyncio.wait_for(asked.wait(), 10)
                old.ip("link", "delete", "eth0")
                assert addresses(await adding) == [address]
            (claim,) = (await there.claims()).values()
            assert (claim.spec.state, claim.spec.pod_uid) == ("Allocated", second.uid)

    asyncio.run(main())


@pytest.mark.upstream("F00002")
def test_the_source_of_a_live_migration_is_no_stranger(kube: Cluster, lan: Segment) -> None:
    define_kubevirt(kube)

    async def main() -> None:
        async with world(kube) as there, there.node(settings=DETECT) as ipam:
            v4 = await there.pool("v4", 10, 11)
            owner = await there.virtual("VirtualMachine", "vm")
            instance = await there.virtual("VirtualMachineInstance", "vm", owner)
            source = await there.pod("virt-launcher-vm-a", pools(v4), owner=instance)
            given = await ipam.add(source.call(netns_fd=lan.add_host(up=False).fd))
            (address,) = addresses(given)
            runs = lan.add_host(f"{address}/24")
            neighbour = lan.add_host(f"{there.address(9)}/24")
            neighbour.ip("neigh", "add", address, "lladdr", runs.mac, "dev", "eth0", "nud", "stale")
            await there.virtual("VirtualMachineInstanceMigration", "move")
            target = await there.pod("virt-launcher-vm-b", pools(v4) | {MIGRATION: "move"}, owner=instance)
            for _ in range(2):
                assert await ipam.add(target.call(netns_fd=lan.add_host(up=False).fd)) == given
            assert neighbours(neighbour)[address] == runs.mac, "its traffic was taken away while it still ran there"
            runs.ip("link", "set", "eth0", "down")  # it has moved
            arrived = lan.add_host(up=False)
            assert await ipam.add(target.call(netns_fd=arrived.fd)) == given
            await until(lambda: neighbours(neighbour)[address] == arrived.mac)

    asyncio.run(main())
