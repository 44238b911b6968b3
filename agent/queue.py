"""Replay of the deletions that the shim queued while there was no agent to take them.

A queue file is one request frame; its name orders it. Two rules keep replay safe:

* **Nothing new overtakes.** `settled` is awaited before each ADD and CHECK: the runtime was told that the queued
  deletion succeeded, so an ADD for the same container or address must find it done. That covers the start of the
  agent and every later moment alike. One container's deletion that keeps failing stops only that container's calls.
* **A GC is tried once.** Its list of valid attachments is true only until the next ADD; repeated later it would delete
  pods that are younger than it. The runtime sends another.

Calls for one container replay in order, a failed one holding back its followers (the coordinator's routes go before
the address is free for others); different containers replay side by side.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import stat
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from agent import metrics
from agent.host import Reply
from agent.settings import QueueSettings
from agent.wire import HEADER, MAX_ENV, MAX_STDIN, FrameError, Request, Status, decode_env, decode_frame
from plugins.errors import InvalidEnvironmentError, TryAgainLaterError
from store.inotify import IN_MOVED_TO, DirectoryWatch

FAILED = "failed"
"""Folder for what could not be replayed, for a person to look at."""
_NAME = re.compile(r"\d{20}-\d{10}\.call")
_STALE = 600.0
"""Age in seconds at which an unfinished file is a dead shim's; its caller was never told success."""
_PERMANENT = frozenset({1, 2, 4, 6, 7})
"""CNI codes (version, field, environment, JSON, configuration) that another attempt cannot change."""
_TRANSIENT = TryAgainLaterError.code
_FIRST_BACKOFF = 0.5

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    name: str
    owner: str
    """The container id, or the command where a call is for no container."""
    once: bool
    attempts: int = 0
    due: float = 0.0
    stuck: bool = False
    """It failed for a reason that waiting does not cure: ADDs for other containers do not wait for it any more."""


class CallQueue:
    """The directory `settings.directory`; `replay` executes one request, as a live call would be."""

    def __init__(self, settings: QueueSettings, replay: Callable[[Request], Awaitable[Reply]]) -> None:
        self._directory = settings.directory
        self._settings = settings
        self._replay = replay
        self._entries: dict[str, _Entry] = {}
        self._wake = asyncio.Event()
        self._progress = asyncio.Condition()

    def open(self) -> None:
        """Create the directory if it is missing and remove what dead shims left unfinished. Raises OSError."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        os.makedirs(self._path(FAILED), mode=0o700, exist_ok=True)
        for name in os.listdir(self._directory):
            if name.endswith(".tmp") and time.time() - os.lstat(self._path(name)).st_mtime > _STALE:
                os.unlink(self._path(name))

    async def settled(self, container_id: str = "") -> None:
        """Return when everything that is in the directory now was replayed or set aside.

        What failed for a reason that waiting does not cure is waited for by its own container only, together with
        what comes behind it: replayed after that container's next ADD, it would delete what the ADD made.
        Raises TryAgainLaterError after `settings.wait` seconds.
        """
        self._scan()
        before = self._in_the_way(container_id)
        if not before:
            return
        self._wake.set()
        try:
            async with asyncio.timeout(self._settings.wait), self._progress:
                await self._progress.wait_for(lambda: before.isdisjoint(self._in_the_way(container_id)))
        except TimeoutError:
            raise TryAgainLaterError(
                "queued deletions are still being replayed", f"{len(self._entries)} of them are left"
            ) from None

    async def run(self) -> None:
        """Replay what is there and what arrives. Runs until it is cancelled. Raises OSError."""
        watch = DirectoryWatch(self._directory, IN_MOVED_TO, lambda _name: self._wake.set())
        try:
            while True:
                self._wake.clear()
                self._scan()
                if runnable := self._runnable():
                    await self._replay_all(runnable)
                    continue
                await self._rest()
        finally:
            watch.close()

    def _in_the_way(self, container_id: str) -> set[str]:
        """Names of the entries that a call for this container has to wait for."""
        entries = self._entries.values()
        stuck = {entry.owner for entry in entries if entry.stuck}
        return {entry.name for entry in entries if entry.owner == container_id or entry.owner not in stuck}

    def _path(self, *names: str) -> str:
        return os.path.join(self._directory, *names)

    def _scan(self) -> None:
        """Take notice of new files."""
        present = os.listdir(self._directory)
        for name in sorted(set(present) - self._entries.keys()):
            if name == FAILED or name.endswith(".tmp"):
                continue
            try:
                env = decode_env(self._read(name).env)
            except FileNotFoundError:
                continue
            except (FrameError, InvalidEnvironmentError, OSError) as error:
                self._set_aside(name, "malformed", str(error))
                continue
            command = env.get("CNI_COMMAND", "")
            owner = env.get("CNI_CONTAINERID", "") or command
            self._entries[name] = _Entry(name, owner, once=command == "GC")
        for name in self._entries.keys() - set(present):
            del self._entries[name]
        metrics.QUEUE_LENGTH.set(len(self._entries))

    def _read(self, name: str) -> Request:
        """One file's request. Raises FrameError, OSError."""
        if not _NAME.fullmatch(name):
            raise FrameError("the name is not one that the shim gives")
        fd = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != 0:
                raise FrameError("it is not a regular file of root")
            return decode_frame(file.read(HEADER.size + MAX_ENV + MAX_STDIN + 1))

    def _runnable(self) -> list[list[_Entry]]:
        """Entries that may replay now: due, with nothing of their owner's before them; grouped by owner."""
        now = time.monotonic()
        held: set[str] = set()
        groups: dict[str, list[_Entry]] = {}
        for name in sorted(self._entries):
            entry = self._entries[name]
            if entry.due > now:
                held.add(entry.owner)
            if entry.owner not in held:
                groups.setdefault(entry.owner, []).append(entry)
        return list(groups.values())

    async def _replay_all(self, groups: list[list[_Entry]]) -> None:
        slots = asyncio.Semaphore(self._settings.concurrency)

        async def replay_group(group: list[_Entry]) -> None:
            async with slots:
                for entry in group:
                    if not await self._replay_one(entry):
                        return

        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(replay_group(group))

    async def _replay_one(self, entry: _Entry) -> bool:
        """Whether the entry is out of the way."""
        try:
            reply = await self._replay(self._read(entry.name))
        except FileNotFoundError:
            reply = Reply(Status.DONE, b"")
        except (FrameError, OSError) as error:
            self._set_aside(entry.name, "malformed", str(error))
            return True
        entry.attempts += 1
        reason = reply.body.decode(errors="replace")
        if reply.status is Status.DONE:
            self._remove(entry)
        elif entry.once or reply.code in _PERMANENT or entry.attempts >= self._settings.attempts:
            self._set_aside(entry.name, "failed", reason)
        else:
            delay = min(_FIRST_BACKOFF * 2 ** (entry.attempts - 1), self._settings.backoff)
            entry.due = time.monotonic() + delay * random.uniform(0.8, 1.2)
            entry.stuck = reply.code != _TRANSIENT
            metrics.QUEUE_REPLAYED.labels("retried").inc()
            _log.warning("replay of %s failed, next attempt in %.1f s: %s", entry.name, delay, reason)
        async with self._progress:
            self._progress.notify_all()
        return entry.name not in self._entries

    def _remove(self, entry: _Entry) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(entry.name))
        self._entries.pop(entry.name, None)
        metrics.QUEUE_REPLAYED.labels("done").inc()
        metrics.QUEUE_LENGTH.set(len(self._entries))

    def _set_aside(self, name: str, outcome: str, reason: str) -> None:
        """Move a file where a person finds it; the oldest of too many are deleted."""
        _log.error("queue file %s is %s and was moved to %s: %s", name, outcome, self._path(FAILED), reason)
        with suppress(FileNotFoundError):
            os.rename(self._path(name), self._path(FAILED, name))
        self._entries.pop(name, None)
        metrics.QUEUE_REPLAYED.labels(outcome).inc()
        kept = sorted(os.listdir(self._path(FAILED)))
        for old in kept[: -self._settings.keep_failed]:
            os.unlink(self._path(FAILED, old))

    async def _rest(self) -> None:
        """Until a file arrives or the next attempt is due."""
        due = min((entry.due for entry in self._entries.values()), default=None)
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            return
