"""The store adapters that the conformance tests try, and what those tests share.

To add an adapter: write a class with the methods of `Adapter`, picklable, and add its name to the fixture. Nothing
else in the tests knows which one it has.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pytest
from msgspec.structs import replace

from api.claim import Claim, ClaimSpec
from api.endpoint import Endpoint
from api.meta import ObjectMeta, Resource
from api.pool import Pool, PoolSpec
from store.port import Event, Store
from store.sqlite import SqliteSettings, SqliteStore

R = TypeVar("R", bound=Resource)
WAIT = 10.0
"""Seconds within which an event must come."""


class Adapter(Protocol):
    """One empty store, and how to open it, also from other processes."""

    async def open(self) -> Store:
        """A client of the store."""

    async def expire(self) -> None:
        """Make the store forget its past, so that watches from before now are too old."""


@dataclass(frozen=True)
class Sqlite:
    path: str

    async def open(self) -> Store:
        return await SqliteStore.open(self.path)

    async def expire(self) -> None:
        store = await SqliteStore.open(self.path, SqliteSettings(history=1))
        created = await store.create(claim(250_000))
        await store.delete(Claim, created.metadata.name)
        await store.close()


@pytest.fixture(name="adapter", params=["sqlite"])
def any_adapter(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Adapter:
    return {"sqlite": lambda: Sqlite(os.path.join(tmp_path, "store", "store.db"))}[request.param]()


def on_store(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a test of a coroutine method that takes a `store`, and the `adapter` as well if it wants to."""
    signature = inspect.signature(test)
    names = dict.fromkeys("adapter" if name == "store" else name for name in signature.parameters)

    def run(self: object, adapter: Adapter, **parameters: object) -> None:
        async def main() -> None:
            if "adapter" in signature.parameters:
                parameters["adapter"] = adapter
            async with opened(adapter) as store:
                await test(self, store, **parameters)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return run


@asynccontextmanager
async def opened(adapter: Adapter) -> AsyncGenerator[Store, None]:
    store = await adapter.open()
    try:
        yield store
    finally:
        await store.close()


def claim(number: int, **metadata: object) -> Claim:
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return Claim(
        metadata=ObjectMeta(**({"name": address} | metadata)),  # type: ignore[arg-type]
        spec=ClaimSpec(address=address, ip_version=4, pool="blue"),
    )


def pool(name: str = "blue", **metadata: object) -> Pool:
    return Pool(
        metadata=ObjectMeta(name=name, **metadata),  # type: ignore[arg-type]
        spec=PoolSpec(subnet="10.0.0.0/8", ip_version=4, ips=["10.0.0.1-10.0.0.9"]),
    )


def endpoint(name: str, namespace: str, **metadata: object) -> Endpoint:
    return Endpoint(metadata=ObjectMeta(name=name, namespace=namespace, **metadata))  # type: ignore[arg-type]


def edit(resource: R, **metadata: object) -> R:
    return replace(resource, metadata=replace(resource.metadata, **metadata))


def version(resource: Resource) -> int:
    return int(resource.metadata.resource_version)


async def take(events: AsyncGenerator[Event[R], None], count: int) -> list[Event[R]]:
    """The next `count` events that are no bookmarks."""
    got: list[Event[R]] = []
    async with asyncio.timeout(WAIT):
        while len(got) < count:
            event = await anext(events)
            if event.type != "BOOKMARK":
                got.append(event)
    return got


def told(events: list[Event[R]]) -> list[tuple[str, str]]:
    return [(event.type, event.object.metadata.name) for event in events if event.object is not None]
