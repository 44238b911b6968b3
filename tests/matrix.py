"""The matrix of pods that the coordinator must serve: kinds of NICs, how many, families, modes; all or pairwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import NamedTuple

KINDS = ("macvlan", "ipvlan", "sriov", "vlan", "macvlan-on-vlan", "bond")
"""`vlan`: the VLAN sub-interface itself is in the pod; `macvlan-on-vlan`: it stays on the node, made by ifacer, as is
the bond."""
COUNTS = (1, 2, 3)
FAMILIES = ("4", "6", "46")
MODES = ("underlay", "overlay")


class Case(NamedTuple):
    """A pod."""

    kind: str
    nics: int
    """NICs of that kind. In an overlay the pod's first NIC is another one, the overlay's."""
    families: str
    mode: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.nics}-v{self.families}-{self.mode}"


def full(kinds: Sequence[str] = KINDS) -> list[Case]:
    """All cases, those of a kind together."""
    return [Case(*values) for values in product(kinds, COUNTS, FAMILIES, MODES)]


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """A choice with every pair of values that occurs in `cases`: next is always the case with most pairs still missing.

    Among equals it is the one whose values were chosen least, so that all numbers and families have their share. The
    order is that of `cases`.
    """
    left = list(cases)
    missing = set().union(*map(pairs, left))
    chosen: list[Case] = []
    while missing:
        best = max(left, key=lambda case: (len(pairs(case) & missing), -_worn(case, chosen)))
        chosen.append(best)
        missing -= pairs(best)
    return [case for case in left if case in chosen]


def _worn(case: Case, chosen: Iterable[Case]) -> int:
    return sum(own == other for earlier in chosen for own, other in zip(case, earlier, strict=True))


def pairs(case: Case) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    """Any two of its values, each with its place."""
    return set(combinations(enumerate(case), 2))
