"""ADD and DEL against a real store: what a pod gets, keeps and gives back."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from api.claim import Claim
from api.endpoint import Endpoint
from api.meta import ObjectMeta, now
from api.pool import Pool, Route
from api.reservedip import ReservedIP, ReservedIPSpec
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.errors import (
    AddressConflictError,
    CniError,
    ExhaustedError,
    InvalidConfigError,
    NoPoolError,
    TryAgainLaterError,
)
from plugins.ipam.claims import quarantined
from plugins.ipam.plugin import Ipam
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError, UnavailableError, UncertainError
from tests.integration.ipam_rig import Trouble, addresses, call, claims, node, opened, pool, running, until

DUAL: Any = {"v4": ("v4",), "v6": ("v6",)}


def test_dual_stack_result_in_every_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            routes = [Route(dst="10.9.0.0/16", gw="10.6.0.2")]
            await pool(store, "v4", "10.6.0.10", gateway="10.6.0.1", routes=routes)
            await pool(store, "v6", "fd06::10", gateway="fd06::1")
            v4, v6 = (
                {"address": "10.6.0.10/16", "gateway": "10.6.0.1"},
                {"address": "fd06::10/64", "gateway": "fd06::1"},
            )
            result = await ipam.add(call("a", **DUAL))
            assert result == {
                "cniVersion": "1.0.0",
                "ips": [v4, v6],
                "routes": [
                    {"dst": "10.9.0.0/16", "gw": "10.6.0.2"},
                    {"dst": "0.0.0.0/0", "gw": "10.6.0.1"},
                    {"dst": "::/0", "gw": "fd06::1"},
                ],
                "dns": {},
            }
            old = await ipam.add(call("a", **DUAL, version="0.3.1"))
            assert old["ips"] == [v4 | {"version": "4"}, v6 | {"version": "6"}]
            clean = await ipam.add(call("a", **DUAL, ipam={"clean_gateway": True}))
            assert clean["routes"] == result["routes"][:1]
            assert len(await claims(store)) == 2

    asyncio.run(main())


def test_the_log_tells_who_had_an_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10")
            await ipam.add(call("a", **DUAL))
            await ipam.delete(call("a", "DEL"))

    with caplog.at_level("INFO"):
        asyncio.run(main())
    assert "gave 10.6.0.10/16 of pool v4, fd06::10/64 of pool v6" in caplog.messages
    assert {"released 10.6.0.10 of pool v4", "released fd06::10 of pool v6"} <= set(caplog.messages)


def test_what_a_claim_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10")
            await ipam.add(call("a", **DUAL))
            claim = await store.get(Claim, "fd06-0000-0000-0000-0000-0000-0000-0010")
            spec = claim.spec
            assert (spec.pool, spec.node, spec.nic, spec.set_size) == ("v6", "node1", "eth0", 2)
            assert (spec.pod_uid, spec.container_id, spec.network) == ("uid-a", "sandbox-a", "net")
            assert spec.workload is not None
            assert (spec.workload.namespace, spec.workload.name) == ("ns", "a")
            assert claim.metadata.labels == {
                "ipam.spidernet.io/pool": "v6",
                "ipam.spidernet.io/node": "node1",
                "ipam.spidernet.io/identity": "pod.uid-a",
            }
            assert not claim.metadata.finalizers
            assert not claim.metadata.owner_references

    asyncio.run(main())


def test_excluded_and_reserved_addresses_are_never_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.15", exclude_ips=["10.6.0.11"])
            await store.create(
                ReservedIP(metadata=ObjectMeta(name="r"), spec=ReservedIPSpec(ips=["10.6.0.12-10.6.0.13", "bad"]))
            )
            await until(lambda: settled(lambda: ipam._catalog.reserved[4].count == 2))
            got = [addresses(await ipam.add(call(str(i))))[0] for i in range(3)]
            assert sorted(got) == ["10.6.0.10", "10.6.0.14", "10.6.0.15"]
            with pytest.raises(ExhaustedError) as raised:
                await ipam.add(call("more"))
            assert raised.value.details == "v4: full (3 of 5 in use, 2 reserved)"
            await store.delete(ReservedIP, "r")
            await until(lambda: settled(lambda: not ipam._catalog.reserved[4]))
            assert addresses(await ipam.add(call("more")))[0] in {"10.6.0.12", "10.6.0.13"}

    asyncio.run(main())


def test_the_next_pool_serves_when_the_first_is_full_and_exhaustion_names_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "first", "10.6.0.10")
            await pool(store, "off", "10.6.0.20", disable=True)
            await pool(store, "second", "10.6.0.30")
            listed: Any = {"v4": ("first", "off", "second", "none")}
            assert addresses(await ipam.add(call("a", **listed))) == ["10.6.0.10"]
            assert addresses(await ipam.add(call("b", **listed))) == ["10.6.0.30"]
            with pytest.raises(ExhaustedError) as raised:
                await ipam.add(call("c", **listed))
            assert raised.value.details == (
                "first: full (1 of 1 in use); second: full (1 of 1 in use); "
                "off: it is disabled; none: there is no such pool"
            )

    asyncio.run(main())


def test_all_or_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await pool(store, "v6", "fd06::10")
            await ipam.add(call("a", **DUAL))
            with pytest.raises(ExhaustedError, match="no free IPv6 address"):
                await ipam.add(call("b", **DUAL))
            assert len(await claims(store)) == 2
            await ipam.delete(call("a", "DEL"))
            assert not await claims(store)
            assert len((await ipam.add(call("b", **DUAL)))["ips"]) == 2

    asyncio.run(main())


@pytest.mark.parametrize("error", [UnavailableError("down"), UncertainError("lost"), ValueError("a fault of ours")])
def test_a_creation_that_fails_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(rollback_deadline=2)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await pool(store, "v6", "fd06::10")

            async def fail(resource: Any) -> None:
                if resource.spec.ip_version == 6:
                    raise error

            store.before["create"] = fail
            with pytest.raises((CniError, ValueError)):
                await ipam.add(call("a", **DUAL))
            assert not await claims(store)
            del store.before["create"]
            assert len((await ipam.add(call("a", **DUAL)))["ips"]) == 2

    asyncio.run(main())


def test_a_lost_answer_is_resolved_by_reading_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")

            async def lose(_: Any) -> None:
                del store.after["create"]
                raise UncertainError("the answer was lost")

            store.after["create"] = lose
            assert addresses(await ipam.add(call("a"))) == ["10.6.0.10"]

            async def lose_deletion(_: Any) -> None:
                del store.after["delete"]
                raise UncertainError("the answer was lost")

            store.after["delete"] = lose_deletion
            await ipam.delete(call("a", "DEL"))
            assert not await claims(store)
            assert addresses(await ipam.add(call("b"))) == ["10.6.0.10"]

    asyncio.run(main())


def test_a_claim_whose_deletion_failed_is_deleted_later(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(partial_grace=0.4)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10-fd06::11")

            async def fail(resource: Any) -> None:
                if resource.spec.ip_version == 6:
                    raise UnavailableError("down")

            async def fail_always(_: Any) -> None:
                raise UnavailableError("down")

            store.before = {"create": fail, "delete": fail_always}
            with pytest.raises(TryAgainLaterError):
                await ipam.add(call("a", **DUAL))
            assert list(ipam._allocator.leftovers) == ["10.6.0.10"]
            store.before.clear()
            await until(lambda: settled(lambda: not ipam._allocator.leftovers))
            assert not await claims(store)

    asyncio.run(main())


def test_a_retry_adopts_a_leftover_and_nobody_deletes_it_then(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(partial_grace=0.4)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10-fd06::11")

            async def fail(resource: Any) -> None:
                if resource.spec.ip_version == 6:
                    raise UnavailableError("down")

            async def fail_always(_: Any) -> None:
                raise UnavailableError("down")

            store.before = {"create": fail, "delete": fail_always}
            with pytest.raises(TryAgainLaterError):
                await ipam.add(call("a", **DUAL))
            store.before.clear()
            result = await ipam.add(call("a", **DUAL))
            assert addresses(result)[0] == "10.6.0.10"
            await ipam._house.delete_leftovers()
            await ipam._house.collect_partial_sets()
            assert set(await claims(store)) == set(addresses(result))

    asyncio.run(main())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_cancelled_add_leaves_nothing(tmp_path: Path, moment: str) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await pool(store, "v6", "fd06::10")
            reached = asyncio.Event()
            go = asyncio.Event()

            async def pause(_: Any) -> None:
                reached.set()
                await go.wait()

            getattr(store, moment)["create"] = pause
            task = asyncio.create_task(ipam.add(call("a", **DUAL)))
            await reached.wait()
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, go.set)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await claims(store)

    asyncio.run(main())


def test_undoing_is_not_interrupted(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10")
            undoing, go = asyncio.Event(), asyncio.Event()

            async def fail(resource: Any) -> None:
                if resource.spec.ip_version == 6:
                    raise UnavailableError("down")

            async def pause(_: Any) -> None:
                undoing.set()
                await go.wait()

            store.before = {"create": fail, "delete": pause}
            task = asyncio.create_task(ipam.add(call("a", **DUAL)))
            await undoing.wait()
            task.cancel()
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await claims(store)

    asyncio.run(main())


def test_a_pool_that_goes_in_the_middle_of_an_add(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")

            async def remove(_: Any) -> None:
                await store.delete(Pool, "v4")
                terminating = await store.get(Pool, "v4")
                await store.update(replace(terminating, metadata=replace(terminating.metadata, finalizers=[])))
                await until(lambda: settled(lambda: ipam._catalog.get("v4") is None))

            store.after["create"] = remove
            with pytest.raises(NoPoolError, match="pool of an address that is claimed is gone"):
                await ipam.add(call("a"))
            assert not await claims(store)

    asyncio.run(main())


def test_a_second_claim_of_a_family_is_surplus_and_completes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store:
            async with running(store) as ipam:
                await pool(store, "v4", "10.6.0.10-10.6.0.19")
                await pool(store, "v6", "fd06::10-fd06::19")
                first = addresses(await ipam.add(call("a", **DUAL)))
            model = (await claims(store))[first[0]]
            await store.delete(Claim, (await claims(store))[first[1]].metadata.name)
            spare = min({"10.6.0.10", "10.6.0.11"} - {first[0]})
            meta = ObjectMeta(name=spare, labels=model.metadata.labels)
            await store.create(replace(model, metadata=meta, spec=replace(model.spec, address=spare)))
            async with running(store) as ipam:
                again = addresses(await ipam.add(call("a", **DUAL)))
            assert again[0] == first[0]
            assert len(again) == 2
            assert set(await claims(store)) == set(again)

    asyncio.run(main())


def test_the_deadline_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        settings = IpamSettings(add_deadline=0.2, rollback_deadline=0.2)
        async with node(tmp_path, settings=settings) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            go = asyncio.Event()

            async def pause(_: Any) -> None:
                await go.wait()

            store.after["create"] = pause
            with pytest.raises(TryAgainLaterError, match="too long"):
                await ipam.add(call("a"))
            go.set()
            assert not await claims(store)

    asyncio.run(main())


def test_a_creation_that_lands_after_the_deadline_leaves_nothing(tmp_path: Path) -> None:
    """The store hangs in the middle of the write, while reads of it go on."""

    async def main() -> None:
        settings = IpamSettings(add_deadline=0.2, rollback_deadline=0.2, partial_grace=0.4)
        async with node(tmp_path, settings=settings) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(TryAgainLaterError, match="too long"):
                    await ipam.add(call("a"))
                assert ipam._allocator.leftovers
                other.execute("ROLLBACK")
            await until(lambda: settled(lambda: not ipam._allocator.leftovers))
            assert not await claims(store)

    asyncio.run(main())


def test_a_creation_that_lands_after_it_was_undone_is_undone_again(tmp_path: Path) -> None:
    """The request was held up on its way, and everything else went past it."""

    async def main() -> None:
        settings = IpamSettings(add_deadline=0.2, rollback_deadline=0.2, partial_grace=0.4)
        late: list[Any] = []

        async def hang(resource: Any) -> None:
            late.append(resource)
            await asyncio.Event().wait()

        async with node(tmp_path, settings=settings) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "other", "10.7.0.10", subnet="10.7.0.0/24")
            store.before["create"] = hang
            with pytest.raises(TryAgainLaterError, match="too long"):
                await ipam.add(call("a", container="first"))
            store.before.clear()
            result = await ipam.add(call("a", container="second", v4=("other",)))
            await store.inner.create(late[0])
            assert len(await claims(store)) == 2

            async def one_is_left() -> bool:
                return set(await claims(store)) == set(addresses(result))

            await until(one_is_left)

    asyncio.run(main())


def test_del_finds_a_take_over_that_lands_after_the_adds_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        settings = IpamSettings(add_deadline=0.5, rollback_deadline=0.2)
        async with node(tmp_path, settings=settings) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await ipam.add(call("a", container="old"))
            with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(TryAgainLaterError, match="too long"):
                    await ipam.add(call("a", container="new"))
                deletion = asyncio.create_task(ipam.delete(call("a", "DEL", container="new")))
                await asyncio.sleep(0.1)
                other.execute("ROLLBACK")
            await deletion
            assert not await claims(store)

    asyncio.run(main())


def test_a_retry_gets_the_same_and_completes_what_a_crash_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store:
            async with running(store) as ipam:
                await pool(store, "v4", "10.6.0.10-10.6.0.99")
                await pool(store, "v6", "fd06::10-fd06::99")
                first = addresses(await ipam.add(call("a", **DUAL)))
                assert addresses(await ipam.add(call("a", **DUAL))) == first
            left = (await claims(store))[first[1]]
            await store.delete(Claim, left.metadata.name)
            current = await store.get(Pool, "v4")
            await store.update(replace(current, spec=replace(current.spec, ips=["10.6.1.1"])))
            async with running(store) as ipam:
                again = addresses(await ipam.add(call("a", **DUAL)))
                assert again[0] == first[0]  # kept, though the pool has changed since
                assert len(again) == 2
                assert set(await claims(store)) == set(again)

    asyncio.run(main())


def test_a_complete_set_needs_no_selection(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            first = await ipam.add(call("a"))
            current = await store.get(Pool, "v4")
            await store.update(replace(current, spec=replace(current.spec, disable=True)))
            await until(lambda: settled(lambda: bool(ipam._catalog.get("v4").spec.disable)))  # type: ignore[union-attr]
            assert await ipam.add(call("a")) == first
            with pytest.raises(NoPoolError, match="v4: it is disabled"):
                await ipam.add(call("b"))

    asyncio.run(main())


def test_concurrent_duplicates_get_one_set(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            results = await asyncio.gather(*(ipam.add(call("a")) for _ in range(8)))
            assert all(result == results[0] for result in results)
            assert len(await claims(store)) == 1
            await asyncio.gather(*(ipam.delete(call("a", "DEL")) for _ in range(8)))
            assert not await claims(store)

    asyncio.run(main())


def test_nics_of_one_pod_are_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            eth0, net1 = await asyncio.gather(ipam.add(call("a")), ipam.add(call("a", nic="net1")))
            assert addresses(eth0) != addresses(net1)
            await ipam.delete(call("a", "DEL"))
            assert list(await claims(store)) == addresses(net1)

    asyncio.run(main())


def test_a_new_sandbox_keeps_the_addresses_and_the_old_ones_late_del_frees_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            first = await ipam.add(call("a", container="old"))
            assert await ipam.add(call("a", container="new")) == first
            await ipam.delete(call("a", "DEL", container="old"))
            await ipam.delete(call("a", "DEL", container="old", uid=False))
            assert (await claims(store))[addresses(first)[0]].spec.container_id == "new"
            await ipam.delete(call("a", "DEL", container="new"))
            assert not await claims(store)

    asyncio.run(main())


def test_del_and_take_over_race(tmp_path: Path) -> None:
    """Whichever is first: the new sandbox ends with a claim of its own, and the address is in one claim."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.12")
            for turn in range(20):
                pod = f"p{turn}"
                await ipam.add(call(pod, container="old"))
                work = [ipam.delete(call(pod, "DEL", container="old")), ipam.add(call(pod, container="new"))]
                outcome = await asyncio.gather(*(work if turn % 2 else reversed(work)))
                result = next(item for item in outcome if item is not None)
                held = await claims(store)
                assert list(held) == addresses(result)
                assert held[addresses(result)[0]].spec.container_id == "new"
                await ipam.delete(call(pod, "DEL", container="new"))

    asyncio.run(main())


def test_del_without_uid_and_before_the_caches_are_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store:
            async with running(store) as ipam:
                await pool(store, "v4", "10.6.0.10-10.6.0.99")
                for pod in "abc":
                    await ipam.add(call(pod, uid=pod != "c"))
                await ipam.delete(call("a", "DEL", uid=False))
                await ipam.delete(call("a", "DEL"))
                await ipam.delete(call("b", "DEL", args={"K8S_POD_UID": "another"}))
                assert len(await claims(store)) == 2
            prober = Prober(ProbeSettings())
            idle = Ipam(store, "node1", IpamSettings(), prober)  # not running: nothing is cached
            await idle.delete(call("b", "DEL"))
            await idle.delete(call("c", "DEL"))
            assert not await claims(store)
            await prober.close()

    asyncio.run(main())


def test_another_nodes_claims_are_not_ours(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store, running(store) as one, running(store, node="node2") as two:
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            await one.add(call("a"))
            await two.delete(call("a", "DEL"))
            assert len(await claims(store)) == 1

    asyncio.run(main())


def test_a_fixed_address_is_given_or_refused_and_never_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99", exclude_ips=["10.6.0.50"])
            fixed = {"IP": "10.6.0.42"}
            assert addresses(await ipam.add(call("a", args=fixed))) == ["10.6.0.42"]
            assert addresses(await ipam.add(call("a", args=fixed))) == ["10.6.0.42"]
            with pytest.raises(AddressConflictError, match=r"10\.6\.0\.42: pod ns/a on node node1 has it"):
                await ipam.add(call("b", args=fixed))
            with pytest.raises(AddressConflictError, match=r"10\.6\.0\.42 of pool v4 instead of 10\.6\.0\.43"):
                await ipam.add(call("a", args={"IP": "10.6.0.43"}))
            with pytest.raises(InvalidConfigError, match="none of the pools v4"):
                await ipam.add(call("b", args={"IP": "10.6.0.50"}))
            with pytest.raises(InvalidConfigError, match="this NIC gets no IPv6 address"):
                await ipam.add(call("b", args={"IP": "fd06::1"}))
            assert len(await claims(store)) == 1

    asyncio.run(main())


def test_a_stale_view_does_not_refuse(tmp_path: Path) -> None:
    """The pool's last address is freed in a way that the view has not heard of: the store is asked before refusing."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await ipam.add(call("a"))
            facts = ipam._catalog.get("v4")
            assert facts is not None
            await ipam._views.open(facts)
            ipam._views._tasks["v4"].cancel()
            claim = (await claims(store))["10.6.0.10"]
            await store.delete(Claim, claim.metadata.name)
            assert addresses(await ipam.add(call("b"))) == ["10.6.0.10"]

    asyncio.run(main())


def test_claims_of_another_pool_on_the_same_addresses_are_respected(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.19")
            await pool(store, "over", "10.6.0.10-10.6.0.19")
            for i in range(9):
                await ipam.add(call(f"a{i}"))
            last = await ipam.add(call("b", v4=("over",)))
            with pytest.raises(ExhaustedError, match=r"over: full \(1 of 10 in use, 9 held by claims of pool v4\)"):
                await ipam.add(call("c", v4=("over",)))
            assert addresses(last)[0] in await claims(store)
            await ipam.delete(call("a3", "DEL"))
            await ipam.add(call("c", v4=("over",)))
            assert len(await claims(store)) == 10

    asyncio.run(main())


def test_an_add_waits_for_addresses_in_flight_and_none_deadlocks(tmp_path: Path) -> None:
    """One address of each family, and two pods that want both while a third's ADD fails and gives them back."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await pool(store, "v6", "fd06::10")
            reached, go = asyncio.Event(), asyncio.Event()

            async def pause(resource: Any) -> None:
                reached.set()
                await go.wait()
                store.before.clear()
                if resource.spec.ip_version == 6:
                    raise UnavailableError("down")

            store.before["create"] = pause
            loser = asyncio.create_task(ipam.add(call("a", **DUAL)))
            await reached.wait()
            waiting = asyncio.create_task(ipam.add(call("b", **DUAL)))
            only4 = asyncio.create_task(ipam.add(call("c")))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            go.set()
            with pytest.raises(TryAgainLaterError):
                await loser
            outcome = await asyncio.gather(waiting, only4, return_exceptions=True)
            assert sum(isinstance(item, ExhaustedError) for item in outcome) == 1
            assert len(await claims(store)) in {1, 2}

    asyncio.run(main())


def test_endpoints_follow(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10", gateway="10.6.0.1", routes=[Route(dst="10.9.0.0/16", gw="10.6.0.2")])
            await pool(store, "plain", "10.6.0.20")
            await ipam.add(call("a"))
            await ipam.add(call("a", nic="net1", v4=("plain",)))
            await until(lambda: settled(lambda: ipam._endpoints.idle))
            endpoint = await store.get(Endpoint, "a", "ns")
            assert not endpoint.metadata.finalizers
            assert [(o.kind, o.name, o.uid) for o in endpoint.metadata.owner_references] == [("Pod", "a", "uid-a")]
            status = endpoint.status
            assert status is not None
            assert (status.owner_controller_type, status.owner_controller_name) == ("Pod", "a")
            assert (status.current.uid, status.current.node) == ("uid-a", "node1")
            eth0, net1 = status.current.ips
            assert (eth0.ipv4, eth0.ipv4_pool, eth0.ipv4_gateway) == ("10.6.0.10/16", "v4", "10.6.0.1")
            assert (eth0.vlan, eth0.clean_gateway, eth0.mac) == (0, False, None)
            assert eth0.routes == [Route(dst="10.9.0.0/16", gw="10.6.0.2")]
            assert (net1.interface, net1.ipv4_gateway, net1.clean_gateway) == ("net1", None, None)
            await ipam.delete(call("a", "DEL", nic="net1"))
            await until(lambda: settled(lambda: ipam._endpoints.idle))
            status = (await store.get(Endpoint, "a", "ns")).status
            assert status is not None
            assert [entry.interface for entry in status.current.ips] == ["eth0"]
            await ipam.delete(call("a", "DEL"))
            await until(lambda: settled(lambda: ipam._endpoints.idle))
            with pytest.raises(NotFoundError):
                await store.get(Endpoint, "a", "ns")

    asyncio.run(main())


def test_partial_sets_are_collected_after_the_grace(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(f"{tmp_path}/store.db") as store:
            async with running(store) as ipam:
                await pool(store, "v4", "10.6.0.10-10.6.0.99")
                await pool(store, "v6", "fd06::10-fd06::99")
                partial = addresses(await ipam.add(call("a", **DUAL)))
                whole = addresses(await ipam.add(call("b", **DUAL)))
                netns = "/proc/self/ns/net"
                fd = os.open(netns, os.O_RDONLY)
                in_use = addresses(await ipam.add(call("c", **DUAL, netns=netns, netns_fd=fd)))
                os.close(fd)
                upstreams = addresses(await ipam.add(call("d", **DUAL)))
                unseen = addresses(await ipam.add(call("e", **DUAL)))
            # Of what was adopted no sandbox is known, and one family may have to wait for its pool's records.
            adopted = (await claims(store))[upstreams[1]]
            await store.update(replace(adopted, spec=replace(adopted.spec, container_id="", netns="", netns_inode=0)))
            hidden = (await claims(store))[unseen[1]]
            elsewhere = f"{tmp_path}/not-mounted/e"
            await store.update(replace(hidden, spec=replace(hidden.spec, netns=elsewhere, netns_inode=7)))
            for address in (partial[0], in_use[0], upstreams[0], unseen[0]):
                await store.delete(Claim, (await claims(store))[address].metadata.name)
            async with running(store, settings=IpamSettings(partial_grace=0.4)) as ipam:
                await until(lambda: gone(store, partial[1]))
                await until(lambda: settled(lambda: not ipam._house._partial_since))
                assert set(await claims(store)) == {*whole, in_use[1], upstreams[1], unseen[1]}

    asyncio.run(main())


def test_a_pool_is_followed_only_when_guesses_fail(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path) as (ipam, store), running(store, node="node2") as other:
            await pool(store, "v4", "10.6.0.0-10.6.0.199")
            for i in range(50):
                await ipam.add(call(f"a{i}"))
                await other.add(call(f"b{i}"))
            followed = ipam._views.get("v4") is not None, other._views.get("v4") is not None
            for i in range(100):
                await ipam.add(call(f"c{i}"))
            with pytest.raises(ExhaustedError, match=r"v4: full \(200 of 200 in use\)"):
                await ipam.add(call("d"))
            assert ipam._views.get("v4") is not None
            assert len(await claims(store)) == 200
            assert not all(followed), "half a pool was given"

    asyncio.run(main())


def test_addresses_that_others_gave_back_are_found_again(tmp_path: Path) -> None:
    """What a guess has found taken is not taken for good, and what went before the claims were seen is known."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store), running(store, node="node2") as other:
            await pool(store, "v4", "10.6.0.0-10.6.0.7")
            for i in range(6):
                await other.add(call(f"b{i}"))
            await ipam.add(call("a0"))
            await ipam.add(call("a1"))  # it has met others by now, or followed the pool
            for i in range(6):
                await other.delete(call(f"b{i}", "DEL"))
            await ipam.delete(call("a0", "DEL"))
            for i in range(7):
                await ipam.add(call(f"c{i}"))
            assert len(await claims(store)) == 8

    asyncio.run(main())


def test_a_pool_that_is_hardly_used_is_not_followed_for_long(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(partial_grace=0.4)) as (ipam, store):
            for name, number in (("sparse", 6), ("crowded", 7)):
                await pool(store, name, f"10.{number}.0.10-10.{number}.0.30", subnet=f"10.{number}.0.0/16")
            await ipam.add(call("a", v4=("sparse",)))
            for i in range(3):
                await ipam.add(call(f"b{i}", v4=("crowded",)))
            for name in ("sparse", "crowded"):
                facts = ipam._catalog.get(name)
                assert facts is not None
                await ipam._views.open(facts)
            await until(lambda: settled(lambda: ipam._views.get("sparse") is None))
            assert ipam._views.get("crowded") is not None
            await ipam.add(call("c", v4=("sparse",)))
            assert len(await claims(store)) == 5

    asyncio.run(main())


def test_pools_that_are_not_used_are_not_followed(tmp_path: Path) -> None:
    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(partial_grace=0.4, view_idle=0.1)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.99")
            assert not ipam._views.names()
            await ipam.add(call("a"))
            assert ipam._views.names() == ["v4"]
            await until(lambda: settled(lambda: not ipam._views.names()))
            await ipam.add(call("b"))
            assert len(await claims(store)) == 2

    asyncio.run(main())


def test_a_pool_that_an_add_waits_for_is_in_use(tmp_path: Path) -> None:
    """It was not used for long, and guesses do not pay: all claims are being read when the idle are closed."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.15")  # a claim makes it crowded
            await ipam.add(call("a"))
            facts, loop = ipam._catalog.get("v4"), asyncio.get_running_loop()
            assert facts is not None
            view = ipam._views.usable(facts)
            assert view is not None
            while view.usable:
                view.contest(0)
            view.last_used = loop.time() - 1000
            opening = asyncio.create_task(ipam.add(call("b")))
            async with asyncio.timeout(10):
                while not view.followed:  # noqa: ASYNC110 - a turn later, when the list has only been asked for
                    await asyncio.sleep(0)
            ipam._views.close_idle(loop.time() - 900)
            assert ipam._views.names() == ["v4"]
            assert len(addresses(await opening)) == 1

    asyncio.run(main())


def test_quarantined_claims_are_nobodys(tmp_path: Path) -> None:
    """A claim in quarantine is neither found by the pod's DEL nor given, and counts in the error."""

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10")
            await ipam.add(call("a"))
            claim = (await claims(store))["10.6.0.10"]
            stored = await store.update(quarantined(claim, "it answered", "02:00:00:00:00:01", 60))
            assert stored.spec.quarantine is not None
            assert now() < stored.spec.quarantine.until <= now() + timedelta(seconds=61)
            await until(lambda: settled(lambda: not ipam._held.sets()))
            await ipam.delete(call("a", "DEL"))
            assert await claims(store)
            with pytest.raises(ExhaustedError, match=r"v4: full \(0 of 1 in use, 1 in quarantine\)"):
                await ipam.add(call("b"))
            with pytest.raises(AddressConflictError, match="in quarantine until"):
                await ipam.add(call("b", args={"IP": "10.6.0.10"}))

    asyncio.run(main())


async def settled(condition: Any) -> bool:
    return bool(condition())


async def gone(store: Trouble, address: str) -> bool:
    return address not in await claims(store)
