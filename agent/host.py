"""The plugin host: one request in, one reply out, whatever happens in between."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import msgspec

from agent import metrics
from agent.settings import ServerSettings
from agent.wire import MAX_REPLY, Request, Status, decode_env
from daemon.logs import CALL
from plugins.cni import COMMANDS, SUPPORTED_VERSIONS, Call, Command, Plugin, parse_call
from plugins.errors import CniError, InternalError, InvalidEnvironmentError, TryAgainLaterError
from plugins.ipam import metrics as ipam_metrics
from plugins.net.netns import require_netns

DEFAULT_VERSION = "1.0.0"
"""cniVersion of an error whose caller named none that we know; the shim's is the same."""
MAX_DETAILS = 32 << 10
"""Characters of an error's details; a runtime copies them into pod events."""

_WAITS = {
    ("spiderpool", "ADD"): ipam_metrics.allocation_limit_duration,
    ("spiderpool", "DEL"): ipam_metrics.release_limit_duration,
}
"""Where the time that calls wait for their turn is told, as upstream tells that of its limiter."""

_log = logging.getLogger(__name__)
_Execute = Callable[[Plugin, Call], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one call."""

    status: Status
    body: bytes
    code: int = 0
    """CNI error code; 0 with success."""


def error_body(error: CniError, version: str) -> bytes:
    """`error` as the error object of the CNI specification (section "Error"), the same in all versions."""
    return (
        msgspec.json.encode(
            {"cniVersion": version, "code": error.code, "msg": error.msg, "details": error.details[:MAX_DETAILS]}
        )
        + b"\n"
    )


class Host:
    """Executes calls: checked, in turn, at most so many at a time, each within its deadline.

    `admit` is awaited before an ADD, CHECK or STATUS is executed; it raises CniError to refuse it.
    """

    def __init__(
        self, plugins: Mapping[str, Plugin], settings: ServerSettings, admit: Callable[[Call], Awaitable[None]]
    ) -> None:
        self.executing: set[asyncio.Task[object]] = set()
        """Tasks of `call` that are inside a plugin now; the others are still waiting."""
        self._plugins = plugins
        self._settings = settings
        self._admit = admit
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._locks: WeakValueDictionary[tuple[str, ...], asyncio.Lock] = WeakValueDictionary()

    async def call(
        self, request: Request, netns_fd: int | None = None, abandoned: Callable[[], bool] = lambda: False
    ) -> Reply:
        """Execute a request that a caller waits for; a failure becomes a CNI error object in the caller's version.

        An ADD is not begun that is `abandoned` by then: the runtime has given up and deletes, perhaps by
        way of the queue, which does not wait here. The only exception that leaves is asyncio.CancelledError, after the
        plugin has rolled back.
        """

        async def execute(plugin: Plugin, call: Call) -> bytes:
            return await self._in_order(plugin, call, abandoned)

        return await self._answer(request, netns_fd, execute)

    async def replay(self, request: Request) -> Reply:
        """Execute a request out of the queue: at once, since calls that wait to be admitted wait for it."""
        return await self._answer(request, None, self._exclusively)

    async def _answer(self, request: Request, netns_fd: int | None, execute: _Execute) -> Reply:
        started = time.monotonic()
        env: dict[str, str] = {}
        CALL.set({})
        metrics.IN_FLIGHT.inc()
        try:
            env = decode_env(request.env)
            name = env.get("SPIDERPOOL_PLUGIN", "")
            call = parse_call(name, env, request.stdin, netns_fd)
            CALL.set(_names(call))
            plugin = self._plugins.get(name)
            if plugin is None:
                raise InvalidEnvironmentError(
                    f"the agent has no plugin {name[:40]!r}", f"it serves {', '.join(sorted(self._plugins))}"
                )
            body = await self._within_deadline(execute, plugin, _checked_netns(call))
            reply = Reply(Status.DONE, body)
        except CniError as error:
            _log.warning("failed with code %d: %s", error.code, error)
            reply = _failure(env, error)
        except Exception:  # noqa: BLE001 (the outermost frame of a call: its caller must get an answer)
            _log.exception("failed unexpectedly")
            reply = _failure(env, InternalError("internal error", "the agent's log has the trace"))
        finally:
            metrics.IN_FLIGHT.dec()
        self._account(env, reply, time.monotonic() - started)
        return reply

    def _account(self, env: Mapping[str, str], reply: Reply, seconds: float) -> None:
        plugin, command = env.get("SPIDERPOOL_PLUGIN", ""), env.get("CNI_COMMAND", "")
        plugin = plugin if plugin in self._plugins else "unknown"
        command = command if command in COMMANDS else "unknown"
        metrics.CALLS.labels(plugin, command, str(reply.code)).inc()
        metrics.DURATION.labels(plugin, command).observe(seconds)
        if reply.status is Status.DONE:
            level = logging.INFO if command in ("ADD", "DEL", "GC") else logging.DEBUG
            _log.log(level, "succeeded in %.1f ms", seconds * 1e3)

    async def _within_deadline(self, execute: _Execute, plugin: Plugin, call: Call) -> bytes:
        limit = self._settings.add_deadline if call.command == "ADD" else self._settings.deadline
        try:
            async with asyncio.timeout(limit) as timer:
                return await execute(plugin, call)
        except TimeoutError:
            if not timer.expired():
                raise
            raise TryAgainLaterError("the call took too long", f"{call.command} has {limit:g} s in all") from None

    async def _in_order(self, plugin: Plugin, call: Call, abandoned: Callable[[], bool]) -> bytes:
        """After all earlier calls for the same NIC: a DEL must not overtake its ADD, not even one that waits."""
        arrived = time.monotonic()
        async with self._lock("arrival", call):
            if call.command in ("ADD", "CHECK", "STATUS"):
                await self._admit(call)
            async with self._slots:
                if call.command == "ADD" and abandoned():
                    raise TryAgainLaterError("the caller has gone", "while the call waited for its turn")
                waited = _WAITS.get((call.plugin, call.command))
                if waited is not None:
                    waited.observe(time.monotonic() - arrived)
                task = asyncio.current_task()
                assert task is not None  # noqa: S101 (a coroutine runs in a task)
                self.executing.add(task)
                try:
                    return await self._exclusively(plugin, call)
                finally:
                    self.executing.discard(task)

    async def _exclusively(self, plugin: Plugin, call: Call) -> bytes:
        """While nothing else executes for the same NIC, be it live or replayed."""
        async with self._lock("execution", call):
            metrics.RUNNING.inc()
            try:
                return await _run(plugin, call)
            finally:
                metrics.RUNNING.dec()

    def _lock(self, stage: str, call: Call) -> asyncio.Lock:
        """The lock of one NIC for one plugin; calls for no container share nothing and get a lock of their own."""
        if not call.container_id:
            return asyncio.Lock()
        key = (stage, call.plugin, call.container_id, call.ifname)
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock


def _failure(env: Mapping[str, str], error: CniError) -> Reply:
    version = env.get("SPIDERPOOL_CNI_VERSION", "")
    body = error_body(error, version if version in SUPPORTED_VERSIONS else DEFAULT_VERSION)
    return Reply(Status.FAILED, body, error.code)


def _names(call: Call) -> dict[str, str]:
    """What identifies the call in the log."""
    names = {"plugin": call.plugin, "command": call.command}
    if call.container_id:
        names |= {"container": call.container_id, "ifname": call.ifname}
    if call.pod_name:
        names |= {"pod": f"{call.pod_namespace}/{call.pod_name}", "pod_uid": call.pod_uid}
    return names


def _checked_netns(call: Call) -> Call:
    """The call with a descriptor that is a pod's network namespace, or None where the command may do without.

    Our own namespace is refused: a path such as /proc/PID/ns/net may by now belong to a process of the host, and a
    plugin that believed it would rewire the node. Raises InvalidEnvironmentError for ADD and CHECK.
    """
    if call.netns_fd is None:
        return call
    try:
        own = require_netns(call.netns_fd) == os.stat("/proc/self/ns/net").st_ino
        error = (
            InvalidEnvironmentError("CNI_NETNS is the node's own", f"{call.netns!r} is not a pod's") if own else None
        )
    except InvalidEnvironmentError as reason:
        error = InvalidEnvironmentError("CNI_NETNS is not a network namespace", f"{call.netns!r}: {reason}")
    if error is None:
        return call
    if call.command in ("ADD", "CHECK"):
        raise error
    return replace(call, netns_fd=None)


async def _run(plugin: Plugin, call: Call) -> bytes:
    """One plugin method; what goes to standard output."""
    if call.command == "ADD":
        body = msgspec.json.encode(await plugin.add(call)) + b"\n"
        if len(body) > MAX_REPLY:
            raise InternalError("the result is too large", f"{len(body)} bytes, the limit is {MAX_REPLY}")
        return body
    methods: dict[Command, Callable[[Call], Awaitable[None]]] = {
        "DEL": plugin.delete,
        "CHECK": plugin.check,
        "STATUS": plugin.status,
        "GC": plugin.gc,
    }
    await methods[call.command](call)
    return b""
