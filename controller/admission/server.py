"""The TLS server that the API server asks: kopf's webhook server, at upstream's paths.

Certificates are exchanged under it: who is connected stays connected, the next handshake sees the new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from http import HTTPStatus

import msgspec
from aiohttp import web
from kopf import WebhookClientConfig, WebhookFn

from controller.admission.review import Review, decided, decode_review
from controller.admission.rules import Context, Entry, Rules, mutate_path, validate_path
from controller.certificates.x509 import Pair

HEALTH_PATH = "/webhook-health-check"

_LARGEST = 8 << 20
"""Bytes of a request: twice what etcd takes, for the old and the new object, and room for managed fields."""
_AT_ONCE = 64
"""Requests being read or answered together; more wait. Anybody who reaches the port may ask."""
_READING = 5.0
"""Seconds for a request to arrive."""
_CLOSING = 5.0
"""Seconds that requests under way have at the end."""

_log = logging.getLogger(__name__)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebhookServer:
    """Answers admission reviews by `table`; `context` makes what a review may look at."""

    def __init__(self, host: str, port: int, table: Iterable[Entry], context: Callable[[Review], Context]) -> None:
        self._host = host
        self._port = port
        self._context = context
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._shown: Pair | None = None
        self._opened = asyncio.Event()
        self._runner: web.AppRunner | None = None
        routes = [web.get(HEALTH_PATH, _healthy)]
        for entry in table:
            routes.append(web.post(mutate_path(entry.kind), self._handler(entry, "mutate")))
            if isinstance(entry, Rules):
                routes.append(web.post(validate_path(entry.kind), self._handler(entry, "validate")))
        self._routes = routes

    @property
    def listening(self) -> bool:
        """Whether requests are answered."""
        return self._opened.is_set()

    @property
    def port(self) -> int:
        """The port that it listens on, where 0 was asked for."""
        return int(self._runner.addresses[0][1]) if self._runner is not None and self._runner.addresses else self._port

    async def opened(self) -> None:
        """Return when it listens; the caller sets the deadline."""
        await self._opened.wait()

    def show(self, pair: Pair) -> None:
        """Use another certificate from the next handshake on. Raises ssl.SSLError: the old one is then still in use."""
        if pair == self._shown:
            return
        trial = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _load(trial, pair)  # what fails half way must not leave a certificate without its key
        _load(self._tls, pair)
        if self._shown is not None:
            _log.info("serving with a new certificate")
        self._shown = pair

    async def open(self) -> None:
        """Listen. Raises OSError."""
        app = web.Application(client_max_size=_LARGEST)
        app.add_routes(self._routes)
        runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=_CLOSING)
        await runner.setup()
        self._runner = runner
        site = web.TCPSite(runner, self._host or None, self._port, ssl_context=self._tls, backlog=512)
        try:
            await site.start()
        except BaseException:
            await self.close()
            raise
        self._opened.set()
        _log.info("admission listens", extra={"host": self._host, "port": self.port})

    async def close(self) -> None:
        """Stop listening, and end what is under way."""
        if self._runner is not None:
            self._opened.clear()
            await self._runner.cleanup()
            self._runner = None

    async def __call__(self, _: WebhookFn) -> AsyncIterator[WebhookClientConfig]:
        """kopf's protocol for webhook servers: serve until closed.

        What kopf would do with the configuration, write it to its own objects, is switched off; and its own function
        for a request is not used, see `controller.admission.review`.
        """
        await self.open()
        try:
            yield {}
            await asyncio.Event().wait()
        finally:
            await self.close()

    def _handler(self, entry: Entry, step: str) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            async with self._places:
                try:
                    async with asyncio.timeout(_READING):
                        body = await request.read()
                    review = decode_review(body)
                except TimeoutError:
                    return web.Response(status=HTTPStatus.REQUEST_TIMEOUT, text="the request does not arrive")
                except msgspec.MsgspecError as error:
                    return web.Response(status=HTTPStatus.BAD_REQUEST, text=f"this is no AdmissionReview: {error}")
                answer = await decided(entry, step, review, self._context(review))
            return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

        return handle


async def _healthy(_: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


def _load(tls: ssl.SSLContext, pair: Pair) -> None:
    """Give `tls` a certificate by way of memory: OpenSSL's binding reads files only, and a key is not for disks."""
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(pair.certificate + pair.key)
        tls.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
