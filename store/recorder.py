"""Events on the objects that a user would look at, written in the background: nobody waits for them.

What is repeated raises the count of the event that is there; what comes too fast, or while the queue is full, is
dropped: an event is a courtesy, and the same is in the log.
Source: client-go `tools/record` (its aggregation and its limits).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from secrets import token_hex

from msgspec.structs import replace
from prometheus_client import Counter

from api.event import Event, EventSource, ObjectReference
from api.meta import ObjectMeta, Resource, now
from store.errors import StoreError
from store.port import Store

_log = logging.getLogger(__name__)

_QUEUE = 256
_REMEMBERED = 1024
"""Events whose count can still be raised."""
_REPEAT_SECONDS = 10.0
"""Between two raises of one event's count at least."""

DROPPED = Counter("spiderpool_events_dropped", "Events that were not written: too many, or refused by the store.")


class Recorder:
    """Writes events; `run` must be running for any to be written."""

    def __init__(self, store: Store, component: str, instance: str = "") -> None:
        self._store = store
        self._source = EventSource(component=component, host=instance)
        self._queue: asyncio.Queue[tuple[Event, tuple[str, ...]]] = asyncio.Queue(_QUEUE)
        self._written: OrderedDict[tuple[str, ...], tuple[Event, float]] = OrderedDict()

    def normal(self, about: Resource, reason: str, message: str) -> None:
        """Something a user may want to know. `reason` is CamelCase."""
        self._record(about, "Normal", reason, message)

    def warning(self, about: Resource, reason: str, message: str) -> None:
        """Something a user should act upon. `reason` is CamelCase."""
        self._record(about, "Warning", reason, message)

    def _record(self, about: Resource, type_: str, reason: str, message: str) -> None:
        meta = about.metadata
        moment = now()
        event = Event(
            metadata=ObjectMeta(name=f"{meta.name[:235]}.{token_hex(8)}", namespace=meta.namespace or "default"),
            involved_object=ObjectReference(
                api_version=about.TYPE.api_version,
                kind=about.TYPE.kind,
                name=meta.name,
                namespace=meta.namespace,
                uid=meta.uid,
                resource_version=meta.resource_version,
            ),
            reason=reason,
            message=message[:1024],
            type=type_,
            source=self._source,
            first_timestamp=moment,
            last_timestamp=moment,
            reporting_component=self._source.component,
            reporting_instance=self._source.host,
        )
        key = (about.TYPE.kind, meta.namespace, meta.name, meta.uid, type_, reason, event.message)
        _, at = self._written.get(key, (None, 0.0))
        if at and asyncio.get_running_loop().time() - at < _REPEAT_SECONDS:
            return
        try:
            self._queue.put_nowait((event, key))
        except asyncio.QueueFull:
            DROPPED.inc()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            event, key = await self._queue.get()
            try:
                await self._write(event, key)
            except StoreError as error:
                DROPPED.inc()
                _log.info("event %s on %s was not written: %s", event.reason, event.involved_object.name, error)

    async def _write(self, event: Event, key: tuple[str, ...]) -> None:
        known, at = self._written.pop(key, (None, 0.0))
        moment = asyncio.get_running_loop().time()
        if known is not None and moment - at < _REPEAT_SECONDS:
            self._written[key] = (known, at)
            return
        written: Event | None = None
        if known is not None:
            raised = replace(known, count=known.count + 1, last_timestamp=event.last_timestamp)
            try:
                written = await self._store.update(raised)
            except StoreError:  # it was collected, or somebody else raised it: a new one tells as much
                written = None
        if written is None:
            written = await self._store.create(event)
        self._written[key] = (written, moment)
        while len(self._written) > _REMEMBERED:
            self._written.popitem(last=False)
