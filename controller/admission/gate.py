"""Who may wait for what at the admission server: bounded connections, and requests bounded in bytes and time.

Anybody who reaches the port may connect, and the API server must be answered all the same. Who does not come to the
point therefore holds nothing that others need: a request takes a place among those that are decided (`places`) only
when all of it has arrived, and when connections or bytes run out, who has been waited for longest goes. To send a
request takes the API server milliseconds, so that is never it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

READING = 5.0
"""Seconds for the TLS handshake, for the first request's head, and for each request's body."""
LARGEST = 8 << 20
"""Bytes of a request: twice what etcd takes, for the old and the new object, and room for managed fields."""
_ALL = 64 << 20
"""Bytes of the requests that are being read or answered."""
_CONNECTIONS = 512
"""At a time; an API server opens one for each request under way, and keeps it."""
_AT_ONCE = 64
"""Requests being answered together; more wait."""
_WAIT = 5.0
"""Seconds that a request may wait for that, so that the API server, which gives up after ten, hears why."""
_IDLE = 120.0
"""Seconds until a connection without requests is closed: later than the API server does it (90 s), whose next request
would else meet a connection that is being closed."""

_log = logging.getLogger(__name__)
Answer = Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]


class Gate(web.Server):
    """A protocol factory for `create_server`; `answer` gets whole requests."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(
            self._handle,
            handler_cancellation=True,  # nobody waits for the answer any more
            access_log=None,
            keepalive_timeout=_IDLE,
            lingering_time=0,
            auto_decompress=False,
        )
        self._answer = answer
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._open: dict[RequestHandler, asyncio.Transport] = {}
        self._awaited: dict[RequestHandler, None] = {}
        """Connections whose next move is the client's, first who has been waited for longest."""
        self._silent: set[RequestHandler] = set()
        """Those that have not sent the head of a request yet."""
        self._held: dict[RequestHandler, int] = {}
        """Bytes of each request that is being read or answered, first who began first."""

    # Connections

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Let the connection in, in place of another one if there are too many."""
        super().connection_made(handler, transport)
        self._open[handler] = transport
        self._await(handler)
        self._silent.add(handler)
        if len(self._open) > _CONNECTIONS:
            # Between requests is where the API server's connections are: those go last.
            sending = (each for each in self._awaited if each in self._silent or each in self._held)
            self._hang_up(next(sending, None) or next(iter(self._awaited)), f"there are {_CONNECTIONS} connections")
        asyncio.get_running_loop().call_later(READING, self._hang_up_if_silent, handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget the connection."""
        super().connection_lost(handler, exc)
        self._forget(handler)

    def _hang_up_if_silent(self, handler: RequestHandler) -> None:
        if handler in self._silent:
            self._hang_up(handler, f"no request within {READING:g} s")

    def _hang_up(self, handler: RequestHandler, why: str) -> None:
        transport = self._open[handler]
        _log.debug("hung up on %s: %s", transport.get_extra_info("peername"), why)
        self._forget(handler)
        # At once would be before the handler of a new connection has begun, which it does not expect.
        asyncio.get_running_loop().call_soon(transport.abort)

    def _await(self, handler: RequestHandler) -> None:
        """From now on the client's next move is waited for."""
        self._awaited.pop(handler, None)
        self._awaited[handler] = None

    def _forget(self, handler: RequestHandler) -> None:
        self._open.pop(handler, None)
        self._awaited.pop(handler, None)
        self._silent.discard(handler)

    # Requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        handler = request.protocol
        self._silent.discard(handler)
        self._held[handler] = 0
        if handler in self._open:
            self._await(handler)
        try:
            body = await self._read(request, handler)
            self._awaited.pop(handler, None)
            async with asyncio.timeout(_WAIT):
                await self._places.acquire()
            try:
                return await self._answer(request, body)
            finally:
                self._places.release()
        except _RefusedError as refusal:
            return _closing(refusal.status, str(refusal))
        except TimeoutError:
            return _closing(HTTPStatus.SERVICE_UNAVAILABLE, f"{_AT_ONCE} other requests are being answered")
        except ConnectionError:  # gone, or hung up on
            return _closing(HTTPStatus.BAD_REQUEST, "the request did not arrive")
        finally:
            del self._held[handler]
            if handler in self._open:
                self._await(handler)

    async def _read(self, request: web.BaseRequest, handler: RequestHandler) -> bytes:
        """The request's body. Raises _RefusedError, ConnectionError."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(READING):
                async for part in request.content.iter_any():
                    parts.append(part)
                    self._held[handler] += len(part)
                    if self._held[handler] > LARGEST:
                        text = f"a request has at most {LARGEST} bytes"
                        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
                    self._make_room(handler)
        except TimeoutError:
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the request does not arrive") from None
        return b"".join(parts)

    def _make_room(self, newest: RequestHandler) -> None:
        """Give up who has been sending for longest, until all have room. Raises _RefusedError if that is not enough."""
        while sum(self._held.values()) > _ALL:
            oldest = next((each for each in self._held if each in self._awaited), newest)
            if oldest is newest:
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests at once")
            self._held[oldest] = 0
            self._hang_up(oldest, "it held memory that others need")


class _RefusedError(Exception):
    """Why a request is not answered."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def _closing(status: HTTPStatus, text: str) -> web.Response:
    """An answer after which the connection is of no use: the rest of the request may still come."""
    response = web.Response(status=status, text=text)
    response.force_close()
    return response
