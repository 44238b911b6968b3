"""When endpoints are written: after the ADDs that are under way, and not much later although these do not end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from api.endpoint import Endpoint
from api.meta import Resource
from plugins.ipam import endpoints
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError
from store.port import Store
from tests.integration.ipam_rig import call, node, pool, until

PODS = 12


async def is_there(store: Store, name: str) -> bool:
    try:
        await store.get(Endpoint, name, "ns")
    except NotFoundError:
        return False
    return True


def test_an_endpoint_waits_for_the_adds_that_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_PATIENCE", 60.0)

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.20")
            await ipam.add(call("first"))
            go, reached = asyncio.Event(), asyncio.Event()

            async def hang(_: Resource) -> None:
                reached.set()
                await go.wait()

            store.before["create"] = hang
            adding = asyncio.create_task(ipam.add(call("second")))
            await reached.wait()
            await asyncio.sleep(4 * endpoints._DELAY)  # in which it would have been written
            assert not await is_there(store, "first")
            go.set()
            await adding
            await until(lambda: is_there(store, "first"))
            await until(lambda: is_there(store, "second"))

    asyncio.run(main())


def test_endpoints_are_written_though_adds_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_PATIENCE", 1.0)

    async def main() -> None:
        async with node(tmp_path) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.40")
            began = time.monotonic()
            for number in range(PODS):
                await ipam.add(call(f"p{number}"))
            with ipam._endpoints.yielding():
                for number in range(PODS):
                    await until(lambda name=f"p{number}": is_there(store, name))  # type: ignore[misc]
            assert time.monotonic() - began >= 1.0

    asyncio.run(main())


def test_endpoints_do_not_wait_when_there_is_no_room_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above half of the queue they are written at once, ADDs or not; none is left out."""
    monkeypatch.setattr(endpoints, "_PATIENCE", 60.0)

    async def main() -> None:
        async with node(tmp_path, settings=IpamSettings(endpoint_queue=PODS)) as (ipam, store):
            await pool(store, "v4", "10.6.0.10-10.6.0.40")
            with ipam._endpoints.yielding():
                for number in range(PODS):
                    await ipam.add(call(f"p{number}"))
                await until(lambda: is_there(store, "p0"))
            for number in range(PODS):
                await until(lambda name=f"p{number}": is_there(store, name))  # type: ignore[misc]

    asyncio.run(main())
