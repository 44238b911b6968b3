"""What the store does when answers get lost, connections break and the server is busy: a real one, behind a proxy."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from api.claim import Claim
from api.pool import Pool, PoolStatus
from lab.kube.cluster import Cluster
from store.errors import (
    AlreadyExistsError,
    ConflictError,
    ExpiredError,
    ForbiddenError,
    NotFoundError,
    UnavailableError,
    UncertainError,
)
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.open import StoreSettings, open_store
from store.port import EVERYTHING, Query
from tests.integration.store_adapters import claim, edit, pool, take, told
from tests.kube.fault_proxy import Fault, Proxy
from tests.kube.store_rig import empty, make_admin, token_of, write_kubeconfig

numbers = itertools.count(1_000_000)
"""Claims that no other test of the session's cluster has."""


@dataclass
class Rig:
    proxy: Proxy
    store: KubeStore
    """Behind the proxy."""
    direct: KubeStore
    """Somebody else."""
    kubeconfig: str


@pytest.fixture(name="token", scope="module")
def a_token(kube: Cluster) -> Iterator[str]:
    token = token_of(kube, "spt-faults")
    make_admin(kube, "spt-faults")
    yield token
    empty(kube)


Test = Callable[[Rig], Awaitable[None]]


@pytest.fixture(name="rigged")
def in_a_rig(kube: Cluster, token: str, tmp_path: object) -> Callable[..., None]:
    """Runs a coroutine function with a rig; keywords are KubeSettings."""

    @asynccontextmanager
    async def rig(settings: dict[str, float]) -> AsyncGenerator[Rig, None]:
        async with Proxy(kube).running() as proxy:
            kubeconfig = write_kubeconfig(f"{tmp_path}/config", kube, proxy.url, {"token": token})
            store = await KubeStore.open(KubeSettings(kubeconfig=kubeconfig, **settings))  # type: ignore[arg-type]
            direct = await KubeStore.open(KubeSettings(kubeconfig=kube.admin))
            try:
                yield Rig(proxy, store, direct, kubeconfig)
            finally:
                await store.close()
                await direct.close()

    def run(test: Test, **settings: float) -> None:
        async def main() -> None:
            async with asyncio.timeout(60), rig(settings) as made:
                await test(made)

        asyncio.run(main())

    return run


def lost(method: str, path: str = "", **more: object) -> Fault:
    """The server does it, and its answer gets lost."""
    return Fault(method, path, forward=True, **more)  # type: ignore[arg-type]


def dropped(method: str, path: str = "", **more: object) -> Fault:
    """The request gets lost; the client cannot tell the difference."""
    return Fault(method, path, **more)  # type: ignore[arg-type]


HOW = pytest.mark.parametrize("how", [lost, dropped])


class TestLostAnswers:
    @HOW
    def test_create(self, rigged: Callable[..., None], how: Callable[[str], Fault]) -> None:
        async def test(rig: Rig) -> None:
            wanted = claim(next(numbers))
            rig.proxy.faults.append(how("POST"))
            made = await rig.store.create(wanted)
            assert made == await rig.direct.get(Claim, wanted.metadata.name)
            assert rig.proxy.seen["POST"] == (1 if how is lost else 2)
            with pytest.raises(AlreadyExistsError):
                await rig.store.create(wanted)

        rigged(test)

    def test_create_that_takes_too_long(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            wanted = claim(next(numbers))
            rig.proxy.faults.append(lost("POST", silence=True))
            made = await rig.store.create(wanted)
            assert made == await rig.direct.get(Claim, wanted.metadata.name)

        rigged(test, attempt=0.5)

    def test_create_that_another_was_faster_with(self, rigged: Callable[..., None]) -> None:
        """Also if the other has created the very same."""

        async def test(rig: Rig) -> None:
            wanted = claim(next(numbers))

            async def create() -> None:
                await rig.direct.create(wanted)

            rig.proxy.faults.append(dropped("POST", then=create))
            with pytest.raises(AlreadyExistsError):
                await rig.store.create(wanted)

        rigged(test)

    def test_create_has_one_winner(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            wanted = claim(next(numbers))
            rig.proxy.faults.append(lost("POST", times=2))
            outcomes = await asyncio.gather(*(rig.store.create(wanted) for _ in range(5)), return_exceptions=True)
            won = [each for each in outcomes if isinstance(each, Claim)]
            assert len(won) == 1
            assert all(isinstance(each, Claim | AlreadyExistsError) for each in outcomes)
            assert won[0] == await rig.direct.get(Claim, wanted.metadata.name)

        rigged(test)

    @HOW
    def test_update(self, rigged: Callable[..., None], how: Callable[[str], Fault]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            rig.proxy.faults.append(how("PUT"))
            newer = await rig.store.update(edit(made, labels={"a": "b"}))
            assert newer.metadata.labels == {"a": "b"}
            assert newer == await rig.direct.get(Claim, made.metadata.name)
            assert rig.proxy.seen["PUT"] == (1 if how is lost else 2)

        rigged(test)

    @HOW
    def test_update_of_any_version(self, rigged: Callable[..., None], how: Callable[[str], Fault]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            rig.proxy.faults.append(how("PUT"))
            newer = await rig.store.update(edit(made, labels={"a": "b"}, resource_version="", uid=""))
            assert newer == await rig.direct.get(Claim, made.metadata.name)

        rigged(test)

    @HOW
    def test_update_that_another_was_faster_with(self, rigged: Callable[..., None], how: Callable[..., Fault]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))

            async def relabel() -> None:
                await rig.direct.update(edit(made, labels={"by": "another"}, resource_version=""))

            rig.proxy.faults.append(how("PUT", then=relabel))
            with pytest.raises(UncertainError):
                await rig.store.update(edit(made, labels={"a": "b"}))

        rigged(test)

    @HOW
    def test_update_of_status(self, rigged: Callable[..., None], how: Callable[[str], Fault]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(pool(f"spt-{next(numbers)}"))
            rig.proxy.faults.append(how("PUT"))
            newer = await rig.store.update_status(replace(made, status=PoolStatus(total_ip_count=9)))
            assert newer.status == PoolStatus(total_ip_count=9)
            assert newer == await rig.direct.get(Pool, made.metadata.name)

        rigged(test)

    @HOW
    def test_removal_of_the_last_finalizer(self, rigged: Callable[..., None], how: Callable[[str], Fault]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(pool(f"spt-{next(numbers)}", finalizers=["f.io/x"]))
            await rig.store.delete(Pool, made.metadata.name)
            dying = await rig.store.get(Pool, made.metadata.name)
            rig.proxy.faults.append(how("PUT"))
            assert (await rig.store.update(edit(dying, finalizers=[]))).metadata.uid == made.metadata.uid
            with pytest.raises(NotFoundError):
                await rig.direct.get(Pool, made.metadata.name)

        rigged(test)

    @HOW
    @pytest.mark.parametrize("condition", ["uid", "resource_version"])
    def test_delete(self, rigged: Callable[..., None], how: Callable[[str], Fault], condition: str) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            rig.proxy.faults.append(how("DELETE"))
            await rig.store.delete(Claim, made.metadata.name, **{condition: getattr(made.metadata, condition)})
            with pytest.raises(NotFoundError):
                await rig.direct.get(Claim, made.metadata.name)
            assert rig.proxy.seen["DELETE"] == (1 if how is lost else 2)

        rigged(test)

    def test_delete_with_a_finalizer(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(pool(f"spt-{next(numbers)}", finalizers=["f.io/x"]))
            rig.proxy.faults.append(lost("DELETE"))
            await rig.store.delete(Pool, made.metadata.name, uid=made.metadata.uid)
            assert rig.proxy.seen["DELETE"] == 1
            dying = await rig.direct.get(Pool, made.metadata.name)
            await rig.direct.update(edit(dying, finalizers=[]))

        rigged(test)

    @pytest.mark.parametrize("by_uid", [True, False])
    def test_delete_never_takes_the_successor(self, rigged: Callable[..., None], by_uid: bool) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            name = made.metadata.name
            successor: list[Claim] = []

            async def recreate() -> None:
                successor.append(await rig.direct.create(edit(made, resource_version="")))

            rig.proxy.faults.append(lost("DELETE", then=recreate))
            if by_uid:
                await rig.store.delete(Claim, name, uid=made.metadata.uid)
            else:
                with pytest.raises(UncertainError):
                    await rig.store.delete(Claim, name)
            assert [await rig.direct.get(Claim, name)] == successor

        rigged(test)

    def test_stays_uncertain_without_a_server(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            wanted = claim(next(numbers))
            rig.proxy.faults.append(lost("POST", then=rig.proxy.vanish))
            with pytest.raises(UncertainError, match=r"10\."):
                await rig.store.create(wanted)
            with pytest.raises(UnavailableError):  # never sent
                await rig.store.create(claim(next(numbers)))

        rigged(test, deadline=1.5)


def refusing(method: str, status: int, seconds: str = "", *, times: int = 1, body: bytes = b"") -> Fault:
    return Fault(method, status=status, headers={"Retry-After": seconds} if seconds else {}, times=times, body=body)


FAILED = b'{"kind":"Status","message":"failed calling webhook","reason":"InternalError","code":500}'


class TestBusyServer:
    @pytest.mark.parametrize("status", [429, 503])
    def test_does_as_it_is_told(self, rigged: Callable[..., None], status: int) -> None:
        async def test(rig: Rig) -> None:
            for method, call in (
                ("POST", lambda: rig.store.create(claim(next(numbers)))),
                ("GET", lambda: rig.store.list(Pool)),
            ):
                rig.proxy.faults.append(refusing(method, status, "1"))
                start = time.monotonic()
                await call()
                assert 1 <= time.monotonic() - start < 3

        rigged(test)

    def test_does_not_wait_beyond_its_deadline(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults += [refusing("GET", 429, "3600"), refusing("POST", 429, "3600")]
            start = time.monotonic()
            with pytest.raises(UnavailableError):
                await rig.store.list(Pool)
            with pytest.raises(UnavailableError):
                await rig.store.create(claim(next(numbers)))
            assert time.monotonic() - start < 1

        rigged(test)

    def test_gives_up_at_its_deadline(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults.append(refusing("GET", 429, times=99))
            start = time.monotonic()
            with pytest.raises(UnavailableError):
                await rig.store.list(Pool)
            assert time.monotonic() - start < 1.5
            assert rig.proxy.seen["GET"] > 2

        rigged(test, deadline=1)

    @pytest.mark.parametrize("status", [429, 503])
    def test_does_not_give_up_before(self, rigged: Callable[..., None], status: int) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults.append(refusing("GET", status, times=20))
            await rig.store.list(Pool)
            assert rig.proxy.seen["GET"] == 21

        rigged(test, backoff_most=0.1)

    def test_failure_that_wrote_nothing(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults.append(refusing("POST", 500, times=9, body=FAILED))
            with pytest.raises(UnavailableError, match="failed calling webhook"):
                await rig.store.create(claim(next(numbers)))

        rigged(test)

    def test_failure_of_etcd_that_may_have_written(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            body = FAILED.replace(b"failed calling webhook", b"etcdserver: request timed out")
            rig.proxy.faults.append(refusing("POST", 500, times=9, body=body))
            with pytest.raises(UncertainError, match="etcdserver: request timed out"):
                await rig.store.create(claim(next(numbers)))

        rigged(test)

    def test_a_request_for_one_object_does_not_wait_for_lists(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            rig.proxy.faults.append(Fault("GET", "/spiderippools", times=8, silence=True))
            lists = [asyncio.create_task(rig.store.list(Pool)) for _ in range(8)]
            await asyncio.sleep(0.2)
            async with asyncio.timeout(2):
                assert await rig.store.get(Claim, made.metadata.name) == made
            assert rig.proxy.seen["GET"] == 1 + 2
            for task in lists:
                task.cancel()
            await asyncio.gather(*lists, return_exceptions=True)

        rigged(test, scans=2)

    def test_silence_ends_by_itself(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults.append(Fault("GET", times=99, silence=True))
            start = time.monotonic()
            with pytest.raises(UnavailableError):
                await rig.store.get(Claim, "10.0.0.1")
            assert time.monotonic() - start < 3

        rigged(test, attempt=0.3, deadline=1.0)

    def test_close_ends_everything(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            rig.proxy.faults += [Fault("GET", times=99, silence=True), lost("POST", silence=True)]
            reading = asyncio.create_task(rig.store.get(Claim, "10.0.0.1"))
            writing = asyncio.create_task(rig.store.create(claim(next(numbers))))
            await rig.proxy.requests(2)
            async with asyncio.timeout(2):
                await rig.store.close()
                outcomes = await asyncio.gather(reading, writing, return_exceptions=True)
            assert [type(each) for each in outcomes] == [UnavailableError, UncertainError]
            with pytest.raises(UnavailableError):
                await rig.store.get(Claim, "10.0.0.1")

        rigged(test)


def label() -> dict[str, str]:
    return {"spt": str(next(numbers))}


class TestWatch:
    def test_goes_on_where_it_was_cut(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            start = (await rig.store.list(Claim, query)).resource_version
            wanted = [claim(next(numbers), labels=labels) for _ in range(300)]

            async def write() -> None:
                for index, each in enumerate(wanted):
                    await rig.direct.create(each)
                    if index % 40 == 20:
                        rig.proxy.cut()

            writing = asyncio.create_task(write())
            async with aclosing(rig.store.watch(Claim, query, start)) as events:
                got: list[tuple[str, str]] = []
                while len(got) < len(wanted):
                    got += told(await take(events, 1))
            await writing
            assert got == [("ADDED", each.metadata.name) for each in wanted]
            assert rig.proxy.seen["WATCH"] >= 4

        rigged(test)

    def test_closing_it_closes_its_connection(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            start = (await rig.store.list(Claim, query)).resource_version
            await rig.direct.create(claim(next(numbers), labels=labels))
            events = rig.store.watch(Claim, query, start)
            await take(events, 1)
            assert rig.proxy.watches == 1
            await events.aclose()
            await rig.direct.create(claim(next(numbers), labels=labels))
            async with asyncio.timeout(5):
                await rig.proxy.nobody_watches()

        rigged(test)

    def test_server_ends_it_now_and_then(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            start = (await rig.store.list(Claim, query)).resource_version
            async with aclosing(rig.store.watch(Claim, query, start)) as events:
                for _ in range(8):
                    made = await rig.direct.create(claim(next(numbers), labels=labels))
                    assert told(await take(events, 1)) == [("ADDED", made.metadata.name)]
                    await asyncio.sleep(0.4)
            assert 2 <= rig.proxy.seen["WATCH"] <= 5

        rigged(test, watch_least=1.0, watch_most=1.0)

    def test_silent_server_is_left(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            start = (await rig.store.list(Claim, query)).resource_version
            async with aclosing(rig.store.watch(Claim, query, start)) as events:
                first = await rig.direct.create(claim(next(numbers), labels=labels))
                assert told(await take(events, 1)) == [("ADDED", first.metadata.name)]
                rig.proxy.mute = True
                second = await rig.direct.create(claim(next(numbers), labels=labels))
                reading = asyncio.create_task(take(events, 1))
                await asyncio.sleep(0.5)
                assert not reading.done()
                rig.proxy.mute = False
                assert told(await reading) == [("ADDED", second.metadata.name)]

        rigged(test, watch_least=1.0, watch_most=1.0, watch_grace=0.5)

    @pytest.mark.parametrize("status", [200, 410])
    def test_too_old_in_either_form(self, rigged: Callable[..., None], status: int) -> None:
        async def test(rig: Rig) -> None:
            body = b'{"kind":"Status","code":410,"reason":"Expired","message":"too old resource version"}'
            if status == 200:
                body = b'{"type":"ERROR","object":' + body + b"}\n"
            rig.proxy.faults.append(Fault("WATCH", status=status, body=body))
            start = (await rig.store.list(Claim, EVERYTHING)).resource_version
            with pytest.raises(ExpiredError, match="too old"):
                await take(rig.store.watch(Claim, EVERYTHING, start), 1)
            rig.proxy.faults.append(Fault("WATCH", status=500, times=99, body=FAILED))
            with pytest.raises(ExpiredError):  # a server that cannot serve this version may serve another
                await take(rig.store.watch(Claim, EVERYTHING, start), 1)

        rigged(test, backoff_most=0.2)

    def test_overloaded_server(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            start = (await rig.store.list(Claim, query)).resource_version
            rig.proxy.faults.append(refusing("WATCH", 429, "1"))
            made = await rig.direct.create(claim(next(numbers), labels=labels))
            begin = time.monotonic()
            async with aclosing(rig.store.watch(Claim, query, start)) as events:
                assert told(await take(events, 1)) == [("ADDED", made.metadata.name)]
            assert 1 <= time.monotonic() - begin < 3

        rigged(test)


class TestList:
    def test_pages_expire(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            labels = label()
            query = Query(labels=labels)
            made = [await rig.direct.create(claim(next(numbers), labels=labels)) for _ in range(25)]
            seen = rig.proxy.seen["GET"]
            assert (await rig.store.list(Claim, query)).items == made
            assert rig.proxy.seen["GET"] - seen == 3
            body = b'{"kind":"Status","code":410,"reason":"Expired","message":"continue is too old"}'

            async def one_more() -> None:
                made.append(await rig.direct.create(claim(next(numbers), labels=labels)))

            rig.proxy.faults += [lost("GET", then=one_more), Fault("GET", status=410, body=body)]
            listing = await rig.store.list(Claim, query)
            assert listing.items == made
            assert int(listing.resource_version) >= int(made[-1].metadata.resource_version)
            rig.proxy.faults.append(Fault("GET", status=410, body=body, times=99))
            with pytest.raises(UnavailableError, match="no snapshot"):
                await rig.store.list(Claim, query)

        rigged(test, page=10)


class TestRights:
    def test_says_which_are_missing(self, kube: Cluster, tmp_path: object) -> None:
        kubeconfig = write_kubeconfig(f"{tmp_path}/c", kube, kube.place.url, {"token": token_of(kube, "spt-nobody")})

        async def main() -> None:
            store = await KubeStore.open(KubeSettings(kubeconfig=kubeconfig))
            for call, verb in (
                (store.create(claim(1)), "create"),
                (store.get(Claim, "10.0.0.1"), "get"),
                (store.list(Claim), "list"),
                (store.delete(Claim, "10.0.0.1"), "delete"),
                (take(store.watch(Claim, EVERYTHING, "1"), 1), "watch"),
            ):
                with pytest.raises(ForbiddenError, match=rf"cannot {verb} resource \"spideripclaims\""):
                    await call
            await store.close()

        asyncio.run(main())

    def test_conflict_of_others_is_told(self, rigged: Callable[..., None]) -> None:
        async def test(rig: Rig) -> None:
            made = await rig.store.create(claim(next(numbers)))
            await rig.direct.update(edit(made, labels={"a": "b"}))
            with pytest.raises(ConflictError, match="modified"):
                await rig.store.update(edit(made, labels={"c": "d"}))

        rigged(test)


class TestAgent:
    def test_setting_chooses_the_store(self, kube: Cluster) -> None:
        async def main() -> None:
            store = await open_store(StoreSettings(kind="kubernetes", kubeconfig=kube.admin))
            assert isinstance(store, KubeStore)
            await store.list(Pool)
            await store.close()

        asyncio.run(main())
        with pytest.raises(ValueError, match="sqlite or kubernetes"):
            StoreSettings(kind="etcd")
