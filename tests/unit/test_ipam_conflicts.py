"""Conflicts known by small steps are those that are found by looking at everything."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.conflicts import pool_conflicts
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec
from plugins.ipam import conflicts
from plugins.ipam.conflicts import Conflicts

SUBNETS = ["10.0.0.0/28", "10.0.0.0/29", "10.0.0.16/28", "10.0.0.0/24", "fd00::/125", "fd00::/126", "nonsense"]
BIRTH = datetime(2026, 1, 1, tzinfo=UTC)


def pool(name: int, subnet: str, ranges: list[tuple[int, int]], age: int, uid: object = "") -> Pool:
    base = "fd00::{:x}" if ":" in subnet else "10.0.0.{}"
    ips = [f"{base.format(low)}-{base.format(low + more)}" for low, more in ranges]
    born = BIRTH + timedelta(seconds=age)
    meta = ObjectMeta(name=f"p{name}", uid=f"u{uid}-{name}", creation_timestamp=born)
    return Pool(metadata=meta, spec=PoolSpec(subnet=subnet, ips=ips))


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=2)
STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([*SUBNETS, None]), RANGES, st.integers(0, 3), st.booleans()),
    max_size=25,
)


@given(STEPS)
@example([(0, SUBNETS[0], [], 1, False), (1, SUBNETS[1], [], 0, True), (0, SUBNETS[0], [], 0, True)])
def test_steps_and_a_look_at_everything_agree(steps: list[tuple[int, str | None, Any, int, bool]]) -> None:
    there: dict[str, Pool] = {}
    known = Conflicts(there.values)
    for number, (name, subnet, ranges, age, look) in enumerate(steps):
        old = there.pop(f"p{name}", None)
        new = None if subnet is None else pool(name, subnet, ranges, age, number)
        if new is not None:
            there[f"p{name}"] = new
        known.changed(old, new)
        if look:
            assert known.now() == pool_conflicts(there.values())
    assert known.now() == pool_conflicts(there.values())


def test_without_conflicts_nobody_looks_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {f"p{i}": pool(i, "10.0.0.0/24", [(2 * i, 0)], 0) for i in range(100)}
    known = Conflicts(there.values)
    looks: list[int] = []

    def look(pools: Iterable[Pool]) -> dict[str, str]:
        looks.append(1)
        return pool_conflicts(pools)

    monkeypatch.setattr(conflicts, "pool_conflicts", look)
    for each in there.values():
        known.changed(None, each)
    for i in range(100):
        known.changed(there[f"p{i}"], pool(i, "10.0.0.0/24", [(2 * i + 1, 0)], 0))
        assert known.now() == {}
    assert not looks
