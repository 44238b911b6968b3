"""Finding the claims that an event concerns: the index agrees with a look at all claims, and forgets what is gone."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from api.claim import LABEL_WORKLOAD, Claim
from api.mirror import is_mirrored
from api.reclaim import workload_key
from controller.reclaim.index import Index, holder_of
from controller.reclaim.suspects import Suspects

UIDS = ("u1", "u2", "")
SETS = ("db", "web", "")


def claim(number: int, uid: str, owner: str, node: str, state: str) -> Claim:
    version, kind = ("v1", "Node") if owner == "a-node" else ("apps/v1", "StatefulSet")
    controller = {"apiVersion": version, "kind": kind, "name": owner, "uid": "s"}
    workload: dict[str, Any] = {"namespace": "ns", "name": "p", **({"controller": controller} if owner else {})}
    spec = {"address": f"10.0.0.{number}", "ipVersion": 4, "pool": "p", "podUID": uid, "node": node, "state": state}
    labels = {LABEL_WORKLOAD: "w.x"} if owner else {}
    body = {"metadata": {"name": f"10.0.0.{number}", "labels": labels}, "spec": {**spec, "workload": workload}}
    return msgspec.convert(body, Claim)


claims = st.builds(
    claim,
    st.integers(1, 5),
    st.sampled_from(UIDS),
    st.sampled_from([*SETS, "a-node"]),
    st.sampled_from(["n1", "n2", ""]),
    st.sampled_from(["Allocated", "Quarantined"]),
)


@given(st.lists(st.one_of(claims, st.integers(1, 5))))
def test_the_index_agrees_with_a_look_at_all_claims(changes: list[Claim | int]) -> None:
    index, there = Index(), dict[str, Claim]()
    for change in changes:
        name = change.metadata.name if isinstance(change, Claim) else f"10.0.0.{change}"
        new = change if isinstance(change, Claim) else None
        old = there.pop(name, None)
        if old is None and new is None:
            continue
        if new is not None:
            there[name] = new
        index.claim_changed(old, new)
    for holder in {holder_of(each) for each in there.values()} | {*UIDS, "/10.0.0.1"}:
        assert sorted(index.claims(holder)) == sorted(n for n, each in there.items() if holder_of(each) == holder)
    for owner in SETS:
        key = ("ns", "StatefulSet", owner)
        assert set(index.waiting(key)) == {name for name, each in there.items() if workload_key(each) == key}
    for node in ("n1", "n2"):
        wanted = {name for name, e in there.items() if (not e.spec.pod_uid or is_mirrored(e)) and e.spec.node == node}
        assert set(index.on_node(node)) == wanted
    for each in list(there.values()):
        index.claim_changed(each, None)
    assert not any((index._claims, index._waiting, index._on_node))


def test_suspects_are_taken_when_they_are_due_and_once() -> None:
    suspects = Suspects()
    suspects.add("ns", "late", 10.0)
    suspects.add("ns", "soon", 5.0)
    suspects.add("ns", "late", 7.0)  # sooner counts
    suspects.add("ns", "late", 9.0)  # later does not
    suspects.add("other", "x", 0.0)
    assert suspects.next_due("ns") == 5.0
    assert suspects.take("ns", 6.0, 10) == ["soon"]
    assert suspects.take("ns", 6.9, 10) == []
    assert suspects.next_due("ns") == 7.0
    assert suspects.take("ns", 7.0, 10) == ["late"]
    assert suspects.next_due("ns") is None
    assert len(suspects) == 1
    for i in range(5):
        suspects.add("many", str(i), 0.0)
    assert len(suspects.take("many", 1.0, 2)) == 2
    assert suspects.next_due("many") == 0.0
    assert len(suspects.take("many", 1.0, 10)) == 3
