"""Which NICs the infrastructure provider decides about, and asking it in an ADD or DEL.

Those whose SpiderMultusConfig is of type `vlan` with `vlanMode: auto`: the provider answers which MAC address and which
VLAN the pod's NIC must have. Unlike with upstream, a failed ADD takes its request back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from api.claim import Claim, Provided
from api.multusconfig import MultusConfig, MultusConfigSpec
from plugins.errors import ProviderError
from plugins.ipam.candidates import PoolFacts
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import network_of
from store.errors import NotFoundError, UnavailableError
from store.port import Store
from store.provider import ProviderClient


class Provider:
    """Asks the provider about NICs of one node."""

    def __init__(self, store: Store, settings: IpamSettings, client: ProviderClient) -> None:
        self._store = store
        self._settings = settings
        self._client = client

    async def parent_mac(self, facts: PodFacts, nic: str) -> str:
        """MAC address of the node's NIC below the pod's, if the provider has to be asked about that; empty otherwise.

        Raises ProviderError if the NIC below cannot be read, StoreError.
        """
        network, _ = network_of(nic, facts, self._settings)
        namespace, _, name = network.partition("/")
        if not name:
            return ""
        try:
            config = await self._store.get(MultusConfig, name, namespace)
        except NotFoundError:
            return ""
        link = parent_link(config.spec)
        if not link:
            return ""
        try:
            return await asyncio.to_thread(_mac_of, link)
        except OSError as error:
            raise ProviderError(
                "the NIC below the pod's cannot be read",
                f"{link}, named by SpiderMultusConfig {network}: {error.strerror}",
            ) from None

    async def allocate(self, claims: Sequence[Claim], deadline: float) -> list[Claim]:
        """The claims with the provider's answers, not yet written; `deadline` is loop time. Raises ProviderError."""
        try:
            return await self._client.allocate(claims, deadline)
        except UnavailableError as error:
            raise ProviderError(
                "the infrastructure provider could not be asked for the addresses", str(error)
            ) from None

    async def release(self, claim: Claim) -> None:
        """Unbind the claim's address. Raises ProviderError, and then it may still be bound."""
        try:
            await self._client.release(claim)
        except UnavailableError as error:
            raise ProviderError(
                "the infrastructure provider could not be told of the release", f"{claim.spec.address}: {error}"
            ) from None


def parent_link(spec: MultusConfigSpec) -> str:
    """The node's NIC below the pod's, if the provider decides on the VLAN; empty otherwise."""
    vlan = spec.vlan
    if spec.cni_type != "vlan" or vlan is None or vlan.vlan_mode != "auto" or not vlan.master:
        return ""
    if len(vlan.master) == 1:
        return vlan.master[0]
    return vlan.bond.name if vlan.bond is not None else ""


def to_be_provided(claim: Claim, parent_mac: str, pool: PoolFacts | None) -> Claim:
    """The claim with what the provider must know; the same without `parent_mac`, or if it has that already."""
    if not parent_mac or claim.spec.provided is not None or pool is None:
        return claim
    return replace(claim, spec=replace(claim.spec, provided=Provided(subnet=str(pool.network), parent_mac=parent_mac)))


def _mac_of(link: str) -> str:
    if "/" in link or link in (".", ".."):
        raise OSError(0, "it is not a NIC's name", link)
    with open(f"/sys/class/net/{link}/address") as file:
        return file.read().strip()
