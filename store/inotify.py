"""The least of inotify(7) that asyncio needs: a callback when something happens in one directory."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

IN_ATTRIB = 0x0004
IN_MOVED_TO = 0x0080
IN_Q_OVERFLOW = 0x4000
_IN_ONLYDIR = 0x01000000

_HEADER = struct.Struct("=iIII")
"""wd, mask, cookie, length of the name that follows (linux/inotify.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Calls `ring(name)` in the running loop for each event of `mask` on a file of `directory`.

    An empty name means that the kernel dropped events: look at everything. Several events may have been merged into
    one. Raises OSError (EMFILE: fs.inotify.max_user_instances).
    """

    def __init__(self, directory: str, mask: int, ring: Callable[[str], None]) -> None:
        self._ring = ring
        self._fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise _os_error("inotify_init1")
        if _libc.inotify_add_watch(self._fd, os.fsencode(directory), mask | _IN_ONLYDIR) < 0:
            error = _os_error(directory)
            os.close(self._fd)
            raise error
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        """Stop; may be called twice."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        for name in event_names(data):
            self._ring(name)


def event_names(data: bytes) -> list[str]:
    """The distinct file names of the events in `data`, in order; empty for an overflow."""
    names: dict[str, None] = {}
    offset = 0
    while offset < len(data):
        _, mask, _, length = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        name = "" if mask & IN_Q_OVERFLOW else os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
        names[name] = None
        offset += length
    return list(names)


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
