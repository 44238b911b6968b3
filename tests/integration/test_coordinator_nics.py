"""The part of the matrix that this machine's kernel can have: macvlans, of an underlay and beside an overlay's veth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.coordinator_node import Node
from tests.integration.coordinator_wire import run_case, serving_node
from tests.matrix import Case, full


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    with serving_node() as made:
        yield made


@pytest.mark.upstream("C00001", "C00002", "C00003", "C00004", "C00011", "C00012")
@pytest.mark.parametrize("case", full(["macvlan"]), ids=str)
def test_each_nic_answers_for_itself(here: Node, case: Case) -> None:
    run_case(here, case)
