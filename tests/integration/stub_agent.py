"""The real agent with plugins that only record what they are asked: `python -m tests.integration.stub_agent FLAGS`.

The member `stub` of a call's configuration tells what happens: `sleep` seconds, then `error` ("again", "refused",
"bug") or success. Each execution appends a line to $STUB_RECORD when it begins, and one when it ended.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from agent import daemon
from agent.settings import SOURCES, Settings
from agent.unixsocket import AddressInUseError
from daemon.logs import configure
from plugins.cni import Call
from plugins.errors import CniError, InvalidConfigError, IOFailureError, TryAgainLaterError

_ERRORS: dict[str, CniError | Exception] = {
    "again": TryAgainLaterError("stub", "not now"),
    "refused": InvalidConfigError("stub", "never"),
    "io": IOFailureError("stub", "the kernel says no"),
    "bug": KeyError("stub"),
}


class Stub:
    """Records each call."""

    def __init__(self) -> None:
        self._record = os.open(os.environ["STUB_RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _write(self, when: str, call: Call) -> None:
        inode = 0 if call.netns_fd is None else os.fstat(call.netns_fd).st_ino
        line = f"{when} {call.plugin} {call.command} {call.container_id} {call.ifname} {inode}\n"
        os.write(self._record, line.encode())

    async def _execute(self, call: Call) -> None:
        orders = call.config.get("stub", {})
        self._write("begin", call)
        try:
            await asyncio.sleep(orders.get("sleep", 0))
        except asyncio.CancelledError:
            self._write("rolled-back", call)
            raise
        if error := orders.get("error"):
            self._write(f"failed-{error}", call)
            raise _ERRORS[error]
        self._write("end", call)

    async def add(self, call: Call) -> Mapping[str, Any]:
        """Record; the result is empty."""
        await self._execute(call)
        return {"cniVersion": call.cni_version, "ips": [], "dns": {}}

    async def delete(self, call: Call) -> None:
        """Record."""
        await self._execute(call)

    async def check(self, call: Call) -> None:
        """Record."""
        await self._execute(call)

    async def status(self, call: Call) -> None:
        """Record."""
        await self._execute(call)

    async def gc(self, call: Call) -> None:
        """Record."""
        await self._execute(call)


async def furnish(_settings: Settings, _stack: AsyncExitStack) -> daemon.Rooms:
    """One stub under two names; STUB_DIE is the number of seconds until a background task ends."""
    stub = Stub()

    async def background() -> None:
        await asyncio.sleep(float(os.environ.get("STUB_DIE", "3600")))

    async def ready(_deadline: float) -> None:
        await asyncio.sleep(float(os.environ.get("STUB_START", "0")))

    return daemon.Rooms(plugins={"spiderpool": stub, "coordinator": stub}, background={"stub": background}, ready=ready)


def main() -> int:
    """As agent.__main__, with the stub."""
    settings, _ = SOURCES.load(sys.argv[1:], os.environ)
    configure(settings.log.level)
    try:
        return asyncio.run(daemon.run(settings, furnish))
    except AddressInUseError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
