"""What IPAM tidies up in the background: what failed ADDs could not delete, crashes left partial, no DEL released."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from api.claim import Claim
from api.mirror import is_mirrored
from plugins.errors import ProviderError
from plugins.ipam import metrics
from plugins.ipam.allocation import Allocator
from plugins.ipam.claims import ClaimWriter
from plugins.ipam.concurrency import Key, KeyLocks, container_key, pod_key
from plugins.ipam.fate import Fates
from plugins.ipam.held import NodeClaims, is_retained, partial, set_key
from plugins.ipam.nic import namespace_lives
from plugins.ipam.settings import IpamSettings
from plugins.ipam.view import Views
from store.errors import StoreError

log = logging.getLogger(__name__)

_INTERVAL = 10.0
"""Seconds between two rounds at most; a quarter of the partial sets' grace if that is less."""


class Housekeeping:
    """Tidies up for one node."""

    def __init__(
        self,
        *,
        settings: IpamSettings,
        views: Views,
        held: NodeClaims,
        writer: ClaimWriter,
        allocator: Allocator,
        locks: KeyLocks,
        fates: Callable[[], Fates],
        released: Callable[[Claim], None],
    ) -> None:
        self._settings = settings
        self._views = views
        self._held = held
        self._writer = writer
        self._allocator = allocator
        self._locks = locks
        self._fates = fates
        self._released = released
        self._partial_since: dict[tuple[tuple[str, str], ...], float] = {}
        self._unclaimed_since: dict[tuple[str, str], float] = {}
        """Claims of kubelet's own pods that neither a sandbox nor a mirror vouches for, by uid and version."""

    async def run(self) -> None:
        """Tidy up until cancelled."""
        while True:
            await asyncio.sleep(min(_INTERVAL, self._settings.partial_grace / 4))
            self._views.close_idle(asyncio.get_running_loop().time() - self._settings.view_idle)
            for work in (self.delete_leftovers, self.collect_partial_sets, self.collect_mirrored):
                try:
                    await work()
                except (StoreError, ProviderError) as error:
                    log.warning("housekeeping is put off: %s", error)
            metrics.leftovers.set(len(self._allocator.leftovers))

    async def delete_leftovers(self) -> None:
        """Delete the claims that failed ADDs could not delete. Raises StoreError, ProviderError."""
        for claim in list(self._allocator.leftovers.values()):
            async with self._locks.hold(*keys_of(claim)):
                if claim.metadata.name in self._allocator.leftovers:
                    await self._allocator.discard(claim)

    async def collect_partial_sets(self) -> None:
        """Release sets that a crash left incomplete and that nobody has completed for the grace time.

        The time runs from when this agent first saw the very claims, by the monotonic clock: a wrong wall clock
        frees nothing. As long as the sandbox is there, its address may be in use (somebody may have deleted the other
        claim by hand), and the runtime's DEL is still to come. No crash left what names no sandbox: that was
        upstream's, whose record of the other family may not be adopted yet, and the reclaim judges it by its pod. What
        a static workload retains waits for its next pod, or for its end. Raises StoreError, ProviderError.
        """
        now = asyncio.get_running_loop().time()
        found: dict[tuple[tuple[str, str], ...], list[Claim]] = {}
        for claims in self._held.sets().values():
            if partial(claims) and not any(is_retained(c) or _may_have_sandbox(c) for c in claims):
                found[tuple((c.metadata.uid, c.metadata.resource_version) for c in claims)] = claims
        self._partial_since = {key: self._partial_since.get(key, now) for key in found}
        for key, claims in found.items():
            locks = [key for claim in claims for key in keys_of(claim)]
            if now - self._partial_since[key] < self._settings.partial_grace or any(map(self._locks.busy, locks)):
                continue
            async with self._locks.hold(*locks):
                freed = [
                    claim.spec.address
                    for claim in claims
                    if await self._writer.free(
                        claim, _unchanged(claim.metadata.resource_version), metrics.release_conflicts
                    )
                ]
            if freed:
                metrics.partial_sets.inc()
                log.warning("collected an incomplete set of claims: %s", ", ".join(sorted(freed)))

    async def collect_mirrored(self) -> None:
        """Release what kubelet's own pods have left.

        The DEL that ends such a pod finds its mirror alive, which goes afterwards; and without a mirror the pod may go
        on for long. So what counts is that there is neither a mirror nor the sandbox. Of claims that were upstream's no
        sandbox is known: their mirror must be away for the grace time of partial sets. Raises StoreError,
        ProviderError.
        """
        now = asyncio.get_running_loop().time()
        mirrored = [claim for claims in self._held.sets().values() for claim in claims if is_mirrored(claim)]
        known = self._unclaimed_since
        self._unclaimed_since = {}
        for claim in mirrored:
            locks = keys_of(claim)
            if _sandbox_lives(claim) or any(map(self._locks.busy, locks)):
                continue
            async with self._locks.hold(*locks):
                if await self._fates().reason_to_keep(claim):
                    continue
                version = claim.metadata.uid, claim.metadata.resource_version
                since = self._unclaimed_since[version] = known.get(version, now)
                if not claim.spec.netns and now - since < self._settings.partial_grace:
                    continue
                if await self._writer.free(claim, _unchanged(version[1]), metrics.release_conflicts):
                    self._released(claim)
                    log.info("released %s of pool %s: its static pod is gone", claim.spec.address, claim.spec.pool)


def keys_of(claim: Claim) -> tuple[Key, Key]:
    """The locks that a call for the claim's NIC holds."""
    return container_key(claim.spec.container_id, claim.spec.nic), pod_key(*set_key(claim))


def _sandbox_lives(claim: Claim) -> bool:
    """Whether the namespace is there, or may be: where its folder is missing, nothing tells that it has gone.

    So it is in an agent's container that does not see the node's /run/netns.
    """
    path = claim.spec.netns
    return namespace_lives(path, claim.spec.netns_inode) or (bool(path) and not os.path.isdir(os.path.dirname(path)))


def _may_have_sandbox(claim: Claim) -> bool:
    return not claim.spec.netns or _sandbox_lives(claim)


def _unchanged(version: str) -> Callable[[Claim], bool]:
    return lambda claim: claim.metadata.resource_version == version
