"""Takes addresses back whose holders are gone: at once where an event tells, and by a scan of all claims now and then.

Both ways lead to the same place. Events and scans only say whom to look at; looking at a holder reads its pod, its
workload and its node from the API server, lets `api.reclaim` decide, and deletes the claims in exactly the version that
was decided on. Holders of a namespace are looked at together, so that a thousand pods that went with their namespace
cost one list and not a thousand reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from api.apps import StatefulSet, VirtualMachineInstance, controller_of
from api.claim import Claim
from api.core import Node, Pod
from api.meta import Resource
from api.mirror import uid_on_node
from api.pool import ANNOTATION_SCAN, Pool
from api.reclaim import Action, Verdict, is_known_to_node, is_static, judge
from controller.reclaim.absences import Absences
from controller.reclaim.endpoints import Endpoints
from controller.reclaim.index import Index, holder_of
from controller.reclaim.releases import Doomed, Releaser
from controller.reclaim.settings import ReclaimSettings
from controller.reclaim.suspects import Suspects
from controller.reclaim.witnesses import Fresh, Remembered, Watched
from controller.room import Desk
from controller.work import WorkQueue
from store.errors import ConflictError, StoreError
from store.provider import ProviderClient, ProviderSettings

_log = logging.getLogger(__name__)

_BATCH = 5000
"""Holders of a namespace that are looked at together at most: what a batch reads is held until it is through."""
_SLICE = 500
"""Claims that a scan looks at before others get a turn."""

NO_PROVIDER = ProviderSettings()
"""No infrastructure provider is to be told."""


class Reclaim:
    """The room; `run` is the leader's."""

    def __init__(self, desk: Desk, settings: ReclaimSettings, provider: ProviderSettings = NO_PROVIDER) -> None:
        self._store = desk.store
        self._settings = settings
        self._switches = settings.switches()
        self._watched = Watched(desk.caches)
        self._pools = desk.caches.of(Pool)
        self._releaser = Releaser(desk, settings)
        self._provider = provider
        self._endpoints = Endpoints(desk, settings)
        self._wanted = asyncio.Event()
        self._forget()

    def _forget(self) -> None:
        """Begin anew: nothing is remembered from an earlier run."""
        self._index = Index()
        self._absences = Absences(self._switches)
        self._remembered = Remembered(self._index, self._watched, self._absences)
        self._suspects = Suspects()
        self._missing: dict[str, datetime] = {}
        """Nodes that are not there although claims of containers that they alone know of name them, and since when."""
        self._replayed = False
        """Whether the listeners have been told of all that is there, which the first scan looks at together."""
        self._scanned = False
        self._queue: WorkQueue[str] = WorkQueue("reclaim", self._examine, workers=4)

    def scan(self) -> None:
        """Have all claims looked at now."""
        self._wanted.set()

    @property
    def idle(self) -> bool:
        """Whether a scan has been made, and nobody is being looked at or due."""
        return self._scanned and not self._wanted.is_set() and self._queue.idle

    async def run(self) -> None:
        """Reclaim until cancelled."""
        await self._watched.synced()
        self._forget()
        async with AsyncExitStack() as stack:
            if self._provider.server_url:
                self._releaser.provider = ProviderClient(self._provider)
                stack.push_async_callback(self._releaser.provider.close)
            # Pods come first: claims are judged by them.
            stack.callback(self._watched.pods.listen(self._pod_changed))
            stack.callback(self._watched.claims.listen(self._claim_changed))
            stack.callback(self._watched.nodes.listen(self._node_changed))
            stack.callback(self._watched.sets.listen(self._set_changed))
            stack.callback(self._watched.instances.listen(self._machine_changed))
            stack.callback(self._watched.machines.listen(self._machine_changed))
            stack.callback(self._pools.listen(self._pool_changed))
            self._replayed = True  # and not after the scan: what happens meanwhile it would miss
            async with asyncio.TaskGroup() as group:
                group.create_task(self._queue.run())
                group.create_task(self._endpoints.run(self._index))
                group.create_task(self._scan_for_ever())

    # Whom to look at

    async def _scan_for_ever(self) -> None:
        while True:
            self._wanted.clear()
            claims = list(self._watched.claims.values())
            for start in range(0, len(claims), _SLICE):
                for claim in claims[start : start + _SLICE]:
                    self._consider(claim)
                await asyncio.sleep(0)
            self._endpoints.scan()
            self._absences.forget_old(datetime.now(UTC), lambda uid: bool(self._index.claims(uid)))
            self._scanned = True
            try:
                async with asyncio.timeout(self._settings.interval):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    def _consider(self, claim: Claim, after: float = 0.0) -> None:
        """Look at the claim's holder if the caches do not vouch for it."""
        verdict = self._judge_by_caches(claim)
        if verdict.action is Action.RELEASE:
            self._suspect(claim, after)
        elif verdict.action is Action.LATER:
            self._suspect(claim, max(after, _seconds_until(verdict)))

    def _judge_by_caches(self, claim: Claim) -> Verdict:
        if not self._settings.enabled and claim.spec.state != "Quarantined":
            return Verdict(Action.KEEP, "reclaim is switched off")
        if claim.spec.node and is_known_to_node(claim) and self._watched.nodes.get(claim.spec.node) is None:
            self._missing.setdefault(claim.spec.node, datetime.now(UTC))
        moment = datetime.now(UTC)
        return judge(claim, self._remembered.witness(claim, self._missing, moment), self._switches, moment)

    def _suspect(self, claim: Claim, after: float) -> None:
        self._queue.add(self._wait(claim, after), after)

    def _wait(self, claim: Claim, after: float) -> str:
        """Note the claim's holder, for when its namespace is examined; the namespace."""
        namespace = claim.spec.workload.namespace if claim.spec.workload else ""
        self._suspects.add(namespace, holder_of(claim), asyncio.get_running_loop().time() + after)
        return namespace

    def _consider_all(self, names: Iterable[str], after: float) -> None:
        for name in names:
            claim = self._watched.claims.get(name)
            if claim is not None:
                self._consider(claim, after)

    def _claim_changed(self, old: Claim | None, new: Claim | None) -> None:
        self._index.claim_changed(old, new)
        if old is not None and not self._index.claims(holder_of(old)):
            self._absences.forget(old.spec.pod_uid)
        if new is not None and self._replayed:
            # A claim may be heard of before its pod, and its pod's end before it.
            self._consider(new, self._settings.settle)

    def _pod_changed(self, old: Pod | None, new: Pod | None) -> None:
        self._index.pod_changed(old, new)
        if new is not None:
            self._absences.forget(new.metadata.uid)
        if old is not None and old.metadata.uid not in self._index.pods:
            self._absences.left(old, datetime.now(UTC))
        if not self._replayed:
            return
        for pod in (old, new):
            if pod is not None and (pod is new or new is None or new.metadata.uid != pod.metadata.uid):
                self._consider_all(self._index.claims(uid_on_node(pod)), self._settings.settle)
        if new is not None and new.status.pod_ips and (old is None or not old.status.pod_ips):
            owner = controller_of(new.metadata)
            if owner is not None and owner.kind == StatefulSet.TYPE.kind:  # it is up, with or without what was kept
                waiting = self._index.waiting((new.metadata.namespace, owner.kind, owner.name))
                self._consider_all(waiting, self._settings.settle)

    def _node_changed(self, old: Node | None, new: Node | None) -> None:
        name = (new or old).metadata.name  # type: ignore[union-attr]
        if new is not None:
            self._missing.pop(name, None)
        if not self._replayed or (old is not None and new is not None and old.ready == new.ready):
            return
        self._consider_all(self._index.on_node(name), 0)
        for pod in self._index.pods.values():
            if pod.spec.node_name == name:
                self._consider_all(self._index.claims(uid_on_node(pod)), self._settings.settle)

    def _set_changed(self, old: StatefulSet | None, new: StatefulSet | None) -> None:
        meta = (new or old).metadata  # type: ignore[union-attr]
        if self._replayed and (old is None or new is None or old.spec != new.spec):
            waiting = self._index.waiting((meta.namespace, StatefulSet.TYPE.kind, meta.name))
            self._consider_all(waiting, self._settings.settle)

    def _machine_changed(self, old: Resource | None, new: Resource | None) -> None:
        meta = (new or old).metadata  # type: ignore[union-attr]
        if self._replayed and (new is None or meta.deletion_timestamp is not None):
            waiting = self._index.waiting((meta.namespace, VirtualMachineInstance.TYPE.kind, meta.name))
            self._consider_all(waiting, self._settings.settle)

    def _pool_changed(self, old: Pool | None, new: Pool | None) -> None:
        """Somebody may ask for a scan by a pool's annotation; pools themselves make no claim suspect."""
        asked = new.metadata.annotations.get(ANNOTATION_SCAN) if new is not None else None
        if asked and old is not None and old.metadata.annotations.get(ANNOTATION_SCAN) != asked:
            _log.info("asked for a scan by pool %s", old.metadata.name)
            self.scan()

    # Looking

    async def _examine(self, namespace: str) -> float | None:
        """Look at the holders of a namespace that are due; in how many seconds the next one is."""
        loop = asyncio.get_running_loop()
        holders = self._suspects.take(namespace, loop.time(), _BATCH)
        claims = [claim for holder in holders for claim in self._still_suspect(holder)]
        try:
            failures = await self._judge_and_release(claims) if claims else []
        except BaseException:
            for holder in holders:
                self._suspects.add(namespace, holder, loop.time())
            raise
        due = self._suspects.next_due(namespace)
        if failures:
            raise failures[0]
        return None if due is None else max(0.0, due - loop.time())

    def _still_suspect(self, holder: str) -> Iterator[Claim]:
        """The holder's claims that the caches do not vouch for by now: its pod may have been heard of since."""
        for name in self._index.claims(holder):
            claim = self._watched.claims.get(name)
            verdict = self._judge_by_caches(claim) if claim is not None else None
            if claim is None or verdict is None or verdict.action is Action.KEEP:
                continue
            if verdict.action is Action.LATER:
                self._wait(claim, _seconds_until(verdict))
            else:
                yield claim

    async def _judge_and_release(self, claims: list[Claim]) -> list[StoreError]:
        """Decide by what the API server says now, and do it; what failed, which is a suspect again."""
        fresh = Fresh(self._store, self._index, self._absences)
        await fresh.read_pods(claims)
        doomed: list[Doomed] = []
        failures: list[StoreError] = []
        for claim in claims:
            try:
                static = is_static(claim, self._switches)
                witness = await fresh.witness(claim, self._missing, static=static)
            except StoreError as error:
                failures.append(error)
                self._wait(claim, 0)
                continue
            verdict = judge(claim, witness, self._switches, datetime.now(UTC))
            if verdict.action is Action.RELEASE:
                doomed.append(Doomed(claim, verdict.reason, witness.pod))
            elif verdict.action is Action.LATER:
                self._suspect(claim, _seconds_until(verdict))
        del fresh
        failed = await self._releaser.release(doomed)
        self._endpoints.released(each.claim for each in doomed)
        for claim, failure in failed:
            if isinstance(failure, ConflictError):
                # Somebody changed it under our hands: the new version is judged when the cache has it.
                self._suspect(claim, self._settings.settle)
            else:
                failures.append(failure)
                self._wait(claim, 0)
        return failures


def _seconds_until(verdict: Verdict) -> float:
    return max(0.0, (verdict.at - datetime.now(UTC)).total_seconds()) if verdict.at else 0.0
