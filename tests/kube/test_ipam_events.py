"""`kubectl describe pod` tells why a pod gets no address, on a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from api.event import Event
from lab.kube.cluster import Cluster
from plugins.errors import CniError
from store.port import Query
from tests.integration.ipam_rig import until
from tests.kube.ipam_pods import Started, World, pools, world


async def told(there: World, pod: str) -> dict[str, Event]:
    found = (await there.store.inner.list(Event, Query(namespace=there.namespace))).items
    mine = [each for each in found if each.involved_object.name == pod]
    by_reason = {each.reason: each for each in mine}
    assert len(by_reason) == len(mine), "a reason is told once"
    return by_reason


def telling(there: World, pod: str, reason: str) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return reason in await told(there, pod)

    return holds


async def fails(add: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(CniError):
        await add()


def test_pods_are_told_why_they_get_no_address(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            small = await there.pool("small", 10, 10)
            away = await there.pool("away", 11, 12, node_name=["node2"])

            async def refused(name: str, said: dict[str, str], reason: str) -> Started:
                pod = await there.pod(name, said)
                for _ in range(3):  # as a kubelet that tries again
                    await fails(lambda: ipam.add(pod.call()))
                await until(telling(there, name, reason))
                return pod

            await refused("picky", pools(away), "NoPoolAvailable")
            await refused("wrong", {"ipam.spidernet.io/ippool": "{"}, "InvalidAddressRequest")
            first = await there.pod("first", pools(small))
            await ipam.add(first.call())
            late = await refused("late", pools(small), "AddressesExhausted")

            event = (await told(there, "picky"))["NoPoolAvailable"]
            assert (event.type, event.source.component, event.source.host) == ("Warning", "spiderpool-agent", "node1")
            assert event.involved_object.uid
            shown = await asyncio.to_thread(describe, kube, there.namespace, "picky")
            assert f"{away}: nodeName does not list node node1" in shown
            shown = await asyncio.to_thread(describe, kube, there.namespace, "late")
            assert "all IP addresses used out" in shown
            assert small in shown
            assert await told(there, "first") == {}
            await there.delete_pod(first)
            await ipam.delete(first.call("DEL"))
            await ipam.add(late.call())

    asyncio.run(main())


def describe(kube: Cluster, namespace: str, pod: str) -> str:
    return kube.kubectl("describe", "pod", pod, "-n", namespace)
