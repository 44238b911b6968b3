"""kopf, which runs the operator: it starts it, serves its webhooks and ends it.

What kopf is not asked to do: watch objects (the store's informers notice what was deleted while we were away), lead
(its peering freezes operators of equal priority), write webhook configurations, or handle admission (see
`controller.admission.review`). It may look at the API server once, for its discovery, and that for as long as it takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

import aiohttp
import kopf

from controller.admission.server import WebhookServer
from store.kube_access import Access, Credentials

_log = logging.getLogger(__name__)


class _Endless:
    """Pauses between attempts, without end: an API server that is away for long is no reason to die."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1.0, 2.0)
        while True:
            yield 5.0


class _Everybody(Collection[asyncio.Task[Any]]):
    """All tasks. kopf cancels at its end whatever it does not know; ours end by themselves, and before it."""

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(asyncio.all_tasks())

    def __len__(self) -> int:
        return len(asyncio.all_tasks())


async def operate(
    server: WebhookServer,
    credentials: Credentials,
    *,
    startup: Callable[[], Awaitable[None]],
    spawned: Callable[[], None],
    stop: asyncio.Event,
) -> None:
    """Run the operator until `stop`. `server` is opened when `startup` has returned.

    `spawned` is called when kopf has taken the signals SIGTERM and SIGINT, for whoever wants them back.
    """
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry, id="startup")
    async def _startup(**_: Any) -> None:
        await startup()

    @kopf.on.login(registry=registry, id="login")
    async def _login(**_: Any) -> kopf.AiohttpSession:
        access = await credentials.access()
        return kopf.AiohttpSession(server=access.server, aiohttp_session=_session(access))

    settings = kopf.OperatorSettings()
    settings.admission.server = server
    settings.admission.managed = None
    settings.networking.error_backoffs = _Endless()
    settings.networking.request_timeout = 10.0
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = None
    tasks = await kopf.spawn_tasks(
        registry=registry, settings=settings, clusterwide=True, standalone=True, stop_flag=stop
    )
    spawned()
    await kopf.run_tasks(tasks, ignored=_Everybody())


def _session(access: Access) -> aiohttp.ClientSession:
    headers = {"Authorization": access.authorization} if access.authorization else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=access.tls), headers=headers, proxy=access.proxy, trust_env=False
    )
