"""The admission server under clients that do not come to the point: others are answered, and nothing piles up."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api.pool import Pool
from controller.admission import gate
from controller.admission.review import Review
from controller.admission.rules import Context, Features, Rules, validate_path
from controller.admission.server import HEALTH_PATH, WebhookServer
from controller.certificates.x509 import new_authority, new_server

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
AUTHORITY = new_authority(NOW, DAY)
PATH = validate_path(Pool)
REVIEW = json.dumps(
    {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "u", "operation": "CREATE", "object": {"metadata": {"name": "p"}, "spec": {"subnet": "x"}}},
    }
).encode()
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """A server, and clients that trust it."""

    def __init__(self, server: WebhookServer) -> None:
        self.server = server
        self._tls = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())

    async def connect(self) -> Stream:
        return await asyncio.open_connection("127.0.0.1", self.server.port, ssl=self._tls)

    async def ask(
        self, body: bytes = REVIEW, path: str = PATH, method: str = "POST", more: str = ""
    ) -> tuple[int, bytes]:
        """Status and body of an answer, on a connection of its own."""
        return await exchange(await self.connect(), head(len(body), path, method, more) + body)


def head(length: int, path: str = PATH, method: str = "POST", more: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


async def exchange(stream: Stream, sent: bytes) -> tuple[int, bytes]:
    stream[1].write(sent)
    try:
        return await answer(stream[0])
    finally:
        stream[1].transport.abort()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    async with asyncio.timeout(20):
        top = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        (length,) = [line.partition(": ")[2] for line in top.split("\r\n") if line.startswith("content-length: ")]
        return int(top.split()[1]), await reader.readexactly(int(length))


@asynccontextmanager
async def serving(decide: Callable[[], Awaitable[None]] | None = None, **limits: float) -> AsyncIterator[Site]:
    """A server that admits all pools after `decide`, with other limits than `gate` has."""

    async def default(pool: Pool, _old: Pool | None, _context: Context) -> Pool:
        return pool

    async def validate(_pool: Pool, _old: Pool | None, _context: Context) -> list[Any]:
        if decide is not None:
            await decide()
        return []

    def context(_: Review) -> Context:
        return Context(store=None, namespace="n", features=Features())  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(gate, name, value)
        server = WebhookServer("127.0.0.1", 0, [Rules(Pool, default, validate)], context)
        server.show(new_server(AUTHORITY, ["127.0.0.1"], NOW, DAY))
        await server.open()
        try:
            yield Site(server)
        finally:
            await server.close()


async def closed(stream: Stream) -> bool:
    """Whether the server has hung up."""
    try:
        async with asyncio.timeout(20):
            return not await stream[0].read()
    except ConnectionError:
        return True


def test_requests_are_answered_refused_and_found() -> None:
    async def main() -> None:
        async with serving() as site:
            status, body = await site.ask()
            assert status == 200
            assert json.loads(body)["response"] == {"uid": "u", "allowed": True}
            assert await site.ask(b"", HEALTH_PATH, "GET") == (200, b"ok\n")
            assert (await site.ask(b"", PATH, "GET"))[0] == 405
            assert (await site.ask(path="/validate-something-else"))[0] == 404
            for wrong in (b"", b"{", b'{"kind": 1}', b"[" * 100_000, b"\xff"):
                status, body = await site.ask(wrong)
                assert (status, body.startswith(b"this is no AdmissionReview")) == (400, True)
            assert (await site.ask(more="Content-Encoding: gzip\r\n"))[0] == 200, "what is no gzip is not unpacked"
            stream = await site.connect()
            for _ in range(3):  # one connection, as an API server keeps it
                stream[1].write(head(len(REVIEW)) + REVIEW)
                assert (await answer(stream[0]))[0] == 200
            stream[1].transport.abort()

    asyncio.run(main())


SLOW = pytest.mark.parametrize(
    "sent", [b"", b"POST /x HTTP/1.1\r\nHost: ", head(9) + b"{"], ids=["nothing", "head", "body"]
)


async def slow_clients(site: Site, stack: AsyncExitStack, number: int, sent: bytes) -> list[Stream]:
    clients = []
    for _ in range(number):
        stream = await site.connect()
        stack.callback(stream[1].transport.abort)
        stream[1].write(sent)
        clients.append(stream)
    return clients


@SLOW
def test_slow_clients_hold_nothing_that_others_need(sent: bytes) -> None:
    """They are more than there are places and connections, and nobody waits for them: that would be for a minute."""

    async def main() -> None:
        async with serving(_CONNECTIONS=40, _AT_ONCE=2, READING=60.0) as site, AsyncExitStack() as stack:
            await slow_clients(site, stack, 60, sent)
            answers = await asyncio.gather(*(site.ask() for _ in range(10)))
            assert [status for status, _ in answers] == [200] * 10

    asyncio.run(main())


@SLOW
def test_slow_clients_are_given_up(sent: bytes) -> None:
    async def main() -> None:
        async with serving(READING=0.5) as site, AsyncExitStack() as stack:
            clients = await slow_clients(site, stack, 5, sent)
            for stream in clients:
                if sent.endswith(b"{"):
                    assert (await answer(stream[0]))[0] == 408
                assert await closed(stream)

    asyncio.run(main())


def test_a_handshake_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("controller.admission.server.READING", 0.5)
        async with serving() as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            writer.write(b"\x16\x03\x01")
            assert await closed((reader, writer))
            writer.close()
            assert (await site.ask())[0] == 200

    asyncio.run(main())


def test_the_api_servers_connections_go_last() -> None:
    async def main() -> None:
        async with serving(_CONNECTIONS=10, READING=60.0) as site, AsyncExitStack() as stack:
            kept = await site.connect()
            stack.callback(kept[1].transport.abort)
            kept[1].write(head(len(REVIEW)) + REVIEW)
            assert (await answer(kept[0]))[0] == 200
            strangers = [await site.connect() for _ in range(30)]
            for stream in strangers:
                stack.callback(stream[1].transport.abort)
            assert all(await asyncio.gather(*map(closed, strangers[:20])))
            kept[1].write(head(len(REVIEW)) + REVIEW)
            assert (await answer(kept[0]))[0] == 200
            assert not strangers[-1][0].at_eof()

    asyncio.run(main())


def test_memory_is_bounded_and_who_is_slow_gives_way() -> None:
    async def main() -> None:
        async with serving(LARGEST=100_000, _ALL=250_000) as site, AsyncExitStack() as stack:
            assert (await site.ask(b" " * 100_001))[0] == 413
            assert (await site.ask(REVIEW + b" " * (99_990 - len(REVIEW))))[0] == 200
            slow = []
            for _ in range(3):
                stream = await site.connect()
                stack.callback(stream[1].transport.abort)
                stream[1].write(head(90_000) + b" " * 80_000)
                slow.append(stream)
            await asyncio.sleep(0)
            assert (await site.ask(REVIEW + b" " * 90_000))[0] == 200
            assert await closed(slow[0])

    asyncio.run(main())


def test_who_finds_no_place_is_told_and_who_has_gone_leaves_it() -> None:
    async def main() -> None:
        begun, cancelled = 0, 0

        async def for_ever() -> None:
            nonlocal begun, cancelled
            begun += 1
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                raise

        async with serving(for_ever, _AT_ONCE=1, _WAIT=0.3) as site:
            first = await site.connect()
            first[1].write(head(len(REVIEW)) + REVIEW)
            async with asyncio.timeout(10):
                while not begun:  # noqa: ASYNC110 - the server's turn
                    await asyncio.sleep(0.01)
                assert (await site.ask())[0] == 503
                first[1].transport.abort()
                while not cancelled:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await site.ask(b"", HEALTH_PATH, "GET") == (200, b"ok\n")

    asyncio.run(main())
