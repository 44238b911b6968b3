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

from controller.admission.gate import READING, Gate
from controller.admission.review import Review, decided, decode_review
from controller.admission.rules import Context, Entry, Rules, mutate_path, validate_path
from controller.certificates.x509 import Pair

HEALTH_PATH = "/webhook-health-check"

_CLOSING = 5.0
"""Seconds that requests under way have at the end."""

_log = logging.getLogger(__name__)
_Handler = Callable[[bytes], Awaitable[web.StreamResponse]]


class WebhookServer:
    """Answers admission reviews by `table`; `context` makes what a review may look at."""

    def __init__(self, host: str, port: int, table: Iterable[Entry], context: Callable[[Review], Context]) -> None:
        self._host = host
        self._port = port
        self._context = context
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._shown: Pair | None = None
        self._opened = asyncio.Event()
        self._gate: Gate | None = None
        self._server: asyncio.Server | None = None
        self._handlers: dict[tuple[str, str], _Handler] = {("GET", HEALTH_PATH): _healthy}
        for entry in table:
            self._handlers["POST", mutate_path(entry.kind)] = self._handler(entry, "mutate")
            if isinstance(entry, Rules):
                self._handlers["POST", validate_path(entry.kind)] = self._handler(entry, "validate")

    @property
    def listening(self) -> bool:
        """Whether requests are answered."""
        return self._opened.is_set()

    @property
    def port(self) -> int:
        """The port that it listens on, where 0 was asked for."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server is not None else self._port

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
        self._gate = Gate(self._answer)
        self._server = await asyncio.get_running_loop().create_server(
            self._gate,
            self._host or None,
            self._port,
            ssl=self._tls,
            ssl_handshake_timeout=READING,
            backlog=512,
        )
        self._opened.set()
        _log.info("admission listens", extra={"host": self._host, "port": self.port})

    async def close(self) -> None:
        """Stop listening, and end what is under way."""
        self._opened.clear()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._gate is not None:
            self._gate.pre_shutdown()
            await self._gate.shutdown(_CLOSING)
            self._gate = None

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
        async def handle(body: bytes) -> web.StreamResponse:
            try:
                review = decode_review(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                return web.Response(status=HTTPStatus.BAD_REQUEST, text=f"this is no AdmissionReview: {error}")
            answer = await decided(entry, step, review, self._context(review))
            return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

        return handle

    async def _answer(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        handler = self._handlers.get((request.method, request.path))
        if handler is not None:
            return await handler(body)
        methods = [method for method, path in self._handlers if path == request.path]
        if methods:
            return web.Response(status=HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": ", ".join(methods)})
        return web.Response(status=HTTPStatus.NOT_FOUND, text="there is no such path\n")


async def _healthy(_: bytes) -> web.StreamResponse:
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
