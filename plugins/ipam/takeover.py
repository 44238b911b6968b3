"""What there is already for a NIC: claims of the same pod's earlier sandbox, or of the pod whose successor it is."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from api.claim import Claim
from api.ranges import Family
from plugins.errors import AddressConflictError, TryAgainLaterError
from plugins.ipam import metrics
from plugins.ipam.attempt import Attempt
from plugins.ipam.candidates import Candidates
from plugins.ipam.catalog import Catalog
from plugins.ipam.claims import ClaimWriter, held_by
from plugins.ipam.config import Request
from plugins.ipam.held import NodeClaims, by_family, partial, set_key
from plugins.ipam.provider import to_be_provided
from plugins.ipam.retained import RetainedClaims, split
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import Source
from store.errors import ConflictError, NotFoundError

log = logging.getLogger(__name__)

Wanted = Callable[[Attempt], Awaitable[Mapping[Family, Candidates]]]
"""Looks up which pools may serve the NIC; raises if there is none."""

_ADOPTIONS = 4
"""How often an identity's claims are read anew because somebody changed them meanwhile."""


class TakeOvers:
    """Takes claims over for one node, each by a write that is checked against the version it was read in."""

    def __init__(
        self,
        *,
        node: str,
        settings: IpamSettings,
        catalog: Catalog,
        held: NodeClaims,
        writer: ClaimWriter,
        retained: RetainedClaims,
    ) -> None:
        self._node = node
        self._settings = settings
        self._catalog = catalog
        self._held = held
        self._writer = writer
        self._retained = retained

    async def adopt(self, attempt: Attempt, source: Source, wanted: Wanted) -> None:
        """Take over what there is for the NIC: of an earlier ADD for the pod, or of the pod whose successor it is.

        The first may be complete, partial, or of the sandbox before; it stays, whatever became of the pools. The second
        stays as long as its pool is one that the pod names, whether or not that pool may serve.
        """
        request = attempt.request
        static = False
        if request.facts is not None and request.facts.static:
            static = True
            attempt.quiet = await self._retained.migrates(request.facts)
        elif not await self._held.of_set(request.identity, request.nic):
            return
        for _ in range(_ADOPTIONS):
            claims = await self._held.read_set(request.identity, request.nic)
            complete = bool(claims) and not partial(claims)
            own, surplus = by_family(claims)
            kept = dict(own)
            if static and not complete:
                inherited, dropped = await self._inherit(attempt, source, own)
                kept |= inherited
                surplus += dropped
                # All that is wanted may be there already, though no pool may serve now.
                complete = bool(kept) and kept.keys() == attempt.wanted
            _respect_fixed(request, kept)
            # Before anything is given up, since this may refuse the ADD.
            size = len(kept) if complete else len(kept.keys() | (await wanted(attempt)).keys())
            attempt.sticky = set(kept) if static or (complete and not _may_move(request, kept)) else set()
            attempt.settled = bool(kept) and complete
            try:
                for claim in surplus:
                    await self._writer.free(claim, _unchanged(claim), metrics.allocation_conflicts)
                attempt.claims = {f: await self._take_over(c, attempt, size) for f, c in kept.items()}
            except (ConflictError, NotFoundError):
                metrics.allocation_conflicts.inc()
                continue
            return
        raise TryAgainLaterError("the claims of this pod keep changing", f"identity {request.identity}")

    async def _inherit(
        self, attempt: Attempt, source: Source, own: Mapping[Family, Claim]
    ) -> tuple[dict[Family, Claim], list[Claim]]:
        """The predecessor's claims that the pod takes over, and those that it gives up. Raises CniError, StoreError."""
        request = attempt.request
        facts = request.facts
        assert facts is not None  # noqa: S101 - only a pod has a predecessor
        found = await self._retained.find(request.workload, request.nic)
        found = [claim for claim in found if set_key(claim) != (request.identity, request.nic)]
        if not found:
            return {}, []
        await self._retained.ensure_free(found, facts, migrates=attempt.quiet)
        named = await self._catalog.named(source, facts)
        enabled = {4: self._settings.enable_ipv4, 6: self._settings.enable_ipv6}
        attempt.wanted = {family for family, names in named.items() if names and enabled[family]}
        first, surplus = by_family(found)
        kept, dropped = split({family: claim for family, claim in first.items() if family not in own}, named)
        for claim in dropped:
            log.info("%s of pool %s goes: the pod names other pools now", claim.spec.address, claim.spec.pool)
        return kept, [*surplus, *dropped, *(claim for family, claim in first.items() if family in own)]

    async def _take_over(self, claim: Claim, attempt: Attempt, size: int) -> Claim:
        held = held_by(claim, attempt.request, node=self._node, set_size=size, inode=attempt.inode)
        held = to_be_provided(held, attempt.parent_mac, self._catalog.get(claim.spec.pool))
        if held == claim:
            return self._writer.learn(claim)
        return await self._writer.update(held)


def _unchanged(claim: Claim) -> Callable[[Claim], bool]:
    return lambda current: set_key(current) == set_key(claim) and current.metadata.uid == claim.metadata.uid


def _may_move(request: Request, kept: Mapping[Family, Claim]) -> bool:
    """Whether the pod may get other addresses than it had in a sandbox that is gone, if somebody uses those.

    A DEL frees nothing as long as the pod is alive: without this, a pod whose address was stolen would never start.
    """
    before = {claim.spec.container_id for claim in kept.values()}
    return request.facts is not None and request.container_id not in before


def _respect_fixed(request: Request, kept: Mapping[Family, Claim]) -> None:
    for family, address in request.fixed.items():
        if family in kept and kept[family].spec.address != str(address):
            raise AddressConflictError(
                "the pod has another address than the one asked for",
                f"{kept[family].spec.address} of pool {kept[family].spec.pool} instead of {address}",
            )
