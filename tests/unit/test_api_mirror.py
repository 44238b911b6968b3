"""Whose pod it is that a claim names, where kubelet and API know the pod by different UIDs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from api.claim import Claim, ClaimSpec, Controller, Workload
from api.core import Pod
from api.meta import ObjectMeta
from api.mirror import MIRROR, is_mirrored, is_pod_of, uid_on_node

HASH = "b0bf0a1f5ab0a6e4a7bd2e63b4d3d9e3"
UID = "11111111-1111-4111-8111-111111111111"
NODE = Controller(api_version="v1", kind="Node", name="n1")


def pod(name: str = "web-n1", *, uid: str = UID, mirrors: str | None = None, namespace: str = "ns") -> Pod:
    annotations = {} if mirrors is None else {MIRROR: mirrors}
    return Pod(metadata=ObjectMeta(name=name, namespace=namespace, uid=uid, annotations=annotations))


def claim(uid: str, *, name: str = "web-n1", controller: Controller | None = NODE, named: bool = True) -> Claim:
    workload = Workload(namespace="ns", name=name, controller=controller) if named else None
    spec = ClaimSpec(address="10.0.0.1", ip_version=4, pool="p", pod_uid=uid, workload=workload)
    return Claim(metadata=ObjectMeta(name="10.0.0.1"), spec=spec)


def test_a_pod_is_known_on_its_node_by_the_uid_that_its_kubelet_gave_it() -> None:
    assert uid_on_node(pod(mirrors=HASH)) == HASH
    assert uid_on_node(pod()) == uid_on_node(pod(mirrors="")) == UID


@dataclass(frozen=True)
class Row:
    pod: Pod
    claim: Claim
    same: bool


ROWS = {
    "an ordinary pod, by its UID": Row(pod(), claim(UID), True),
    "another under its name": Row(pod(uid="22222222-2222-4222-8222-222222222222"), claim(UID), False),
    "one that was named wrongly by hand": Row(pod("other"), claim(UID), True),
    "one that was not named at all": Row(pod(), claim(UID, named=False), True),
    "a mirror, by what it mirrors": Row(pod(mirrors=HASH), claim(HASH), True),
    "a mirror, not by its own UID": Row(pod(mirrors=HASH), claim(UID), False),
    "the mirror of the file's next version": Row(pod(mirrors="another"), claim(HASH), False),
    "the mirror of another node, whose file is the same": Row(pod("web-n2", mirrors=HASH), claim(HASH), False),
    "what somebody calls a mirror of another's pod": Row(pod(mirrors=HASH, namespace="elsewhere"), claim(HASH), False),
    "a mirror, of a claim without a name": Row(pod(mirrors=HASH), claim(HASH, named=False), False),
}


@pytest.mark.parametrize("row", ROWS)
def test_whose_pod_it_is(row: str) -> None:
    assert is_pod_of(ROWS[row].pod, ROWS[row].claim) is ROWS[row].same


@pytest.mark.parametrize(
    ("controller", "mirrored"),
    [
        (NODE, True),
        (Controller(api_version="v1", kind="Pod", name="web"), False),
        (Controller(api_version="example.com/v1", kind="Node", name="n1"), False),
        (None, False),
    ],
)
def test_a_kubelets_own_pods_belong_to_their_node(controller: Controller | None, mirrored: bool) -> None:
    assert is_mirrored(claim(HASH, controller=controller)) is mirrored
    assert not is_mirrored(claim(HASH, named=False))
