"""Which of the replicas leads: the one that holds the Lease, with client-go's semantics.

Others' clocks are not trusted: a lease is taken over when our own monotonic clock has seen no change of it for as long
as it says. The leader for its part counts from before it sent its last successful renewal, so it knows that it has lost
the lease before anybody else can.

What may not happen is that two lead. So when a leader cannot renew, its duties are cancelled at the renew deadline; if
they have not ended when the lease may be taken, or if the event loop hangs so that nothing can be cancelled at all, the
process ends on the spot: a thread of its own sees to that.
Source: client-go `tools/leaderelection/leaderelection.go`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from random import uniform
from typing import Any

from msgspec.structs import replace
from prometheus_client import Gauge

from api.lease import Lease, LeaseSpec
from api.meta import ObjectMeta
from api.validate.labels import is_subdomain
from daemon.limits import at_least
from store.errors import AlreadyExistsError, ConflictError, NotFoundError, StoreError
from store.port import Store

LEADING = Gauge("spiderpool_controller_leader", "1 while this replica leads.")

_EXIT = 70
"""Exit status of a process that could not stop leading (EX_SOFTWARE)."""
_ATTEMPTS = 8
"""To take the lease from a leader that renews it meanwhile."""
_RELEASE_DEADLINE = 3.0
"""Seconds for giving the lease back; without it the next leader waits until it expires."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaderSettings:
    """Leader election among the replicas, by a Lease. Times are in seconds, names and defaults upstream's."""

    enabled: bool = True
    """Take part. A replica that does not only serves admission."""
    lease: str = "spiderpool-controller-leases"
    """Name of the Lease, in the namespace that Spiderpool is installed in."""
    duration: float = 15.0
    """For how long a lease holds without renewal: a dead leader is missed for at most so long."""
    renew_deadline: float = 10.0
    """A leader that has not renewed for so long gives up. The rest of the duration is for its duties to end."""
    retry_period: float = 2.0
    """Between two attempts to take or renew the lease."""

    def __post_init__(self) -> None:
        at_least(1, duration=self.duration)
        at_least(0.05, retry_period=self.retry_period, renew_deadline=self.renew_deadline)
        if not is_subdomain(self.lease):
            raise ValueError(f"lease is {self.lease!r}; it must be the name of a Lease")
        if self.duration != int(self.duration):
            raise ValueError(f"duration is {self.duration}; a Lease takes whole seconds")
        if not self.retry_period * 1.2 < self.renew_deadline < self.duration:
            raise ValueError(
                f"renew_deadline is {self.renew_deadline}; it must be above 1.2 times retry_period "
                f"({self.retry_period}) and below duration ({self.duration})"
            )


class Fence:
    """Ends the process when a deadline passes, even if the event loop hangs."""

    def __init__(self, kill: Callable[[], None] | None = None) -> None:
        self.kill = kill or _die
        """Ends the process at once."""
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def set(self, deadline: float | None) -> None:
        """The process must not outlive `deadline` (time.monotonic); None: it may."""
        with self._changed:
            self._deadline = deadline
            if self._thread is None and deadline is not None:
                self._thread = threading.Thread(target=self._watch, name="fence", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.kill()
                    return
                self._changed.wait(left)
            self._thread = None


def _die() -> None:
    sys.stderr.write('{"level":"critical","logger":"controller.election","message":"the lease is lost and the ')
    sys.stderr.write("leader's duties have not ended: exiting\"}\n")
    sys.stderr.flush()
    os._exit(_EXIT)


class Election:
    """One candidate. `identity` must be no other process's, also not that of a former process of the same pod."""

    def __init__(
        self, store: Store, namespace: str, identity: str, settings: LeaderSettings, fence: Fence | None = None
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._identity = identity
        self._settings = settings
        self._fence = fence or Fence()
        self._seen: Lease | None = None
        """The lease as it was last read or written."""
        self._seen_at = 0.0
        """When its spec was last seen to change, by our clock."""
        self._renewed_at = 0.0
        """When the last renewal of ours that succeeded was begun."""
        self.leading = False

    async def run(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Be a candidate until cancelled; run `lead` whenever elected, and cancel it when the lease is lost.

        `lead` ends only by failing; that ends the candidacy, after the lease is given back.
        """
        while True:
            await self._acquire()
            await self._lead(lead)

    async def _acquire(self) -> None:
        while not await self._attempt(self._settings.renew_deadline):  # noqa: ASYNC110 (nobody tells us)
            await asyncio.sleep(min(self._pause(), self._until_expiry()))
        _log.info("leading", extra={"identity": self._identity})

    async def _lead(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.leading = True
        LEADING.set(1)
        self._fence.set(self._lost_at())
        duty = asyncio.create_task(lead(), name="leader")
        try:
            await self._renew_while(duty)
            if duty.done():
                await duty  # raises
                raise RuntimeError("the leader's duties ended")
            _log.warning("the lease could not be renewed: stopping the leader's duties")
        finally:
            duty.cancel()
            # The fence waits with us: duties that do not end take the process with them.
            await asyncio.wait({duty})
            if time.monotonic() >= self._lost_at():
                self._fence.kill()  # they went on for too long: a process that slept, or a loop that hung
            self.leading = False
            LEADING.set(0)
            self._fence.set(None)
            await self._release()

    async def _renew_while(self, duty: asyncio.Task[None]) -> None:
        """Keep the lease as long as `duty` goes on; return when it ends or the lease cannot be kept."""
        while True:
            await asyncio.wait({duty}, timeout=self._pause())
            if duty.done():
                return
            left = self._renewed_at + self._settings.renew_deadline - time.monotonic()
            if left <= 0:
                return
            attempt = asyncio.create_task(self._attempt(left), name="renewal")
            try:
                await asyncio.wait([duty, attempt], return_when=asyncio.FIRST_COMPLETED)
            finally:
                attempt.cancel()
            if attempt.done() and not attempt.cancelled() and attempt.result():
                self._fence.set(self._lost_at())
            elif self._is_anothers():
                return

    async def _attempt(self, seconds: float) -> bool:
        """One try to take or renew the lease; whether we hold it. What fails is logged: the next try is not far."""
        try:
            async with asyncio.timeout(seconds):
                return await self._take_or_renew()
        except (ConflictError, AlreadyExistsError, NotFoundError) as error:
            _log.debug("the lease was changed by another: %s", error)
        except StoreError as error:
            _log.warning("the lease cannot be %s: %s", "renewed" if self.leading else "taken", error)
        except TimeoutError:
            _log.warning("the lease cannot be %s in %.1f s", "renewed" if self.leading else "taken", seconds)
        return False

    async def _take_or_renew(self) -> bool:
        moment = _now()
        spec = LeaseSpec(
            holder_identity=self._identity,
            lease_duration_seconds=int(self._settings.duration),
            acquire_time=moment,
            renew_time=moment,
            lease_transitions=0,
        )
        try:
            stored = await self._store.get(Lease, self._settings.lease, self._namespace)
        except NotFoundError:
            metadata = ObjectMeta(name=self._settings.lease, namespace=self._namespace)
            began = time.monotonic()
            self._saw(await self._store.create(Lease(metadata=metadata, spec=spec)))
        else:
            self._saw(stored)
            if self._is_anothers() and not self._is_expired(stored):
                return False
            transitions = stored.spec.lease_transitions or 0
            if stored.spec.holder_identity == self._identity:
                spec = replace(spec, acquire_time=stored.spec.acquire_time, lease_transitions=transitions)
            else:
                spec = replace(spec, lease_transitions=transitions + 1)
            began = time.monotonic()
            self._saw(await self._store.update(replace(stored, spec=spec)))
        self._renewed_at = began
        return True

    async def _release(self) -> None:
        """Let another lead at once. Only after the duties ended."""
        moment = _now()
        try:
            async with asyncio.timeout(_RELEASE_DEADLINE):
                # read again: a renewal that was interrupted may have been done all the same
                stored = await self._store.get(Lease, self._settings.lease, self._namespace)
                self._saw(stored)
                if stored.spec.holder_identity != self._identity:
                    return
                spec = replace(
                    stored.spec, holder_identity="", lease_duration_seconds=1, acquire_time=moment, renew_time=moment
                )
                self._saw(await self._store.update(replace(stored, spec=spec)))
        except (StoreError, TimeoutError) as error:
            _log.info("the lease was not given back: %r", error)
        else:
            _log.info("gave the lease back")

    def _saw(self, lease: Lease) -> None:
        if self._seen is None or lease.spec != self._seen.spec:
            self._seen_at = time.monotonic()
        self._seen = lease

    def _is_anothers(self) -> bool:
        holder = self._seen.spec.holder_identity if self._seen is not None else ""
        return bool(holder) and holder != self._identity

    def _is_expired(self, lease: Lease) -> bool:
        return time.monotonic() >= self._expires_at(lease)

    def _expires_at(self, lease: Lease) -> float:
        return self._seen_at + (lease.spec.lease_duration_seconds or 0)

    def _until_expiry(self) -> float:
        """Seconds until another's lease may be taken, if that is ahead: no time is lost by coming late."""
        if self._seen is None or not self._is_anothers():
            return self._settings.retry_period
        ahead = self._expires_at(self._seen) - time.monotonic()
        return ahead + 0.001 if ahead > 0 else self._settings.retry_period

    def _lost_at(self) -> float:
        """From when on others may hold the lease."""
        return self._renewed_at + self._settings.duration

    def _pause(self) -> float:
        """Seconds until the next attempt, so that candidates do not come as one."""
        return self._settings.retry_period * uniform(1.0, 1.2)


async def depose(store: Store, namespace: str, name: str, identity: str, seconds: int) -> float:
    """Take the Lease from whoever leads, for `seconds`; returns in how many seconds their duties have ended.

    For what must not be undone by leaders, and does none of their work. They see at their next renewal that the lease
    is another's, and their process ends if they did not by the time it would have run out. Raises StoreError.
    """
    for _ in range(_ATTEMPTS):
        moment = _now()
        spec = LeaseSpec(
            holder_identity=identity, lease_duration_seconds=seconds, acquire_time=moment, renew_time=moment
        )
        try:
            stored = await store.get(Lease, name, namespace)
        except NotFoundError:
            stored = None
        try:
            if stored is None:
                await store.create(Lease(metadata=ObjectMeta(name=name, namespace=namespace), spec=spec))
                return 0.0
            transitions = (stored.spec.lease_transitions or 0) + 1
            await store.update(replace(stored, spec=replace(spec, lease_transitions=transitions)))
        except (ConflictError, AlreadyExistsError, NotFoundError):
            continue  # renewed just now
        if stored.spec.holder_identity in ("", None, identity):
            return 0.0
        return float(stored.spec.lease_duration_seconds or 0)
    raise ConflictError(f"Lease {namespace}/{name} keeps changing")


def _now() -> datetime:
    """The time now, with microseconds in any case: a MicroTime without them is refused."""
    moment = datetime.now(UTC)
    return moment if moment.microsecond else moment.replace(microsecond=1)
