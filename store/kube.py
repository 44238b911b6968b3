"""The store in a cluster: the Kubernetes API, whose own semantics the port has.

A write whose answer was lost is settled here as far as that can be done: by looking what became of it, and by sending
it once more where the server itself would refuse to do it twice. Only what is left over is `UncertainError`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Generic, Self, cast

import msgspec
from msgspec.structs import replace

from api.meta import R, Resource, Timestamp, decode, encode
from store import changes, rules
from store.errors import (
    AlreadyExistsError,
    ConflictError,
    ExpiredError,
    InvalidError,
    NotFoundError,
    StoreError,
    UnavailableError,
    UncertainError,
)
from store.kube_access import Credentials
from store.kube_http import Client, DoubtError, backoff
from store.kube_paths import collection, item, selectors
from store.kube_settings import KubeSettings
from store.kube_status import label
from store.kube_watch import report_unreadable, watch
from store.port import EVERYTHING, Event, Listing, Query, Store

log = logging.getLogger(__name__)

MANAGER = "spiderpool"
"""Who the API server writes into `metadata.managedFields`; creations add a random word, to be known again."""

DEFAULTS = KubeSettings()
"""Those of the environment that this process is in."""

ROUNDS = 3
"""How often a write is sent whose answers get lost, and an update without a version that others interfere with."""

SLICE_SECONDS = 0.002
"""How long a list is decoded before others get a turn."""


class _Page(msgspec.Struct):
    """One answer to a list, its objects yet to be decoded."""

    metadata: _PageMetadata
    items: list[msgspec.Raw]


class _PageMetadata(msgspec.Struct, rename="camel"):
    resource_version: str
    more: str = msgspec.field(default="", name="continue")


class _FieldManager(msgspec.Struct):
    manager: str = ""


class _HeadMetadata(msgspec.Struct, rename="camel"):
    uid: str
    resource_version: str
    deletion_timestamp: Timestamp | None = None
    managed_fields: list[_FieldManager] = []


class _Head(msgspec.Struct):
    """As much of an object as it takes to know it again."""

    metadata: _HeadMetadata


_decode_page = msgspec.json.Decoder(_Page).decode
_decode_head = msgspec.json.Decoder(_Head).decode


@dataclass(frozen=True, slots=True)
class _Done(Generic[R]):
    """A write that has turned out to be done, with its result."""

    result: R | None


class KubeStore(Store):
    """The adapter for a cluster; use `open`."""

    def __init__(self, settings: KubeSettings, credentials: Credentials) -> None:
        """Needs a running loop."""
        self._settings = settings
        self._client = Client(settings, credentials)

    @classmethod
    async def open(cls, settings: KubeSettings = DEFAULTS) -> Self:
        """The store of the cluster that the settings name; the server need not be there yet.

        Raises UnavailableError if there are no credentials.
        """
        credentials = Credentials(settings)
        try:
            await credentials.access()
        except BaseException:
            await credentials.close()
            raise
        return cls(settings, credentials)

    async def close(self) -> None:
        """As the port says; writes under way end with UncertainError."""
        await self._client.close()

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        """As the port says; InvalidError if what is stored breaks the kind's schema."""
        return _read(kind, await self._get(kind, name, namespace), label(kind.TYPE, namespace, name))

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        """As the port says. Objects that break the kind's schema are left out and logged."""
        rules.check_query(kind.TYPE, query)
        # Pages are parts of one snapshot, which the server may forget before the last of them; then once more, and at
        # last in one piece.
        for page in (self._settings.page, self._settings.page, 0):
            try:
                return await self._list(kind, query, page)
            except ExpiredError as error:
                log.info("listing again: %s", error)
        raise UnavailableError(f"{label(kind.TYPE, query.namespace, '')}: no snapshot lasts long enough to be listed")

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        """As the port says; lost connections are mended from within."""
        return self._watch(kind, query, since)

    async def create(self, resource: R) -> R:
        """As the port says; NotFoundError if the namespace does not exist."""
        _check_whole(resource)
        rules.check(resource)
        metadata = resource.metadata
        if metadata.resource_version:
            raise InvalidError("metadata.resourceVersion: must not be set on objects to be created")
        kind, what, body = type(resource), changes.title(resource), _body(resource)
        path = collection(kind.TYPE, metadata.namespace)
        marker = f"{MANAGER}-{token_hex(6)}"

        async def send() -> R:
            data = await self._client.write("POST", path, {"fieldManager": marker}, body, what)
            return _read(kind, data, what)

        async def look() -> _Done[R] | None:
            """Who created what is there now? The server wrote our marker into it if it was us."""
            try:
                data = await self._get(kind, metadata.name, metadata.namespace)
            except NotFoundError:
                return None
            if marker in (field.manager for field in _head(data, what).managed_fields):
                return _Done(_read(kind, data, what))
            raise AlreadyExistsError(f"{what} already exists")

        return cast(R, await self._settle(send, look, what))

    async def update(self, resource: R) -> R:
        """As the port says."""
        _check_whole(resource)
        rules.check(resource)
        return await self._replace(resource, "", _same_but_status)

    async def update_status(self, resource: R) -> R:
        """As the port says; NotFoundError also if the kind has no status subresource."""
        _check_whole(resource)
        if not resource.TYPE.status_subresource:
            raise NotFoundError(f"{resource.TYPE.kind} has no status subresource")
        return await self._replace(resource, "/status", _same_status)

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        """As the port says. One whose answer was lost counts as done once the object is gone or terminating."""
        what = label(kind.TYPE, namespace, name)
        path = self._path(kind, name, namespace)
        conditions = {"uid": uid, "resourceVersion": resource_version}
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid or resource_version:
            options["preconditions"] = {key: value for key, value in conditions.items() if value}
        body = msgspec.json.encode(options)

        async def send() -> None:
            await self._client.write("DELETE", path, {}, body, what)

        async def look() -> _Done[R] | None:
            try:
                found = _head(await self._get(kind, name, namespace), what)
            except NotFoundError:
                return _Done(None)
            if (uid and found.uid != uid) or found.deletion_timestamp is not None:
                return _Done(None)
            if uid or found.resource_version == resource_version:
                return None  # still the one; its conditions make it safe to ask again
            raise UncertainError(f"{what}: there is one, but it may have come after the one that was to be deleted")

        await self._settle(send, look, what)

    async def _get(self, kind: type[Resource], name: str, namespace: str) -> bytes:
        return await self._client.read(self._path(kind, name, namespace), {}, label(kind.TYPE, namespace, name))

    @staticmethod
    def _path(kind: type[Resource], name: str, namespace: str) -> str:
        """Raises NotFoundError for names that no object can have: they must not become a part of a URL."""
        problems = (*rules.name_problems(kind.TYPE, name), *rules.namespace_problems(kind.TYPE, namespace))
        if problems:
            raise NotFoundError(f"{label(kind.TYPE, namespace, name)} not found")
        return item(kind.TYPE, namespace, name)

    async def _list(self, kind: type[R], query: Query, limit: int) -> Listing[R]:
        """Raises ExpiredError."""
        loop = asyncio.get_running_loop()
        path, what = collection(kind.TYPE, query.namespace), label(kind.TYPE, query.namespace, "")
        parameters = selectors(query) | ({"limit": str(limit)} if limit else {})
        items: list[R] = []
        unreadable: list[str] = []
        while True:
            data = await self._client.read(path, parameters, what, scan=not query.name)
            try:
                page = _decode_page(data)
            except msgspec.MsgspecError as error:
                raise UnavailableError(f"{what}: the answer is not a list: {error}") from error
            del data
            turn = loop.time() + SLICE_SECONDS
            for raw in page.items:
                try:
                    items.append(decode(kind, cast(bytes, raw)))
                except msgspec.MsgspecError as error:
                    unreadable.append(report_unreadable(kind, cast(bytes, raw), error))
                if loop.time() >= turn:
                    await asyncio.sleep(0)
                    turn = loop.time() + SLICE_SECONDS
            if not page.metadata.more:
                break
            parameters["continue"] = page.metadata.more
        if kind.TYPE.namespaced and not query.namespace:
            # the server orders "namespace/name" as one text, in which "a-b/c" comes before "a/c"
            items.sort(key=lambda each: (each.metadata.namespace, each.metadata.name))
        return Listing(items, page.metadata.resource_version, tuple(unreadable))

    async def _watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        rules.check_query(kind.TYPE, query)
        if self._client.closing.is_set():
            raise UnavailableError("the store is closed")
        async with aclosing(watch(self._client, kind, query, since)) as events:
            async for event in events:
                yield event

    async def _replace(self, resource: R, subresource: str, same: Callable[[R, R], bool]) -> R:
        """PUT, under the condition of a version in any case: custom resources take no other."""
        if resource.metadata.resource_version:
            return await self._put(resource, subresource, same)
        metadata = resource.metadata
        for left in reversed(range(ROUNDS)):
            stored = await self.get(type(resource), metadata.name, metadata.namespace)
            changes.require(stored, uid=metadata.uid, resource_version="")
            version = stored.metadata.resource_version
            current = replace(resource, metadata=replace(metadata, resource_version=version))
            try:
                return await self._put(current, subresource, same)
            except ConflictError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    async def _put(self, resource: R, subresource: str, same: Callable[[R, R], bool]) -> R:
        metadata = resource.metadata
        kind, what, body = type(resource), changes.title(resource), _body(resource)
        path = self._path(kind, metadata.name, metadata.namespace) + subresource

        async def send() -> R:
            return _read(kind, await self._client.write("PUT", path, {"fieldManager": MANAGER}, body, what), what)

        async def look() -> _Done[R] | None:
            try:
                stored = await self.get(kind, metadata.name, metadata.namespace)
            except NotFoundError:
                if metadata.deletion_timestamp is not None and not metadata.finalizers and not subresource:
                    return _Done(resource)  # that was what the update was to bring about
                raise
            changes.require(stored, uid=metadata.uid, resource_version="")
            if stored.metadata.resource_version == metadata.resource_version:
                return None
            if same(stored, resource):
                return _Done(stored)
            raise UncertainError(f"{what}: the answer was lost, and it has been modified since, by us or by others")

        return cast(R, await self._settle(send, look, what))

    async def _settle(
        self, send: Callable[[], Awaitable[R | None]], look: Callable[[], Awaitable[_Done[R] | None]], what: str
    ) -> R | None:
        """The result of `send`, or of `look` if the answer was lost; `look` returns None if nothing was done so far.

        Raises UncertainError if it stays unknown, UnavailableError if the server has said that it failed.
        """
        doubt: DoubtError | None = None
        for failures in range(1, ROUNDS + 1):
            refused: StoreError | None = None
            try:
                return await send()
            except DoubtError as error:
                doubt = error
                log.info("%s: looking what became of a write: %s", what, error)
            except (AlreadyExistsError, ConflictError, NotFoundError) as error:
                if doubt is None:
                    raise
                refused = error  # by the effect of the first attempt perhaps
            try:
                done = await look()
            except (UnavailableError, InvalidError) as error:
                raise UncertainError(
                    f"{what}: the answer was lost ({doubt}), and it cannot be read: {error}"
                ) from error
            if done is not None:
                return done.result
            if refused is not None:
                raise refused
            if failures == ROUNDS and doubt.answered:
                raise UnavailableError(f"{what}: nothing was written: {doubt}")
            await self._client.pause(min(max(doubt.wait, backoff(self._settings, failures)), 5.0))
        raise UncertainError(f"{what}: {doubt}")


def _check_whole(resource: Resource) -> None:
    """Raises InvalidError for a partial kind: what its type does not know would be lost."""
    if resource.TYPE.partial:
        raise InvalidError(f"{changes.title(resource)}: objects of this kind are only read, not written")


def _body(resource: Resource) -> bytes:
    """Raises InvalidError."""
    try:
        data = encode(resource)
    except (msgspec.MsgspecError, TypeError, UnicodeEncodeError) as error:
        raise InvalidError(f"{changes.title(resource)} is invalid: {error}") from error
    if len(data) > rules.OBJECT_BYTES:
        raise InvalidError(
            f"{changes.title(resource)} is invalid: {len(data)} bytes are too long, at most {rules.OBJECT_BYTES}"
        )
    return data


def _read(kind: type[R], data: bytes, what: str) -> R:
    """Raises InvalidError."""
    try:
        return decode(kind, data)
    except msgspec.MsgspecError as error:
        raise InvalidError(f"{what} as the API server has it cannot be read: {error}") from error


def _head(data: bytes, what: str) -> _HeadMetadata:
    try:
        return _decode_head(data).metadata
    except msgspec.MsgspecError as error:
        raise UncertainError(f"{what}: the answer was lost, and what was read back is no object: {error}") from error


def _same_but_status(stored: R, wanted: R) -> bool:
    """Whether an update to `wanted` leaves `stored` as it is."""
    have, want = stored.metadata, wanted.metadata
    metadata = replace(
        have,
        labels=want.labels,
        annotations=want.annotations,
        finalizers=want.finalizers,
        owner_references=want.owner_references,
    )
    candidate = replace(wanted, metadata=metadata)
    if wanted.TYPE.status_subresource and hasattr(stored, "status"):
        candidate = replace(candidate, status=stored.status)
    return bool(candidate == stored)


def _same_status(stored: R, wanted: R) -> bool:
    return bool(getattr(stored, "status", None) == getattr(wanted, "status", None))
