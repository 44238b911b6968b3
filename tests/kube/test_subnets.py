"""Subnets and automatic pools on a real API server, with the real controllers that make ReplicaSets and Pods."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from lab.kube.cluster import Cluster
from tests.kube.conftest import running
from tests.kube.subnet_rig import Rig, annotations, rig, workload

V4 = "10.40.0.0/16"
V6 = "fd40::/64"


@pytest.fixture(name="own", scope="module")
def a_cluster_of_its_own() -> Iterator[Cluster]:
    """Subnets must not overlap, so tests have the cluster one after the other."""
    with running() as cluster:
        yield cluster


@pytest.mark.upstream("I00003")
@pytest.mark.parametrize("kind", ["Deployment", "ReplicaSet", "StatefulSet", "Job", "CronJob"])
def test_each_kind_of_controller_has_its_pools(own: Cluster, kind: str) -> None:
    async def scenario() -> None:
        async with rig(own) as it:
            v4 = await it.subnet(V4, ["10.40.0.10-10.40.0.50"], gateway="10.40.0.1")
            v6 = await it.subnet(V6, ["fd40::10-fd40::50"])
            asked = annotations({"ipv4": [v4], "ipv6": [v6]}, number="+1")
            await it.apply(workload(kind, "app", asked, 3))
            await it.becomes(it.sizes, {"app/eth0/4": 4, "app/eth0/6": 4})
            for pool in await it.pools():
                assert pool.metadata.name.startswith(f"auto{pool.spec.ip_version}-app-eth0-")
            (four,) = await it.pools(v4)
            assert four.spec.gateway == "10.40.0.1"
            assert four.spec.ips == ["10.40.0.10-10.40.0.13"]
            if kind in ("Deployment", "ReplicaSet", "StatefulSet"):
                await it.apply(workload(kind, "app", asked, 8))
                await it.becomes(it.sizes, {"app/eth0/4": 9, "app/eth0/6": 9})
                await it.apply(workload(kind, "app", asked, 1))
                await it.becomes(it.sizes, {"app/eth0/4": 2, "app/eth0/6": 2})
            await it.delete(kind, "app")
            await it.becomes(it.sizes, {})
            for subnet in (v4, v6):
                await it.becomes(lambda subnet=subnet: it.free(subnet), 41 if subnet == v4 else 65)
                await it.consistent(subnet)

    asyncio.run(scenario())
