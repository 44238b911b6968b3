"""Subnets as users see them: the whole controller with its webhooks, kubectl, and claims as agents write them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from api.pool import Pool
from api.subnet import Subnet
from lab.kube.cluster import Cluster
from lab.layout import LabError
from store.errors import NotFoundError
from tests.kube.controller_rig import CONFIGURATIONS, SUBNETS, Replica, Requests, controllers, eventually, manifest
from tests.kube.subnet_rig import Rig, asking, rig, workload


@pytest.fixture(scope="module")
def controller(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with controllers(kube, tmp_path_factory.mktemp("controller")) as launch:
        replica = launch("subnets", "--reclaim-enabled=false")  # the claims of this module are nobody's
        eventually(30, lambda: replica.probe() == 200, "the controller is ready")
        ask = Requests(kube)
        path = f"{CONFIGURATIONS}/validatingwebhookconfigurations/spiderpool-controller"
        eventually(30, lambda: ask("GET", path)[0] == 200, "admission is asked")
        yield replica


async def refused(it: Rig, *arguments: str, stdin: str = "") -> str:
    with pytest.raises(LabError) as error:
        await it.kubectl(*arguments, stdin=stdin)
    return str(error.value)


@pytest.mark.upstream("I00001", "I00002", "I00003", "I00018", "I00020", "I00007")
def test_the_life_of_a_subnet(kube: Cluster, controller: Replica) -> None:
    async def scenario() -> None:
        async with rig(kube, None) as it:
            spec: dict[str, Any] = {"subnet": "10.60.0.0/24", "ips": ["10.60.0.10-10.60.0.19"], "gateway": "10.60.0.1"}
            await it.kubectl("apply", "-f", "-", stdin=json.dumps(manifest(SUBNETS, "office", **spec)))
            await it.until(lambda: it.is_ready("office"))
            assert (await it.store.get(Subnet, "office")).spec.ip_version == 4
            other = manifest(SUBNETS, "other", **{**spec, "gateway": "10.60.0.2"})
            assert "overlap with Subnet office" in await refused(it, "apply", "-f", "-", stdin=json.dumps(other))

            asked = asking({"ipv4": ["office"]}, number="+1")
            await it.apply(workload("Deployment", "shop", asked, 3))
            await it.becomes(it.sizes, {"shop/eth0/4": 4})
            (pool,) = await it.pools()
            name = pool.metadata.name

            for wrong in (["10.60.0.10-10.60.0.15"], ["10.60.0.10"]):
                patch = json.dumps({"spec": {"ips": wrong}})
                told = await refused(it, "patch", "sp", name, "--type=merge", "-p", patch)
                assert "it's illegal to update AutoPool.Spec.IPs" in told
            by_hand = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderIPPool"}
            for ips, words in (
                ("10.60.0.13", "overlap with IPPool"),
                ("10.60.0.30", "not contained in controller Subnet"),
            ):
                made = {**by_hand, "metadata": {"name": "hand"}, "spec": {"subnet": "10.60.0.0/24", "ips": [ips]}}
                assert words in await refused(it, "create", "-f", "-", stdin=json.dumps(made))
            narrow = json.dumps({"spec": {"ips": ["10.60.0.12-10.60.0.19"]}})
            told = await refused(it, "patch", "ss", "office", "--type=merge", "-p", narrow)
            assert "remove some IP ranges [10.60.0.10-10.60.0.11] that is being used by IPPool" in told

            await it.take(name, 0, 1, 3)
            await it.apply(workload("Deployment", "shop", asked, 7))
            await it.becomes(it.sizes, {"shop/eth0/4": 8})
            await it.apply(workload("Deployment", "shop", asked, 1))
            await it.becomes(it.sizes, {"shop/eth0/4": 3})
            assert (await it.store.get(Pool, name)).spec.ips == ["10.60.0.10-10.60.0.11", "10.60.0.13"]
            await it.frees("office", 7)
            made = {**by_hand, "metadata": {"name": "hand"}, "spec": {"subnet": "10.60.0.0/24", "ips": ["10.60.0.12"]}}
            await it.kubectl("create", "-f", "-", stdin=json.dumps(made))
            assert (await it.store.get(Pool, "hand")).spec.gateway == "10.60.0.1"
            await it.frees("office", 6)

            await it.delete("Deployment", "shop")
            await it.until(lambda: terminating(it, name))
            await it.give_back(name)
            await it.frees("office", 9)
            await it.kubectl("delete", "ss", "office", "--timeout=20s")
            with pytest.raises(NotFoundError):
                await it.store.get(Pool, "hand")

    asyncio.run(scenario())


async def terminating(it: Rig, name: str) -> bool:
    return (await it.store.get(Pool, name)).metadata.deletion_timestamp is not None


@pytest.mark.upstream("I00006", "P00002")
def test_many_applications_at_once(kube: Cluster, controller: Replica) -> None:
    async def scenario() -> None:
        async with rig(kube, None) as it:
            spec: dict[str, Any] = {"subnet": "10.61.0.0/16", "ips": ["10.61.0.1-10.61.0.200"]}
            await it.kubectl("apply", "-f", "-", stdin=json.dumps(manifest(SUBNETS, "many", **spec)))
            await it.until(lambda: it.is_ready("many"))
            names = [f"app-{number}" for number in range(40)]
            asked = asking({"ipv4": ["many"]})
            await it.apply(*(workload("Deployment", name, asked, 5) for name in names))
            began = asyncio.get_running_loop().time()
            await it.becomes(it.sizes, {f"{name}/eth0/4": 5 for name in names})
            print(f"40 pools of 200 addresses, a whole subnet: {asyncio.get_running_loop().time() - began:.1f} s")
            await it.frees("many", 0)
            await it.kubectl("delete", "deployments", "--all", "-n", it.namespace, "--wait=false")
            await it.frees("many", 200)

    asyncio.run(scenario())
