"""A node in a process of its own: `python -m tests.integration.ipam_child STORE NODE [split]`.

Says `ready`, reads `ADD pod` and `DEL pod` lines from standard input until that is closed, executes them all at once
and writes one JSON line for each that is done. With `split` the two claims of a set come in different commits, which is
rare otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from typing import Any

from plugins.errors import CniError
from tests.integration.ipam_rig import addresses, call, opened, running

DUAL: Any = {"v4": ("v4",), "v6": ("v6",)}


def say(**what: object) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


async def main(path: str, node: str, split: bool) -> None:
    loop = asyncio.get_running_loop()
    async with opened(path) as store, running(store, node=node) as ipam:
        slots = asyncio.Semaphore(16)

        async def later(claim: Any) -> None:
            if claim.spec.ip_version == 6:
                await asyncio.sleep(random.uniform(0, 0.01))

        if split:
            store.before["create"] = later

        async def execute(command: str, pod: str) -> None:
            async with slots:
                try:
                    if command == "ADD":
                        say(pod=pod, got=addresses(await ipam.add(call(pod, **DUAL))))
                    else:
                        await ipam.delete(call(pod, "DEL"))
                        say(pod=pod, got=None)
                except CniError as error:
                    say(pod=pod, error=str(error), kind=type(error).__name__)

        say(ready=True)
        lines = await loop.run_in_executor(None, sys.stdin.readlines)
        await asyncio.gather(*(execute(*line.split()) for line in lines))
        say(done=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], "split" in sys.argv))
