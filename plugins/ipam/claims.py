"""Making, changing and deleting claims so that the outcome is known, also when the store's answer was lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from msgspec.structs import replace
from prometheus_client import Counter

from api.claim import (
    LABEL_IDENTITY,
    LABEL_NODE,
    LABEL_POOL,
    LABEL_WORKLOAD,
    Claim,
    ClaimSpec,
    Provided,
    Quarantine,
    Workload,
    claim_name,
    label_value,
    workload_label,
)
from api.meta import ObjectMeta, now
from api.ranges import Address
from plugins.ipam.config import Request
from plugins.ipam.held import NodeClaims
from plugins.ipam.provider import Provider
from plugins.ipam.view import Views
from store.errors import AlreadyExistsError, ConflictError, NotFoundError, StoreError, UncertainError
from store.port import Store

log = logging.getLogger(__name__)

_ATTEMPTS = 8
"""How often a write is tried again after its answer was lost or somebody else wrote in between."""

_LATE = 120.0
"""Seconds within which a write that was given up may still land; the stores' own limits are below a minute."""

_NOBODYS = "00000000-0000-0000-0000-000000000000"
"""The nil UUID (RFC 9562 section 5.9): no object's uid."""


def new_claim(
    request: Request,
    *,
    node: str,
    pool: str,
    address: Address,
    set_size: int,
    inode: int,
    provided: Provided | None = None,
) -> Claim:
    """The claim on `address` for this request, not yet in the store."""
    return Claim(
        metadata=ObjectMeta(
            name=claim_name(address), labels={LABEL_POOL: label_value(pool), **holder_labels(request, node)}
        ),
        spec=ClaimSpec(
            address=str(address),
            ip_version=address.version,
            pool=pool,
            workload=workload_of(request),
            pod_uid=request.pod_uid,
            container_id=request.container_id,
            nic=request.nic,
            set_size=set_size,
            network=request.network,
            node=node,
            netns=request.netns,
            netns_inode=inode,
            provided=provided,
        ),
    )


def held_by(claim: Claim, request: Request, *, node: str, set_size: int, inode: int) -> Claim:
    """The claim as this request's, whoever had it before; not yet written.

    What an infrastructure provider said counts for the pod that it was said to.
    """
    spec = claim.spec
    kept = {LABEL_NODE, LABEL_IDENTITY, LABEL_WORKLOAD}
    labels = {key: value for key, value in claim.metadata.labels.items() if key not in kept}
    return replace(
        claim,
        metadata=replace(claim.metadata, labels={**labels, **holder_labels(request, node)}),
        spec=replace(
            spec,
            workload=workload_of(request),
            pod_uid=request.pod_uid,
            container_id=request.container_id,
            network=request.network,
            node=node,
            netns=request.netns,
            netns_inode=inode,
            set_size=set_size,
            provided=spec.provided if (spec.pod_uid, spec.node) == (request.pod_uid, node) else None,
        ),
    )


def workload_of(request: Request) -> Workload | None:
    """Who a claim of this request is for; None if nobody has a name."""
    return request.workload if request.workload.name else None


def holder_labels(request: Request, node: str) -> dict[str, str]:
    """The labels that tell who holds a claim, and where."""
    labels = {LABEL_NODE: label_value(node), LABEL_IDENTITY: request.identity}
    if request.facts is not None and request.facts.static:
        labels[LABEL_WORKLOAD] = workload_label(request.workload.namespace, request.workload.name)
    return labels


def quarantined(claim: Claim, reason: str, mac: str, seconds: float) -> Claim:
    """The claim as a record of quarantine: nobody's any more, hence without identity."""
    spec = claim.spec
    return replace(
        claim,
        metadata=replace(
            claim.metadata,
            labels={k: v for k, v in claim.metadata.labels.items() if k not in (LABEL_IDENTITY, LABEL_WORKLOAD)},
        ),
        spec=ClaimSpec(
            address=spec.address,
            ip_version=spec.ip_version,
            pool=spec.pool,
            state="Quarantined",
            domain=spec.domain,
            node=spec.node,
            quarantine=Quarantine(reason=reason, mac=mac, until=now() + timedelta(seconds=seconds)),
        ),
    )


class ClaimWriter:
    """Writes claims, and tells the caches of every own write."""

    def __init__(self, store: Store, held: NodeClaims, views: Views, provider: Provider | None = None) -> None:
        self._store = store
        self._held = held
        self._views = views
        self._provider = provider
        self._doubtful_until = 0.0

    @property
    def in_doubt(self) -> bool:
        """Whether a write that was given up may not have landed yet: then the caches may lack it."""
        return asyncio.get_running_loop().time() < self._doubtful_until

    @contextmanager
    def _noticing_doubt(self) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, UncertainError):
            self._doubtful_until = asyncio.get_running_loop().time() + _LATE
            raise

    async def create(self, claim: Claim) -> Claim:
        """Take the address. Raises AlreadyExistsError if somebody else has it, StoreError.

        UncertainError alone means that the claim may be there all the same. A creation whose answer was lost is
        repeated under the same name until the store says who has the claim, so that it cannot land later, unseen,
        beside another choice.
        """
        with self._noticing_doubt():
            return await self._create(claim)

    async def _create(self, claim: Claim) -> Claim:
        lost = False
        for _ in range(_ATTEMPTS):
            try:
                return self.learn(await self._store.create(claim))
            except UncertainError:
                lost = True
            except AlreadyExistsError:
                found = await self._read_back(claim) if lost else None
                if found is None or found.spec != claim.spec:
                    raise
                return self.learn(found)
            except StoreError as error:
                if lost:
                    raise UncertainError(str(error)) from error
                raise
        raise UncertainError(f"the store does not say whether claim {claim.metadata.name} was created")

    async def _read_back(self, claim: Claim) -> Claim | None:
        try:
            return await self.read(claim.metadata.name)
        except StoreError as error:
            raise UncertainError(str(error)) from error

    async def update(self, claim: Claim) -> Claim:
        """Write `claim` if it is still in the version it was read in.

        Raises ConflictError, NotFoundError, StoreError.
        """
        with self._noticing_doubt():
            return await self._update(claim)

    async def _update(self, claim: Claim) -> Claim:
        for _ in range(_ATTEMPTS):
            try:
                return self.learn(await self._store.update(claim))
            except UncertainError:
                found = await self.read_after_writes(claim.metadata.name)
                if found is None:
                    raise NotFoundError(f"claim {claim.metadata.name} is gone") from None
                if found.metadata.resource_version != claim.metadata.resource_version:
                    if found.metadata.uid == claim.metadata.uid and found.spec == claim.spec:
                        return self.learn(found)
                    raise ConflictError(f"claim {claim.metadata.name} was changed by somebody else") from None
        raise UncertainError(f"the store does not say whether claim {claim.metadata.name} was updated")

    async def free(self, claim: Claim, still: Callable[[Claim], bool], conflicts: Counter) -> bool:
        """`release`, after the infrastructure provider has let go of the address.

        The provider first: another pod that gets the address asks for it at once. Raises ProviderError, and then the
        claim stays; StoreError.
        """
        if self._provider is not None and claim.spec.provided is not None:
            current = await self.read(claim.metadata.name)
            if current is None or not still(current):
                return False
            await self._provider.release(current)
        return await self.release(claim, still, conflicts)

    async def release(self, claim: Claim, still: Callable[[Claim], bool], conflicts: Counter) -> bool:
        """Delete the claim as long as it is `still` the caller's to delete; False if it is not any more.

        The version that was judged is the version that is deleted: uid and resourceVersion are preconditions.
        Raises StoreError.
        """
        for _ in range(_ATTEMPTS):
            meta = claim.metadata
            try:
                await self._store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)
            except NotFoundError:
                pass
            except (ConflictError, UncertainError):
                conflicts.inc()
                current = await self.read(meta.name)
                if current is not None:
                    self.learn(current)
                    if not still(current):
                        return False
                    claim = current
                    continue
            self.forget(claim)
            return True
        raise UncertainError(f"claim {claim.metadata.name} cannot be deleted, others keep changing it")

    async def read(self, name: str) -> Claim | None:
        """The claim as it is in the store, or None."""
        try:
            return await self._store.get(Claim, name)
        except NotFoundError:
            return None

    async def catch_up(self, name: str = "0.0.0.0") -> None:  # noqa: S104 - a claim's name, nothing listens
        """Return when every write that was begun before is decided. Raises StoreError.

        Reads overtake a write that hangs in the store and lands later. So a write goes that waits its turn and cannot
        change anything: the deletion of an object that nobody has.
        """
        with suppress(ConflictError, NotFoundError):
            await self._store.delete(Claim, name, uid=_NOBODYS)

    async def read_after_writes(self, name: str) -> Claim | None:
        """The claim as it is once every write that was begun before is decided, or None. Raises StoreError."""
        await self.catch_up(name)
        return await self.read(name)

    def learn(self, claim: Claim) -> Claim:
        """Tell the caches; returns the claim."""
        if claim.metadata.labels.get(LABEL_NODE) == self._held.label:
            self._held.informer.learn(claim)
        self._views.learn(claim)
        return claim

    def forget(self, claim: Claim) -> None:
        """Tell the caches that the claim is deleted."""
        self._held.informer.forget(claim)
        self._views.forget(claim)
