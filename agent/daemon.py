"""The life of the agent: what starts in which order, what happens when a part dies, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from agent.host import Host
from agent.queue import CallQueue
from agent.server import Server
from agent.settings import Settings
from daemon.health import Health, open_servers
from daemon.notify import notify, watchdog, watchdog_interval
from plugins.cni import Call, Plugin
from plugins.errors import CniError, NotAvailableError, TryAgainLaterError

_READY_DEADLINE = 30.0
"""Seconds after which the log tells, again, that the rooms are not ready."""
_END_DEADLINE = 5.0
"""Seconds for background tasks to end after they were cancelled."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the daemon runs."""

    plugins: Mapping[str, Plugin]
    background: Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
    """Tasks by name that run as long as the agent does. One that ends takes the agent with it: a service manager
    restarts the whole, which is tried at every start, rather than a part, which is tried never."""
    ready: Callable[[float], Awaitable[None]]
    """Returns when ADDs can be executed. Raises CniError or TimeoutError after so many seconds."""
    doors: Mapping[str, Callable[[Host, Health], Coroutine[Any, Any, None]]] = field(default_factory=dict)
    """Further ways in for calls: tasks as in `background`, for which the host executes."""


Furnish = Callable[[Settings, AsyncExitStack], Awaitable[Rooms]]
"""Builds the rooms; what has to be given back at the end goes on the stack."""


class Admission:
    """Keeps ADD, CHECK and STATUS from executing before the agent can do them right."""

    def __init__(self, wait: float) -> None:
        self.ready = asyncio.Event()
        self.queue: CallQueue | None = None
        self._wait = wait

    async def __call__(self, call: Call) -> None:
        """Wait for the start, and for deletions that were queued before `call`. Raises CniError."""
        if not self.ready.is_set():
            if call.command == "STATUS":
                raise NotAvailableError("the agent is starting")
            try:
                async with asyncio.timeout(self._wait):
                    await self.ready.wait()
            except TimeoutError:
                raise TryAgainLaterError("the agent is starting", f"it was not ready in {self._wait:g} s") from None
        if call.command != "STATUS" and self.queue is not None:
            await self.queue.settled(call.container_id)


async def run(settings: Settings, furnish: Furnish) -> int:
    """Run the agent until it is told to stop (exit status 0) or a part of it dies (1).

    Raises AddressInUseError, OSError and whatever `furnish` raises when it cannot start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server = Server(settings.server)
    server.claim()
    health = Health()
    async with AsyncExitStack() as stack:
        for http in await open_servers(health, settings.health):
            stack.push_async_callback(http.close)
        rooms = await furnish(settings, stack)
        admission = Admission(settings.queue.wait)
        host = Host(rooms.plugins, settings.server, admission)
        queue = admission.queue = CallQueue(settings.queue, host.replay)
        queue.open()
        tasks = {name: loop.create_task(work(), name=name) for name, work in rooms.background.items()}
        tasks |= {name: loop.create_task(door(host, health), name=name) for name, door in rooms.doors.items()}
        tasks["queue"] = loop.create_task(queue.run(), name="queue")
        if interval := watchdog_interval():
            tasks["watchdog"] = loop.create_task(watchdog(interval), name="watchdog")
        server.listen(host)
        starting = loop.create_task(_become_ready(rooms, queue, admission, health), name="start")
        stopping = loop.create_task(stop.wait(), name="stop")
        try:
            status = await _watch(stopping, starting, set(tasks.values()))
        finally:
            health.ready = False
            notify("STOPPING=1")
            await server.stop(settings.server.stop_patience)
            await _end({stopping, starting, *tasks.values()})
    _log.info("stopped")
    return status


async def _become_ready(rooms: Rooms, queue: CallQueue, admission: Admission, health: Health) -> None:
    while True:
        try:
            await rooms.ready(_READY_DEADLINE)
            break
        except (CniError, TimeoutError) as error:
            _log.warning("not ready yet: %s", error)
    admission.ready.set()
    while True:
        try:
            await queue.settled()
            break
        except TryAgainLaterError as error:
            _log.warning("not ready yet: %s", error)
    # What exists now lives as long as the process: the collector need not walk it again, which would stall calls.
    gc.collect()
    gc.freeze()
    health.ready = health.started = True
    notify("READY=1")
    _log.info("ready")


async def _watch(stopping: asyncio.Task[Any], starting: asyncio.Task[None], background: set[asyncio.Task[None]]) -> int:
    """Wait for the order to stop or for something to die; the exit status."""
    pending: set[asyncio.Task[Any]] = {stopping, starting, *background}
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            error = task.exception()
            if task is not starting or error is not None:
                _log.critical("task %s ended: the agent cannot go on", task.get_name(), exc_info=error)
                return 1
        if stopping in done:
            _log.info("asked to stop")
            return 0


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel, and wait a moment for what cancellation has to undo."""
    for task in tasks:
        task.cancel()
    done, late = await asyncio.wait(tasks, timeout=_END_DEADLINE)
    for task in late:
        _log.error("task %s does not end", task.get_name())
    for task in done:
        if not task.cancelled():
            task.exception()  # reported by `_watch` already; asyncio need not complain that nobody looked
