"""A Unix socket that one process at a time serves, taken over without a moment in which the path is missing."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from contextlib import suppress

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""


class AddressInUseError(Exception):
    """Another agent, or something that is not ours, has the socket's path."""


class UnixSocket:
    """The path, the lock beside it, and the listening socket; for root alone."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock_fd = -1
        self._inode = 0

    def claim(self) -> None:
        """Make sure that nobody serves the path, and keep other agents from it until `release`.

        The lock decides between agents that start at the same moment; the connection attempt finds whoever knows
        nothing of the lock. Raises AddressInUseError, OSError.
        """
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        self._lock_fd = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _refuse_if_answered(self.path)
        except BlockingIOError:
            self.release()
            raise AddressInUseError(f"another agent serves {self.path} (it holds {self.path}.lock)") from None
        except BaseException:
            self.release()
            raise

    def listen(self) -> socket.socket:
        """A listening socket at the path, non-blocking. `claim` comes first.

        It is renamed into place: callers that wait for a restarting agent find the dead one's or this one. Raises
        OSError.
        """
        fresh = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind: created with it, whatever the umask (unix(7))
            listener.bind(fresh)
            listener.listen(BACKLOG)
            self._inode = os.stat(fresh).st_ino
            os.rename(fresh, self.path)
        except BaseException:
            listener.close()
            raise
        return listener

    def unlink(self) -> None:
        """Remove the path, unless it is somebody else's by now."""
        with suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def release(self) -> None:
        """Let others claim the path."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _refuse_if_answered(path: str) -> None:
    """Raise AddressInUseError unless `path` is free or a socket that nobody listens on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressInUseError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:  # its listen queue is full: somebody is there
            pass
    raise AddressInUseError(f"another process answers on {path}")
