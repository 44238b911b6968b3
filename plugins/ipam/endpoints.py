"""SpiderEndpoints of this node's pods: a view for people and upstream's clients, written after the ADD has answered.

No decision relies on it, so a write that fails is tried a few times, logged and left. And it can wait: to the API
server an endpoint is as dear as a claim, and in a burst of pods it is the claims that are waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from msgspec.structs import replace

from api.claim import Claim
from api.core import Pod
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import FINALIZER, ObjectMeta, OwnerReference
from api.mirror import is_mirrored
from plugins.ipam import metrics
from plugins.ipam.held import is_retained
from store.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError, StoreError
from store.port import Store

log = logging.getLogger(__name__)

_DELAY = 0.2
"""Seconds without an ADD after which endpoints are written: a pod's NICs come one after the other, and so do pods."""
_PATIENCE = 5.0
"""Seconds after which an endpoint is written though ADDs go on."""
_SHARE = 9
"""While they go on, so many times as long as a write took nothing is written: a tenth of the time is for endpoints."""
_BATCH = 8
"""Endpoints written at a time when there are no ADDs; each takes a connection of its own to the API server."""
_ATTEMPTS = 5

Key = tuple[str, str]
"""Namespace and name of the endpoint: those of the pod, or of the virtual machine."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose endpoint it is."""

    uid: str
    """UID of the pod; the container id where there is no pod."""
    owner: OwnerReference | None
    """The pod, with which the endpoint goes; None if it outlives the pod, or its object, or where there is no pod."""
    static: bool
    """The addresses outlive the pod."""
    controller_type: str
    controller_name: str


@dataclass(slots=True)
class _Change:
    """What is to be written about one pod."""

    subject: Subject
    since: float
    """Loop time from which it waits."""
    nics: dict[str, EndpointIP | None] = field(default_factory=dict)
    """NIC to its entry; None if the NIC has no addresses any more."""


class EndpointWriter:
    """Writes endpoints in the background, the latest state of each pod once.

    With `owners_collect` endpoints go with the pods that own them, by Kubernetes' garbage collection, and a DEL costs
    no write.
    """

    def __init__(self, store: Store, node: str, limit: int, *, owners_collect: bool = False) -> None:
        self._store = store
        self._node = node
        self._limit = limit
        self._owners_collect = owners_collect
        self._changes: dict[Key, _Change] = {}
        self._written: OrderedDict[Key, Endpoint] = OrderedDict()
        """What was written last, so that the next NIC's write need not read it first."""
        self._wake = asyncio.Event()
        self._busy = False
        self._dropping = False
        self._adds = 0
        """ADDs under way."""
        self._last_add = 0.0
        """Loop time at which one ended last."""

    @contextmanager
    def yielding(self) -> Iterator[None]:
        """An ADD is under way: what can wait does not get in its way."""
        self._adds += 1
        try:
            yield
        finally:
            self._adds -= 1
            self._last_add = asyncio.get_running_loop().time()

    def attached(self, claim: Claim, entry: EndpointIP) -> None:
        """The NIC of `entry` got its addresses, one of which is the claim's."""
        self._note(claim, entry.interface, entry)

    def detached(self, claim: Claim) -> None:
        """The claim's NIC has given its addresses back."""
        if not self._owners_collect or subject_of(claim).owner is None:
            self._note(claim, claim.spec.nic, None)

    def _note(self, claim: Claim, nic: str, entry: EndpointIP | None) -> None:
        key, subject = key_of(claim), subject_of(claim)
        if not all(key):
            return
        change = self._changes.get(key)
        if change is None or change.subject.uid != subject.uid:
            if change is not None and entry is None:
                return  # a predecessor of the same name goes; its endpoint is being overwritten
            if change is None and len(self._changes) >= self._limit:
                metrics.endpoints_dropped.inc()
                if not self._dropping:
                    log.warning("too many endpoints wait to be written, %s/%s and further ones are left out", *key)
                self._dropping = True
                return
            change = self._changes[key] = _Change(subject, asyncio.get_running_loop().time())
        change.subject = subject
        change.nics[nic] = entry
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled: what waits longest first."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            await asyncio.sleep(_DELAY)
            self._busy = True
            while self._changes:
                began = loop.time()
                calm = not self._adds and began >= self._last_add + _DELAY
                if not calm and not self._pressing(began):
                    await asyncio.sleep(_DELAY)
                    continue
                keys = list(islice(self._changes, _BATCH if calm else 1))
                await asyncio.gather(*(self._write(key, self._changes.pop(key)) for key in keys))
                if not calm and not self._crowded:
                    await asyncio.sleep(_SHARE * (loop.time() - began))
            self._wake.clear()
            self._busy = self._dropping = False

    def _pressing(self, now: float) -> bool:
        """Whether the endpoint that waits longest cannot wait any more."""
        return self._crowded or now >= next(iter(self._changes.values())).since + _PATIENCE

    @property
    def _crowded(self) -> bool:
        """Whether endpoints would soon have to be left out."""
        return len(self._changes) > self._limit // 2

    @property
    def idle(self) -> bool:
        """Whether everything noted has been written or given up."""
        return not self._changes and not self._busy

    async def _write(self, key: Key, change: _Change) -> None:
        known = self._written.pop(key, None)
        for attempt in range(_ATTEMPTS):
            try:
                if attempt or (known is None and not any(change.nics.values())):
                    known = await self._read(key)
                written = await self._apply(key, change, known)
            except (ConflictError, AlreadyExistsError, NotFoundError):
                continue  # somebody else wrote: look again
            except StoreError as error:
                if attempt == _ATTEMPTS - 1 or isinstance(error, InvalidError):
                    log.warning("endpoint %s/%s was not written: %s", *key, error)
                    break
                await asyncio.sleep(_DELAY * 2**attempt)
                continue
            if written is not None:
                self._written[key] = written
                while len(self._written) > self._limit:
                    self._written.popitem(last=False)
            return
        metrics.endpoints_dropped.inc()

    async def _read(self, key: Key) -> Endpoint | None:
        namespace, name = key
        try:
            return await self._store.get(Endpoint, name, namespace)
        except NotFoundError:
            return None

    async def _apply(self, key: Key, change: _Change, current: Endpoint | None) -> Endpoint | None:
        """Write the change to what is there; the endpoint as it is then, None if there is none."""
        subject = change.subject
        status = merged(current, subject, self._node, change.nics)
        if status is None:
            if current is not None and (uid_of(current) == subject.uid or subject.static):
                await remove(self._store, current)
            return None
        if current is not None and not _goes_on(current, subject):
            await remove(self._store, current)
            current = None
        if current is None:
            namespace, name = key
            owners = [subject.owner] if subject.owner else []
            meta = ObjectMeta(namespace=namespace, name=name, owner_references=owners)
            return await self._store.create(Endpoint(metadata=meta, status=status))
        return await self._store.update(replace(current, status=status))


def key_of(claim: Claim) -> Key:
    """The endpoint that tells of the claim; empty strings if there is none."""
    workload = claim.spec.workload
    return (workload.namespace, workload.name) if workload is not None else ("", "")


def subject_of(claim: Claim) -> Subject:
    """Whose endpoint tells of the claim."""
    spec = claim.spec
    name = spec.workload.name if spec.workload is not None else ""
    controller = spec.workload.controller if spec.workload is not None else None
    static = is_retained(claim)
    owner = None
    if spec.pod_uid and not static and not is_mirrored(claim):
        owner = OwnerReference(api_version=Pod.TYPE.api_version, kind=Pod.TYPE.kind, name=name, uid=spec.pod_uid)
    return Subject(
        uid=spec.pod_uid or spec.container_id,
        owner=owner,
        static=static,
        controller_type=controller.kind if controller is not None else Pod.TYPE.kind,
        controller_name=controller.name if controller is not None else name,
    )


def uid_of(endpoint: Endpoint) -> str:
    """UID of the pod that the endpoint was written for; empty if nothing was."""
    return endpoint.status.current.uid if endpoint.status else ""


def merged(
    current: Endpoint | None, subject: Subject, node: str, nics: dict[str, EndpointIP | None]
) -> EndpointStatus | None:
    """The status after the changes to `nics`; None if no NIC is left.

    Entries of another pod's UID do not count, unless addresses outlive their pods: then the predecessor's entries tell
    the successor's next NICs which addresses wait for them.
    """
    known: Iterable[EndpointIP] = ()
    if current is not None and current.status is not None and (subject.static or uid_of(current) == subject.uid):
        known = current.status.current.ips
    entries = {entry.interface: entry for entry in known}
    for nic, entry in nics.items():
        if entry is None:
            entries.pop(nic, None)
        else:
            entries[nic] = entry
    if not entries:
        return None
    return EndpointStatus(
        current=EndpointCurrent(uid=subject.uid, node=node, ips=list(entries.values())),
        owner_controller_type=subject.controller_type,
        owner_controller_name=subject.controller_name,
    )


async def remove(store: Store, endpoint: Endpoint) -> None:
    """Take our finalizer off and delete the endpoint in this version. Raises StoreError."""
    if endpoint.metadata.finalizers:
        others = [finalizer for finalizer in endpoint.metadata.finalizers if finalizer != FINALIZER]
        endpoint = await store.update(replace(endpoint, metadata=replace(endpoint.metadata, finalizers=others)))
        if endpoint.metadata.deletion_timestamp is not None:
            return  # that removed it, or somebody else's finalizer keeps it
    meta = endpoint.metadata
    await store.delete(Endpoint, meta.name, meta.namespace, uid=meta.uid, resource_version=meta.resource_version)


def _goes_on(current: Endpoint, subject: Subject) -> bool:
    """Whether the object may be written over.

    One that is being deleted may not; and one that another pod owns is about to be, by Kubernetes' garbage collection,
    which may not look at what was written meanwhile.
    """
    meta = current.metadata
    owners = [subject.owner] if subject.owner else []
    return meta.deletion_timestamp is None and meta.owner_references == owners and FINALIZER not in meta.finalizers
