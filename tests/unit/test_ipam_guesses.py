"""Guessing addresses: how many agents fill one pool of which each knows only its own part."""

from __future__ import annotations

from random import Random

import pytest

from api.ranges import FreeSet, IPSet
from plugins.ipam.guesses import Guesses

SIZE = 1000


class Guesser:
    """An agent that never sees claims."""

    def __init__(self, seed: int) -> None:
        self.free = FreeSet(IPSet(4, [(0, SIZE - 1)]))
        self.guesses = Guesses(Random(seed))
        self.failures = 0

    def allocate(self, taken: set[int]) -> int | None:
        """One address, by guesses; None if they do not pay any more."""
        while self.guesses.pay:
            number = self.guesses.pick(self.free)
            assert number is not None
            self.free.take(number)
            if number not in taken:
                self.guesses.right()
                taken.add(number)
                return number
            self.guesses.wrong()
            self.failures += 1
        return None


@pytest.mark.parametrize(("agents", "filled", "most"), [(1, SIZE, 0), (10, 500, 0.06), (50, 500, 0.15)])
def test_agents_fill_a_pool_without_seeing_each_other(agents: int, filled: int, most: float) -> None:
    failures = stopped = 0
    for seed in range(5):
        taken: set[int] = set()
        guessers = [Guesser(seed * 100 + number) for number in range(agents)]
        stopped += sum(guessers[number % agents].allocate(taken) is None for number in range(filled))
        failures += sum(guesser.failures for guesser in guessers)
    assert failures <= most * 5 * filled
    assert stopped <= 0.05 * 5 * filled


@pytest.mark.parametrize("used", [0.5, 0.95])
def test_guessing_ends_where_addresses_are_taken_here_and_there(used: float) -> None:
    for seed in range(20):
        taken = set(Random(seed).sample(range(SIZE), int(used * SIZE)))
        guesser = Guesser(seed)
        got = 0
        while guesser.allocate(taken) is not None:
            got += 1
            assert got < 100
        assert guesser.failures <= 4 + got / 4


def test_a_tenth_taken_here_and_there_is_guessed_around() -> None:
    taken = set(Random(1).sample(range(SIZE), SIZE // 10))
    guesser = Guesser(1)
    assert all(guesser.allocate(taken) is not None for _ in range(200))
    assert guesser.failures < 50


def test_nothing_is_free() -> None:
    assert Guesses(Random(1)).pick(FreeSet(IPSet(6))) is None
    guesses, free = Guesses(Random(1)), FreeSet(IPSet(6, [(2**64, 2**65)]))
    first = guesses.pick(free)
    assert first is not None
    assert first in free
    assert guesses.pick(FreeSet(IPSet(6))) is None
