"""Asking the network about addresses before a pod gets them: conflicts, quarantine, gateways.

The claim comes first, so that none of our own nodes can be the one who answers; the question comes before the address
is put on the NIC, so that nobody is disturbed. The gateway is asked last, since that question names the new address
as its sender, and whoever hears it remembers it (upstream issue 4484).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address

from api.claim import Claim
from api.ranges import Family
from plugins.coordinator.probe import NicProbe, Prober, ProbeUnknownError
from plugins.errors import AddressConflictError, GatewayUnreachableError, TryAgainLaterError
from plugins.ipam import metrics
from plugins.ipam.attempt import Attempt, same_claim
from plugins.ipam.catalog import Catalog
from plugins.ipam.claims import ClaimWriter, quarantined
from plugins.ipam.concurrency import together
from plugins.ipam.nic import leave_duplicates_to_us
from plugins.ipam.questions import Policy
from plugins.ipam.settings import IpamSettings
from plugins.ipam.view import Views

log = logging.getLogger(__name__)

PREDECESSOR_PAUSE = 0.25
"""Seconds between two looks whether the pod before has gone."""


class Detector:
    """Probes for one node's ADDs."""

    def __init__(
        self,
        *,
        settings: IpamSettings,
        policy: Policy,
        catalog: Catalog,
        views: Views,
        writer: ClaimWriter,
        prober: Prober,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._catalog = catalog
        self._views = views
        self._writer = writer
        self._prober = prober

    async def detect(self, attempt: Attempt, complete: Callable[[Attempt], Awaitable[None]]) -> None:
        """Make sure that nobody uses the addresses and that the gateways are there, as far as that is switched on.

        `complete` claims other addresses for the families whose address turned out to be in use. Raises
        AddressConflictError, GatewayUnreachableError, TryAgainLaterError if the network could not be asked, and what
        `complete` raises.
        """
        asked = {family: self._policy.of(claim.spec.pool) for family, claim in attempt.claims.items()}
        if attempt.netns_fd is None or not any(each.conflict or each.gateway for each in asked.values()):
            return
        if attempt.parent_mac:
            return  # what an infrastructure provider decides about is no NIC before it has answered
        if 6 in asked and asked[6].conflict:
            await _spare_the_kernel_its_own(attempt)
        unsure = [family for family, each in asked.items() if each.conflict]
        try:
            async with await self._prober.open(attempt.netns_fd, attempt.request.nic) as nic:
                if attempt.quiet:
                    await self._announce_what_is_left(attempt, nic, unsure)
                    return
                await self._avoid_strangers(attempt, nic, unsure, complete)
                await together(
                    self._ask_gateway(nic, claim, announces=family in unsure)
                    for family, claim in attempt.claims.items()
                    if self._policy.of(claim.spec.pool).gateway
                )
                await self._announce(attempt, nic, unsure)
        except ProbeUnknownError as error:
            raise TryAgainLaterError("the network could not be asked about the address", str(error)) from error

    async def _announce_what_is_left(self, attempt: Attempt, nic: NicProbe, families: list[Family]) -> None:
        """For the target of a live migration: announce the addresses that the source has left already.

        As long as the source answers, the machine runs there, and an announcement would take its traffic away. When
        it switches over, the hypervisor announces it.
        """
        macs = await together(nic.conflict(ip_address(attempt.claims[f].spec.address)) for f in families)
        await self._announce(attempt, nic, [f for f, mac in zip(families, macs, strict=True) if mac is None])

    async def _avoid_strangers(
        self, attempt: Attempt, nic: NicProbe, unsure: list[Family], complete: Callable[[Attempt], Awaitable[None]]
    ) -> None:
        """Probe the addresses of these families, all at once, and replace those that are in use."""
        while unsure:
            macs = await together(self._stranger(attempt, nic, family) for family in unsure)
            conflicts = {family: mac for family, mac in zip(unsure, macs, strict=True) if mac is not None}
            for family, mac in conflicts.items():
                await self._reject(attempt, nic, family, mac)
            if conflicts:
                await complete(attempt)
            unsure = list(conflicts)
        for claim, mac in attempt.suspects:
            await self._quarantine(attempt, claim, mac)

    async def _stranger(self, attempt: Attempt, nic: NicProbe, family: Family) -> str | None:
        """The MAC that uses the address; None: nobody.

        Where the pod before had the address, it may be that one, on its way out on another node: it is given a moment.
        """
        address, loop = ip_address(attempt.claims[family].spec.address), asyncio.get_running_loop()
        patience = loop.time() + (self._settings.predecessor_wait if family in attempt.sticky else 0)
        while (mac := await nic.conflict(address)) is not None and loop.time() < patience:  # noqa: ASYNC110 - none tells
            await asyncio.sleep(PREDECESSOR_PAUSE)
        return mac

    async def _reject(self, attempt: Attempt, nic: NicProbe, family: Family, mac: str) -> None:
        """The address is in use by a stranger: put it out of use, so that the ADD goes on with another, or give up.

        If it is the gateway that answers, it may do so for every address (proxy ARP, proxy NDP), or have this one
        itself: only when another address turns out to be free it is known which, and the first is quarantined.
        """
        claim = attempt.claims[family]
        address = ip_address(claim.spec.address)
        request, pool = attempt.request, claim.spec.pool
        metrics.address_conflicts.inc()
        attempt.strangers.append((address, mac))
        log.warning("address %s of pool %s is in use by %s, seen from NIC %s", address, pool, mac, request.nic)
        router = await self._router(attempt, nic, pool)
        if family in attempt.sticky or family in request.fixed:
            why = "it was asked for" if family in request.fixed else "the pod was given it before"
            whose = f"{mac}, the pool's gateway" if mac == router else mac
            raise AddressConflictError(
                "ip conflict: the address is in use by somebody else",  # which begins with upstream's words, as below
                f"{address} of pool {pool} is used by {whose}, seen from NIC {request.nic}; not replaced since {why}",
            )
        if len(attempt.strangers) > self._settings.conflict_moves:
            text = _tell(attempt, pool, router)
            raise AddressConflictError("ip conflict: the addresses tried are in use by somebody else", text)
        if mac == router:
            attempt.suspects.append((claim, mac))
        else:
            await self._quarantine(attempt, claim, mac)
        del attempt.claims[family]

    async def _router(self, attempt: Attempt, nic: NicProbe, pool: str) -> str | None:
        """The MAC of the pool's gateway, asked once for each ADD and in nobody's name; None if there is none."""
        facts = self._catalog.get(pool)
        if facts is None or not facts.gateway:
            return None
        if facts.gateway not in attempt.routers:
            attempt.routers[facts.gateway] = await nic.gateway(ip_address(facts.gateway))
        return attempt.routers[facts.gateway]

    async def _quarantine(self, attempt: Attempt, claim: Claim, mac: str) -> None:
        settings, address = self._settings, int(ip_address(claim.spec.address))
        facts = self._catalog.get(claim.spec.pool)
        view = await self._views.open(facts) if facts is not None else None
        cap, per_mac = settings.quarantine_cap, settings.quarantine_cap_per_mac
        if view is None or not view.may_quarantine(mac, cap, per_mac):
            # Its claim goes, and the address stays in flight, so that this ADD does not choose it again.
            log.warning("no more quarantine in pool %s, %s stays in use", claim.spec.pool, claim.spec.address)
            if view is not None and (view, address) not in attempt.held:
                view.hold(address)
                attempt.held.append((view, address))
            await self._writer.release(claim, same_claim(claim), metrics.allocation_conflicts)
            attempt.made = [made for made in attempt.made if made.metadata.uid != claim.metadata.uid]
            return
        view.quarantined[address] = mac
        who = f"{attempt.request.workload.namespace}/{attempt.request.workload.name}".strip("/")
        reason = f"{mac} answered for it when {who or 'container ' + attempt.request.container_id} was to get it"
        try:
            await self._writer.update(quarantined(claim, reason, mac, settings.quarantine_time))
        except BaseException:
            view.quarantined.pop(address, None)
            raise
        attempt.made = [made for made in attempt.made if made.metadata.uid != claim.metadata.uid]
        metrics.quarantines.inc()

    async def _ask_gateway(self, nic: NicProbe, claim: Claim, *, announces: bool) -> None:
        """Raise GatewayUnreachableError unless the gateway answers.

        It is asked in the address's name if `announces`, since that was found free. Otherwise it is asked in nobody's;
        some answer only their own subnet, so if it is silent, whether the address is free is found out first.
        """
        pool = self._catalog.get(claim.spec.pool)
        if pool is None or not pool.gateway:
            return
        gateway, address = ip_address(pool.gateway), ip_address(claim.spec.address)
        stranger = None
        if not announces:
            if await nic.gateway(gateway) is not None:
                return
            stranger = await nic.conflict(address)
        if stranger is None and await nic.gateway(gateway, address) is not None:
            return
        metrics.unreachable_gateways.inc()
        text = f"gateway {gateway} of pool {pool.name}, asked for {address} from NIC {claim.spec.nic}"
        raise GatewayUnreachableError(
            "the gateway is unreachable: it does not answer",
            f"{text}; the address itself is in use by {stranger}" if stranger else text,
        )

    async def _announce(self, attempt: Attempt, nic: NicProbe, families: Iterable[Family]) -> None:
        """Tell the neighbours, who may remember an earlier holder's MAC. It is a courtesy: failure is only logged."""
        try:
            await together(nic.announce(ip_address(attempt.claims[family].spec.address)) for family in families)
        except (ProbeUnknownError, OSError) as error:
            log.warning("addresses could not be announced on NIC %s: %s", attempt.request.nic, error)


async def _spare_the_kernel_its_own(attempt: Attempt) -> None:
    """Beside our probe the kernel's, which takes a second or two, has nothing to add. Failure only costs that time."""
    if 6 not in attempt.claims or attempt.netns_fd is None:
        return
    try:
        await leave_duplicates_to_us(attempt.netns_fd, attempt.request.nic)
    except OSError as error:
        log.warning("NIC %s keeps the kernel's duplicate address detection: %s", attempt.request.nic, error)


def _tell(attempt: Attempt, pool: str, router: str | None) -> str:
    """The conflicts of this ADD; several by one MAC point to a router rather than to several thieves."""
    text = ", ".join(f"{address} by {mac}" for address, mac in attempt.strangers)
    macs = [mac for _, mac in attempt.strangers]
    for mac in dict.fromkeys(macs):
        if macs.count(mac) > 1:
            text += f"; {mac} answers for {macs.count(mac)} of them: "
            text += (
                "it is the pool's gateway, with proxy ARP (or proxy NDP); turn that off there, or detection for the"
                " pool (spec.detectIPConflict: false)"
                if mac == router
                else "is it a router with proxy ARP (or proxy NDP)?"
            )
    return f"pool {pool}, NIC {attempt.request.nic}: {text}"
