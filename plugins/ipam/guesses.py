"""Choosing addresses of a pool without having seen its claims. Pure.

To see a pool's claims an agent has to hear of every allocation that any other makes, which is what an allocation costs
most where many allocate. Most of the time it need not: creating the claim tells whether an address was free, and a
good guess mostly is. An agent goes on from the address that it got last, and starts somewhere else, at random, when it
hits on somebody else's. So agents that fill a pool each have a stretch of their own, and meet when little is left.
"""

from __future__ import annotations

from random import Random

from api.ranges import FreeSet

_CREDIT = 4.0
"""Failures that are borne at first. A list of a thousand claims costs the API server what it costs to refuse dozens."""
_MOST = 6.0
"""Failures in a row at most, before the claims are asked for."""
_EARNED = 0.25
"""Failures borne for each address that was got: so seeing the claims costs less than guessing where more than a fifth
of the addresses is taken here and there."""
_MEANWHILE = 4.0
"""Failures borne while the claims are being read, rather than to wait for them."""


class Guesses:
    """Where to guess next in one pool, and whether that still pays."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._next: int | None = None
        self._credit = _CREDIT

    @property
    def pay(self) -> bool:
        """Whether to go on guessing, and not to see the claims."""
        return self._credit >= 1

    @property
    def bearable(self) -> bool:
        """Whether to go on guessing until the claims were read."""
        return self._credit >= 1 - _MEANWHILE

    def pick(self, free: FreeSet) -> int | None:
        """An address of `free`, those that are not known to be taken; None if there is none."""
        number = free.scatter(self._random) if self._next is None else free.following(self._next)
        if number is not None:
            self._next = number + 1
        return number

    def right(self) -> None:
        """An address that was guessed was free."""
        self._credit = min(_MOST, self._credit + _EARNED)

    def wrong(self) -> None:
        """Somebody else had it."""
        self._credit -= 1
        self._next = None
