"""What this agent believes to be free in the pools it uses.

A view is a hint for choosing and never a permission: only creating the claim is. It begins with what this agent has
itself, and goes on guessing as long as that pays; then it follows the pool's claims. It may be late in both directions;
an address that it wrongly offers costs one refused creation, and before it makes an ADD fail it is read afresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from itertools import islice
from random import Random
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

from api.claim import LABEL_POOL, Claim, claim_name, label_value
from api.ranges import FreeSet, IPSet, to_address
from plugins.ipam.candidates import PoolFacts
from plugins.ipam.concurrency import Coalesced
from plugins.ipam.guesses import Guesses
from store.errors import InvalidError, NotFoundError
from store.informer import Informer
from store.port import Query, Store

log = logging.getLogger(__name__)

_BATCH = 32
"""Claims read at a time when contested addresses are settled."""
_SPARSE = 10
"""A pool of which less than this part of one is taken is not followed for long: guesses cost less."""


class PoolView:
    """The free addresses of one pool: its addresses, less reserved, claimed, in flight and contested ones.

    *In flight* is an address that a running ADD of this agent has chosen and not yet got or given up. *Contested* is
    one whose claim somebody else turned out to have although no event has told of it: mostly the event is under way,
    and sometimes the claim names another pool (overlapping pools) and no event will ever come.
    """

    def __init__(
        self, store: Store, facts: PoolFacts, reserved: IPSet, random: Random, own: Iterable[Claim] = ()
    ) -> None:
        self._store = store
        self._random = random
        self._guesses = Guesses(random)
        self._query = Query(labels={LABEL_POOL: label_value(facts.name)})
        self.name = facts.name
        self.informer = Informer(store, Claim, self._query, on_change=self._changed)
        self.in_flight: set[int] = set()
        self.contested: dict[int, str] = {}
        """Number to the pool that the claim names, as far as that is known."""
        self.quarantined: dict[int, str] = {}
        """Number to the MAC address that answered; also those about to be written."""
        self.last_used = 0.0
        """Loop time at which somebody last wanted an address of it."""
        self._claimed: set[int] = set()
        """What the informer has."""
        self._own = {number for claim in own if (number := _number(claim)) is not None}
        """What this agent has, until all claims were seen."""
        self.followed = False
        """All claims are seen, or about to be."""
        self._settled = False
        self.waiters: set[asyncio.Future[None]] = set()
        """Done when an address may have become free."""
        self.refresh = Coalesced(self._read_afresh)
        """Read the pool's claims afresh, so that the view is no older than the call. Raises StoreError."""
        self.rebase(facts, reserved)

    def rebase(self, facts: PoolFacts, reserved: IPSet) -> None:
        """Follow a change of the pool's spec or of the reserved addresses."""
        self._facts = facts
        self._reserved_count = (facts.addresses & reserved).count
        self._base = facts.addresses - reserved
        self._free = FreeSet(self._base)
        for taken in (self._claimed, self._own, self.in_flight, self.contested):
            for number in taken:
                self._free.take(number)
        self._wake()

    @property
    def wanted(self) -> bool:
        """Whether it is time to follow the claims."""
        return not self.followed and not self._guesses.pay

    @property
    def usable(self) -> bool:
        """Whether to choose now, and not to see all claims first."""
        return self.informer.is_synced or self._guesses.bearable

    @property
    def sparse(self) -> bool:
        """Whether so little is taken that following it is not worth while."""
        return self.informer.is_synced and len(self._claimed) * _SPARSE < self._base.count

    def settle_in(self) -> None:
        """Once all claims are in view, what was known before counts no more."""
        if self._settled or not self.informer.is_synced:
            return
        self._settled = True
        before = {*self._own, *self.contested}
        self._own.clear()
        self.contested.clear()
        for number in before:
            self._offer(number)

    def learn(self, claim: Claim) -> None:
        """Take an own write in at once."""
        if self.followed:
            self.informer.learn(claim)
        if not self.informer.is_synced and (number := _number(claim)) is not None and number not in self._own:
            self._own.add(number)
            self._free.take(number)
            self._guesses.right()

    def forget(self, claim: Claim) -> None:
        """Take an own deletion in at once."""
        if self.followed:
            self.informer.forget(claim)
        if (number := _number(claim)) is not None and number in self._own:
            self._own.discard(number)
            self._offer(number)

    def pick(self) -> int | None:
        """Choose an address and hold it in flight until `done`; None if none is believed to be free.

        At random, once all claims were seen: then all agents see the same ones as free.
        """
        free = self._free
        number = free.pick(self._random) if self.informer.is_synced else self._guesses.pick(free)
        if number is not None:
            self.hold(number)
        return number

    def hold(self, number: int) -> None:
        """Put an address in flight that was chosen otherwise."""
        self._free.take(number)
        self.in_flight.add(number)

    def done(self, number: int) -> None:
        """The ADD is through with this address; whether it is free now follows from what is known of claims."""
        self.in_flight.discard(number)
        self._offer(number)

    def contest(self, number: int) -> None:
        """Somebody else has the claim of this address."""
        self._guesses.wrong()
        if number not in self._claimed:
            self.contested.setdefault(number, "")
            self._free.take(number)

    def contains(self, number: int) -> bool:
        """Whether the pool may give this address at all."""
        return number in self._base

    def may_quarantine(self, mac: str, cap: int, cap_per_mac: int) -> bool:
        """Whether the pool can bear another address in quarantine."""
        return len(self.quarantined) < cap and sum(m == mac for m in self.quarantined.values()) < cap_per_mac

    def describe(self) -> str:
        """The state of a pool that has no free address, for people."""
        total, quarantined = self._facts.addresses.count, len(self.quarantined)
        used = sum(number in self._facts.addresses for number in self._claimed.difference(self.quarantined))
        parts = [f"{used} of {total} in use" if total else "it has no addresses"]
        parts += [f"{quarantined} in quarantine"] if quarantined else []
        parts += [f"{self._reserved_count} reserved"] if self._reserved_count else []
        others = sum(number in self._base for number in self.contested)
        if others:
            pools = sorted({pool for pool in self.contested.values() if pool})
            parts.append(f"{others} held by claims of {'pool ' + ', '.join(pools) if pools else 'others'}")
        return f"{self.name}: full ({', '.join(parts)})"

    async def _read_afresh(self) -> None:
        listing = await self._store.list(Claim, self._query)
        present = {claim.metadata.name for claim in listing.items}
        seen = int(listing.resource_version)
        for claim in [c for c in self.informer.values() if c.metadata.name not in present]:
            if int(claim.metadata.resource_version) <= seen:
                self.informer.forget(claim)
        for claim in listing.items:
            self.informer.learn(claim)
        await self._settle()

    async def _settle(self) -> None:
        """Find out who has the contested addresses of which the pool's own claims say nothing."""
        numbers = iter([number for number in self.contested if number not in self._claimed])
        while batch := list(islice(numbers, _BATCH)):
            names = [claim_name(to_address(self._base.family, number)) for number in batch]
            claims = await asyncio.gather(*(self._read(name) for name in names))
            for number, claim in zip(batch, claims, strict=True):
                if claim is None:
                    self.contested.pop(number, None)
                    self._offer(number)
                elif isinstance(claim, InvalidError):
                    continue
                elif claim.metadata.labels.get(LABEL_POOL) == self._query.labels[LABEL_POOL]:
                    self.informer.learn(claim)
                elif number in self.contested:
                    self.contested[number] = claim.spec.pool

    async def _read(self, name: str) -> Claim | InvalidError | None:
        try:
            return await self._store.get(Claim, name)
        except NotFoundError:
            return None
        except InvalidError as error:  # it cannot be read, but it is there: the address is taken
            log.warning("claim %s is in the way: %s", name, error)
            return error

    def _changed(self, old: Claim | None, new: Claim | None) -> None:
        claim = new or old
        if claim is None:
            return
        number = _number(claim)
        if number is None:
            if old is None:
                log.warning("claim %s is on %r, which is no address", claim.metadata.name, claim.spec.address)
            return
        self.quarantined.pop(number, None)
        if new is not None:
            if new.spec.quarantine is not None:
                self.quarantined[number] = new.spec.quarantine.mac
            if old is None:
                self._claimed.add(number)
                self.contested.pop(number, None)
                self._free.take(number)
        else:
            self._claimed.discard(number)
            self._offer(number)

    def _offer(self, number: int) -> None:
        if (
            number in self._base
            and number not in self._claimed
            and number not in self._own
            and number not in self.in_flight
            and number not in self.contested
        ):
            self._free.put(number)
        self._wake()

    def _wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


def _number(claim: Claim) -> int | None:
    """The claim's address as a number; None if it is none, as it may be where somebody wrote a claim by hand.

    Not by `ipaddress`, which takes ten times as long: every agent does this for every claim of the pools that it uses.
    """
    family = AF_INET if claim.spec.ip_version == 4 else AF_INET6
    try:
        return int.from_bytes(inet_pton(family, claim.spec.address))
    except (OSError, ValueError):
        return None


async def any_change(views: Sequence[PoolView]) -> None:
    """Return after an address of one of the views may have become free."""
    waiter = asyncio.get_running_loop().create_future()
    for view in views:
        view.waiters.add(waiter)
    try:
        await waiter
    finally:
        for view in views:
            view.waiters.discard(waiter)


class Views:
    """The views of the pools that this agent uses."""

    def __init__(
        self,
        store: Store,
        reserved: Callable[[PoolFacts], IPSet],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        random: Random,
        own: Callable[[], Iterable[Claim]],
    ) -> None:
        self._store = store
        self._reserved = reserved
        self._spawn = spawn
        self._random = random
        self._own = own
        self._views: dict[str, PoolView] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def get(self, name: str) -> PoolView | None:
        """The pool's view, if there is one that has seen all claims once."""
        view = self._views.get(name)
        return view if view is not None and view.informer.is_synced else None

    def usable(self, facts: PoolFacts) -> PoolView | None:
        """The pool's view if an address is to be chosen from it now; None if all claims are to be seen first."""
        view = self._begun(facts)
        if view.wanted:
            self._follow(view)
        view.settle_in()
        return view if view.usable else None

    async def open(self, facts: PoolFacts) -> PoolView:
        """The pool's view after it has seen all claims once; it follows them from then on."""
        view = self._begun(facts)
        if not view.followed:
            self._follow(view)
        await view.informer.synced()
        view.settle_in()
        return view

    def _follow(self, view: PoolView) -> None:
        self._tasks[view.name] = self._spawn(view.informer.run())
        view.followed = True

    def _begun(self, facts: PoolFacts) -> PoolView:
        view = self._views.get(facts.name)
        if view is None:
            own = [claim for claim in self._own() if claim.spec.pool == facts.name]
            view = self._views[facts.name] = PoolView(self._store, facts, self._reserved(facts), self._random, own)
        view.last_used = asyncio.get_running_loop().time()  # also of who must wait until all claims are seen
        return view

    def rebase(self, facts: PoolFacts) -> None:
        """Follow a change of this pool, or of what is reserved in it."""
        view = self._views.get(facts.name)
        if view is not None:
            view.rebase(facts, self._reserved(facts))

    def names(self) -> list[str]:
        """The pools that are viewed."""
        return list(self._views)

    def learn(self, claim: Claim) -> None:
        """Take an own write in at once."""
        view = self._views.get(claim.spec.pool)
        if view is not None:
            view.learn(claim)

    def forget(self, claim: Claim) -> None:
        """Take an own deletion in at once."""
        view = self._views.get(claim.spec.pool)
        if view is not None:
            view.forget(claim)

    def close_idle(self, before: float) -> None:
        """Stop following the pools that were last used before that loop time, and those that are hardly used."""
        for name, view in list(self._views.items()):
            if (view.last_used < before or view.sparse) and not view.in_flight:
                del self._views[name]
                if task := self._tasks.pop(name, None):
                    task.cancel()
