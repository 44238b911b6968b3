"""The agent's Unix socket: root only, bounded, one task for each connection."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from contextlib import suppress

from agent import metrics
from agent.host import Host
from agent.settings import ServerSettings
from agent.unixsocket import BACKLOG, UnixSocket
from agent.wire import FrameError, Status, close_all, encode_reply, hung_up, peer_uid, receive_request, send_reply

_ACCEPTS_PER_TURN = 64
"""Connections taken before the event loop may do something else."""
_ACCEPT_PAUSE = 0.2
"""Seconds without accepting after the process ran out of descriptors or memory."""
_SEND_DEADLINE = 5.0
"""Seconds that a peer may take to read its reply."""
_ROLLBACK_DEADLINE = 5.0
"""Seconds for calls that were cancelled at the stop to roll back."""
_STOPPING = "it is stopping"
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger(__name__)


class Server:
    """Accepts calls on `settings.socket` and lets a host execute them.

    At most `settings.concurrency` calls execute and `settings.waiting` more wait; further ones are told at once that
    the agent is busy. An unbounded room would only move the wait to where nobody sees it, and a runtime that gave up
    would find its calls executed later.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._socket = UnixSocket(settings.socket)
        self._settings = settings
        self._capacity = settings.concurrency + settings.waiting
        self._tasks: set[asyncio.Task[None]] = set()
        self._host: Host | None = None
        self._listener: socket.socket | None = None

    def claim(self) -> None:
        """Make sure that no other agent serves the path, and keep others from it as long as this process lives.

        Raises AddressInUseError, OSError.
        """
        self._socket.claim()

    def listen(self, host: Host) -> None:
        """Accept calls from now on. `claim` comes first. Raises OSError."""
        self._listener = self._socket.listen()
        self._host = host
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def stop(self, patience: float) -> None:
        """Take no more calls, give the executing ones `patience` seconds, then have them rolled back.

        Calls that have not begun are answered STOPPING, those in the listen queue too: nothing of them was executed,
        so a shim may go to our successor with them.
        """
        if self._listener is None or self._host is None:
            return
        self._socket.unlink()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._turn_away(self._listener)
        self._listener.close()
        self._listener = None
        await asyncio.sleep(0)  # a task that has not begun would be cancelled before it can answer
        for task in self._tasks - self._host.executing:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_ROLLBACK_DEADLINE)
            if late:
                _log.error("%d calls did not end in time and are abandoned", len(late))
        self._socket.release()

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101 (the reader is removed when it is closed)
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                _log.error("cannot accept: %s", error)
                self._pause()
                return
            connection.setblocking(False)
            if peer_uid(connection) != 0:
                metrics.REFUSED.labels("peer").inc()
                _log.warning("refused a connection of user %d", peer_uid(connection))
                connection.close()
            elif len(self._tasks) >= self._capacity:
                metrics.REFUSED.labels("busy").inc()
                text = f"it is busy: {len(self._tasks)} calls execute or wait, the limit is {self._capacity}"
                _refuse(connection, Status.BUSY, text)
            else:
                task = asyncio.get_running_loop().create_task(self._serve(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _pause(self) -> None:
        """Leave new connections in the kernel's queue for a moment: closing calls frees what is missing."""
        loop = asyncio.get_running_loop()
        assert self._listener is not None  # noqa: S101 (called from _accept)
        loop.remove_reader(self._listener)

        def resume() -> None:
            if self._listener is not None:
                loop.add_reader(self._listener, self._accept)

        loop.call_later(_ACCEPT_PAUSE, resume)

    def _turn_away(self, listener: socket.socket) -> None:
        """Answer what is in the listen queue; nothing is added to it any more, the path is gone."""
        with suppress(OSError):  # empty; or without descriptors, when closing it must do
            for _ in range(BACKLOG + 1):
                connection, _ = listener.accept()
                connection.setblocking(False)
                _refuse(connection, Status.STOPPING, _STOPPING)

    async def _serve(self, connection: socket.socket) -> None:
        """One connection: one request, one reply."""
        assert self._host is not None  # noqa: S101 (set by listen)
        fds: list[int] = []
        try:
            try:
                async with asyncio.timeout(self._settings.read_deadline):
                    request = await receive_request(connection, fds)
                reply = await self._host.call(request, fds[0] if fds else None, lambda: hung_up(connection))
                answer = encode_reply(reply.status, reply.body)
            except asyncio.CancelledError:  # by `stop`, and by nobody else
                answer = encode_reply(Status.STOPPING, _STOPPING.encode())
            async with asyncio.timeout(_SEND_DEADLINE):
                await send_reply(connection, answer)
        except FrameError as error:
            metrics.REFUSED.labels("malformed").inc()
            _log.warning("refused a malformed request: %s", error)
        except TimeoutError:
            metrics.REFUSED.labels("slow").inc()
            _log.warning("gave up on a peer that neither sends nor reads")
        except (EOFError, OSError) as error:
            metrics.REFUSED.labels("gone").inc()
            _log.warning("the caller went away: %s", error)
        finally:
            close_all(fds)
            connection.close()


def _refuse(connection: socket.socket, status: Status, text: str) -> None:
    """Answer a call that is not taken, and hang up."""
    with connection:
        try:
            connection.send(encode_reply(status, text.encode()), socket.MSG_NOSIGNAL)  # fits an empty buffer
        except OSError:
            return
