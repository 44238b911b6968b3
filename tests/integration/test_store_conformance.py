"""What `store.port` promises of reads and writes, tried on every adapter."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from msgspec.structs import replace

from api.claim import Claim
from api.endpoint import Endpoint, EndpointCurrent, EndpointStatus
from api.meta import OwnerReference, Resource, now
from api.pool import Pool, PoolStatus
from store.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError
from store.port import EVERYTHING, Query, Store
from tests.integration.store_adapters import (
    any_adapter,
    claim,
    edit,
    endpoint,
    on_store,
    pool,
    take,
    told,
    version,
)

__all__ = ["any_adapter"]


class TestCreate:
    @on_store
    async def test_sets_what_is_the_stores_to_set(self, store: Store) -> None:
        before = now()
        given = claim(1, labels={"app": "web"}, annotations={"a": "b"}, uid="mine", generation=7)
        made = await store.create(edit(given, deletion_timestamp=before, deletion_grace_period_seconds=3))
        metadata = made.metadata
        assert metadata.uid not in ("", "mine")
        assert metadata.resource_version
        assert metadata.generation == 1
        assert metadata.creation_timestamp is not None
        assert abs((metadata.creation_timestamp - before).total_seconds()) < 60
        assert metadata.deletion_timestamp is None
        assert metadata.deletion_grace_period_seconds is None
        assert (metadata.labels, metadata.annotations) == ({"app": "web"}, {"a": "b"})
        assert made.spec == given.spec
        assert await store.get(Claim, "10.0.0.1") == made

    @on_store
    async def test_refuses_a_name_that_exists(self, store: Store) -> None:
        made = await store.create(claim(1))
        with pytest.raises(AlreadyExistsError, match=r"10\.0\.0\.1"):
            await store.create(claim(1))
        assert await store.get(Claim, "10.0.0.1") == made

    @on_store
    async def test_refuses_a_resource_version(self, store: Store) -> None:
        with pytest.raises(InvalidError, match="resourceVersion"):
            await store.create(claim(1, resource_version="1"))

    @on_store
    async def test_same_name_in_other_kinds_and_namespaces_is_another_object(self, store: Store) -> None:
        made = [
            await store.create(pool("same")),
            await store.create(edit(claim(1), name="same")),
            await store.create(endpoint("same", "one")),
            await store.create(endpoint("same", "two")),
        ]
        assert len({each.metadata.uid for each in made}) == 4
        assert (await store.get(Endpoint, "same", "two")).metadata.uid == made[3].metadata.uid

    @on_store
    async def test_versions_order_all_writes(self, store: Store) -> None:
        first = await store.create(claim(1))
        second = await store.create(pool())
        third = await store.update(edit(first, labels={"a": "b"}))
        assert version(first) < version(second) < version(third)

    @on_store
    async def test_name_can_be_used_again_after_delete_by_a_new_object(self, store: Store) -> None:
        first = await store.create(claim(1))
        await store.delete(Claim, "10.0.0.1")
        second = await store.create(claim(1))
        assert second.metadata.uid != first.metadata.uid
        assert version(second) > version(first) + 1

    @on_store
    async def test_concurrent_creates_have_one_winner_and_do_not_spoil_each_other(self, store: Store) -> None:
        names = [number for number in range(40) for _ in range(3)]
        bad = claim(1, name="Bad_Name"), claim(100, annotations={"a": "\udcff"})
        results = await asyncio.gather(*map(store.create, [*map(claim, names), *bad]), return_exceptions=True)
        assert isinstance(results.pop(), InvalidError)
        assert isinstance(results.pop(), InvalidError)
        won = [each for each in results if isinstance(each, Claim)]
        assert sorted(each.metadata.name for each in won) == sorted(claim(n).metadata.name for n in range(40))
        assert all(isinstance(each, Claim | AlreadyExistsError) for each in results)
        listing = await store.list(Claim)
        assert {each.metadata.uid for each in listing.items} == {each.metadata.uid for each in won}
        assert len({version(each) for each in won}) == 40


class TestRead:
    @on_store
    async def test_get_tells_what_is_missing(self, store: Store) -> None:
        with pytest.raises(NotFoundError, match=r"SpiderIPClaim '10\.0\.0\.1'"):
            await store.get(Claim, "10.0.0.1")
        await store.create(endpoint("pod", "one"))
        with pytest.raises(NotFoundError, match="two/pod"):
            await store.get(Endpoint, "pod", "two")

    @on_store
    async def test_list_of_nothing_can_be_watched_from(self, store: Store) -> None:
        listing = await store.list(Claim)
        assert listing.items == []
        async with aclosing(store.watch(Claim, EVERYTHING, listing.resource_version)) as events:
            await store.create(claim(1))
            assert told(await take(events, 1)) == [("ADDED", "10.0.0.1")]

    @on_store
    async def test_list_is_ordered_by_namespace_and_name(self, store: Store) -> None:
        for name, namespace in (("b", "two"), ("a", "two"), ("c", "one"), ("a-b", "one"), ("a.b", "one")):
            await store.create(endpoint(name, namespace, labels={"app": "web"}))
        for query in (EVERYTHING, Query(labels={"app": "web"})):
            got = [(e.metadata.namespace, e.metadata.name) for e in (await store.list(Endpoint, query)).items]
            assert got == [("one", "a-b"), ("one", "a.b"), ("one", "c"), ("two", "a"), ("two", "b")]

    @pytest.mark.parametrize(
        ("query", "names"),
        [
            (Query(), ["a", "b", "a"]),
            (Query(namespace="one"), ["a", "b"]),
            (Query(namespace="none"), []),
            (Query(name="a"), ["a", "a"]),
            (Query(name="a", namespace="two"), ["a"]),
            (Query(labels={"app": "web"}), ["a", "a"]),
            (Query(labels={"app": "web", "tier": "front"}), ["a"]),
            (Query(labels={"tier": "front", "app": "web"}, namespace="two"), []),
            (Query(labels={"app": "web"}, name="b"), []),
            (Query(labels={"app": ""}), ["b"]),
            (Query(labels={"app": "none"}), []),
            (Query(labels={"none": "web"}), []),
        ],
    )
    @on_store
    async def test_all_conditions_of_a_query_must_hold(self, store: Store, query: Query, names: list[str]) -> None:
        await store.create(endpoint("a", "one", labels={"app": "web", "tier": "front"}))
        await store.create(endpoint("b", "one", labels={"app": ""}))
        await store.create(endpoint("a", "two", labels={"app": "web"}))
        await store.create(claim(1, labels={"app": "web"}))
        assert [each.metadata.name for each in (await store.list(Endpoint, query)).items] == names

    @pytest.mark.parametrize(
        "query",
        [
            Query(labels={"a": "b,c=d"}),
            Query(labels={"a,b": "c"}),
            Query(labels={"a": "b c"}),
            Query(name="a,metadata.namespace=b"),
            Query(name="../a"),
            Query(namespace="a/b"),
        ],
    )
    @on_store
    async def test_query_that_nothing_can_match_is_refused(self, store: Store, query: Query) -> None:
        """It must not be taken for another one."""
        with pytest.raises(InvalidError):
            await store.list(Endpoint, query)
        with pytest.raises(InvalidError):
            await take(store.watch(Endpoint, query, "1"), 1)

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a?b=c", "A"])
    @on_store
    async def test_name_that_no_object_can_have_is_not_found(self, store: Store, name: str) -> None:
        with pytest.raises(NotFoundError):
            await store.get(Claim, name)
        with pytest.raises(NotFoundError):
            await store.delete(Claim, name)
        with pytest.raises(NotFoundError):
            await store.get(Endpoint, "a", name)

    @on_store
    async def test_list_by_labels_follows_updates_and_deletes(self, store: Store) -> None:
        one, two = [await store.create(claim(number, labels={"app": "web"})) for number in (1, 2)]
        await store.update(edit(one, labels={"app": "db"}))
        await store.delete(Claim, two.metadata.name)
        assert (await store.list(Claim, Query(labels={"app": "web"}))).items == []
        assert [e.metadata.name for e in (await store.list(Claim, Query(labels={"app": "db"}))).items] == ["10.0.0.1"]

    @on_store
    async def test_list_is_a_snapshot_to_watch_from(self, store: Store) -> None:
        """What a list shows and what a watch from it tells together are every write, once."""

        async def write() -> None:
            for number in range(60):
                await store.create(claim(number))

        writing = asyncio.create_task(write())
        for _ in range(5):
            listing = await store.list(Claim)
            seen = {each.metadata.name for each in listing.items}
            async with aclosing(store.watch(Claim, EVERYTHING, listing.resource_version)) as events:
                rest = {name for _, name in told(await take(events, 60 - len(seen)))}
            assert not seen & rest
            assert len(seen | rest) == 60
        await writing


class TestUpdate:
    @on_store
    async def test_replaces_and_keeps_identity(self, store: Store) -> None:
        made = await store.create(claim(1, labels={"a": "b"}, annotations={"x": "y"}))
        wanted = replace(edit(made, labels={"c": "d"}, annotations={}), spec=replace(made.spec, node="n1"))
        got = await store.update(wanted)
        assert (got.metadata.labels, got.metadata.annotations, got.spec.node) == ({"c": "d"}, {}, "n1")
        assert (got.metadata.uid, got.metadata.creation_timestamp) == (
            made.metadata.uid,
            made.metadata.creation_timestamp,
        )
        assert version(got) > version(made)
        assert await store.get(Claim, "10.0.0.1") == got

    @on_store
    async def test_generation_counts_changes_of_the_spec(self, store: Store) -> None:
        made = await store.create(pool())
        labelled = await store.update(edit(made, labels={"a": "b"}, generation=9))
        assert labelled.metadata.generation == 1
        told = await store.update_status(replace(labelled, status=PoolStatus(total_ip_count=9)))
        assert told.metadata.generation == 1
        changed = await store.update(replace(told, spec=replace(told.spec, gateway="10.0.0.254")))
        assert changed.metadata.generation == 2

    @on_store
    async def test_without_version_and_uid_is_unconditional(self, store: Store) -> None:
        made = await store.create(claim(1))
        await store.update(edit(made, labels={"a": "b"}))
        got = await store.update(claim(1, labels={"c": "d"}))
        assert got.metadata.labels == {"c": "d"}
        assert got.metadata.uid == made.metadata.uid

    @on_store
    async def test_stale_version_is_a_conflict(self, store: Store) -> None:
        made = await store.create(claim(1))
        newer = await store.update(edit(made, labels={"a": "b"}))
        with pytest.raises(ConflictError):
            await store.update(edit(made, labels={"c": "d"}))
        assert await store.get(Claim, "10.0.0.1") == newer

    @on_store
    async def test_other_uid_is_a_conflict(self, store: Store) -> None:
        made = await store.create(claim(1))
        await store.delete(Claim, "10.0.0.1")
        await store.create(claim(1))
        with pytest.raises(ConflictError):
            await store.update(edit(made, resource_version=""))

    @on_store
    async def test_missing_object(self, store: Store) -> None:
        with pytest.raises(NotFoundError):
            await store.update(claim(1))
        made = await store.create(claim(1))
        await store.delete(Claim, "10.0.0.1")
        with pytest.raises(NotFoundError):
            await store.update(made)

    @on_store
    async def test_concurrent_updates_of_one_version_have_one_winner(self, store: Store) -> None:
        made = await store.create(claim(1))
        results = await asyncio.gather(
            *(store.update(edit(made, labels={"n": str(n)})) for n in range(20)), return_exceptions=True
        )
        won = [each for each in results if isinstance(each, Claim)]
        assert len(won) == 1
        assert sum(isinstance(each, ConflictError) for each in results) == 19
        assert await store.get(Claim, "10.0.0.1") == won[0]

    @on_store
    async def test_changing_nothing_keeps_the_version_and_sends_no_event(self, store: Store) -> None:
        made = await store.create(pool(labels={"a": "1", "b": "2"}))
        async with aclosing(store.watch(Pool, EVERYTHING, made.metadata.resource_version)) as events:
            assert await store.update(edit(made, labels={"b": "2", "a": "1"})) == made
            assert await store.update(pool(labels={"a": "1", "b": "2"})) == made
            assert await store.update_status(made) == made
            await store.create(pool("end"))
            assert told(await take(events, 1)) == [("ADDED", "end")]

    @on_store
    async def test_timestamps_are_immutable(self, store: Store) -> None:
        made = await store.create(claim(1))
        with pytest.raises(InvalidError, match=r"metadata\.deletionTimestamp"):
            await store.update(edit(made, deletion_timestamp=now()))


class TestStatus:
    @on_store
    async def test_create_and_update_ignore_status(self, store: Store) -> None:
        made = await store.create(replace(pool(), status=PoolStatus(total_ip_count=1)))
        assert made.status is None or made.status == PoolStatus()
        told = await store.update_status(replace(made, status=PoolStatus(total_ip_count=9)))
        assert told.status == PoolStatus(total_ip_count=9)
        got = await store.update(
            replace(edit(told, labels={"a": "b"}), status=PoolStatus(total_ip_count=1, allocated_ip_count=1))
        )
        assert got.status == PoolStatus(total_ip_count=9)
        assert got.metadata.labels == {"a": "b"}

    @on_store
    async def test_update_status_ignores_the_rest(self, store: Store) -> None:
        made = await store.create(pool(labels={"a": "b"}))
        other = replace(edit(made, labels={"c": "d"}, annotations={"x": "y"}, finalizers=["f.io/x"]))
        other = replace(other, spec=replace(made.spec, gateway="10.0.0.254"), status=PoolStatus(allocated_ip_count=2))
        got = await store.update_status(other)
        assert got.status == PoolStatus(allocated_ip_count=2)
        assert got.spec == made.spec
        assert replace(got.metadata, resource_version="") == replace(made.metadata, resource_version="")
        assert version(got) > version(made)

    @on_store
    async def test_update_status_raises_as_update(self, store: Store) -> None:
        with pytest.raises(NotFoundError):
            await store.update_status(pool())
        made = await store.create(pool())
        await store.update(edit(made, labels={"a": "b"}))
        with pytest.raises(ConflictError):
            await store.update_status(replace(made, status=PoolStatus(total_ip_count=1)))
        with pytest.raises(ConflictError):
            await store.update_status(edit(made, uid="other", resource_version=""))

    @on_store
    async def test_kind_without_subresource(self, store: Store) -> None:
        current = EndpointCurrent(uid="u", node="n", ips=[])
        status = EndpointStatus(current=current, owner_controller_type="Pod", owner_controller_name="pod")
        made = await store.create(replace(endpoint("pod", "one"), status=status))
        assert made.status == status
        with pytest.raises(NotFoundError):
            await store.update_status(made)


class TestDelete:
    @on_store
    async def test_removes(self, store: Store) -> None:
        await store.create(claim(1))
        await store.delete(Claim, "10.0.0.1")
        with pytest.raises(NotFoundError):
            await store.get(Claim, "10.0.0.1")
        with pytest.raises(NotFoundError):
            await store.delete(Claim, "10.0.0.1")
        assert (await store.list(Claim)).items == []

    @on_store
    async def test_preconditions(self, store: Store) -> None:
        made = await store.create(claim(1))
        newer = await store.update(edit(made, labels={"a": "b"}))
        uid = made.metadata.uid
        for wrong in (
            {"uid": "other"},
            {"resource_version": made.metadata.resource_version},
            {"uid": uid, "resource_version": made.metadata.resource_version},
            {"uid": "other", "resource_version": newer.metadata.resource_version},
        ):
            with pytest.raises(ConflictError):
                await store.delete(Claim, "10.0.0.1", **wrong)
        await store.delete(Claim, "10.0.0.1", uid=uid, resource_version=newer.metadata.resource_version)
        with pytest.raises(NotFoundError):
            await store.delete(Claim, "10.0.0.1", uid=uid)

    @on_store
    async def test_finalizers_hold_the_object_until_the_last_is_removed(self, store: Store) -> None:
        made = await store.create(pool(finalizers=["f.io/one", "f.io/two"]))
        async with aclosing(store.watch(Pool, EVERYTHING, made.metadata.resource_version)) as events:
            await store.delete(Pool, "blue")
            dying = await store.get(Pool, "blue")
            assert dying.metadata.deletion_timestamp is not None
            assert version(dying) > version(made)
            await store.delete(Pool, "blue")  # once more changes nothing
            assert await store.get(Pool, "blue") == dying
            with pytest.raises(AlreadyExistsError):
                await store.create(pool())
            half = await store.update(edit(dying, finalizers=["f.io/two"]))
            assert await store.get(Pool, "blue") == half
            last = await store.update(edit(half, finalizers=[]))
            assert last.metadata.finalizers == []
            with pytest.raises(NotFoundError):
                await store.get(Pool, "blue")
            assert [event.type for event in await take(events, 3)] == ["MODIFIED", "MODIFIED", "DELETED"]
        assert (await store.create(pool())).metadata.uid != made.metadata.uid

    @on_store
    async def test_preconditions_hold_for_objects_with_finalizers_too(self, store: Store) -> None:
        made = await store.create(pool(finalizers=["f.io/one"]))
        with pytest.raises(ConflictError):
            await store.delete(Pool, "blue", uid="other")
        assert await store.get(Pool, "blue") == made

    @on_store
    async def test_removing_the_last_finalizer_of_a_living_object_keeps_it(self, store: Store) -> None:
        made = await store.create(pool(finalizers=["f.io/one"]))
        await store.update(edit(made, finalizers=[]))
        assert (await store.get(Pool, "blue")).metadata.finalizers == []

    @on_store
    async def test_terminating_object_takes_no_new_finalizers(self, store: Store) -> None:
        await store.create(pool(finalizers=["f.io/one"]))
        await store.delete(Pool, "blue")
        dying = await store.get(Pool, "blue")
        with pytest.raises(InvalidError, match=r"metadata\.finalizers"):
            await store.update(edit(dying, finalizers=["f.io/one", "f.io/two"]))
        kept = await store.update(edit(dying, labels={"a": "b"}, deletion_timestamp=None))
        assert kept.metadata.deletion_timestamp == dying.metadata.deletion_timestamp


INVALID = [
    (claim(1, name=""), "metadata.name"),
    (claim(1, name="Upper"), "metadata.name"),
    (claim(1, name="under_score"), "metadata.name"),
    (claim(1, name="-dash"), "metadata.name"),
    (claim(1, name="dot..dot"), "metadata.name"),
    (claim(1, name="a/b"), "metadata.name"),
    (claim(1, name="line\n"), "metadata.name"),
    (claim(1, name="a" * 254), "metadata.name"),
    (claim(1, namespace="one"), "metadata.namespace"),
    (endpoint("pod", ""), "metadata.namespace"),
    (endpoint("pod", "dotted.name"), "metadata.namespace"),
    (endpoint("pod", "a" * 64), "metadata.namespace"),
    (claim(1, labels={"": "x"}), "metadata.labels"),
    (claim(1, labels={"-x": "x"}), "metadata.labels"),
    (claim(1, labels={"a/b/c": "x"}), "metadata.labels"),
    (claim(1, labels={"/b": "x"}), "metadata.labels"),
    (claim(1, labels={"Upper.io/b": "x"}), "metadata.labels"),
    (claim(1, labels={"a" * 64: "x"}), "metadata.labels"),
    (claim(1, labels={"app": "a" * 64}), "metadata.labels"),
    (claim(1, labels={"app": "a b"}), "metadata.labels"),
    (claim(1, labels={"app": "fd00::1"}), "metadata.labels"),
    (claim(1, labels={"app": "x-"}), "metadata.labels"),
    (claim(1, annotations={"a b": "x"}), "metadata.annotations"),
    (claim(1, annotations={"big": "x" * 262_144}), "metadata.annotations"),
    (claim(1, finalizers=["no/good/name"]), "metadata.finalizers"),
    (
        claim(1, owner_references=[OwnerReference(api_version="v1", kind="Pod", name="", uid="u")]),
        "metadata.ownerReferences[0].name",
    ),
    (
        claim(
            1,
            owner_references=[
                OwnerReference(api_version="v1", kind="Pod", name=name, uid=name, controller=True) for name in "ab"
            ],
        ),
        "metadata.ownerReferences",
    ),
]

VALID: list[Resource] = [
    claim(1, name="a"),
    claim(1, name="fd00-0000-0000-0000-0000-0000-0000-0001"),
    claim(1, name="a" * 253),
    claim(1, name="0-a.b.9"),
    endpoint("pod.one", "a" * 63),
    claim(1, labels={"a" * 63: "b" * 63, f"{'x' * 249}.io/A_b.c-9": "", "e": "A_b.c-9"}),
    claim(1, annotations={"Upper.io/key": "any text at all: ü\n", "big": "x" * 262_000}),
    claim(1, finalizers=["spiderpool.spidernet.io", "f.io/x"]),
]


class TestRules:
    @pytest.mark.parametrize(("resource", "path"), INVALID, ids=[f"{n}-{path}" for n, (_, path) in enumerate(INVALID)])
    @on_store
    async def test_refused_with_the_field_path(self, store: Store, resource: Resource, path: str) -> None:
        with pytest.raises(InvalidError) as caught:
            await store.create(resource)
        assert path in str(caught.value)
        assert (await store.list(type(resource))).items == []

    @pytest.mark.parametrize("resource", VALID, ids=range(len(VALID)))
    @on_store
    async def test_accepted_and_read_back(self, store: Store, resource: Resource) -> None:
        made = await store.create(resource)
        got = await store.get(type(resource), made.metadata.name, made.metadata.namespace)
        assert got == made
        assert (got.metadata.labels, got.metadata.annotations, got.metadata.finalizers) == (
            resource.metadata.labels,
            resource.metadata.annotations,
            resource.metadata.finalizers,
        )

    @on_store
    async def test_update_is_checked_like_create(self, store: Store) -> None:
        made = await store.create(claim(1))
        with pytest.raises(InvalidError, match=r"metadata\.labels"):
            await store.update(edit(made, labels={"app": "a b"}))
        assert await store.get(Claim, "10.0.0.1") == made

    @on_store
    async def test_every_problem_is_named(self, store: Store) -> None:
        with pytest.raises(InvalidError) as caught:
            await store.create(claim(1, name="Bad", labels={"app": "a b"}, finalizers=["?"]))
        for path in ("metadata.name", "metadata.labels", "metadata.finalizers"):
            assert path in str(caught.value)
