"""One ADD's allocation: choose, claim, probe; all of it or nothing.

Choosing is done in memory for all missing families at once and without waiting, so that no ADD sits on the last
address of one pool while it waits for another's. Claims are then created at once, so that they share a commit. What
another node was faster to claim is chosen again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from ipaddress import ip_address

from api.claim import Claim, claim_name
from api.ranges import Address, Family, to_address
from plugins.errors import (
    AddressConflictError,
    ExhaustedError,
    InvalidConfigError,
    ProviderError,
    TryAgainLaterError,
)
from plugins.ipam import metrics
from plugins.ipam.answer import Given, result_of, routes_for, unreachable
from plugins.ipam.attempt import Attempt, Pick, same_claim
from plugins.ipam.candidates import Candidates, PoolFacts
from plugins.ipam.catalog import Catalog
from plugins.ipam.claims import ClaimWriter, new_claim
from plugins.ipam.concurrency import together, uninterrupted
from plugins.ipam.config import Request
from plugins.ipam.detection import Detector
from plugins.ipam.held import NodeClaims
from plugins.ipam.provider import Provider, to_be_provided
from plugins.ipam.settings import IpamSettings
from plugins.ipam.takeover import TakeOvers
from plugins.ipam.view import PoolView, Views, any_change
from store.errors import AlreadyExistsError, StoreError, UncertainError

log = logging.getLogger(__name__)


class Allocator:
    """Allocates for one node."""

    def __init__(
        self,
        *,
        node: str,
        settings: IpamSettings,
        catalog: Catalog,
        views: Views,
        held: NodeClaims,
        writer: ClaimWriter,
        detector: Detector,
        take_overs: TakeOvers,
        provider: Provider | None,
    ) -> None:
        self._node = node
        self._settings = settings
        self._catalog = catalog
        self._views = views
        self._held = held
        self._writer = writer
        self._detector = detector
        self._take_overs = take_overs
        self._provider = provider
        self.leftovers: dict[str, Claim] = {}
        """Claims of failed ADDs that the store would not delete yet, or that may yet be made, by name."""

    async def allocate(self, request: Request, netns_fd: int | None, deadline: float) -> Given:
        """What the NIC gets; `deadline` is loop time. Raises CniError or StoreError, and then leaves nothing behind.

        The caller holds the locks of the container and the identity.
        """
        source = self._catalog.source(request.config, request.nic, request.facts)
        attempt = Attempt(request, netns_fd, os.fstat(netns_fd).st_ino if netns_fd is not None else 0)
        try:
            if self._provider is not None and request.facts is not None:
                attempt.parent_mac = await self._provider.parent_mac(request.facts, request.nic)
            await self._take_overs.adopt(attempt, source, self._wanted)
            if not attempt.settled:
                await self._complete(attempt)
            await self._detector.detect(attempt, self._complete)
            await self._bind(attempt, deadline)
            others = [c for c in self._held.of_identity(request.identity) if c.spec.nic != request.nic]
            routes = routes_for(request.nic, attempt.claims.values(), others, source.routes, self._catalog.get)
            answer = result_of(attempt.claims, self._catalog.get, clean_gateway=source.clean_gateway, routes=routes)
        except BaseException:
            await uninterrupted(self._undo(attempt))
            raise
        finally:
            for view, number in attempt.held:
                view.done(number)
        for claim in attempt.claims.values():
            self.leftovers.pop(claim.metadata.name, None)
        everything = [*others, *attempt.claims.values()]
        return Given(*answer, tuple(attempt.claims.values()), unreachable(source.routes, everything, self._catalog.get))

    # Choosing and claiming

    async def _wanted(self, attempt: Attempt) -> dict[Family, Candidates]:
        if not attempt.candidates:
            request = attempt.request
            selection = await self._catalog.select(
                request.config,
                request.nic,
                request.facts,
                namespace=request.workload.namespace,
                netns_fd=attempt.netns_fd,
            )
            attempt.candidates = {candidates.family: candidates for candidates in selection.candidates}
            for family, address in request.fixed.items():
                if family not in attempt.candidates:
                    raise InvalidConfigError(
                        "the address asked for cannot be given", f"{address}: this NIC gets no IPv{family} address"
                    )
        return attempt.candidates

    async def _complete(self, attempt: Attempt) -> None:
        """Claim an address for every wanted family that has none."""
        wanted = await self._wanted(attempt)
        while missing := [family for family in wanted if family not in attempt.claims]:
            picks = await self._choose(attempt, missing)
            if picks:
                await self._claim(attempt, picks)
            else:
                await self._give_back(attempt)

    async def _choose(self, attempt: Attempt, missing: list[Family]) -> list[Pick]:
        """One address for each missing family; empty if this ADD had better give back what it has and ask again.

        Raises ExhaustedError after the store itself said that no address is left. Addresses in flight may yet come
        back, for which it waits, but only empty-handed: two ADDs that each sit on the other's last address would
        wait for ever.
        """
        fresh: set[Family] = set()
        while True:
            picks, starved = self._choose_now(attempt, missing)
            if starved is None:
                return picks
            for pick in picks:
                self._let_go(attempt, pick)
            unseen = [pool for pool in attempt.candidates[starved].pools if self._views.get(pool.name) is None]
            if unseen:
                await self._views.open(unseen[0])
                continue
            views = [await self._views.open(pool) for pool in attempt.candidates[starved].pools]
            if starved not in fresh:
                fresh.add(starved)
                await together(view.refresh() for view in views)
            elif any(view.in_flight.difference(n for v, n in attempt.held if v is view) for view in views):
                if attempt.made:
                    return []
                await any_change(views)
            else:
                passed = attempt.candidates[starved].passed_over
                raise ExhaustedError(
                    f"no free IPv{starved} address for NIC {attempt.request.nic} of {_who(attempt.request)}: all IP"
                    " addresses used out",
                    "; ".join((*(view.describe() for view in views), *passed)),
                )

    def _choose_now(self, attempt: Attempt, missing: Iterable[Family]) -> tuple[list[Pick], Family | None]:
        """Addresses for the missing families in order, up to the first family for which there is none in view."""
        picks: list[Pick] = []
        for family in missing:
            pick = self._pick(attempt, family)
            if pick is None:
                return picks, family
            attempt.held.append((pick.view, int(pick.address)))
            picks.append(pick)
        return picks, None

    def _pick(self, attempt: Attempt, family: Family) -> Pick | None:
        """A free address of the best pool that has one; None also if a pool's claims are to be seen first."""
        fixed = attempt.request.fixed.get(family)
        for pool in attempt.candidates[family].pools:
            if fixed is not None and fixed not in pool.addresses:
                continue
            view = self._views.usable(pool)
            if view is None:
                return None
            if fixed is not None:
                return _pick_fixed(view, pool, fixed)
            number = view.pick()
            if number is not None:
                return Pick(view, pool, to_address(family, number))
            if not view.informer.is_synced:
                return None
        if fixed is not None:
            names = ", ".join(pool.name for pool in attempt.candidates[family].pools)
            raise InvalidConfigError(
                "the address asked for cannot be given", f"{fixed} is in none of the pools {names}"
            )
        return None

    async def _claim(self, attempt: Attempt, picks: list[Pick]) -> None:
        """Create the claims of the picks; what others were faster to claim stays missing.

        Raises StoreError, CniError.
        """
        request, size = attempt.request, len(attempt.candidates.keys() | attempt.claims.keys())
        tasks: dict[asyncio.Task[Claim], Pick] = {}
        for pick in picks:
            claim = new_claim(
                request,
                node=self._node,
                pool=pick.pool.name,
                address=pick.address,
                set_size=size,
                inode=attempt.inode,
            )
            claim = to_be_provided(claim, attempt.parent_mac, pick.pool)
            task = asyncio.create_task(self._writer.create(claim))
            tasks[task] = pick
            attempt.pending[task] = claim
        await asyncio.wait(tasks)  # and not gather: a creation under way is never cancelled, its outcome must be known
        lost: list[Pick] = []
        for task, pick in tasks.items():
            if task.exception() is None:
                claim = task.result()
                del attempt.pending[task]
                attempt.made.append(claim)
                attempt.claims[claim.spec.ip_version] = claim
            elif isinstance(task.exception(), AlreadyExistsError):
                del attempt.pending[task]
                lost.append(pick)
        for task in tasks:
            if task in attempt.pending:
                task.result()  # raises
        for pick in lost:
            await self._yield_to(attempt, pick)

    async def _yield_to(self, attempt: Attempt, pick: Pick) -> None:
        """Somebody else has the claim of this address."""
        metrics.collisions.inc()
        metrics.allocation_conflicts.inc()
        attempt.collisions += 1
        pick.view.contest(int(pick.address))
        self._let_go(attempt, pick)
        if pick.address in attempt.request.fixed.values():
            holder = await self._writer.read(claim_name(pick.address))
            raise AddressConflictError("the address asked for is taken", f"{pick.address}: {_holder(holder)}")
        if attempt.collisions >= self._settings.max_collisions:
            raise TryAgainLaterError(
                "too many addresses were lost to other nodes",
                f"{attempt.collisions} in pool {pick.pool.name} and others",
            )

    def _let_go(self, attempt: Attempt, pick: Pick) -> None:
        number = int(pick.address)
        attempt.held.remove((pick.view, number))
        pick.view.done(number)

    async def _give_back(self, attempt: Attempt) -> None:
        """Release what this ADD claimed, to start again."""
        while attempt.made:
            claim = attempt.made[-1]
            await self._writer.release(claim, same_claim(claim), metrics.allocation_conflicts)
            attempt.made.pop()
            attempt.claims.pop(claim.spec.ip_version, None)
            self._release_hold(attempt, claim)

    def _release_hold(self, attempt: Attempt, claim: Claim) -> None:
        number = int(ip_address(claim.spec.address))
        for view, held in list(attempt.held):
            if held == number and view.name == claim.spec.pool:
                attempt.held.remove((view, held))
                view.done(held)

    # The infrastructure provider

    async def _bind(self, attempt: Attempt, deadline: float) -> None:
        """Ask the provider for the claims that it has not answered for yet. Raises ProviderError, StoreError."""
        open_ = [c for c in attempt.claims.values() if c.spec.provided is not None and not c.spec.provided.mac]
        if self._provider is None or not open_:
            return
        attempt.asked = True
        answered = await self._provider.allocate(open_, deadline)
        written = await together(self._writer.update(claim) for claim in answered)
        attempt.claims |= {claim.spec.ip_version: claim for claim in written}

    # Undoing

    async def _undo(self, attempt: Attempt) -> None:
        """Delete the claims that this ADD made, also those of which it is not known whether they were made.

        All of it takes `rollback_deadline` at most; what is not deleted by then is a leftover.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.rollback_deadline
        doubtful: list[Claim] = []
        if attempt.pending:
            # At most half of the time: what was made already is to be deleted as well.
            _, late = await asyncio.wait(attempt.pending, timeout=self._settings.rollback_deadline / 2)
            for task in late:
                task.cancel()  # else it would go on asking for the claim that is to be deleted
            if late:
                await asyncio.wait(late)
        for task, claim in attempt.pending.items():
            if task.cancelled() or isinstance(task.exception(), UncertainError):
                doubtful.append(claim)
            elif task.exception() is None:
                attempt.made.append(task.result())
        rollback = [self._roll_back(claim, end, asked=attempt.asked) for claim in (*attempt.made, *doubtful)]
        if rollback:
            await asyncio.gather(*rollback)

    async def _roll_back(self, claim: Claim, end: float, *, asked: bool) -> None:
        try:
            async with asyncio.timeout_at(end):
                await self.discard(claim, asked=asked)
        except (StoreError, ProviderError, TimeoutError) as error:
            log.error("claim %s of a failed ADD could not be deleted yet: %s", claim.metadata.name, error)
            self.leftovers[claim.metadata.name] = claim

    async def discard(self, claim: Claim, *, asked: bool = True) -> None:
        """Delete a claim of an ADD that failed, whether or not its creation was seen to succeed.

        One that is not there, and may yet come, is a leftover, for as long as a write may be late.
        The infrastructure provider lets go first, if it may have been `asked`. Raises ProviderError, StoreError.
        """
        made: Claim | None = claim
        if not claim.metadata.uid:
            made = await self._writer.read_after_writes(claim.metadata.name)
            if self._writer.in_doubt and (made is None or not same_claim(claim)(made)):
                # The request may be on its way: then the pod, alive, would keep an address that it does not have.
                self.leftovers[claim.metadata.name] = claim
                return
        if made is not None and same_claim(claim)(made):
            release = self._writer.free if asked else self._writer.release
            await release(made, same_claim(claim), metrics.allocation_conflicts)
        self.leftovers.pop(claim.metadata.name, None)


def _pick_fixed(view: PoolView, pool: PoolFacts, address: Address) -> Pick:
    if not view.contains(int(address)):
        raise InvalidConfigError("the address asked for cannot be given", f"{address} of pool {pool.name} is reserved")
    if int(address) in view.in_flight:
        raise AddressConflictError("the address asked for is taken", f"{address}: it is being given to another pod")
    view.hold(int(address))
    return Pick(view, pool, address)


def _who(request: Request) -> str:
    workload = request.workload
    if not workload.name:
        return f"container {request.container_id}"
    return f"pod {workload.namespace}/{workload.pod_name}"


def _holder(claim: Claim | None) -> str:
    """Who has a claim, for people."""
    if claim is None:
        return "its claim is just being deleted, try again"
    spec = claim.spec
    if spec.quarantine is not None:
        return f"it is in quarantine until {spec.quarantine.until:%FT%TZ}, {spec.quarantine.mac} uses it"
    who = f"pod {spec.workload.namespace}/{spec.workload.name}" if spec.workload else f"container {spec.container_id}"
    return f"{who} on node {spec.node} has it"
