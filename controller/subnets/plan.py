"""How an automatic pool comes to its size, step by step. Pure.

A pool never has an address that the ledger does not give it, and the ledger takes no address from a pool that still
has it: both are checked by versions, so that neither a crash between two writes nor a second leader can give one
address to two pools.

* To grow, the ledger takes free addresses, then the pool gets them.
* To shrink, the ledger marks addresses that no claim holds; the pool loses them; those that were claimed meanwhile are
  kept until the claim is gone, the others are free.
* What the ledger gives and the pool never got, and is too much by now, is marked and then free as well.

Who adds addresses to a pool has read it when the ledger did not mark them. Between the mark and their freedom lies a
write of the pool (of an annotation, if it has not got them), so whoever was that late finds it in another version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from api.autopools import lowest
from api.claim import Claim
from api.ledger import Grant
from api.ranges import Family, IPSet, parse_address


class Step(Enum):
    """What is to be done next."""

    REPAIR = auto()
    """The pool has addresses that the ledger does not give it: the ledger is wrong."""
    GROW = auto()
    WRITE = auto()
    """The pool is to have what the ledger says."""
    TRIM = auto()
    """The ledger gives more than the pool has, and than it is to have."""
    RELEASE = auto()
    """Addresses that the pool has lost can be free, unless claims hold them."""
    SHRINK = auto()
    DONE = auto()


def next_step(have: IPSet, grant: Grant, size: int, *, kept: IPSet) -> Step:
    """The step from what the pool has to `size` addresses; `kept` are those that claims are known to hold."""
    if not have <= grant.ips:
        return Step.REPAIR
    if size > grant.pool.count:
        return Step.GROW
    if have != grant.pool:
        return Step.TRIM if size < grant.pool.count and grant.pool - have else Step.WRITE
    if grant.releasing - kept:
        return Step.RELEASE
    if size < grant.pool.count:
        return Step.SHRINK
    return Step.DONE


@dataclass(frozen=True, slots=True)
class Shortage:
    """The subnet has not enough free addresses."""

    required: int
    left: int


def grown(grant: Grant, size: int, free: IPSet, avoided: Callable[[int], bool]) -> Grant | Shortage:
    """The grant with `size` addresses for the pool: first those that it was to give back, then the lowest free ones."""
    missing = size - grant.pool.count
    back = lowest(grant.releasing, min(missing, grant.releasing.count), _none_avoided) or IPSet(free.family)
    missing -= back.count
    new = lowest(free, missing, avoided)
    if new is None:
        return Shortage(missing, free.count)
    return replace(grant, ips=grant.ips | new, releasing=grant.releasing - back)


def shrunk(grant: Grant, size: int, held: IPSet) -> Grant:
    """The grant that marks what the pool is to lose: its lowest addresses that are not held, if there are any."""
    idle = grant.pool - held
    drop = lowest(idle, min(grant.pool.count - size, idle.count), _none_avoided) or IPSet(grant.ips.family)
    return replace(grant, releasing=grant.releasing | drop)


def trimmed(grant: Grant, size: int, have: IPSet) -> Grant:
    """The grant that marks what is too much and the pool never got."""
    extra = grant.pool - have
    drop = lowest(extra, min(grant.pool.count - size, extra.count), _none_avoided) or IPSet(grant.ips.family)
    return replace(grant, releasing=grant.releasing | drop)


def released(grant: Grant, held: IPSet) -> Grant:
    """The grant without what the pool has lost and no claim holds."""
    kept = grant.releasing & held
    return replace(grant, ips=grant.ips - (grant.releasing - kept), releasing=kept)


def held_by(claims: Iterable[Claim], family: Family) -> IPSet:
    """The addresses of claims; those that nobody can read hold none."""
    found = []
    for claim in claims:
        if claim.spec.ip_version == family:
            try:
                number = int(parse_address(claim.spec.address, family))
            except ValueError:
                continue
            found.append((number, number))
    return IPSet(family, found)


def _none_avoided(number: int) -> bool:  # noqa: ARG001
    return False
