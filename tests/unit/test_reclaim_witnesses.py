"""What the API server left out of a list is not gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.claim import Claim, ClaimSpec, Workload
from api.core import Pod
from api.meta import ObjectMeta, R
from api.reclaim import Switches
from controller.reclaim.absences import Absences
from controller.reclaim.index import Index
from controller.reclaim.witnesses import READ_ONE_BY_ONE, Fresh
from store.errors import InvalidError
from store.port import EVERYTHING, Listing, Query


class OnePodCannotBeRead:
    """A store whose lists of pods lack one that breaks our type."""

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        assert (kind, query.namespace) in ((Pod, "apps"), (Pod, ""))
        return Listing([], "1", ("Pod apps/odd",))


def claim(number: int, name: str) -> Claim:
    address = f"10.0.0.{number}"
    workload = Workload(namespace="apps" if name else "", name=name)
    spec = ClaimSpec(address=address, ip_version=4, pool="p", pod_uid=f"uid-{number}", workload=workload)
    return Claim(metadata=ObjectMeta(name=address), spec=spec)


@pytest.mark.parametrize(
    "claims",
    [[claim(n, f"pod-{n}") for n in range(READ_ONE_BY_ONE + 1)], [claim(1, "")]],
    ids=["many", "nameless"],
)
def test_nobody_is_judged_by_a_list_that_lacks_a_pod(claims: list[Claim]) -> None:
    store: Any = OnePodCannotBeRead()
    with pytest.raises(InvalidError, match="may not be taken for absent: Pod apps/odd"):
        asyncio.run(Fresh(store, Index(), Absences(Switches())).read_pods(claims))
