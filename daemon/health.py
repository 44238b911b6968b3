"""Health and metrics over HTTP/1.1: GET only, one answer for each connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from daemon.settings import HealthSettings

_MAX_CONNECTIONS = 32
"""Per port; a prober opens one."""
_DEADLINE = 5.0
"""Seconds for a whole request and its answer."""
_MAX_HEADER = 16 << 10
"""Bytes of a request's head."""

_log = logging.getLogger(__name__)
Page = Callable[[], Awaitable["Answer"]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


@dataclass(slots=True)
class Health:
    """The agent's state as probes see it. It is alive as long as it answers."""

    ready: bool = False
    """ADDs can be executed now."""
    started: bool = False
    """It was ready once."""

    def pages(self) -> dict[str, Page]:
        """Kubernetes' three probes under upstream's paths (agent OpenAPI, /v1/runtime)."""

        async def startup() -> Answer:
            return _verdict(self.started, "starting")

        async def readiness() -> Answer:
            return _verdict(self.ready, "not ready")

        async def liveness() -> Answer:
            return _verdict(True, "")

        return {
            "/v1/runtime/startup": startup,
            "/v1/runtime/readiness": readiness,
            "/v1/runtime/liveness": liveness,
        }


def _verdict(good: bool, otherwise: str) -> Answer:
    if good:
        return Answer(HTTPStatus.OK, b"ok\n")
    return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{otherwise}\n".encode())


async def metrics_page() -> Answer:
    """Everything in the default registry, in Prometheus' text format; written in a thread, since it may be long."""
    return Answer(HTTPStatus.OK, await asyncio.to_thread(generate_latest), CONTENT_TYPE_LATEST)


class HttpServer:
    """Serves a few pages on one port."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._connections = 0
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, host or None, port, limit=_MAX_HEADER)

    async def close(self) -> None:
        """Stop listening; answers under way end by their own deadline."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_DEADLINE):
                    await self._answer(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("an HTTP request failed: %r", error)
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1")
        page = self._pages.get(path)
        if method not in (b"GET", b"HEAD"):
            answer = Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        elif page is None:
            answer = Answer(HTTPStatus.NOT_FOUND, f"there are {', '.join(self._pages)}\n".encode())
        else:
            answer = await page()
        writer.write(
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\nContent-Type: {answer.content_type}\r\n"
            f"Content-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n".encode()
        )
        if method != b"HEAD":
            writer.write(answer.body)
        await writer.drain()


async def open_servers(health: Health, settings: HealthSettings) -> list[HttpServer]:
    """The servers that the settings ask for. Raises OSError."""
    servers: list[HttpServer] = []
    metrics: dict[str, Page] = {"/metrics": metrics_page}
    metrics_port = settings.metrics_port if settings.metrics_enabled else 0
    ports = ((health.pages(), settings.host, settings.port), (metrics, settings.metrics_host, metrics_port))
    for content, host, port in ports:
        if port:
            servers.append(HttpServer(content))
            await servers[-1].open(host, port)
    return servers
