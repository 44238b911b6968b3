"""SpiderEndpoints of this node's pods: a view for people, written after the ADD has answered.

No decision reads it, so a write that fails is tried a few times, logged and left.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from msgspec.structs import replace

from api.claim import Claim, Workload
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import FINALIZER, ObjectMeta, OwnerReference
from plugins.ipam import metrics
from store.errors import AlreadyExistsError, ConflictError, InvalidError, NotFoundError, StoreError
from store.port import Store

log = logging.getLogger(__name__)

_DELAY = 0.2
"""Seconds that changes are gathered: a pod's NICs come one after the other, and a burst of ADDs goes first."""
_BATCH = 64
"""Endpoints written at a time; they share a commit."""
_ATTEMPTS = 5


@dataclass(slots=True)
class _Change:
    """What is to be written about one pod."""

    uid: str
    owner: OwnerReference | None
    nics: dict[str, EndpointIP | None] = field(default_factory=dict)
    """NIC to its entry; None if the NIC has no addresses any more."""


class EndpointWriter:
    """Writes endpoints in the background, the latest state of each pod once."""

    def __init__(self, store: Store, node: str, limit: int) -> None:
        self._store = store
        self._node = node
        self._limit = limit
        self._changes: dict[tuple[str, str], _Change] = {}
        self._wake = asyncio.Event()
        self._busy = False
        self._dropping = False

    def attached(self, workload: Workload, pod_uid: str, container_id: str, entry: EndpointIP) -> None:
        """The NIC of `entry` got its addresses."""
        owner = None
        if pod_uid:
            owner = OwnerReference(api_version="v1", kind="Pod", name=workload.name, uid=pod_uid)
        self._note(workload, pod_uid or container_id, owner, entry.interface, entry)

    def detached(self, claim: Claim) -> None:
        """The claim's NIC has given its addresses back."""
        if claim.spec.workload is not None:
            uid = claim.spec.pod_uid or claim.spec.container_id
            self._note(claim.spec.workload, uid, None, claim.spec.nic, None)

    def _note(
        self, workload: Workload, uid: str, owner: OwnerReference | None, nic: str, entry: EndpointIP | None
    ) -> None:
        if not workload.name or not workload.namespace:
            return
        key = (workload.namespace, workload.name)
        change = self._changes.get(key)
        if change is None or change.uid != uid:
            if change is not None and entry is None:
                return  # a predecessor of the same name goes; its endpoint is being overwritten
            if change is None and len(self._changes) >= self._limit:
                metrics.endpoints_dropped.inc()
                if not self._dropping:
                    log.warning("too many endpoints wait to be written, %s/%s and further ones are left out", *key)
                self._dropping = True
                return
            change = self._changes[key] = _Change(uid, owner)
        change.owner = owner or change.owner
        change.nics[nic] = entry
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_DELAY)
            self._busy = True
            while self._changes:
                keys = list(self._changes)[:_BATCH]
                await asyncio.gather(*(self._write(key, self._changes.pop(key)) for key in keys))
            self._wake.clear()
            self._busy = self._dropping = False

    @property
    def idle(self) -> bool:
        """Whether everything noted has been written or given up."""
        return not self._changes and not self._busy

    async def _write(self, key: tuple[str, str], change: _Change) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                await self._write_once(key, change)
            except (ConflictError, AlreadyExistsError, NotFoundError):
                continue  # somebody wrote in between: look again
            except StoreError as error:
                if attempt == _ATTEMPTS - 1 or isinstance(error, InvalidError):
                    log.warning("endpoint %s/%s was not written: %s", *key, error)
                    break
                await asyncio.sleep(_DELAY * 2**attempt)
                continue
            return
        metrics.endpoints_dropped.inc()

    async def _write_once(self, key: tuple[str, str], change: _Change) -> None:
        namespace, name = key
        try:
            current: Endpoint | None = await self._store.get(Endpoint, name, namespace)
        except NotFoundError:
            current = None
        status = merged(current, change.uid, self._node, change.nics, name)
        if current is not None and current.metadata.deletion_timestamp is not None and status is not None:
            await remove(self._store, current)
            current = None
        if status is None:
            if current is not None and uid_of(current) == change.uid:
                await remove(self._store, current)
        elif current is None:
            owners = [change.owner] if change.owner else []
            meta = ObjectMeta(namespace=namespace, name=name, finalizers=[FINALIZER], owner_references=owners)
            await self._store.create(Endpoint(metadata=meta, status=status))
        else:
            meta = current.metadata
            if change.owner and change.owner not in meta.owner_references:
                meta = replace(meta, owner_references=[change.owner])
            await self._store.update(replace(current, metadata=meta, status=status))


def uid_of(endpoint: Endpoint) -> str:
    """UID of the pod that the endpoint was written for; empty if nothing was."""
    return endpoint.status.current.uid if endpoint.status else ""


def merged(
    current: Endpoint | None, uid: str, node: str, nics: dict[str, EndpointIP | None], name: str
) -> EndpointStatus | None:
    """The status after the changes to `nics`; None if no NIC is left. Entries of another pod's UID do not count."""
    known = current.status.current.ips if current and current.status and uid_of(current) == uid else []
    entries = {entry.interface: entry for entry in known}
    for nic, entry in nics.items():
        if entry is None:
            entries.pop(nic, None)
        else:
            entries[nic] = entry
    if not entries:
        return None
    return EndpointStatus(
        current=EndpointCurrent(uid=uid, node=node, ips=list(entries.values())),
        owner_controller_type="Pod",
        owner_controller_name=name,
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
