"""What choosing pools costs, and when what was remembered is forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from api import annotations as notes
from api.claim import Controller
from api.core import Namespace, Pod
from api.meta import ObjectMeta
from api.pool import LabelSelector, Pool, PoolSpec
from plugins.errors import IOFailureError, NoPoolError
from plugins.ipam.candidates import select
from plugins.ipam.catalog import Catalog
from plugins.ipam.config import IpamConfig
from plugins.ipam.nic import master_addresses
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from store.sqlite import SqliteStore
from tests.integration.ipam_rig import until

DEFAULTS = IpamConfig()
SETTINGS = IpamSettings()


def pool(name: str, i: int, **spec: Any) -> Pool:
    ips = [f"10.{i // 200}.{i % 200}.1-10.{i // 200}.{i % 200}.9"]
    return Pool(metadata=ObjectMeta(name=name), spec=PoolSpec(**{"subnet": "10.0.0.0/8", "ips": ips, **spec}))


def pod(i: int, **labels: str) -> PodFacts:
    """A pod that differs from all others in what no pool looks at."""
    own = {"statefulset.kubernetes.io/pod-name": f"web-{i}", **labels}
    return PodFacts(
        pod=Pod(metadata=ObjectMeta(name=f"web-{i}", namespace="shop", uid=f"u{i}", labels=own)),
        namespace=Namespace(metadata=ObjectMeta(name="shop")),
        controller=Controller(api_version="apps/v1", kind="Deployment", name=f"web-{i}", uid=f"d{i}"),
        static="",
        node_labels={},
    )


@asynccontextmanager
async def catalog_of(
    folder: Path, pools: list[Pool], settings: IpamSettings = SETTINGS
) -> AsyncIterator[tuple[Catalog, SqliteStore]]:
    store = await SqliteStore.open(f"{folder}/{len(pools)}.db")
    await asyncio.gather(*(store.create(each) for each in pools))
    catalog = Catalog(store, "node1", settings, lambda name, facts: None, lambda family: None, knows_pods=True)
    task = asyncio.create_task(catalog.pools.run())
    try:
        await catalog.pools.synced()
        yield catalog, store
    finally:
        task.cancel()
        await asyncio.wait([task])
        await store.close()


def test_a_choice_is_remembered_by_what_pools_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(**arguments: Any) -> Any:
        calls.append(1)
        return select(**arguments)

    monkeypatch.setattr("plugins.ipam.catalog.select", counted)
    affinity = {"pod_affinity": LabelSelector(match_labels={"tier": "a"})}

    async def scenario() -> None:
        pools = [pool("all", 0, default=True), pool("tier", 1, default=True, **affinity)]
        async with catalog_of(tmp_path, pools) as (catalog, store):

            async def chosen(facts: PodFacts, config: IpamConfig = DEFAULTS) -> list[str]:
                selection = await catalog.select(config, "eth0", facts)
                return [each.name for each in selection.candidates[0].pools]

            assert [await chosen(pod(i)) for i in range(20)] == [["all"]] * 20
            assert len(calls) == 1
            assert [await chosen(pod(i, tier="a")) for i in range(20)] == [["tier", "all"]] * 20
            assert len(calls) == 2
            assert await chosen(pod(1), IpamConfig(ipv4_pools=("a*",))) == ["all"]
            assert len(calls) == 3
            # every change that matters is seen: of what pools look at, of the list, of the pool
            await store.update(pool("tier", 1, default=True, pod_affinity=LabelSelector(match_labels={"app": "x"})))
            await until(lambda: is_(lambda: len(calls) == 3 and ("pod", "app") in catalog._looks))
            assert await chosen(pod(1, tier="a")) == ["all"]
            assert await chosen(pod(1, app="x")) == ["tier", "all"]
            await store.create(pool("also", 2))
            await until(lambda: is_(lambda: catalog.get("also") is not None))
            assert await chosen(pod(1), IpamConfig(ipv4_pools=("a*",))) == ["all", "also"]
            await store.update(pool("all", 0, default=False))
            await until(lambda: is_(lambda: not catalog.get("all").spec.default))  # type: ignore[union-attr]
            with pytest.raises(NoPoolError, match="tier: podAffinity"):
                await chosen(pod(1))
            await store.delete(Pool, "also")
            await until(lambda: is_(lambda: catalog.get("also") is None))
            assert await chosen(pod(1), IpamConfig(ipv4_pools=("a*",))) == ["all"]

    asyncio.run(scenario())


async def is_(condition: Any) -> bool:
    return bool(condition())


def test_a_younger_pool_that_overlaps_is_not_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with catalog_of(tmp_path, [pool("old", 0)]) as (catalog, store):
            config = IpamConfig(ipv4_pools=("old", "young"))
            await asyncio.sleep(1.1)  # creation times are whole seconds
            await store.create(pool("young", 0))
            await until(lambda: is_(lambda: catalog.get("young") is not None))
            (found,) = (await catalog.select(config, "eth0", pod(1))).candidates
            assert [each.name for each in found.pools] == ["old"]
            assert "overlap with IPPool old, which is older" in found.passed_over[0]
            await store.delete(Pool, "old")
            await until(lambda: is_(lambda: catalog.get("old") is None))
            (found,) = (await catalog.select(config, "eth0", pod(1))).candidates
            assert [each.name for each in found.pools] == ["young"]

    asyncio.run(scenario())


def test_the_cost_does_not_grow_with_pools(tmp_path: Path) -> None:
    """Pods that differ, pools by the thousand, each for one namespace: the second pod costs what it costs with ten."""

    def pools(number: int) -> list[Pool]:
        others = [pool(f"p{i}", i, default=True, namespace_name=[f"ns{i}"]) for i in range(number)]
        return [*others, pool("shop", number, default=True, namespace_name=["shop"])]

    async def cost(path: Path, number: int) -> float:
        async with catalog_of(path, pools(number)) as (catalog, _):
            facts = [pod(i) for i in range(300)]
            await catalog.select(DEFAULTS, "eth0", facts[0])
            best = float("inf")
            for _ in range(5):
                started = time.perf_counter()
                for each in facts:
                    await catalog.select(DEFAULTS, "eth0", each)
                best = min(best, time.perf_counter() - started)
            return best / len(facts)

    few, many = asyncio.run(cost(tmp_path, 10)), asyncio.run(cost(tmp_path, 3000))
    print(f"one selection: {few * 1e6:.0f} µs of 11 pools, {many * 1e6:.0f} µs of 3001")
    assert many < 3 * few


def test_a_pod_without_pools_of_its_own_annotation_is_told_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with catalog_of(tmp_path, []) as (catalog, _):
            facts = pod(1)
            said = {notes.IPPOOL: '{"ipv4": ["x"]}'}
            named = structs.replace(facts.pod, metadata=structs.replace(facts.pod.metadata, annotations=said))
            facts = PodFacts(named, facts.namespace, facts.controller, "", {})
            with pytest.raises(NoPoolError, match=r"named by ipam.spidernet.io/ippool, filtered out: x: there is no"):
                await catalog.select(DEFAULTS, "eth0", facts)

    asyncio.run(scenario())


def test_subnets_of_a_family_that_is_off_do_not_become_the_default_pools(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = IpamSettings(enable_ipv6=False)
        async with catalog_of(tmp_path, [pool("d", 0, default=True)], settings) as (catalog, _):
            facts = pod(1)
            said = {notes.SUBNET: '{"ipv6": ["s"]}'}
            named = structs.replace(facts.pod, metadata=structs.replace(facts.pod.metadata, annotations=said))
            facts = PodFacts(named, facts.namespace, facts.controller, "", {})
            with pytest.raises(NoPoolError, match="a family that is disabled"):
                await catalog.select(DEFAULTS, "eth0", facts)

    asyncio.run(scenario())


def test_the_addresses_of_the_physical_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In folders as the kernel's, and with the loopback NIC for a physical function, whose addresses are known."""
    physical = tmp_path / "bus/pci/devices/0000:3b:00.0"
    virtual = tmp_path / "bus/pci/devices/0000:3b:02.1"
    (physical / "net/lo").mkdir(parents=True)
    virtual.mkdir()
    (virtual / "physfn").symlink_to(physical)
    with open("/proc/self/ns/net") as own:
        with pytest.raises(IOFailureError, match=r"match_master_subnet.*lo"):
            asyncio.run(master_addresses(own.fileno(), "lo"))
        monkeypatch.setattr("plugins.ipam.nic.pci_address", lambda ifname: "0000:3b:02.1")
        found = asyncio.run(master_addresses(own.fileno(), "net1", str(tmp_path)))
    assert ip_address("127.0.0.1") in found
