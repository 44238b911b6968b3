"""Asking the network about addresses before a pod gets them: conflicts, quarantine, gateways.

The claim comes first, so that none of our own nodes can be the one who answers; the question comes before the address
is put on the NIC, so that nobody is disturbed. The gateway is asked last, since that question names the new address
as its sender, and whoever hears it remembers it (upstream issue 4484).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
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
from plugins.ipam.settings import IpamSettings
from plugins.ipam.view import Views

log = logging.getLogger(__name__)


class Detector:
    """Probes for one node's ADDs."""

    def __init__(
        self, settings: IpamSettings, catalog: Catalog, views: Views, writer: ClaimWriter, prober: Prober
    ) -> None:
        self._settings = settings
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
        settings = self._settings
        if not (settings.enable_ip_conflict_detection or settings.enable_gateway_detection):
            return
        if attempt.netns_fd is None:
            return
        if settings.enable_ip_conflict_detection:
            await _spare_the_kernel_its_own(attempt)
        try:
            async with await self._prober.open(attempt.netns_fd, attempt.request.nic) as nic:
                if settings.enable_ip_conflict_detection:
                    await self._avoid_strangers(attempt, nic, complete)
                if settings.enable_gateway_detection:
                    await together(self._ask_gateway(nic, claim) for claim in attempt.claims.values())
                if settings.enable_ip_conflict_detection:
                    await self._announce(attempt, nic)
        except ProbeUnknownError as error:
            raise TryAgainLaterError("the network could not be asked about the address", str(error)) from error

    async def _avoid_strangers(
        self, attempt: Attempt, nic: NicProbe, complete: Callable[[Attempt], Awaitable[None]]
    ) -> None:
        """Probe all addresses, both families at once, and replace those that are in use."""
        unsure = list(attempt.claims)
        while unsure:
            macs = await together(nic.conflict(ip_address(attempt.claims[f].spec.address)) for f in unsure)
            conflicts = {f: mac for f, mac in zip(unsure, macs, strict=True) if mac is not None and mac != nic.mac}
            for family, mac in conflicts.items():
                await self._reject(attempt, family, mac)
            if conflicts:
                await complete(attempt)
            unsure = list(conflicts)

    async def _reject(self, attempt: Attempt, family: Family, mac: str) -> None:
        """The address is in use by a stranger: put it out of use, so that the ADD goes on with another, or give up."""
        claim = attempt.claims[family]
        address = ip_address(claim.spec.address)
        request, pool = attempt.request, claim.spec.pool
        metrics.address_conflicts.inc()
        attempt.strangers.append((address, mac))
        log.warning("address %s of pool %s is in use by %s, seen from NIC %s", address, pool, mac, request.nic)
        if family in attempt.sticky or family in request.fixed:
            why = "it was asked for" if family in request.fixed else "the pod was given it before"
            raise AddressConflictError(
                "the address is in use by somebody else",
                f"{address} of pool {pool} is used by {mac}, seen from NIC {request.nic}; not replaced since {why}",
            )
        if len(attempt.strangers) > self._settings.conflict_moves:
            raise AddressConflictError("the addresses tried are in use by somebody else", _tell(attempt, pool))
        await self._quarantine(attempt, claim, mac)
        del attempt.claims[family]

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

    async def _ask_gateway(self, nic: NicProbe, claim: Claim) -> None:
        pool = self._catalog.get(claim.spec.pool)
        if pool is None or not pool.gateway:
            return
        if await nic.gateway(ip_address(pool.gateway), ip_address(claim.spec.address)) is None:
            metrics.unreachable_gateways.inc()
            raise GatewayUnreachableError(
                "the gateway does not answer",
                f"gateway {pool.gateway} of pool {pool.name}, asked for {claim.spec.address} from NIC {claim.spec.nic}",
            )

    async def _announce(self, attempt: Attempt, nic: NicProbe) -> None:
        """Tell the neighbours, who may remember an earlier holder's MAC. It is a courtesy: failure is only logged."""
        try:
            await together(nic.announce(ip_address(claim.spec.address)) for claim in attempt.claims.values())
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


def _tell(attempt: Attempt, pool: str) -> str:
    """The conflicts of this ADD; several by one MAC point to a router rather than to several thieves."""
    text = ", ".join(f"{address} by {mac}" for address, mac in attempt.strangers)
    macs = [mac for _, mac in attempt.strangers]
    for mac in dict.fromkeys(macs):
        if macs.count(mac) > 1:
            text += f"; {mac} answers for {macs.count(mac)} of them: is it a router with proxy ARP (or proxy NDP)?"
    return f"pool {pool}, NIC {attempt.request.nic}: {text}"
