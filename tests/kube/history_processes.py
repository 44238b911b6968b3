"""Handles on the processes of `history_child`: asking them, killing them, and having them again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from lab.layout import SOURCES
from tests.kube.history_child import CALM

Json = dict[str, Any]
READY = 60.0
"""Seconds until a process must be ready, while faults may be about."""
ANSWER = 45.0
"""Seconds until a process must answer: far above the deadlines that it has itself."""


class DiedError(Exception):
    """The process died before it answered."""


class Nursery:
    """Forks processes off one that has everything imported: that takes milliseconds."""

    def __init__(self, sources: str = SOURCES) -> None:
        """`sources` is the folder that their code is from. Raises AssertionError if it turns out to be another one."""
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, "-m", "tests.kube.history_child"]
            environment = os.environ | {"PYTHONPATH": sources}
            self._process = subprocess.Popen(command, stdin=there.fileno(), cwd=sources, env=environment)
        self._here.settimeout(READY)
        told = json.loads(self._here.recv(65536) or "[]")
        if told != [os.path.realpath(sources)]:
            self.close()
            raise AssertionError(f"the processes' code is from {told}, and not from {sources}")

    def start(self, config: Json, channel: socket.socket) -> int:
        """Start a process that speaks over `channel`; a pidfd of it."""
        socket.send_fds(self._here, [json.dumps(config).encode()], [channel.fileno()])
        return os.pidfd_open(int(self._here.recv(64)))

    def close(self) -> None:
        self._here.close()
        self._process.wait(20)


class Process:
    """One process after the other in the same role."""

    def __init__(self, nursery: Nursery, config: Json) -> None:
        self._nursery = nursery
        self._config = config
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._next = 0
        self._pidfd = -1
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self.deaths = 0
        self.failures: list[str] = []
        """Why processes ended that nobody had killed."""
        self.killed = False
        """Whether the process that runs was killed, or told when to kill itself."""

    @property
    def alive(self) -> bool:
        return self._reading is not None and not self._reading.done()

    async def ensure(self) -> None:
        """Start it unless it runs, as often as it takes until one is ready, as systemd does. Raises TimeoutError."""
        async with self._starting, asyncio.timeout(READY):
            while not self.alive:
                try:
                    await self._start()
                except DiedError:
                    await asyncio.sleep(0.2)

    async def _start(self) -> None:
        await self._bury()
        here, there = socket.socketpair()
        with there:
            self._pidfd = self._nursery.start(self._config, there)
        reader, self._writer = await asyncio.open_connection(sock=here)
        ready = self._expect(-1)
        self.killed = False
        self._reading = asyncio.create_task(self._read(reader))
        await ready

    async def ask(self, do: str, **more: Any) -> Json:
        """Have something done. Raises DiedError, TimeoutError."""
        return await self.send(do, **more)[1]

    def send(self, do: str, **more: Any) -> tuple[int, asyncio.Future[Json]]:
        """The same without waiting: the number of the request, and its answer."""
        self._next += 1
        future = self._expect(self._next)
        if not self.alive:
            self._waiting.pop(self._next).set_exception(DiedError())
        else:
            self._writer.write(json.dumps({"id": self._next, "do": do, **more}).encode() + b"\n")
        return self._next, future

    async def answer(self, do: str, **more: Any) -> Json:
        """`ask`, with a deadline that only a process that hangs misses."""
        async with asyncio.timeout(ANSWER):
            return await self.ask(do, **more)

    async def arm(self, calls: int, within: float | None = None) -> None:
        """Let it kill itself at its n-th call to the API from now on."""
        self.killed = True
        with suppress(DiedError):
            await self.answer("arm", calls=calls, within=within)

    async def calm(self) -> None:
        """Have it wait for answers as long as it does elsewhere, and those that come after it too."""
        self._config = {**self._config, "attempt": CALM}
        with suppress(DiedError):
            await self.answer("calm")

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self.alive:
            self.killed = True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def dead(self) -> None:
        """Return when it has ended."""
        if self._reading is not None:
            await asyncio.wait([self._reading])

    async def close(self) -> None:
        async with self._starting:
            self.kill()
            await self._bury()

    def _expect(self, number: int) -> asyncio.Future[Json]:
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting
        self._waiting[number] = future
        return future

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            async for line in reader:
                message = json.loads(line)
                future = self._waiting.pop(message.pop("id", -1), None)
                if future is not None and not future.done():
                    future.set_result(message)
        self.deaths += 1
        if not self.killed and -1 not in self._waiting:  # before it is ready, whoever started it may start it again
            self.failures.append(f"{self._config['role']} ended by itself, see {self._config['log']}")
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(DiedError())
        self._waiting.clear()

    async def _bury(self) -> None:
        await self.dead()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()


@asynccontextmanager
async def process(nursery: Nursery, config: Json) -> AsyncIterator[Process]:
    """A process while the context lasts, first of all running."""
    there = Process(nursery, config)
    try:
        await there.ensure()
        yield there
    finally:
        await there.close()
