"""The state of one ADD while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from api.claim import Claim
from api.ranges import Address, Family
from plugins.ipam.candidates import Candidates, PoolFacts
from plugins.ipam.config import Request
from plugins.ipam.view import PoolView


@dataclass(frozen=True, slots=True)
class Pick:
    """An address chosen and not yet claimed."""

    view: PoolView
    pool: PoolFacts
    address: Address


@dataclass(slots=True)
class Attempt:
    """What one ADD has got so far, and what must be undone if it fails."""

    request: Request
    netns_fd: int | None
    inode: int = 0
    candidates: dict[Family, Candidates] = field(default_factory=dict)
    claims: dict[Family, Claim] = field(default_factory=dict)
    """What the pod gets."""
    settled: bool = False
    """The set was complete before this ADD: it only asks again for what it was given."""
    sticky: set[Family] = field(default_factory=set)
    """Families whose address is not replaced when somebody else is found to use it."""
    quiet: bool = False
    """The network is not asked: the source of a live migration rightly uses the addresses."""
    wanted: set[Family] = field(default_factory=set)
    """Families of which pools are named, once that was looked up for inherited claims."""
    parent_mac: str = ""
    """MAC address of the NIC below, for the infrastructure provider; empty: it is not to be asked."""
    asked: bool = False
    """The infrastructure provider was asked about the claims."""
    pending: dict[asyncio.Task[Claim], Claim] = field(default_factory=dict)
    """Creations begun."""
    made: list[Claim] = field(default_factory=list)
    """Claims that this ADD created."""
    held: list[tuple[PoolView, int]] = field(default_factory=list)
    """Addresses in flight, until the ADD is over."""
    strangers: list[tuple[Address, str]] = field(default_factory=list)
    """Addresses found in use, with the MAC that answered."""
    suspects: list[tuple[Claim, str]] = field(default_factory=list)
    """Claims given up because the pool's gateway answers for their address, with its MAC: no quarantine yet."""
    routers: dict[str, str | None] = field(default_factory=dict)
    """Gateways to their MAC, as far as it was asked for."""
    collisions: int = 0


def same_claim(claim: Claim) -> Callable[[Claim], bool]:
    """Whether a claim read later is still this one and for this container, whatever a provider said meanwhile."""

    def same(other: Claim) -> bool:
        alike = replace(other.spec, provided=claim.spec.provided) == claim.spec
        return alike and claim.metadata.uid in ("", other.metadata.uid)

    return same
