"""Plays a program on a stage: what kubelets, runtimes and administrators do, and what goes wrong meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from math import inf
from typing import Any

from tests.kube.fault_proxy import Fault
from tests.kube.history import Call, Pod
from tests.kube.history_child import IPAM, RECLAIM
from tests.kube.history_processes import DiedError, Json
from tests.kube.history_program import (
    NODES,
    SLOTS,
    STATEFUL,
    Abandon,
    Add,
    Blind,
    Break,
    ChaosStep,
    Cut,
    Del,
    Kill,
    KillLeader,
    LateDel,
    Lose,
    Mute,
    Pause,
    PodStep,
    Program,
    Remove,
    RestartServer,
    Sandbox,
    Scale,
    Scan,
    Slow,
    Up,
)
from tests.kube.history_stage import DATABASE, PATIENCE, NodeSite, Stage, now

GC_LIMIT = RECLAIM.interval + RECLAIM.teardown + RECLAIM.settle + IPAM.partial_grace
"""Seconds within which what nobody holds any more must be free."""
SLACK = 25.0
"""For a last call that runs into its deadline."""
BRISK = 1.0
"""What it takes the system to answer all that is asked in one look at it, at most. The machine may be busy and the API
server not answer for seconds: such time does not count."""
DURING = 0.002
"""Seconds between the beginning of a call and the end of its process: about as long as the server needs."""

Moment = Callable[[], Coroutine[Any, Any, None]]
"""Returns when it has come."""


class Slot:
    """A name of pods, and the kubelets that look after them one after the other."""

    def __init__(self, stage: Stage, index: int) -> None:
        self._stage = stage
        ordinal = index - (SLOTS - STATEFUL)
        self.static = ordinal >= 0
        self.ordinal = ordinal
        self.name = f"{DATABASE}-{ordinal}" if self.static else f"web-{index}"
        self.next_node = index % NODES
        self.pod: Pod | None = None
        self.given: Json = {}
        """What the last ADD for the pod gave."""
        self._boxes: list[tuple[Pod, str]] = []
        """All sandboxes, with their pods; the last is the one that is there."""
        self.background: list[asyncio.Task[None]] = []

    @property
    def wanted(self) -> bool:
        return not self.static or self.ordinal < self._stage.replicas

    def node(self, pod: Pod) -> NodeSite:
        return next(node for node in self._stage.nodes if node.name == pod.node)

    async def play(self, steps: tuple[PodStep, ...]) -> None:
        for step in steps:
            pod = await self.living()
            if pod is None:
                await asyncio.sleep(0.1)
            elif self.node(pod).lost:
                await asyncio.sleep(0.2)
            else:
                await self._step(pod, step)

    async def _step(self, pod: Pod, step: PodStep) -> None:
        match step:
            case Add(times):
                await asyncio.gather(*(self.add(pod) for _ in range(times)))
            case Sandbox(old):
                before = self.container
                if old == "first":
                    await self.cni("DEL", pod, before)
                elif old == "late":
                    self._later(self.cni("DEL", pod, before))
                self.new_box(pod)
                await self.add(pod)
            case Abandon(after):
                await self.add(pod, abandon=lambda: asyncio.sleep(after / 1000))
            case Del():
                await self.cni("DEL", pod, self.container)
            case LateDel():
                for whose, container in self._boxes[-5:-1]:
                    self._later(self.cni("DEL", whose, container))
            case Remove():
                await self.remove(pod, step)
            case Up():
                await self.up(pod)
            case Pause(milliseconds):
                await asyncio.sleep(milliseconds / 1000)

    # Pods

    async def living(self) -> Pod | None:
        """The pod of the name that is there, made if there is none; None if none is wanted."""
        if self.pod is not None and self.pod.deleted == inf:
            return self.pod
        while self.wanted:
            if self.pod is not None and not await self._gone(self.pod):
                await self._stage.delete(self.pod, 0)
            began = now()
            uid = await (self._bound() if self.static else self._made())
            if uid:
                self.pod = Pod(uid, self.name, self._stage.nodes[self.next_node].name, self.static, began)
                self._stage.history.pods[uid] = self.pod
                given_up = [when for name, when in self._stage.history.scaled if name == self.name and when >= began]
                if given_up or not self.wanted:
                    self.pod.delete(began)
                self.given = {}
                self.new_box(self.pod)
                return self.pod
            await asyncio.sleep(0.03)
        return None

    async def there(self) -> Pod:
        """The same, where one is wanted."""
        pod = await self.living()
        assert pod is not None
        return pod

    async def _gone(self, pod: Pod) -> bool:
        status, answer = await self._stage.ask("GET", self._stage.path("pods", self.name), fine=(404,))
        return status == 404 or answer["metadata"]["uid"] != pod.uid

    async def _made(self) -> str:
        meta = {"name": self.name, "annotations": self._stage.annotations}
        spec = {
            "nodeName": self._stage.nodes[self.next_node].name,
            "containers": [{"name": "c", "image": "none"}],
            "terminationGracePeriodSeconds": 0,
        }
        status, answer = await self._stage.ask(
            "POST", self._stage.path("pods"), {"metadata": meta, "spec": spec}, fine=(409,)
        )
        if status == 409:  # it was made, and the answer was lost; or somebody is still there
            status, answer = await self._stage.ask("GET", self._stage.path("pods", self.name), fine=(404,))
        return self._new(status, answer)

    async def _bound(self) -> str:
        """The StatefulSet's pod, once it is there, bound to the node."""
        status, answer = await self._stage.ask("GET", self._stage.path("pods", self.name), fine=(404,))
        uid = self._new(status, answer)
        if uid:
            target = {"apiVersion": "v1", "kind": "Node", "name": self._stage.nodes[self.next_node].name}
            body = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": self.name, "uid": uid},
                "target": target,
            }
            path = self._stage.path("pods", f"{self.name}/binding")
            status, _ = await self._stage.ask("POST", path, body, fine=(404, 409))
            if status == 404:
                return ""
        return uid

    def _new(self, status: int, answer: Json) -> str:
        if status == 404 or "deletionTimestamp" in answer["metadata"]:
            return ""
        uid = str(answer["metadata"]["uid"])
        return "" if uid in self._stage.history.pods else uid

    @property
    def container(self) -> str:
        return self._boxes[-1][1]

    def new_box(self, pod: Pod) -> None:
        """The pod's next sandbox."""
        self._boxes.append((pod, f"{self.name}-{self._stage.key}-{len(self._boxes)}"))

    async def remove(self, pod: Pod, step: Remove) -> None:
        container = self.container
        if step.force:
            await self._stage.delete(pod, 0)
            if step.cni != "never":
                self._later(self.cni("DEL", pod, container))
        else:
            await self._stage.delete(pod, 1)
            if step.cni == "in time":
                await self.cni("DEL", pod, container)
            elif step.cni == "over time":
                await asyncio.sleep(1.6)
                await self.cni("DEL", pod, container)
            elif step.cni == "late":
                self._later(self.cni("DEL", pod, container))
            await self._stage.delete(pod, 0)
        self.next_node = step.node

    async def up(self, pod: Pod) -> None:
        """As a kubelet says it."""
        if self.given:
            ips = [{"ip": address} for address in sorted(self.given, key=lambda each: ":" in each)]
            body = {"metadata": {"uid": pod.uid}, "status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips}}
            await self._stage.ask("PATCH", self._stage.path("pods", f"{self.name}/status"), body, fine=(404, 409, 422))

    # Calls

    async def add(self, pod: Pod, *, abandon: Moment | None = None) -> Call:
        call = await self.cni("ADD", pod, self.container, abandon=abandon)
        if call.given and self.pod is pod:
            self.given = dict(call.given)
        return call

    async def cni(self, command: Any, pod: Pod, container: str, *, abandon: Moment | None = None) -> Call:
        """One CNI call on the pod's node, whose agent is started if it is dead; its caller goes away at a moment."""
        node = self.node(pod)
        while node.lost:  # noqa: ASYNC110 - rare
            await asyncio.sleep(0.05)
        with suppress(DiedError):
            await node.agent.ensure()
        call = Call(command, pod.uid, container, node.name, now())
        self._stage.history.calls.append(call)
        names = {"namespace": self._stage.namespace, "name": pod.name, "uid": pod.uid, "container": container}
        try:
            async with asyncio.timeout(45):
                number, answer = node.agent.send(command, **names)
                if abandon is not None:
                    moment = asyncio.create_task(abandon())
                    either: list[asyncio.Future[Any]] = [answer, moment]
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    moment.cancel()
                    if not answer.done():
                        with suppress(DiedError):
                            await node.agent.ask("abandon", call=number)
                result = await answer
        except DiedError:
            return call
        call.answered = now()
        call.error, call.given = result.get("error", ""), result.get("given", {})
        return call

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        async def later() -> None:
            await asyncio.sleep(0.1)
            await work

        self.background.append(asyncio.create_task(later()))


def _status(code: int, reason: str) -> bytes:
    status = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": reason,
    }
    return json.dumps(status).encode()


def fault(kind: str, method: str, times: int) -> Fault:
    """What the proxy does to the next requests."""
    if kind == "409":
        reason = "AlreadyExists" if method == "POST" else "Conflict"
        return Fault(method, times=times, status=409 if method != "GET" else 500, body=_status(409, reason))
    if kind == "429":
        return Fault(
            method, times=times, status=429, headers={"Retry-After": "1"}, body=_status(429, "TooManyRequests")
        )
    if kind == "500":
        return Fault(method, times=times, status=500, body=_status(500, "InternalError"))
    if kind == "lost":
        return Fault(method, times=times, forward=True)
    if kind == "silent":
        return Fault(method, times=times, forward=True, silence=True)
    return Fault(method, times=times)


class Play:
    """A program on a stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.slots = [Slot(stage, index) for index in range(SLOTS)]
        self.converged_after = 0.0
        self.failures: list[str] = []
        self._chaos: list[asyncio.Task[None]] = []

    async def run(self, program: Program) -> None:
        """The whole of it; `settle` is to follow."""
        async with asyncio.TaskGroup() as group:
            for slot, steps in zip(self.slots, program.pods, strict=True):
                group.create_task(slot.play(steps))
            for step in program.chaos:
                await self._step(step)

    async def _step(self, step: ChaosStep) -> None:
        stage = self.stage
        if not isinstance(step, Pause):
            stage.note(str(step))
        match step:
            case Kill(node, calls, during):
                await stage.nodes[node].agent.arm(calls, DURING if during else None)
            case KillLeader(calls, during):
                await self._leader()
                await stage.leader.arm(calls, DURING if during else None)
            case Lose(node, back):
                self._chaos.append(asyncio.create_task(stage.lose(stage.nodes[node], back)))
            case Scan():
                await self._leader()
                with suppress(DiedError):
                    await stage.leader.answer("scan")
            case Break(whom, kind, method, times):
                stage.proxies[whom].faults.append(fault(kind, method, times))
            case Cut(whom, gone):
                if gone:
                    refusal = Fault("WATCH", times=4, status=410, body=_status(410, "Expired"))
                    stage.proxies[whom].faults.append(refusal)
                stage.proxies[whom].cut()
            case Mute(whom, milliseconds):
                self._chaos.append(asyncio.create_task(self._mute(whom, milliseconds)))
            case Blind(whom, times):
                stage.proxies[whom].faults.append(Fault("WATCH", "/pods", times=times, silence=True))
                stage.proxies[whom].cut()
            case Slow(whom, method, milliseconds):
                stage.proxies[whom].latency[method] = milliseconds / 1000
            case Scale(replicas):
                await stage.scale(replicas)
            case RestartServer():
                await stage.restart_server()
            case Pause(milliseconds):
                await asyncio.sleep(milliseconds / 1000)
        await asyncio.sleep(0.02)

    async def _mute(self, whom: str, milliseconds: int) -> None:
        proxy = self.stage.proxies[whom]
        proxy.mute = True
        await asyncio.sleep(milliseconds / 1000)
        proxy.mute = False
        proxy.cut()

    async def _leader(self) -> None:
        with suppress(DiedError):
            await self.stage.leader.ensure()

    # The end

    async def settle(self) -> None:
        """Faults end, and kubelets do what they do in the end; then the claims must become what they should be."""
        for slot in self.slots:
            for task in slot.background:
                await task
        for task in self._chaos:
            await task
        stage = self.stage
        for proxy in stage.proxies.values():
            proxy.faults.clear()
            proxy.latency.clear()
            proxy.let_go()
            proxy.mute = False
            proxy.cut()
        for process in (stage.leader, *(node.agent for node in stage.nodes)):
            await process.arm(0)
            await process.calm()
            await process.ensure()
        stage.note("the faults are over")
        for slot in self.slots:
            if slot.pod is not None and slot.pod.deleted < inf and not slot.wanted:
                await stage.delete(slot.pod, 0)
        began = looked = now()
        slow = 0.0
        while not stage.history.violations() and (problem := await self._unsettled()):
            slow += max(0.0, now() - looked - BRISK)
            looked = now()
            if looked - began > GC_LIMIT + SLACK + min(slow, PATIENCE):
                self.failures.append(f"{looked - began:.1f} s after the last fault: {problem}")
                break
            await asyncio.sleep(0.1)
        self.converged_after = now() - began
        await self.log_is_complete()
        processes = (stage.leader, *(node.agent for node in stage.nodes))
        self.failures += [failure for process in processes for failure in process.failures]
        self.failures += stage.history.violations()

    async def _unsettled(self) -> str:
        """What is not yet as it should be: each pod served or the pool full, and claims of the served ones alone."""
        results = await asyncio.gather(*(self._served(slot) for slot in self.slots))
        served = [slot for slot, there in zip(self.slots, results, strict=True) if there]
        wanting = [slot for slot in self.slots if slot.wanted]
        expected = {address: slot.pod.uid for slot in served if slot.pod for address in slot.given}
        claims = await self.stage.claims()
        if claims != expected:
            return f"claims are {claims}, and should be {expected}"
        if len(served) < min(len(wanting), self.stage.size):
            return f"only {len(served)} of {len(wanting)} pods have addresses"
        return ""

    async def _served(self, slot: Slot) -> bool:
        """Do what a kubelet does for a pod that is not up; whether it has addresses."""
        pod = await slot.living()
        if pod is None:
            return False
        if not slot.given:
            call = await slot.add(pod)
            if call.answered is None or call.error not in ("", "ExhaustedError"):
                self.stage.note(f"{slot.name} is not served after the faults: {call.error or 'its agent died'}")
            await slot.up(pod)
        return bool(slot.given)

    async def log_is_complete(self) -> None:
        """Return when the log has come as far as the API server."""
        claims = await self.stage.claims()
        async with asyncio.timeout(20):
            while _latest(self.stage) != claims:  # noqa: ASYNC110 - the watch is somebody else's
                await asyncio.sleep(0.02)


def _latest(stage: Stage) -> Json:
    state: Json = {}
    for change in stage.history.changes:
        state[change.address] = change.pod
    return {address: pod for address, pod in state.items() if pod}
