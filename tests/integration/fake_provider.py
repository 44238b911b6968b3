"""A stand-in for an infrastructure provider's service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from store.provider import ALLOCATE, BUDGET, RELEASE


class FakeProvider:
    """A stand-in for a cloud's service: remembers what is bound, and answers as it is told to."""

    def __init__(self) -> None:
        self.bound: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.budgets: list[int] = []
        self.failing: set[str] = set()
        self.hanging = False
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.path, body))
        self.budgets.append(int(request.headers[BUDGET]))
        if self.hanging:
            await asyncio.sleep(30)
        if request.path in self.failing:
            return web.Response(status=503, text="no capacity")
        if request.path == RELEASE:
            self.bound.pop(body["ipAddress"], None)
            return web.json_response({})
        given = []
        for item in body["iaasIPsAllocationRequest"]:
            assert item["ipAddress"] not in self.bound, "bound twice"
            mac = f"fa:16:3e:00:00:{len(self.bound):02x}"
            self.bound[item["ipAddress"]] = item
            given.append({**item, "macAddress": mac, "vlanId": 100})
        return web.json_response({"podName": body["podName"], "iaasIPsAllocationResponse": given})


@asynccontextmanager
async def fake_provider() -> AsyncIterator[FakeProvider]:
    """One that serves on loopback, in the network namespace of the calling thread."""
    fake = FakeProvider()
    application = web.Application()
    application.router.add_post(ALLOCATE, fake.answer)
    application.router.add_post(RELEASE, fake.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
