"""Tell the service manager what goes on (sd_notify(3)), if there is one that asked."""

from __future__ import annotations

import asyncio
import logging
import os
import socket

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send `state` ("READY=1", "STOPPING=1") to $NOTIFY_SOCKET; without one, do nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as channel:
            channel.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("cannot notify the service manager: %s", error)


def watchdog_interval() -> float | None:
    """Seconds between signs of life that the service manager wants; None: it wants none.

    Half of its patience, as sd_watchdog_enabled(3) recommends.
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        patience = int(os.environ.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return patience / 2e6 if patience > 0 else None


async def watchdog(interval: float) -> None:
    """Give a sign of life each `interval` seconds, as long as the event loop turns. Runs until it is cancelled."""
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
