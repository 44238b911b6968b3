"""Requests to the API server: connections, deadlines, attempts, and how many at a time.

There is no limit on requests per second: the API server's own flow control (priority and fairness) knows better what it
can take, and says so with 429, which is obeyed. What is limited is how many requests of ours are under way.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import uniform

import aiohttp
from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, hdrs

from store.errors import UnavailableError
from store.kube_access import Access, Credentials
from store.kube_settings import KubeSettings
from store.kube_status import BROKEN, OVERLOADED, Status, read_status, refusal, retry_after

log = logging.getLogger(__name__)

_IDLE = 30.0
"""Seconds that a connection is kept without a request; the API server keeps it for 90, load balancers for 60."""

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
_UNACKNOWLEDGED = 30_000
"""Milliseconds for which the peer may leave data unacknowledged (tcp(7), TCP_USER_TIMEOUT). With the above, a dead
peer is found out within half a minute, also under a watch that only listens."""

_HEADERS = {
    hdrs.ACCEPT: "application/json",
    hdrs.ACCEPT_ENCODING: "identity",  # unpacking a list costs this side more than the bytes cost the wire
    hdrs.USER_AGENT: "spiderpool",
}
_LARGE = 1 << 20
"""Bytes from which a body is sent as a stream, in parts."""


class NotSentError(Exception):
    """The request did not reach the server."""


class LostError(Exception):
    """The request may have reached the server, no answer came."""


class RefusedError(Exception):
    """The server answered with an error."""

    def __init__(self, status: Status, wait: float) -> None:
        super().__init__(status.message or status.reason)
        self.status = status
        self.wait = wait
        """Seconds that the server asks to wait; 0: it does not say."""


class DoubtError(Exception):
    """A write may or may not have been done. Ours to resolve, the port does not know it."""

    def __init__(self, text: str, *, wait: float, answered: bool) -> None:
        super().__init__(text)
        self.wait = wait
        self.answered = answered
        """The server said that it failed, so what is not there now is not going to come."""


def _is_settled(status: Status) -> bool:
    """Whether a failed write is over. etcd's own failures (its time-out, a new leader) pass through the API server as a
    500 as well, and what it gave no answer for may still be committed."""
    return status.code == 500 and "etcdserver" not in status.message


def backoff(settings: KubeSettings, failures: int) -> float:
    """Seconds to wait after the `failures`-th failure in a row."""
    longest = min(settings.backoff_most, settings.backoff_first * 2 ** min(failures - 1, 16))
    return uniform(longest / 2, longest)


@dataclass(slots=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str]
    body: bytes | None = None
    begun: bool = False
    """Whether a part of it may have reached the server."""


class Client:
    """One session with the API server."""

    def __init__(self, settings: KubeSettings, credentials: Credentials) -> None:
        self.settings = settings
        self.closing = asyncio.Event()
        self._credentials = credentials
        self._points = asyncio.Semaphore(settings.points)
        self._scans = asyncio.Semaphore(settings.scans)
        self._limits: set[asyncio.Timeout] = set()
        self._streams: set[Callable[[], None]] = set()
        # no limit on connections: a watch keeps one, and requests are counted here
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE, socket_factory=_socket)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect),
            read_bufsize=1 << 18,
        )

    async def close(self) -> None:
        """End all requests."""
        self.closing.set()
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)  # aiohttp closes connections, but wakes nobody who reads from one
        for expire in self._streams:
            expire()
        await asyncio.sleep(0)
        await self._session.close()
        await self._credentials.close()

    async def read(self, path: str, query: Mapping[str, str], what: str, *, scan: bool = False) -> bytes:
        """The body of the answer to a GET, attempted again where that may help. Raises StoreError.

        `what` names the object or objects in messages; `scan` is a list.
        """
        lane = self._scans if scan else self._points
        try:
            return await self._repeat(
                what, BROKEN | OVERLOADED, lambda limit: self._send(lane, limit, _Request("GET", path, query))
            )
        except LostError as error:
            raise UnavailableError(f"{what}: {error}") from error

    async def write(self, method: str, path: str, query: Mapping[str, str], body: bytes, what: str) -> bytes:
        """The body of the answer, attempted again only where nothing was done. Raises StoreError, DoubtError."""
        try:
            return await self._repeat(
                what, OVERLOADED, lambda limit: self._send(self._points, limit, _Request(method, path, query, body))
            )
        except LostError as error:
            raise DoubtError(str(error), wait=0, answered=False) from error

    async def _repeat(self, what: str, passing: frozenset[int], send: Callable[[float], Awaitable[bytes]]) -> bytes:
        """`send` until an answer comes that is worth something; its argument is the attempt's deadline.

        Raises LostError for writes (those for which BROKEN is not `passing`) at once, for reads at the end.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.deadline
        failures = 0
        error: Exception | None = None
        while True:
            failures += 1
            try:
                return await send(min(deadline, loop.time() + self.settings.attempt))
            except RefusedError as refused:
                status, wait, failure = refused.status, refused.wait, refusal(refused.status, what)
                if status.code not in passing:
                    if status.code in BROKEN:
                        raise DoubtError(str(failure), wait=wait, answered=_is_settled(status)) from refused
                    raise failure from refused
                error = failure
            except NotSentError as unsent:
                wait, error = 0.0, UnavailableError(f"{what}: {unsent}")
            except LostError as lost:
                if not passing >= BROKEN:
                    raise
                # An attempt that the end of our time cut short says less than the one before it.
                wait, error = 0.0, lost if error is None or loop.time() < deadline else error
            wait = max(wait, backoff(self.settings, failures))
            # Time decides, not a count: an API server that restarts is away for seconds, and refuses quickly meanwhile.
            if loop.time() + wait > deadline or self.closing.is_set():
                raise error
            log.info("trying again in %.1f s: %s", wait, error)
            await self.pause(wait)

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the session."""
        try:
            async with asyncio.timeout(seconds):
                await self.closing.wait()
        except TimeoutError:
            return

    async def _send(self, lane: asyncio.Semaphore, deadline: float, request: _Request) -> bytes:
        """One attempt, or two if the first shows that our credentials are old. Raises one of the errors above."""
        try:
            with _translated():
                async with self._bounded(deadline), lane:
                    return await self._authorized(request)
        except LostError as error:
            if request.begun:
                raise
            raise NotSentError("too many requests are waiting for the API server") from error

    async def _authorized(self, request: _Request) -> bytes:
        access = await self._access()
        request.begun = True
        try:
            return await self._exchange(access, request)
        except RefusedError as refused:
            if refused.status.code != 401 or not await self._credentials.refused(access):
                raise
        except aiohttp.ClientConnectorCertificateError:
            if not await self._credentials.refused(access):
                raise
        return await self._exchange(await self._access(), request)

    async def _exchange(self, access: Access, request: _Request) -> bytes:
        async with self._session.request(
            request.method,
            access.server + request.path,
            params=request.query,
            headers=_headers(access, request.body),
            data=io.BytesIO(request.body) if request.body is not None and len(request.body) > _LARGE else request.body,
            ssl=access.tls,
            server_hostname=access.server_name,
            proxy=access.proxy,
            allow_redirects=False,
            middlewares=() if request.method == "GET" else (_Once(),),
        ) as response:
            answer = await response.read()
            if response.status >= 300:
                raise _refused(response, answer)
            return answer

    @asynccontextmanager
    async def _bounded(self, deadline: float) -> AsyncGenerator[None, None]:
        """A deadline, which `close` brings forward."""
        async with asyncio.timeout_at(deadline) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    async def stream(self, path: str, query: Mapping[str, str]) -> aiohttp.ClientResponse:
        """An answer to a GET that goes on; the caller closes it. Raises one of the errors above."""
        with _translated():
            async with self._bounded(asyncio.get_running_loop().time() + self.settings.attempt):
                access = await self._access()
                response = await self._session.get(
                    access.server + path,
                    params=query,
                    headers=_headers(access, None),
                    ssl=access.tls,
                    server_hostname=access.server_name,
                    proxy=access.proxy,
                    allow_redirects=False,
                )
                if response.status < 300:
                    return response
                async with response:
                    body = await response.read()
                if response.status == 401 and await self._credentials.refused(access):
                    raise NotSentError("the credentials were renewed")
                raise _refused(response, body)

    @contextmanager
    def ending(self, response: aiohttp.ClientResponse, deadline: float) -> Generator[None, None, None]:
        """While the context lasts, the stream ends with LostError at the deadline, a loop time, or with the session.

        By one timer for all of the stream: a timeout around each read would cost more than most reads.
        """
        expire = functools.partial(_break_off, response)
        timer = asyncio.get_running_loop().call_at(deadline, expire)
        self._streams.add(expire)
        try:
            yield
        finally:
            self._streams.discard(expire)
            timer.cancel()

    async def more(self, response: aiohttp.ClientResponse) -> bytes:
        """What comes next of a stream; empty at its end. Raises LostError."""
        if self.closing.is_set():
            return b""
        with _translated():
            return await response.content.readany()

    async def _access(self) -> Access:
        if self.closing.is_set():
            raise NotSentError("the store is closed")
        try:
            return await self._credentials.access()
        except UnavailableError as error:
            raise NotSentError(str(error)) from error


class _Once:
    """Stops aiohttp from sending a PUT or DELETE a second time by itself after the connection broke: the second would
    find the effect of the first, and be told of a conflict with nobody else than itself.
    """

    def __init__(self) -> None:
        self._sent = False

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        if self._sent:
            raise aiohttp.ServerDisconnectedError
        self._sent = True
        return await handler(request)


@contextmanager
def _translated() -> Generator[None, None, None]:
    """What aiohttp raises, as LostError or NotSentError."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise NotSentError(f"cannot reach the API server: {error}") from error
    except TimeoutError as error:
        raise LostError("the API server did not answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise LostError(f"the connection broke: {error or type(error).__name__}") from error


def _break_off(stream: ClientResponse) -> None:
    """Wake up who reads from the stream, now or later, with the end of his time."""
    stream.content.set_exception(TimeoutError())


def _refused(response: ClientResponse, body: bytes) -> RefusedError:
    status = read_status(response.status, body)
    return RefusedError(status, retry_after(response.headers.get(hdrs.RETRY_AFTER), status))


def _headers(access: Access, body: bytes | None) -> dict[str, str]:
    headers: dict[str, str] = {}
    if access.authorization:
        headers[hdrs.AUTHORIZATION] = access.authorization
    if body is not None:
        headers[hdrs.CONTENT_TYPE] = "application/json"
    return headers


def _socket(address: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED)
    return made
