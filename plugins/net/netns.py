"""Working in another network namespace.

A thread that has entered a namespace never comes back: it is made for one piece of work and dies with it (about
0.1 ms). Sockets that it opens keep the namespace they were born in, and are used from the event loop afterwards.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from plugins.errors import InvalidEnvironmentError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703
"""_IO(0xb7, 3), include/uapi/linux/nsfs.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def in_netns(fd: int, work: Callable[[], T]) -> T:
    """The result of `work`, run in the network namespace that `fd` refers to; blocks until it is there.

    Raises what `work` raises; OSError if the namespace cannot be entered.
    """
    outcome: Future[T] = Future()

    def enter() -> None:
        try:
            if _libc.setns(fd, CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in the calling thread
            outcome.set_exception(error)

    thread = Thread(target=enter, name="netns")
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
