"""Interval arithmetic against Python's own sets."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import FreeSet, IPSet, parse_range

numbers = st.integers(0, 40)
intervals = st.lists(st.tuples(numbers, numbers).map(lambda p: (min(p), max(p))), max_size=6)


def members(ip_set: IPSet) -> set[int]:
    return {n for low, high in ip_set.intervals for n in range(low, high + 1)}


@given(intervals, intervals)
def test_set_algebra_is_that_of_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = IPSet(4, left), IPSet(4, right)
    assert members(a | b) == members(a) | members(b)
    assert members(a - b) == members(a) - members(b)
    assert members(a & b) == members(a) & members(b)
    assert (a <= b) == (members(a) <= members(b))
    assert a.count == len(members(a))
    for result in (a | b, a - b, a & b):
        pairs = zip(result.intervals, result.intervals[1:], strict=False)
        assert all(p[1] + 1 < q[0] for p, q in pairs), "intervals are disjoint and maximal"


@given(intervals, st.lists(st.tuples(st.booleans(), numbers), max_size=60))
def test_free_set_follows_a_set(start: list[tuple[int, int]], steps: list[tuple[bool, int]]) -> None:
    free, model = FreeSet(IPSet(4, start)), members(IPSet(4, start))
    random = Random(1)
    for put, number in steps:
        if put:
            assert free.put(number) == (number not in model)
            model.add(number)
        else:
            assert free.take(number) == (number in model)
            model.discard(number)
        assert free.count == len(model)
        assert {n for low, high in free for n in range(low, high + 1)} == model
        picked = free.pick(random)
        assert picked in model if model else picked is None
        scattered = free.scatter(random)
        assert scattered in model if model else scattered is None
        assert free.following(number) == min((n for n in model if n >= number), default=min(model, default=None))


def test_a_48_costs_what_a_28_costs() -> None:
    huge = IPSet.of_network("fd00::/48") - IPSet.parse(["fd00::5", "fd00::10-fd00::20"], 6)
    assert huge.count == 2**80 - 18
    assert len(huge.intervals) == 3
    free = FreeSet(huge)
    number = free.pick(Random(1))
    assert number is not None
    assert free.take(number)


@pytest.mark.parametrize(
    ("text", "family", "why"),
    [
        ("10.0.0.9-10.0.0.1", 4, "reversed"),
        ("10.0.0.1 - 10.0.0.9", 4, "not an IP address"),
        ("10.0.0.0/24", 4, "not an IP address"),
        ("fd00::1", 4, "family"),
        ("10.0.0.1-fd00::1", 4, "family"),
        ("", 4, "not an IP address"),
        ("fe80::1%eth0", 6, "zone"),
    ],
)
def test_malformed_ranges_say_why(text: str, family: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_range(text, family)  # type: ignore[arg-type]


def test_text_round_trip() -> None:
    assert IPSet.parse(["10.0.0.3", "10.0.0.1-10.0.0.2", "10.0.0.7"], 4).to_ranges() == [
        "10.0.0.1-10.0.0.3",
        "10.0.0.7",
    ]
