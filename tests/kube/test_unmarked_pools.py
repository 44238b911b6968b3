"""Pools of which nobody has said yet that claims are the truth: not used while upstream's agents run."""

from __future__ import annotations

import asyncio
import json

import pytest

from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool
from api.views import is_marked
from lab.kube.cluster import Cluster
from plugins.errors import NoPoolError
from tests.integration.ipam_rig import addresses
from tests.kube.ipam_pods import CORE, IPPOOLS, World, world

OUR_GROUP = "/apis/spiderpool.spidernet.io/v2beta1"
UPSTREAM = {"app.kubernetes.io/component": "spiderpool-agent"}
OURS = UPSTREAM | {"spiderpool.spidernet.io/records": "claims"}


async def agent(there: World, name: str, labels: dict[str, str]) -> None:
    spec = {"containers": [{"name": "c", "image": "lab.invalid/none:1"}], "nodeName": "nowhere"}
    meta = {"name": name, "namespace": there.namespace, "labels": labels}
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
    await there.ask("POST", there.path(CORE, "pods"), document)


async def remove(there: World, name: str) -> None:
    await there.ask("DELETE", there.path(CORE, "pods", name), {"gracePeriodSeconds": 0})


def test_an_unmarked_pool_waits_for_the_end_of_upstreams_agents(kube: Cluster) -> None:
    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            name = await there.pool("new", 10, 19)
            assert not is_marked(await there.store.get(Pool, name))
            pod = await there.pod("a", {IPPOOLS: json.dumps([{"interface": "eth0", "ipv4": [name]}])})
            await agent(there, "ours", OURS)
            await agent(there, "theirs", UPSTREAM)
            with pytest.raises(NoPoolError, match=f"{name}: upstream's agents still .*theirs"):
                await ipam.add(pod.call())
            await remove(there, "theirs")
            async with asyncio.timeout(10):
                while True:
                    try:
                        given = await ipam.add(pod.call())
                        break
                    except NoPoolError:
                        await asyncio.sleep(0.1)
            assert len(addresses(given)) == 1
            await remove(there, "ours")

    asyncio.run(main())


def test_a_marked_pool_does_not(kube: Cluster) -> None:
    """Nothing keeps upstream's agents from it: they know neither marks nor claims. To refuse pods would not help."""

    async def main() -> None:
        async with world(kube) as there, there.node() as ipam:
            name = await there.pool("old", 10, 19)
            mark = {"metadata": {"annotations": {ANNOTATION_CLAIMS: CLAIMS_AUTHORITATIVE}}}
            await there.ask("PATCH", f"{OUR_GROUP}/spiderippools/{name}", mark)
            await agent(there, "theirs", UPSTREAM)
            pod = await there.pod("a", {IPPOOLS: json.dumps([{"interface": "eth0", "ipv4": [name]}])})
            assert len(addresses(await ipam.add(pod.call()))) == 1
            await remove(there, "theirs")

    asyncio.run(main())
