"""Working in another network namespace.

A thread that has entered a namespace never comes back: it is made for one piece of work and dies with it (about
0.1 ms). Sockets that it opens keep the namespace they were born in, and are used from the event loop afterwards.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import TypeVar

from plugins.errors import InvalidEnvironmentError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703
"""_IO(0xb7, 3), include/uapi/linux/nsfs.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def enter(fd: int) -> None:
    """Move the calling thread, which must be one that dies with its work, into the network namespace `fd`.

    Raises OSError.
    """
    if _libc.setns(fd, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def in_netns(fd: int, work: Callable[[], T]) -> T:
    """The result of `work`, run in the network namespace that `fd` refers to; blocks until it is there.

    Raises what `work` raises; OSError if the namespace cannot be entered.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            enter(fd)
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in the calling thread
            outcome.set_exception(error)

    thread = Thread(target=run, name="netns")
    thread.start()
    thread.join()
    return outcome.result()


def require_netns(fd: int) -> int:
    """The inode of the network namespace that `fd` refers to. Raises InvalidEnvironmentError if it is none."""
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError as error:
        raise InvalidEnvironmentError("not a network namespace", f"fd {fd}: {error.strerror}") from None
    if kind != CLONE_NEWNET:
        raise InvalidEnvironmentError("not a network namespace", f"fd {fd} is a namespace of another kind")
    return os.fstat(fd).st_ino


async def run_in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread of its own that dies with it, so that `work` may `enter` a namespace.

    Cancelling the caller does not stop the thread. Who must know how the work ended shields this call and waits for
    it.
    """
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[T] = loop.create_future()

    def settle(result: list[T], error: BaseException | None) -> None:
        if finished.cancelled():
            return
        if error is None:
            finished.set_result(result[0])
        else:
            finished.set_exception(error)

    def run() -> None:
        result: list[T] = []
        failure: BaseException | None = None
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in the waiting task
            failure = error
        with suppress(RuntimeError):  # the loop is closed and nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    Thread(target=run, name="netns", daemon=True).start()
    return await finished
