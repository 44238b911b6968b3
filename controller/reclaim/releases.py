"""Deleting claims: as many at a time, and as fast, as is allowed; and telling whoever would want to know."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client import Counter

from api.claim import Claim
from api.core import Pod
from api.pool import Pool
from controller.reclaim.settings import ReclaimSettings
from controller.reclaim.witnesses import pod_name
from controller.room import Desk
from store.errors import ConflictError, NotFoundError, StoreError
from store.metrics import RELEASE_CONFLICTS
from store.provider import ProviderClient

_log = logging.getLogger(__name__)

RELEASES = Counter("spiderpool_ip_gc_counts", "Claims that the reclaim went to delete, failures included")
RELEASE_FAILURES = Counter("spiderpool_ip_gc_failure_counts", "Claims that the reclaim could not delete")

_NAMED = 5
"""How many addresses an event on a pool names."""


class Doomed(NamedTuple):
    """A claim that was decided on, in the version that it was decided on."""

    claim: Claim
    reason: str
    pod: Pod | None
    """Its pod, if that is still there."""


Failure = tuple[Claim, StoreError]


class Releaser:
    """Deletes claims under the condition that they are what was decided on."""

    def __init__(self, desk: Desk, settings: ReclaimSettings) -> None:
        self._store = desk.store
        self._events = desk.events
        self._claims = desk.caches.of(Claim)
        self._pools = desk.caches.of(Pool)
        self.provider: ProviderClient | None = None
        """Who bound addresses to NICs and must be told before they are free; None if nobody did."""
        self._gate = asyncio.Semaphore(settings.workers)
        self._workers = settings.workers
        self._pause = 1 / settings.rate
        self._next = 0.0

    async def release(self, doomed: list[Doomed]) -> list[Failure]:
        """Delete the claims; what failed. A claim that was changed meanwhile stays and is a ConflictError.

        The server compares uid and resourceVersion at the moment of deletion: a claim that was taken over by a
        successor after it was decided on is another version, and stays.
        """
        failures: list[Failure] = []
        done: list[Doomed] = []
        todo = iter(doomed)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._workers, len(doomed))):
                group.create_task(self._work(todo, done, failures))
        self._tell(done)
        return failures

    async def _work(self, todo: Iterator[Doomed], done: list[Doomed], failures: list[Failure]) -> None:
        for each in todo:
            async with self._gate:
                await self._take_turn()
                RELEASES.inc()
                try:
                    await self._delete(each)
                except NotFoundError:
                    continue  # its own release came first
                except StoreError as error:
                    if isinstance(error, ConflictError):
                        RELEASE_CONFLICTS.inc()
                    else:
                        RELEASE_FAILURES.inc()
                    failures.append((each.claim, error))
                    continue
            done.append(each)
            spec = each.claim.spec
            _log.info(
                "released %s of pool %s, held by %s: %s", spec.address, spec.pool, _holder(each.claim), each.reason
            )

    async def _delete(self, each: Doomed) -> None:
        meta = each.claim.metadata
        if self.provider is not None and each.claim.spec.provided is not None:
            # It cannot compare versions as the store does: what a successor took over meanwhile must stay bound.
            current = (await self._store.get(Claim, meta.name)).metadata
            if (current.uid, current.resource_version) != (meta.uid, meta.resource_version):
                raise ConflictError(f"claim {meta.name} was changed meanwhile")
            await self.provider.release(each.claim)
        await self._store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)
        self._claims.informer.forget(each.claim)

    async def _take_turn(self) -> None:
        loop = asyncio.get_running_loop()
        self._next = max(self._next + self._pause, loop.time())
        if self._next > loop.time():
            await asyncio.sleep(self._next - loop.time())

    def _tell(self, done: Iterable[Doomed]) -> None:
        """Events: on the pod while it is there, else one on each pool, however many addresses it got back."""
        by_pool: defaultdict[str, list[Doomed]] = defaultdict(list)
        for each in done:
            if each.pod is not None:
                text = f"Address {each.claim.spec.address} of pool {each.claim.spec.pool} was released: {each.reason}"
                self._events.normal(each.pod, "AddressReleased", text)
            else:
                by_pool[each.claim.spec.pool].append(each)
        for name, released in by_pool.items():
            pool = self._pools.get(name)
            if pool is not None:
                named = "; ".join(
                    f"{x.claim.spec.address} of {_holder(x.claim)}: {x.reason}" for x in released[:_NAMED]
                )
                more = f"; and {len(released) - _NAMED} more" if len(released) > _NAMED else ""
                self._events.normal(pool, "AddressesReclaimed", f"{named}{more}")


def _holder(claim: Claim) -> str:
    spec = claim.spec
    if spec.workload is not None and spec.workload.name:
        return f"{spec.workload.namespace}/{pod_name(claim)} ({spec.pod_uid or spec.container_id or 'no UID'})"
    return spec.pod_uid or spec.container_id or "nobody"
