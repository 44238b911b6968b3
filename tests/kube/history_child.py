"""Processes that histories are made of, and that are killed: `python -m tests.kube.history_child`.

It has everything imported, and forks a process for each message with a socket that comes over standard input, which is
a socket too: a node (the agent's IPAM as shipped), the controller's leader (its reclaim and its pools' status as
shipped), or who adopts upstream's records and hands them back, on a real API server. What is forked reads one JSON
line for each thing to do, does them all at once, and answers each with a line.

`{"do": "arm", "calls": n}` makes it kill itself with SIGKILL when the n-th call to the API from then on was answered,
or, with `"within": seconds`, so long after that call was begun: then it may have been done or not. `{"do": "calm"}`
ends the time in which answers that take long count as lost.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from api.meta import R
from controller.adoption.adopt import Adopter
from controller.adoption.decide import Switches
from controller.adoption.hand_back import hand_back
from controller.adoption.settings import AdoptionSettings
from controller.caches import Caches
from controller.reclaim.reclaim import Reclaim
from controller.reclaim.settings import ReclaimSettings
from controller.room import Desk
from controller.status.pools import PoolStatusRoom
from controller.status.settings import StatusSettings
from plugins.cni import Command
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.errors import CniError
from plugins.ipam.plugin import Ipam
from plugins.ipam.pods import Pods
from plugins.ipam.settings import IpamSettings
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import EVERYTHING, Event, Listing, Query, Store
from store.recorder import Recorder
from tests.integration.ipam_rig import call

Json = dict[str, Any]
T = TypeVar("T")
Answer = Callable[[Json], Awaitable[Json]]
Role = tuple[Answer, list[asyncio.Task[None]], Callable[[], bool]]
"""Does what a line asks for; tasks that must not end; whether nothing is left to do in the background at present."""

PRELOADED = ("kubernetes.client", "kubernetes.config.kube_config", "kubernetes.config.incluster_config")
"""What the store imports when it is opened: in a second, and a process that is forked would do it anew."""
ATTEMPT = 1.5
"""Seconds until an answer counts as lost, as a rule, as long as faults are about."""
CALM = KubeSettings().attempt
"""The same afterwards, as shipped: a busy machine's API server may need longer than that for each answer."""
PACKAGES = ("api", "controller", "daemon", "plugins.ipam", "store", "tests.kube")
"""Whose sources these processes run."""
IPAM = IpamSettings(add_deadline=20.0, rollback_deadline=3.0, partial_grace=2.0)
RECLAIM = ReclaimSettings(teardown=0.3, settle=0.1, interval=2.0, lost_node=1.0)
STATUS = StatusSettings(interval=0.5)


class Mortal(Store):
    """A store whose user dies at a call of its choice. Watches do not count."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.made = 0
        """Calls since it was armed."""
        self._fatal = 0
        self._within: float | None = None

    def arm(self, calls: int, within: float | None) -> None:
        self.made, self._fatal, self._within = 0, calls, within

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        return await self._counted(self._inner.get(kind, name, namespace))

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        return await self._counted(self._inner.list(kind, query))

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        return self._inner.watch(kind, query, since)

    async def create(self, resource: R) -> R:
        return await self._counted(self._inner.create(resource))

    async def update(self, resource: R) -> R:
        return await self._counted(self._inner.update(resource))

    async def update_status(self, resource: R) -> R:
        return await self._counted(self._inner.update_status(resource))

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        await self._counted(self._inner.delete(kind, name, namespace, uid=uid, resource_version=resource_version))

    async def close(self) -> None:
        await self._inner.close()

    async def _counted(self, work: Coroutine[Any, Any, T]) -> T:
        self.made += 1
        fatal = self.made == self._fatal
        if fatal and self._within is not None:
            asyncio.get_running_loop().call_later(self._within, _die)
        try:
            return await work
        finally:
            if fatal:
                _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@asynccontextmanager
async def _node(config: Json, store: Mortal) -> AsyncGenerator[Role, None]:
    """The agent's IPAM on a node."""
    prober = Prober(ProbeSettings())
    ipam = Ipam(store, config["node"], IPAM, prober, pods=Pods(store, config["node"], IPAM))
    task = asyncio.create_task(ipam.run())
    await _sooner(ipam.ready(60), task)
    running: dict[int, asyncio.Task[Json]] = {}

    async def execute(message: Json) -> Json:
        command: Command = message["do"]
        names = {
            "K8S_POD_NAMESPACE": message["namespace"],
            "K8S_POD_NAME": message["name"],
            "K8S_POD_UID": message["uid"],
        }
        cni = call(message["name"], command, container=message["container"], args=names, v4=())
        try:
            if command == "DEL":
                await ipam.delete(cni)
                return {}
            given = await ipam.attach(cni)
        except CniError as error:
            return {"error": type(error).__name__, "text": str(error)}
        return {"given": {claim.spec.address: claim.metadata.uid for claim in given.claims}}

    async def answer(message: Json) -> Json:
        if message["do"] == "abandon":
            if message["call"] in running:
                running[message["call"]].cancel()
            return {}
        work = asyncio.create_task(execute(message))
        running[message["id"]] = work
        try:
            await asyncio.wait([work])
            return {"error": "abandoned"} if work.cancelled() else work.result()
        finally:
            del running[message["id"]]

    yield answer, [task], lambda: ipam._endpoints.idle


@asynccontextmanager
async def _leader(_: Json, store: Mortal) -> AsyncGenerator[Role, None]:
    """The controller's reclaim and pool status, as the leader runs them."""
    desk = Desk(store, Caches(store), Recorder(store, "spiderpool-controller"), "kube-system")
    reclaim, pools = Reclaim(desk, RECLAIM), PoolStatusRoom(desk, STATUS)
    tasks = [asyncio.create_task(each) for each in (desk.caches.run(), desk.events.run())]
    await _sooner(desk.caches.synced(), tasks[0])
    tasks += [asyncio.create_task(each) for each in (reclaim.run(), pools.run())]

    async def answer(message: Json) -> Json:
        assert message["do"] == "scan"
        reclaim.scan()
        return {}

    yield answer, tasks, lambda: reclaim.idle and pools.idle


@asynccontextmanager
async def _adopter(_: Json, store: Mortal) -> AsyncGenerator[Role, None]:
    """Adoption and the way back: one pass of each, as the leader and the command make them."""

    async def answer(message: Json) -> Json:
        if message["do"] == "hand back":
            return {"notes": await hand_back(store)}
        assert message["do"] == "adopt"
        adopter = Adopter(store, AdoptionSettings(), Switches())
        return {"done": await adopter.adopt_all(), "troubles": adopter.troubles}

    yield answer, [], lambda: True


async def _sooner(work: Coroutine[Any, Any, None], than: asyncio.Task[None]) -> None:
    """Await `work`; if the task ends first, its error is raised."""
    waiting = asyncio.ensure_future(work)
    await asyncio.wait([waiting, than], return_when=asyncio.FIRST_COMPLETED)
    if than.done():
        than.result()
    await waiting


ROLES: Mapping[str, Any] = {"node": _node, "leader": _leader, "adopter": _adopter}


async def _serve(config: Json, channel: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=channel)

    def say(**what: Any) -> None:
        writer.write(json.dumps(what).encode() + b"\n")

    settings = KubeSettings(kubeconfig=config["kubeconfig"], attempt=config["attempt"], connect=2.0, backoff_most=1.0)
    kube = await KubeStore.open(settings)
    store = Mortal(kube)
    async with ROLES[config["role"]](config, store) as (answer, tasks, idle):
        say(ready=True)
        working: set[asyncio.Task[None]] = set()

        async def work(message: Json) -> None:
            try:
                say(id=message["id"], calls=store.made, **await answer(message))
            except Exception:
                logging.getLogger().exception("%s fails", message)
                os._exit(70)

        async def listen() -> None:
            async for line in reader:
                message = json.loads(line)
                if message["do"] == "arm":
                    store.arm(message["calls"], message.get("within"))
                    say(id=message["id"])
                elif message["do"] == "calm":
                    kube._client.settings = replace(settings, attempt=CALM)
                    say(id=message["id"])
                elif message["do"] == "count":
                    say(id=message["id"], calls=store.made, idle=idle())
                else:
                    task = asyncio.create_task(work(message))
                    working.add(task)
                    task.add_done_callback(working.discard)

        listening = asyncio.create_task(listen())
        await asyncio.wait([listening, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()


def _child(config: Json, channel: socket.socket) -> None:
    with open(config["log"], "ab", buffering=0) as log:
        os.dup2(log.fileno(), 2)
    logging.basicConfig(
        stream=open(2, "w", closefd=False),  # noqa: SIM115 - as long as the process
        level=logging.INFO,
        format=f"%(relativeCreated)d {config['role']} {config.get('node', '')} {os.getpid()} %(levelname)s %(message)s",
    )
    try:
        asyncio.run(_serve(config, channel))
    except BaseException:
        logging.getLogger().exception("it ends by itself")
        os._exit(70)
    os._exit(0)


def _sources() -> list[str]:
    """The folders that the code comes from: one, unless something is wrong."""
    found = set()
    for name in PACKAGES:
        (path,) = importlib.import_module(name).__path__
        found.add(os.path.realpath(path).removesuffix("/" + name.replace(".", "/")))
    return sorted(found)


def main(control: socket.socket) -> None:
    """Tell where the code is from, and fork a process for each message until the socket is closed; answer with its pid.

    The code is that of the current folder: a copy that somebody broke, perhaps, and certainly not a mixture.
    """
    control.send(json.dumps(_sources()).encode())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _child(json.loads(data), socket.socket(fileno=fds[0]))
        os.close(fds[0])
        control.send(str(pid).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=sys.stdin.fileno()))
