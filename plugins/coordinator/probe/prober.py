"""Opening NICs for questions, from the agent's event loop into other network namespaces."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from plugins.coordinator.probe.session import NicProbe, ProbeUnknownError, Sockets, open_new, open_used
from plugins.coordinator.probe.settings import ProbeSettings
from plugins.net.netns import in_netns

log = logging.getLogger(__name__)
T = TypeVar("T")

OPENERS = 4
"""Threads for what waits for the kernel's routing lock, which is one for all."""
CLOSERS = 4
"""Threads that close; four close 360 NICs a second."""


class Prober:
    """Opens NICs for questions, and owns the threads and the sockets that this takes."""

    def __init__(self, settings: ProbeSettings) -> None:
        self._settings = settings
        self._openers = ThreadPoolExecutor(OPENERS, "probe-open")
        self._closers = ThreadPoolExecutor(CLOSERS, "probe-close")
        self._slots = asyncio.Semaphore(settings.nics)
        self._pending: set[asyncio.Future[Any]] = set()

    async def open(self, netns_fd: int, ifname: str) -> NicProbe:
        """The NIC `ifname` of the network namespace `netns_fd`, set up if it was down, and operational.

        `netns_fd` is only needed until this returns. Raises ProbeUnknownError if the namespace cannot be entered or the
        NIC is not there, not Ethernet or not operational in time.
        """
        return await self._open(netns_fd, ifname, open_new)

    async def open_used(self, netns_fd: int, ifname: str) -> NicProbe:
        """The same for a NIC that a pod uses: it stays as it is, down if it is down."""
        return await self._open(netns_fd, ifname, open_used)

    async def close(self) -> None:
        """Return when every socket is closed and every thread has ended. All NICs must have been closed before."""
        while self._pending:
            await asyncio.wait(self._pending)
        self._openers.shutdown()
        self._closers.shutdown()

    async def _open(self, netns_fd: int, ifname: str, opener: Callable[[str], Sockets]) -> NicProbe:
        try:
            async with asyncio.timeout(self._settings.up_wait):
                sockets = await self._open_sockets(netns_fd, lambda: opener(ifname))
                nic = NicProbe(ifname, self._settings, sockets, self._aside, self._retire)
                try:
                    await nic.operational()
                except BaseException:
                    nic.close()
                    raise
                return nic
        except TimeoutError:
            raise ProbeUnknownError(f"{ifname}: not operational after {self._settings.up_wait:g} s") from None
        except OSError as error:
            raise ProbeUnknownError(f"{ifname}: {error.strerror or error}") from error

    async def _open_sockets(self, netns_fd: int, opener: Callable[[], Sockets]) -> Sockets:
        await self._slots.acquire()
        try:
            # A copy: if the call is given up while a thread is at it, the number may soon mean another file.
            namespace = os.dup(netns_fd)
        except BaseException:
            self._slots.release()
            raise

        def enter() -> Sockets:
            try:
                return in_netns(namespace, opener)
            finally:
                os.close(namespace)

        opening = self._start(self._openers, enter)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._abandon)
            raise
        except BaseException:
            self._slots.release()
            raise

    async def _aside(self, work: Callable[[], None]) -> None:
        await asyncio.shield(self._start(self._openers, work))

    def _abandon(self, opening: asyncio.Future[Sockets]) -> None:
        """Nobody waits for these sockets any more."""
        if opening.exception():
            self._slots.release()
        else:
            self._retire(opening.result())

    def _retire(self, sockets: Sockets) -> None:
        self._start(self._closers, sockets.close).add_done_callback(self._free)

    def _free(self, closing: asyncio.Future[None]) -> None:
        self._slots.release()
        if error := closing.exception():
            log.error("cannot close a probe's sockets: %s", error)

    def _start(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(threads, work)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future
