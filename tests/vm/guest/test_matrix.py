"""The matrix on a kernel that has all kinds of NICs: a choice with every pair of values; all of it in soak tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from plugins.errors import InvalidConfigError
from tests.integration.coordinator_node import pod_state
from tests.integration.coordinator_wire import judge, run_case, underlay_pod
from tests.matrix import KINDS, Case, full, pairwise
from tests.vm.guest.matrix_node import BOND, GuestNode, guest_node
from tests.vm.guest.rig import cable, links, until

pytestmark = pytest.mark.timeout(300)
"""Seconds of a test with its fixtures, where the machine has other things to do as well; alone it takes a few."""
ELSEWHERE = ("macvlan",)
"""Kinds that are tested on this machine's own kernel, in tests/integration/test_coordinator_nics.py."""
NodeOf = Callable[[str], GuestNode]


@pytest.fixture(scope="module")
def node_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeOf]:
    """The node with NICs of a kind. It stays until another kind is wanted; the order of the tests minds that."""
    with ExitStack() as stack:
        there: list[GuestNode] = []

        def node_of(kind: str) -> GuestNode:
            if not there or there[-1].kind != kind:
                stack.close()
                there.append(stack.enter_context(guest_node(kind, str(tmp_path_factory.mktemp("ifacer")))))
            return there[-1]

        yield node_of


def test_an_ipvlan_has_its_masters_mac_and_no_other(node_of: NodeOf) -> None:
    here = node_of("ipvlan")
    pod = underlay_pod(here, "4")
    inside = pod_state(pod)
    with pytest.raises(InvalidConfigError, match="podMACPrefix: eth0 is an ipvlan"):
        here.add(pod, podMACPrefix="0a:1b")
    assert here.left() == ""
    assert pod_state(pod) == inside
    assert links(pod.name)["eth0"]["address"] == links()["node1"]["address"]
    here.remove(pod)


def case_on_its_node(node_of: NodeOf, case: Case) -> None:
    """Where a kind can have MAC addresses of its own, cases with several NICs have them with a prefix."""
    prefix = {} if case.kind == "ipvlan" or case.nics == 1 else {"podMACPrefix": "0a:1b"}
    run_case(node_of(case.kind), case, **prefix)


@pytest.mark.upstream("C00001", "C00002", "C00003", "C00004", "C00008", "C00011", "C00012")
@pytest.mark.parametrize("case", pairwise(full([kind for kind in KINDS if kind not in ELSEWHERE])), ids=str)
def test_each_nic_answers_for_itself(node_of: NodeOf, case: Case) -> None:
    case_on_its_node(node_of, case)


def test_a_bond_that_fails_over_keeps_all_paths(node_of: NodeOf) -> None:
    here = node_of("bond")
    pod = underlay_pod(here, "46")
    here.add(pod)
    here.add(pod, here.nic(pod, 1))
    chosen = Path(f"/sys/class/net/{BOND}/bonding/active_slave")
    active = chosen.read_text().strip()
    try:
        cable(active, "out")
        until(lambda: chosen.read_text().strip() not in (active, ""), "the bond goes on by its other NIC")
        judge(here, pod, 4, 6)
    finally:
        cable(active, "in")
        until(lambda: links()[active]["operstate"] == "UP", "the cable is back")
    here.remove(pod)


@pytest.mark.soak
@pytest.mark.parametrize("case", full(), ids=str)
def test_each_nic_answers_for_itself_in_all_cases(node_of: NodeOf, case: Case) -> None:
    case_on_its_node(node_of, case)
