"""The choice of cases from the matrix."""

from __future__ import annotations

from tests.matrix import COUNTS, FAMILIES, KINDS, MODES, full, pairs, pairwise


def test_all_cases_are_there_once() -> None:
    cases = full()
    assert len(cases) == len(set(cases)) == len(KINDS) * len(COUNTS) * len(FAMILIES) * len(MODES)
    assert len({str(case) for case in cases}) == len(cases)


def test_the_choice_has_every_pair_and_is_small() -> None:
    cases = full()
    chosen = pairwise(cases)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))
    # Three times each kind is the least, since each must meet three numbers.
    assert len(KINDS) * len(COUNTS) <= len(chosen) <= len(KINDS) * len(COUNTS) + 2
    assert chosen == [case for case in cases if case in chosen], "cases of a kind come one after the other"
