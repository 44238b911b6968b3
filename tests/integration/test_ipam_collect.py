"""STATUS, GC, and what is collected on a machine without a controller."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.collector import OVERLAPS, Collector, CollectorSettings
from api.claim import Claim
from api.endpoint import Endpoint
from api.pool import Pool, PoolStatus
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.errors import InvalidConfigError, NoPoolError, NotAvailableError
from plugins.ipam.claims import quarantined
from plugins.ipam.plugin import Ipam
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError, UnavailableError
from store.metrics import STRAYS
from store.port import Store
from tests.integration.ipam_rig import addresses, call, claims, node, opened, pool, running, until

QUICK = CollectorSettings(debounce=0.02, sweep=0.05)


@asynccontextmanager
async def collecting(store: Store, name: str = "node1") -> AsyncIterator[Collector]:
    collector = Collector(store, name, QUICK)
    task = asyncio.create_task(collector.run())
    try:
        yield collector
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.wait([task])


def gc(*valid: tuple[str, str], **more: Any) -> Any:
    items = [{"containerID": container, "ifname": nic} for container, nic in valid]
    return replace_call(call("", "GC", **more), {"cni.dev/valid-attachments": items})


def replace_call(base: Any, members: dict[str, Any]) -> Any:
    return dataclasses.replace(base, container_id="", ifname="", config={**base.config, **members})


def test_gc_releases_what_is_stale_and_only_that(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store, running(store) as ipam, running(store, node="n2") as other:
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            kept = addresses(await ipam.add(call("kept")))
            nic = addresses(await ipam.add(call("kept", nic="net1")))
            stale = addresses(await ipam.add(call("stale")))
            network = addresses(await ipam.add(call("net2", config={"name": "another"})))
            elsewhere = addresses(await other.add(call("elsewhere")))
            bad = addresses(await ipam.add(call("bad")))
            await store.update(quarantined((await claims(store))[bad[0]], "it answered", "02:00:00:00:00:01", 60))
            await until(lambda: settled(lambda: ("pod.uid-bad", "eth0") not in ipam._held.sets()))
            await ipam.gc(gc(("sandbox-kept", "eth0")))
            assert set(await claims(store)) == {*kept, *network, *elsewhere, *bad}
            assert stale[0] not in await claims(store)
            assert nic[0] not in await claims(store)

    asyncio.run(main())


def test_gc_spares_calls_in_flight(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            reached, go = asyncio.Event(), asyncio.Event()

            async def pause(_: Any) -> None:
                reached.set()
                await go.wait()

            store.after["create"] = pause
            adding = asyncio.create_task(ipam.add(call("a")))
            await reached.wait()
            await until(lambda: settled(lambda: bool(ipam._held.sets())))
            await ipam.gc(gc())
            go.set()
            assert addresses(await adding) == list(await claims(store))

    asyncio.run(main())


def test_an_add_that_comes_during_gc_waits_and_gets_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            await ipam.add(call("a"))
            reached, go = asyncio.Event(), asyncio.Event()

            async def pause(_: Any) -> None:
                reached.set()
                await go.wait()

            store.before["delete"] = pause
            collecting_garbage = asyncio.create_task(ipam.gc(gc()))
            await reached.wait()
            adding = asyncio.create_task(ipam.add(call("a")))
            await asyncio.sleep(0.02)
            assert not adding.done()
            go.set()
            await collecting_garbage
            assert addresses(await adding) == list(await claims(store))

    asyncio.run(main())


def test_gc_without_a_list_or_a_name_does_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            await ipam.add(call("a"))
            with pytest.raises(InvalidConfigError, match="valid-attachments: a list"):
                await ipam.gc(call("", "GC"))
            with pytest.raises(InvalidConfigError, match="name: is missing"):
                await ipam.gc(gc(config={"name": ""}))
            assert len(await claims(store)) == 1

    asyncio.run(main())


def test_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store:
            prober = Prober(ProbeSettings())
            with pytest.raises(NotAvailableError, match="starting"):
                await Ipam(store, "node1", IpamSettings(), prober).status(call("", "STATUS"))
            await prober.close()
            async with running(store) as ipam:
                with pytest.raises(NotAvailableError, match="v4: there is no such pool"):
                    await ipam.status(call("", "STATUS"))
                await pool(store, "v4", "10.6.0.10", namespace_name=["web"])
                await ipam.status(call("", "STATUS"))
                await store.close()
                with pytest.raises(NotAvailableError, match="store cannot be reached"):
                    await ipam.status(call("", "STATUS"))

    asyncio.run(main())


def test_pool_status_follows_and_two_collectors_agree(tmp_path: Path) -> None:
    async def main() -> None:
        path = f"{tmp_path}/store.db"
        async with opened(path) as store, opened(path) as second, running(store) as ipam:
            await pool(store, "v4", "10.6.0.10-10.6.0.99", exclude_ips=["10.6.0.20"])

            async def shows(count: int) -> bool:
                status = (await store.get(Pool, "v4")).status
                return status is not None and status.allocated_ip_count == count

            async with collecting(store), collecting(second, "node2"):
                await until(lambda: shows(0))
                results = await asyncio.gather(*(ipam.add(call(str(i))) for i in range(20)))
                await until(lambda: shows(20))
                status = (await store.get(Pool, "v4")).status
                assert isinstance(status, PoolStatus)
                assert status.total_ip_count == 89
                assert all(f'"{addresses(result)[0]}"' in (status.allocated_ips or "") for result in results)
                await asyncio.gather(*(ipam.delete(call(str(i), "DEL")) for i in range(20)))
                await until(lambda: shows(0))
                version = (await store.get(Pool, "v4")).metadata.resource_version
                await asyncio.sleep(0.1)
                assert (await store.get(Pool, "v4")).metadata.resource_version == version

    asyncio.run(main())


def test_a_terminating_pool_goes_with_its_last_claim(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store), collecting(store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            first = await ipam.add(call("a"))
            await store.delete(Pool, "v4")
            await until(lambda: settled(lambda: ipam._catalog.get("v4").terminating))  # type: ignore[union-attr]
            with pytest.raises(NoPoolError, match="v4: it is being deleted"):
                await ipam.add(call("b"))
            assert await ipam.add(call("a")) == first
            await asyncio.sleep(0.2)
            assert (await store.get(Pool, "v4")).metadata.deletion_timestamp is not None
            await ipam.delete(call("a", "DEL"))
            await until(lambda: missing(store, Pool, "v4"))

    asyncio.run(main())


def test_quarantine_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store), collecting(store):
            await pool(store, "v4", "10.6.0.10-10.6.0.11")
            for name, seconds in (("a", 600), ("b", -1)):
                (address,) = addresses(await ipam.add(call(name)))
                await store.update(quarantined((await claims(store))[address], "x", "02:00:00:00:00:01", seconds))
            await until(lambda: counted(store, 1))
            await asyncio.sleep(0.15)
            assert await counted(store, 1)
            await ipam.add(call("c"))

    asyncio.run(main())


def test_endpoints_without_claims_are_removed(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.11")
            (address,) = addresses(await ipam.add(call("a")))
            await ipam.add(call("b"))
            await until(lambda: settled(lambda: ipam._endpoints.idle))
            await store.delete(Claim, (await claims(store))[address].metadata.name)
            async with collecting(store, "node2"):
                await asyncio.sleep(0.15)
                assert len((await store.list(Endpoint)).items) == 2
            async with collecting(store):
                await until(lambda: missing(store, Endpoint, "a", "ns"))
            assert [endpoint.metadata.name for endpoint in (await store.list(Endpoint)).items] == ["b"]

    asyncio.run(main())


def test_overlaps_and_strays_are_reported_and_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store), collecting(store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await pool(store, "same", "10.6.0.15-10.6.0.30")
            await until(lambda: settled(lambda: OVERLAPS._value.get() == 1))
            (address,) = addresses(await ipam.add(call("a")))
            current = await store.get(Pool, "v4")
            meta = replace(current.metadata, resource_version="")  # the collector may write the status in between
            await store.update(replace(current, metadata=meta, spec=replace(current.spec, ips=["10.6.0.40"])))
            await until(lambda: settled(lambda: STRAYS.labels("v4")._value.get() == 1))
            await until(lambda: settled(lambda: OVERLAPS._value.get() == 0))
            assert list(await claims(store)) == [address]

    asyncio.run(main())


def test_a_store_that_is_away_for_a_while_is_borne(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.11")
            away = True

            async def refuse(_: Any) -> None:
                if away:
                    raise UnavailableError("away")

            store.before["delete"] = refuse
            (address,) = addresses(await ipam.add(call("a")))
            await store.update(quarantined((await claims(store))[address], "x", "02:00:00:00:00:01", -1))
            async with collecting(store):
                await asyncio.sleep(0.1)
                assert await claims(store)
                away = False
                await until(lambda: counted(store, 0))

    asyncio.run(main())


async def settled(condition: Any) -> bool:
    return bool(condition())


async def counted(store: Store, count: int) -> bool:
    return len(await claims(store)) == count


async def missing(store: Store, kind: Any, name: str, namespace: str = "") -> bool:
    try:
        await store.get(kind, name, namespace)
    except NotFoundError:
        return True
    return False
