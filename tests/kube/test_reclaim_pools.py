"""Pools' status, finalizers, marks and conditions, against a real API server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from msgspec.structs import replace
from prometheus_client import REGISTRY

from api.claim import Claim
from api.condition import Condition
from api.meta import FINALIZER, ObjectMeta, now
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, LabelSelector, Pool, PoolSpec, PoolStatus, Requirement
from controller.status.settings import StatusSettings
from lab.kube.cluster import Cluster
from store.port import Query, Store
from tests.kube.reclaim_rig import api, is_gone, leading, new_claim, opened, pool, until
from tests.kube.store_rig import empty

SOMETIMES = LabelSelector(match_expressions=[Requirement(key="a", operator="Sometimes")])


@pytest.fixture(name="server", scope="module")
def an_emptied_cluster(kube: Cluster) -> Iterator[Cluster]:
    yield kube
    empty(kube)


def ready(there: Pool) -> Condition | None:
    conditions = (there.status.conditions or []) if there.status else []
    assert len(conditions) <= 1
    return conditions[0] if conditions else None


async def shows(store: Store, name: str, reason: str, count: int | None = None) -> Pool:
    """The pool, once its condition gives that reason and its status that many addresses in use."""
    found: list[Pool] = []

    async def look() -> bool:
        there = await store.get(Pool, name)
        found[:] = [there]
        condition = ready(there)
        counts = there.status.allocated_ip_count if there.status else None
        return condition is not None and condition.reason == reason and count in {None, counts}

    try:
        await until(look)
    except TimeoutError:
        raise AssertionError(found) from None
    return found[0]


def gauge(name: str, of: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"SpiderIPPool": of})


def test_counts_records_mark_and_finalizer(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms:
            store = rooms.store
            made = await pool(store, "v4", "10.20.0.1-10.20.0.10", exclude_ips=["10.20.0.2"], finalizer=False)
            there = await shows(store, "v4", "Usable", 0)
            assert there.metadata.finalizers == [FINALIZER]
            assert (
                ANNOTATION_CLAIMS not in there.metadata.annotations
            )  # nothing is claimed yet: upstream's, for all we know
            status, condition = there.status, ready(there)
            assert status is not None
            assert condition is not None
            assert (status.allocated_ips, status.total_ip_count, condition.status) == (None, 9, "True")
            assert condition.observed_generation == made.metadata.generation
            until_later = now() + timedelta(seconds=600)
            claims = [
                await store.create(
                    new_claim("10.20.0.3", pool="v4", namespace="ns", name="a", uid="u-1", container="")
                ),
                await store.create(new_claim("10.20.0.4", pool="v4", until=until_later)),
                await store.create(new_claim("10.20.0.5", pool="v4", container="c5", node="")),
            ]
            claims = claims[1:]  # the first has no pod, and is reclaimed
            there = await shows(store, "v4", "Usable", 2)
            assert there.metadata.annotations[ANNOTATION_CLAIMS] == CLAIMS_AUTHORITATIVE
            assert there.status is not None
            assert json.loads(there.status.allocated_ips or "") == {"10.20.0.5": {"pod": "c5", "podUid": ""}}
            await until(lambda: truth(gauge("spiderpool_debug_ippool_available_ip_counts", "v4") == 7))
            assert gauge("spiderpool_debug_ippool_total_ip_counts", "v4") == 9
            assert gauge("spiderpool_ippool_quarantined_ip_counts", "v4") == 1
            wrong = PoolStatus(allocated_ips='{"10.20.0.9":{"pod":"stray/x","podUid":"u"}}', allocated_ip_count=7)
            await store.update_status(replace(there, status=wrong))
            await shows(store, "v4", "Usable", 2)
            table = server.kubectl("get", "sp", "v4", "-o", "wide").splitlines()
            assert table[0].split()[-1] == "READY"
            assert table[1].split()[-1] == "Usable"
            for claim in claims:
                await store.delete(Claim, claim.metadata.name)
            await shows(store, "v4", "Usable", 0)

    asyncio.run(main())


@pytest.mark.upstream("D00004")
def test_a_pool_in_use_does_not_go_away(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms:
            store = rooms.store
            await pool(store, "used", "10.21.0.1-10.21.0.10")
            await pool(store, "unused", "10.22.0.1-10.22.0.10")
            claim = await store.create(new_claim("10.21.0.1", pool="used", container="c", node=""))
            await shows(store, "used", "Usable", 1)
            await store.delete(Pool, "unused")
            await store.delete(Pool, "used")
            await until(lambda: is_gone(store, Pool, "unused"))
            there = await shows(store, "used", "Terminating", 1)
            assert there.metadata.deletion_timestamp is not None
            await store.delete(Claim, claim.metadata.name)
            await until(lambda: is_gone(store, Pool, "used"))
            assert gauge("spiderpool_debug_ippool_total_ip_counts", "used") is None

    asyncio.run(main())


@pytest.mark.upstream("D00005")
def test_a_disabled_pool_says_so_and_still_releases(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server) as rooms, api(server) as admin:
            store = rooms.store
            made = await pool(store, "off", "10.23.0.1-10.23.0.1")
            uid = await admin.pod("default", "in-it")
            await store.create(new_claim("10.23.0.1", pool="off", namespace="default", name="in-it", uid=uid))
            there = await shows(store, "off", "Exhausted", 1)
            first = ready(there)
            await store.update(replace(there, spec=replace(made.spec, disable=True)))
            there = await shows(store, "off", "Disabled", 1)
            second = ready(there)
            assert first is not None
            assert second is not None
            assert first.last_transition_time == second.last_transition_time  # it was not ready before either
            assert second.observed_generation == there.metadata.generation
            await admin.delete_pod("default", "in-it")
            await shows(store, "off", "Disabled", 0)

            async def told() -> bool:
                return {reason for reason, _ in await admin.events("default", "off")} == {
                    "AddressesReclaimed",
                    "Exhausted",
                }

            await until(told)

    asyncio.run(main())


def test_upstreams_records_are_left_to_be_adopted(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store:
            made = await pool(store, "theirs", "10.24.0.1-10.24.0.10", finalizer=False)
            records = json.dumps({"10.24.0.1": {"pod": "ns/a", "podUid": "u"}})
            await store.update_status(replace(made, status=PoolStatus(allocated_ips=records, allocated_ip_count=1)))
            claim = await store.create(new_claim("10.24.0.9", pool="theirs", container="c", node=""))
            async with leading(server):
                there = await shows(store, "theirs", "UpstreamRecords", 1)
                assert there.status is not None
                assert (there.status.allocated_ips, there.status.total_ip_count) == (records, 10)
                assert ANNOTATION_CLAIMS not in there.metadata.annotations
                await store.delete(Claim, claim.metadata.name)
                await store.delete(Pool, "theirs")
                await asyncio.sleep(0.5)
                there = await store.get(Pool, "theirs")  # its records are all that is known of who has the addresses
                marked = {**there.metadata.annotations, ANNOTATION_CLAIMS: CLAIMS_AUTHORITATIVE}
                await store.update(replace(there, metadata=replace(there.metadata, annotations=marked)))
                await until(lambda: is_gone(store, Pool, "theirs"))

    asyncio.run(main())


def test_invalid_and_conflicting_pools_break_nothing_but_themselves(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store:
            await pool(store, "older", "10.25.0.1-10.25.0.10")
            for name, spec in (
                ("reversed", PoolSpec(subnet="10.26.0.0/16", ips=["10.26.0.9-10.26.0.1"])),
                ("no-cidr", PoolSpec(subnet="nonsense", ips=["10.26.0.1"])),
                ("outside", PoolSpec(subnet="10.26.0.0/16", ips=["10.99.0.1"])),
                ("selects", PoolSpec(subnet="10.26.0.0/16", ips=["10.26.0.1"], node_affinity=SOMETIMES)),
            ):
                await store.create(Pool(metadata=ObjectMeta(name=name), spec=spec))
            async with leading(server):
                for name in ("reversed", "no-cidr", "outside", "selects"):
                    condition = ready(await shows(store, name, "InvalidSpec", 0))
                    assert condition is not None
                    assert condition.status == "False"
                await asyncio.sleep(1.1)  # creation times have whole seconds
                await pool(store, "younger", "10.25.0.10-10.25.0.20")
                condition = ready(await shows(store, "younger", "Overlap", 0))
                assert condition is not None
                assert "older" in condition.message
                await shows(store, "older", "Usable", 0)
                await pool(store, "empty", "")
                await shows(store, "empty", "Exhausted", 0)
                there = await store.get(Pool, "older")
                await store.update(replace(there, spec=replace(there.spec, ips=["10.25.0.1-10.25.0.9"])))
                await shows(store, "younger", "Usable", 0)
                for name in ("reversed", "no-cidr", "outside", "selects", "older", "younger", "empty"):
                    await store.delete(Pool, name)
                    await until(lambda name=name: is_gone(store, Pool, name))  # type: ignore[misc]

    asyncio.run(main())


def test_a_burst_of_claims_costs_few_writes_and_other_pools_none(server: Cluster) -> None:
    async def main() -> None:
        async with leading(server, status=StatusSettings(interval=1.0)) as rooms:
            store = rooms.store
            for name in ("burst", "quiet"):
                await pool(
                    store, name, f"10.{28 if name == 'burst' else 29}.0.1-10.{28 if name == 'burst' else 29}.0.250"
                )
                await shows(store, name, "Usable", 0)
            listing = await store.list(Pool, Query(name="burst"))
            quiet = (await store.get(Pool, "quiet")).metadata.resource_version
            writes = 0

            async def count() -> None:
                nonlocal writes
                async for event in store.watch(Pool, Query(name="burst"), listing.resource_version):
                    writes += event.type == "MODIFIED"

            counting = asyncio.create_task(count())
            claims = [new_claim(f"10.28.0.{i + 1}", pool="burst", container=f"c{i}", node="") for i in range(200)]
            for claim in claims:
                await store.create(claim)
            there = await shows(store, "burst", "Usable", 200)
            counting.cancel()
            assert there.status is not None
            assert len(json.loads(there.status.allocated_ips or "")) == 200
            assert 2 <= writes <= 8  # the mark, and one a second
            assert (await store.get(Pool, "quiet")).metadata.resource_version == quiet
            await asyncio.gather(*(store.delete(Claim, claim.metadata.name) for claim in claims))

    asyncio.run(main())


def test_a_new_leader_finds_everything_again(server: Cluster) -> None:
    async def main() -> None:
        async with opened(server) as store:
            async with leading(server):
                await pool(store, "again", "10.30.0.1-10.30.0.10")
                await shows(store, "again", "Usable", 0)
            claim = await store.create(new_claim("10.30.0.1", pool="again", container="c", node=""))
            await pool(store, "meanwhile", "10.31.0.1-10.31.0.10", finalizer=False)
            async with leading(server):
                await shows(store, "again", "Usable", 1)
                assert (await shows(store, "meanwhile", "Usable", 0)).metadata.finalizers == [FINALIZER]
                await store.delete(Claim, claim.metadata.name)
                await shows(store, "again", "Usable", 0)

    asyncio.run(main())


async def truth(value: bool) -> bool:
    return value
