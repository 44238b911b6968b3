"""The socket that upstream's executables call: HTTP for root alone, bounded in connections, sizes and time."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, Final

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from agent.unixsocket import AddressInUseError, UnixSocket
from agent.upstream.api import Asked, UpstreamApi
from agent.upstream.settings import UpstreamSettings
from agent.wire import peer_uid

MAX_BODY: Final = 64 << 10
"""Bytes of a request's body; upstream's are below one kilobyte."""
_KEEPALIVE: Final = 15.0
"""Seconds that a connection may be idle between two requests of one executable."""
_RETRY: Final = 5.0
"""Seconds between looks whether the path is free now."""
_PATIENCE: Final = 3.0
"""Seconds for requests under way at the stop; what is cancelled then rolls back."""

_log = logging.getLogger(__name__)


class _Gate(web.Server):
    """Hangs up on strangers, on too many, and on who says nothing."""

    def __init__(self, settings: UpstreamSettings, handler: Any, **options: Any) -> None:
        super().__init__(handler, **options)
        self._settings = settings
        self.served: set[RequestHandler] = set()
        """Connections that have sent a request."""

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Let the connection in, or not."""
        super().connection_made(handler, transport)
        loop = asyncio.get_running_loop()
        peer = transport.get_extra_info("socket")
        if peer is None or peer_uid(peer) != 0:
            _log.warning("refused a connection of another user than root")
            loop.call_soon(transport.abort)  # at once would be before the handler has begun, which it does not expect
        elif len(self.connections) > self._settings.connections:
            _log.warning("refused a connection: there are %d", self._settings.connections)
            loop.call_soon(transport.abort)
        else:
            loop.call_later(self._settings.read_deadline, self._hang_up_if_silent, handler, transport)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget the connection."""
        super().connection_lost(handler, exc)
        self.served.discard(handler)

    def _hang_up_if_silent(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        if handler not in self.served and not transport.is_closing():
            transport.abort()


class UpstreamDoor:
    """Serves upstream's API at its path until cancelled."""

    def __init__(self, path: str, settings: UpstreamSettings, api: UpstreamApi) -> None:
        self._socket = UnixSocket(path)
        self._settings = settings
        self._api = api
        self._served: set[RequestHandler] = set()

    async def run(self) -> None:
        """Serve as soon as nobody else does.

        An agent of upstream that still has the path is left alone: the executables are better served by it than by
        nobody, and our own socket is another one.
        """
        while True:
            try:
                self._socket.claim()
                break
            except (AddressInUseError, OSError) as error:
                _log.warning("upstream's API is not served yet: %s", error)
                await asyncio.sleep(_RETRY)
        try:
            await self._serve(self._socket.listen())
        finally:
            self._socket.unlink()
            self._socket.release()

    async def _serve(self, listener: socket.socket) -> None:
        gate = _Gate(
            self._settings,
            self._handle,
            request_factory=_bounded_request,
            access_log=None,
            keepalive_timeout=_KEEPALIVE,
            lingering_time=0,
        )
        self._served = gate.served
        server = await asyncio.get_running_loop().create_unix_server(gate, sock=listener)
        _log.info("upstream's API is served at %s", self._socket.path)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            await gate.shutdown(_PATIENCE)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._served.add(request.protocol)
        try:
            async with asyncio.timeout(self._settings.read_deadline):
                body = await request.read()
        except TimeoutError:
            return web.Response(status=408)
        except web.HTTPRequestEntityTooLarge as refusal:
            return web.Response(status=refusal.status, text=f"a body has at most {MAX_BODY} bytes")
        transport = request.transport
        reply = await self._api.answer(
            Asked(
                request.method,
                request.path,
                request.query,
                body,
                lambda: transport is None or transport.is_closing(),
            )
        )
        if reply.body is None:
            return web.Response(status=reply.status)
        return web.Response(status=reply.status, body=msgspec.json.encode(reply.body), content_type="application/json")


def _bounded_request(
    message: Any, payload: Any, protocol: RequestHandler, writer: Any, task: asyncio.Task[None]
) -> web.BaseRequest:
    return web.BaseRequest(
        message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=MAX_BODY
    )
