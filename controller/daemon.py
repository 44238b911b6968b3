"""The life of the controller: what starts in which order, what happens when a part dies, and how it ends.

Every replica keeps the caches warm and serves admission; one, elected, does the duties. When the process is asked to
stop it first gives up leading, then answers for a moment longer, until the Service sends nobody here, and ends.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from secrets import token_hex
from typing import Any

from api.pool import Pool
from controller import rooms
from controller.admission.configurations import Configurations
from controller.admission.review import Review
from controller.admission.rules import Context
from controller.admission.server import WebhookServer
from controller.admission.table import table
from controller.caches import Caches
from controller.certificates.keeper import Clock, Keeper, present
from controller.certificates.serving import Issued, Provided, Source
from controller.election import Election
from controller.operator import operate
from controller.room import Desk
from controller.settings import Settings
from daemon.health import Health, open_servers
from daemon.notify import notify, watchdog, watchdog_interval
from store.errors import StoreError
from store.kube import KubeStore
from store.kube_access import Credentials
from store.kube_settings import KubeSettings
from store.port import Query, Store
from store.recorder import Recorder

_PAUSE_MOST = 5.0
"""Seconds between two attempts at the start."""
_END_DEADLINE = 5.0
"""Seconds for background tasks to end after they were cancelled."""

_log = logging.getLogger(__name__)


class Controller:
    """One replica; `run` is its life."""

    def __init__(self, settings: Settings, store: Store, credentials: Credentials, clock: Clock) -> None:
        pod, webhook, tls = settings.pod, settings.webhook, settings.tls
        self._settings = settings
        self._credentials = credentials
        self._features = settings.features()
        self._store = store
        self._caches = Caches(store)
        self._events = Recorder(store, "spiderpool-controller", pod.resolve())
        self._rooms = rooms.build(Desk(store, self._caches, self._events, pod.namespace), settings)
        admitted = table(settings, self._caches)
        self._server = WebhookServer(webhook.host, webhook.port, admitted, self._context)
        address = webhook.address(pod.namespace)
        configurations = Configurations(store, webhook.configuration, admitted, address)
        self._certificates: Source
        if tls.server_cert:
            self._certificates = Provided(
                (tls.server_cert, tls.server_key, tls.authorities()),
                configurations,
                self._server.show,
                caches=self._caches,
                configuration=webhook.configuration,
                check=tls.check,
            )
        else:
            keeper = Keeper(
                store,
                pod.namespace,
                tls.secret,
                policy=tls.policy(),
                names=address.names() | set(tls.names),
                clock=clock,
            )
            self._certificates = Issued(
                keeper,
                configurations,
                self._server.show,
                caches=self._caches,
                secret=Query(namespace=pod.namespace, name=tls.secret),
                configuration=webhook.configuration,
                check=tls.check,
                clock=clock,
            )
        identity = f"{pod.resolve()}_{token_hex(4)}"
        self._election = Election(store, pod.namespace, identity, settings.leader)
        self._health = Health()

    async def run(self, stop: asyncio.Event, spawned: Callable[[], None]) -> int:
        """Live until `stop` (exit status 0) or until a part dies (1). Raises OSError if a port is taken."""
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        async with AsyncExitStack() as stack:
            for http in await open_servers(self._health, self._settings.health):
                stack.push_async_callback(http.close)
            work: dict[str, Any] = {
                "operator": operate(
                    self._server, self._credentials, startup=self._startup, spawned=spawned, stop=stopped
                ),
                "caches": self._caches.run(),
                "certificates": self._certificates.run(),
                "events": self._events.run(),
                "health": self._become_ready(),
            }
            if self._settings.leader.enabled:
                work["election"] = self._election.run(self._lead)
            if interval := watchdog_interval():
                work["watchdog"] = watchdog(interval)
            tasks = {name: loop.create_task(coroutine, name=name) for name, coroutine in work.items()}
            stopping = loop.create_task(stop.wait(), name="stop")
            try:
                status = await _watch(stopping, tasks)
            finally:
                self._health.ready = False
                notify("STOPPING=1")
                await self._end(tasks, stopping, stopped)
        _log.info("stopped")
        return status

    async def _startup(self) -> None:
        """Have certificates before admission is served, however long the API server is away."""
        pause = 0.1
        while True:
            try:
                await self._certificates.prepare()
                return
            except (StoreError, OSError, ValueError) as error:
                _log.warning("cannot serve admission yet, trying again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSE_MOST)

    async def _become_ready(self) -> None:
        await self._caches.synced()
        await self._server.opened()
        self._health.ready = self._health.started = True
        notify("READY=1")
        _log.info("ready")
        await asyncio.Event().wait()

    async def _lead(self) -> None:
        """The duties, once what they look at is there, and somebody who answers those who are sent here."""
        await self._caches.synced()
        await self._server.opened()
        await self._defined()
        async with asyncio.TaskGroup() as group:
            group.create_task(_unending("certificates", self._certificates.lead()))
            for name, room in self._rooms.items():
                group.create_task(_unending(name, room.run()))

    async def _defined(self) -> None:
        """Our kinds are still there: caches stay as they were when definitions go, as `clean` makes them go, and a
        leader would then put back webhooks that soon nobody answers."""
        while True:
            try:
                await self._store.list(Pool, Query(name="any"))  # whether the kind is served counts
                return
            except StoreError as error:
                _log.warning("the duties are not taken up yet: %s", error)
            await asyncio.sleep(_PAUSE_MOST)

    def _context(self, review: Review) -> Context:
        return Context(
            store=self._store,
            namespace=self._settings.pod.namespace,
            features=self._features,
            user=review.request.user_info.username,
            dry_run=review.request.dry_run,
        )

    async def _end(
        self, tasks: Mapping[str, asyncio.Task[None]], stopping: asyncio.Task[Any], stopped: asyncio.Event
    ) -> None:
        """Stop leading, answer a little longer, and then the rest."""
        if "election" in tasks:
            await _cancelled({tasks["election"]}, self._settings.leader.duration)
        if self._server.listening and stopping.done() and not tasks["operator"].done():
            await asyncio.wait({tasks["operator"]}, timeout=self._settings.webhook.drain)
        stopped.set()
        await asyncio.wait({tasks["operator"]}, timeout=_END_DEADLINE)
        await _cancelled({stopping, *tasks.values()}, _END_DEADLINE)


async def run(settings: Settings, clock: Clock = present) -> int:
    """Run the controller until it is told to stop (exit status 0) or a part of it dies (1).

    Raises StoreError without credentials for the API server, OSError if a port is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

    listen()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kube = KubeSettings(kubeconfig=settings.kubernetes.kubeconfig, context=settings.kubernetes.context)
    credentials = Credentials(kube)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(credentials.close)
        await credentials.access()
        store = KubeStore(kube, credentials)
        stack.push_async_callback(store.close)
        return await Controller(settings, store, credentials, clock).run(stop, listen)


async def _watch(stopping: asyncio.Task[Any], tasks: Mapping[str, asyncio.Task[None]]) -> int:
    """Wait for the order to stop or for something to die; the exit status."""
    done, _ = await asyncio.wait({stopping, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
    for task in done - {stopping}:
        error = None if task.cancelled() else task.exception()
        _log.critical("task %s ended: the controller cannot go on", task.get_name(), exc_info=error)
        return 1
    _log.info("asked to stop")
    return 0


async def _unending(name: str, duty: Any) -> None:
    await duty
    raise RuntimeError(f"the duty {name} ended")


async def _cancelled(tasks: set[asyncio.Task[Any]], patience: float) -> None:
    """Cancel, and wait for what cancellation has to undo."""
    for task in tasks:
        task.cancel()
    done, late = await asyncio.wait(tasks, timeout=patience)
    for task in late:
        _log.error("task %s does not end", task.get_name())
    for task in done:
        if not task.cancelled():
            task.exception()  # reported by `_watch` already; asyncio need not complain that nobody looked
