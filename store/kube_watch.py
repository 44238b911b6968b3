"""A watch on the API server: one stream of changes out of as many connections as it takes.

Source: Kubernetes API concepts, "Efficient detection of changes"; k8s.io/client-go `tools/cache/reflector.go`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import uniform
from typing import Literal, cast

import msgspec
from aiohttp import ClientResponse

from api.meta import R, decode
from store.errors import ExpiredError
from store.kube_http import Client, LostError, NotSentError, RefusedError, backoff
from store.kube_paths import collection, selectors
from store.kube_status import BROKEN, OVERLOADED, Status, label, refusal, retry_after
from store.port import Event, Query

log = logging.getLogger(__name__)

GATHER = 0.02
"""Seconds that events are let gather that follow each other sooner than that."""

SLICE = 32
"""Events that are handed over before others get a turn: about a millisecond's worth of decoding."""

PATIENCE = 5
"""Answers in a row that no watch can be had from this version, after which the caller shall list again."""


class _Line(msgspec.Struct):
    """One event as it comes."""

    type: str
    object: msgspec.Raw


class _Metadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    name: str = ""
    namespace: str = ""


class _Head(msgspec.Struct):
    metadata: _Metadata


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_status = msgspec.json.Decoder(Status).decode


async def watch(client: Client, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
    """As `Store.watch`; lasts as long as the client."""
    loop = asyncio.get_running_loop()
    what = label(kind.TYPE, query.namespace, "")
    failures = answered = 0
    position = since
    while not client.closing.is_set():
        started = loop.time()
        wait = 0.0
        try:
            async with aclosing(_connection(client, kind, query, position)) as events:
                async for event in events:
                    failures = answered = 0
                    position = event.resource_version
                    yield event
            if loop.time() - started > 1.0:
                continue  # it lasted for as long as the server wanted it to
            problem = "the API server ended it"
        except RefusedError as refused:
            if refused.status.code not in OVERLOADED | BROKEN:
                raise refusal(refused.status, what) from refused
            answered += refused.status.code in BROKEN
            if answered >= PATIENCE:
                raise ExpiredError(f"{what}: cannot be watched from {position}: {refused}") from refused
            wait, problem = min(refused.wait, client.settings.backoff_most), str(refused)
        except (LostError, NotSentError) as error:
            problem = str(error)
        if client.closing.is_set():
            return
        failures += 1
        wait = max(wait, backoff(client.settings, failures))
        log.log(
            logging.WARNING if failures == PATIENCE else logging.INFO,
            "watch of %s: going on from %s in %.1f s: %s",
            what,
            position,
            wait,
            problem,
        )
        await client.pause(wait)


async def _connection(client: Client, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
    """What one connection says until it ends. Raises ExpiredError, and the errors of `store.kube_http`."""
    lasts = uniform(client.settings.watch_least, client.settings.watch_most)
    parameters = selectors(query) | {
        "watch": "1",
        "allowWatchBookmarks": "true",
        "resourceVersion": since,
        "timeoutSeconds": str(max(1, round(lasts))),
    }
    end = asyncio.get_running_loop().time() + lasts + client.settings.watch_grace
    async with await client.stream(collection(kind.TYPE, query.namespace), parameters) as response:
        with client.ending(response, end):
            async with aclosing(_lines(client, response)) as chunks:
                async for lines in chunks:
                    for line in lines:
                        event = _event(kind, line) if line else None
                        if event is not None:
                            yield event


async def _lines(client: Client, response: ClientResponse) -> AsyncGenerator[list[bytes], None]:
    """The lines of a stream, some at a time.

    One that comes after a quiet time is handed over at once. When they come thick and fast they are let gather, since
    it costs the same to be woken for one as for many: with a hundred nodes that allocate, each hears of all the others.
    """
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    heard = 0.0
    while chunk := await client.more(response):
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*parts, lines[0]])
            parts = []
        parts.append(rest)
        for start in range(0, len(lines), SLICE):
            if start:
                await asyncio.sleep(0)
            yield lines[start : start + SLICE]
        before, heard = heard, loop.time()
        if heard - before < GATHER and response.connection is not None and response.connection.transport is not None:
            transport = response.connection.transport
            transport.pause_reading()
            await asyncio.sleep(GATHER)
            transport.resume_reading()


def _event(kind: type[R], line: bytes) -> Event[R] | None:
    """The event that is written in `line`; None: an object that cannot be read, which nobody is told of."""
    try:
        told = _decode_line(line)
        if told.type == "ERROR":
            raise _error(kind, _decode_status(told.object))
        if told.type == "BOOKMARK":
            return Event("BOOKMARK", None, _decode_head(told.object).metadata.resource_version)
    except msgspec.MsgspecError as error:
        raise LostError(f"an event is not what it should be: {error}") from error
    change = cast(Literal["ADDED", "MODIFIED", "DELETED"], told.type)
    try:
        resource = decode(kind, cast(bytes, told.object))
    except msgspec.MsgspecError as error:
        report_unreadable(kind, cast(bytes, told.object), error)
        return None
    return Event(change, resource, resource.metadata.resource_version)


def _error(kind: type[R], status: Status) -> Exception:
    if status.code == 410 or status.reason in ("Expired", "Gone"):
        return ExpiredError(f"{label(kind.TYPE, '', '')}: {status.message}")
    return RefusedError(status, retry_after(None, status))


def report_unreadable(kind: type[R], data: bytes, error: Exception) -> str:
    """Log that an object breaks its kind's schema, as one can that was stored before the schema was; its name.

    It is left out of lists and watches: one bad object must not hide all the good ones.
    """
    try:
        metadata = _decode_head(data).metadata
        name = label(kind.TYPE, metadata.namespace, metadata.name)
    except msgspec.MsgspecError:
        name = f"a {kind.TYPE.kind}"
    log.error("%s is left out, it cannot be read: %s", name, error)
    return name
