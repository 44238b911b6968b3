"""A proxy between a client and the real API server that loses answers, cuts connections, and says no."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from lab.kube.cluster import Cluster


@dataclass
class Fault:
    """What happens to the next `times` requests of a method (and path ending)."""

    method: str
    path: str = ""
    times: int = 1
    status: int = 0
    """Answer this, and do not forward the request."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    forward: bool = False
    """Let the server do it, then act; else act at once."""
    then: Callable[[], Awaitable[None]] | None = None
    """Done before acting."""
    silence: bool = False
    """Say nothing and keep the connection, in place of cutting it."""


class Hold:
    """The next `times` requests of a method for a resource are held up until they are let go, and then done after all.

    It widens the window of a race to whatever has to happen meanwhile, at a named call, without touching the code. Who
    asked may have given up by then, and gets no answer.
    """

    def __init__(self, method: str, resource: str, times: int) -> None:
        self.times = times
        self._method = method
        self._resource = resource
        self._caught = 0
        self._done = 0
        self._changed = asyncio.Condition()
        self._go = asyncio.Event()

    def takes(self, method: str, path: str) -> bool:
        """Whether it is one of those; a watch's method is WATCH."""
        return self._caught < self.times and method == self._method and self._resource in path.split("/")

    async def full(self, seconds: float = 30.0) -> None:
        """Return when all have come. Raises TimeoutError."""
        await self._wait(lambda: self._caught == self.times, seconds)

    async def some(self, seconds: float = 30.0) -> None:
        """Return when one has come. Raises TimeoutError."""
        await self._wait(lambda: self._caught > 0, seconds)

    def let_go(self) -> None:
        """Let those that were held up be done, and others be done at once."""
        self._go.set()

    async def over(self, seconds: float = 30.0) -> None:
        """Return when all that had come were done. Raises TimeoutError."""
        await self._wait(lambda: self._done == self._caught, seconds)

    @asynccontextmanager
    async def passing(self) -> AsyncGenerator[None, None]:
        """One request's way."""
        self._caught += 1
        await self._tell()
        try:
            await self._go.wait()
            yield
        finally:
            self._done += 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)


class Proxy:
    """HTTPS on loopback, with the server's own certificate; clients authenticate by token."""

    def __init__(self, cluster: Cluster) -> None:
        pki = cluster.place.pki
        self.faults: list[Fault] = []
        self.holds: list[Hold] = []
        self.seen: Counter[str] = Counter()
        """Requests that came, by method; watches as WATCH."""
        self.mute = False
        """Watches get nothing from now on, and are not ended."""
        self.port = 0
        self._upstream = cluster.place.url
        self._client_tls = ssl.create_default_context(cafile=f"{pki}/ca.crt")
        self._server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._server_tls.load_cert_chain(f"{pki}/server.crt", f"{pki}/server.key")
        self._watches: set[asyncio.Transport] = set()
        self._came = asyncio.Event()
        self._left = asyncio.Event()
        self._gone = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Proxy, None]:
        runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._client_tls, limit=0)
        ) as self._session:
            await runner.setup()
            self._site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._server_tls)
            await self._site.start()
            self.port = runner.addresses[0][1]
            try:
                yield self
            finally:
                self._gone.set()
                self.cut()
                await runner.cleanup()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Cut all watches, in the middle of whatever they say."""
        while self._watches:
            _cut(self._watches.pop())

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._watches)

    async def nobody_watches(self) -> None:
        """Wait until the last watch is gone."""
        while self._watches:
            self._left.clear()
            await self._left.wait()

    def hold(self, method: str, resource: str, times: int) -> Hold:
        """Hold the next requests of a method for a resource up."""
        hold = Hold(method, resource, times)
        self.holds.append(hold)
        return hold

    def let_go(self) -> None:
        """Let go whatever is held up, and hold up no more."""
        for hold in self.holds:
            hold.let_go()
        self.holds.clear()

    async def requests(self, count: int) -> None:
        """Wait until so many have come."""
        while self.seen.total() < count:
            self._came.clear()
            await self._came.wait()

    async def vanish(self) -> None:
        """Take no more connections."""
        self.cut()
        await self._site.stop()

    def _fault(self, request: web.BaseRequest) -> Fault | None:
        method = _method(request)
        self.seen[method] += 1
        self._came.set()
        for fault in self.faults:
            if fault.times and fault.method == method and request.path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        hold = next((each for each in self.holds if each.takes(_method(request), request.path)), None)
        if hold is None:
            return await self._answer(request)
        await request.read()  # later there may be nobody to read from
        async with hold.passing():
            if request.transport is None and _method(request) == "WATCH":
                return web.Response()
            return await self._answer(request)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        fault = self._fault(request)
        if fault is not None and fault.status:
            return web.Response(status=fault.status, headers=fault.headers, body=fault.body)
        if fault is not None and not fault.forward:
            return await self._act(request, fault)
        headers = {key: value for key, value in request.headers.items() if key != "Host"}
        async with self._session.request(
            request.method,
            self._upstream + request.path_qs,
            headers=headers,
            data=await request.read(),
        ) as answer:
            if "watch" in request.query and answer.status == 200:
                return await self._stream(request, answer)
            body = await answer.read()
        if fault is not None:
            return await self._act(request, fault)
        return web.Response(status=answer.status, body=body, content_type="application/json")

    async def _act(self, request: web.BaseRequest, fault: Fault) -> web.Response:
        if fault.then is not None:
            await fault.then()
        if fault.silence:
            await self._gone.wait()
        _cut(request.transport)
        return web.Response()

    async def _stream(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        assert request.transport is not None
        self._watches.add(transport := request.transport)
        try:
            with suppress(ConnectionError, aiohttp.ClientError):
                async for chunk in answer.content.iter_any():
                    if self.mute:
                        await self._gone.wait()
                    await response.write(chunk)
        finally:
            self._watches.discard(transport)
            self._left.set()
        return response


def _method(request: web.BaseRequest) -> str:
    return "WATCH" if "watch" in request.query else request.method


def _cut(transport: asyncio.Transport | None) -> None:
    if transport is not None and not transport.is_closing():
        transport.abort()
