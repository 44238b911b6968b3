"""Which of upstream's records turn into claims, and who counts as an agent."""

from __future__ import annotations

import json

import pytest

from api.agents import ours_that_run, upstream_that_runs
from api.apps import DaemonSet, DaemonSetSpec, DaemonSetStatus, PodTemplate, TemplateMeta
from api.claim import LABEL_WORKLOAD, Claim, ClaimSpec, Controller, workload_label
from api.core import Pod, PodIP, PodSpec, PodStatus
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec, PoolStatus
from api.ranges import parse_address
from controller.adoption.decide import (
    Evidence,
    Record,
    RecordsError,
    Standing,
    Switches,
    claim_of,
    compare,
    records_of,
)

POOL = Pool(metadata=ObjectMeta(name="p"), spec=PoolSpec(subnet="10.1.0.0/16"))
ADDRESS = parse_address("10.1.0.5", 4)
VMI = Controller(api_version="kubevirt.io/v1", kind="VirtualMachineInstance", name="vm", uid="v")
SET = Controller(api_version="apps/v1", kind="StatefulSet", name="db", uid="s")
AGENT = {"app.kubernetes.io/component": "spiderpool-agent"}
OURS = AGENT | {"spiderpool.spidernet.io/records": "claims"}


def pod(name: str, uid: str = "u", phase: str = "Running", labels: dict[str, str] | None = None) -> Pod:
    meta = ObjectMeta(name=name, namespace="ns", uid=uid, labels=labels or {})
    return Pod(
        metadata=meta, spec=PodSpec(node_name="n1"), status=PodStatus(phase=phase, pod_ips=[PodIP(ip="10.1.0.5")])
    )


def endpoint(name: str, kind: str, *, nic: str = "net1", mac: str | None = None) -> Endpoint:
    entry = EndpointIP(interface=nic, ipv4="10.1.0.5/16", ipv6="fd00::5/64", ipv4_pool="p", mac=mac, vlan=9)
    current = EndpointCurrent(uid="u", node="n2", ips=[entry])
    status = EndpointStatus(current=current, owner_controller_type=kind, owner_controller_name="o")
    return Endpoint(metadata=ObjectMeta(name=name, namespace="ns"), status=status)


def test_a_virtual_machines_record_names_the_machine() -> None:
    record = Record(ADDRESS, "ns", "vm", "u")
    evidence = Evidence(pod("virt-launcher-1"), endpoint("vm", "VirtualMachineInstance", mac="0a:00:00:00:00:01"), VMI)
    claim = claim_of(record, POOL, evidence, Switches())
    assert claim is not None
    assert claim.metadata.labels[LABEL_WORKLOAD] == workload_label("ns", "vm")
    assert claim.spec.workload is not None
    assert (claim.spec.workload.name, claim.spec.workload.pod) == ("vm", "virt-launcher-1")
    assert (claim.spec.nic, claim.spec.node, claim.spec.set_size) == ("net1", "n1", 2)
    assert claim.spec.provided is not None
    assert (claim.spec.provided.mac, claim.spec.provided.vlan) == ("0a:00:00:00:00:01", 9)


def test_without_an_endpoint_the_pods_addresses_tell_its_first_nic() -> None:
    claim = claim_of(Record(ADDRESS, "ns", "a", "u"), POOL, Evidence(pod("a"), None, None), Switches())
    assert claim is not None
    assert (claim.spec.nic, claim.spec.set_size, claim.spec.provided) == ("eth0", 1, None)
    assert LABEL_WORKLOAD not in claim.metadata.labels


@pytest.mark.parametrize(
    ("evidence", "switches", "kept"),
    [
        (Evidence(None, endpoint("db-0", "StatefulSet"), SET, valid=True), Switches(), True),
        (Evidence(None, endpoint("db-0", "StatefulSet"), SET, valid=False), Switches(), False),
        (Evidence(None, endpoint("db-0", "StatefulSet"), SET, valid=True), Switches(stateful_sets=False), False),
        (Evidence(None, endpoint("db-0", "Pod"), None), Switches(), False),
        (Evidence(pod("db-0", phase="Succeeded"), None, SET), Switches(stateful_sets=False), True),
    ],
)
def test_who_keeps_an_address(evidence: Evidence, switches: Switches, kept: bool) -> None:
    assert (claim_of(Record(ADDRESS, "ns", "db-0", "u"), POOL, evidence, switches) is not None) is kept


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"10.1.0.5": {}}',
        '{"10.1.0.5": {"pod": "x"}}',
        '{"10.1.0.5": {"pod": "/x"}}',
        '{"x": {"pod": "a/b", "podUid": "u"}}',
        '{"10.1.0.5": {"pod": "a/b"}}',
        '{"10.1.0.5": {"pod": "a/b", "podUid": ""}}',
    ],
)
def test_unreadable_records(text: str) -> None:
    pool = Pool(metadata=POOL.metadata, spec=POOL.spec, status=PoolStatus(allocated_ips=text))
    with pytest.raises(RecordsError, match=r"status\.allocatedIPs"):
        records_of(pool)


def test_records() -> None:
    text = json.dumps({"10.1.0.5": {"pod": "ns/a", "podUid": "u"}, "fd00::5": {"pod": "ns/b", "podUid": "w"}})
    pool = Pool(metadata=POOL.metadata, spec=POOL.spec, status=PoolStatus(allocated_ips=text))
    assert [(str(each.address), each.name, each.pod_uid) for each in records_of(pool)] == [
        ("10.1.0.5", "a", "u"),
        ("fd00::5", "b", "w"),
    ]
    assert records_of(POOL) == []


def _claim(uid: str, *, state: str = "Allocated", label: str = "") -> Claim:
    spec = ClaimSpec(address="10.1.0.5", ip_version=4, pool="p", pod_uid=uid, state=state)  # type: ignore[arg-type]
    return Claim(metadata=ObjectMeta(name="10.1.0.5", labels={LABEL_WORKLOAD: label} if label else {}), spec=spec)


@pytest.mark.parametrize(
    ("found", "standing"),
    [
        (_claim("u"), Standing.SAME),
        (_claim("successor", label="w.1"), Standing.SAME),
        (_claim("dead"), Standing.STALE),
        (_claim("alive"), Standing.TAKEN),
        (_claim(""), Standing.TAKEN),
        (_claim("", state="Quarantined"), Standing.STALE),
    ],
)
def test_claims_that_are_there_already(found: Claim, standing: Standing) -> None:
    assert (
        compare(found, _claim("u", label="w.1"), lambda other: other.spec.pod_uid in ("alive", "successor")) is standing
    )


def daemon_set(labels: dict[str, str], wanted: int) -> DaemonSet:
    template = PodTemplate(metadata=TemplateMeta(labels=labels))
    return DaemonSet(
        metadata=ObjectMeta(name="ds", namespace="ns"),
        spec=DaemonSetSpec(template=template),
        status=DaemonSetStatus(desired_number_scheduled=wanted),
    )


@pytest.mark.parametrize(
    ("pods", "sets", "theirs", "ours"),
    [
        ([], [], [], []),
        ([pod("a", labels=AGENT)], [], ["Pod ns/a"], []),
        ([pod("a", labels=AGENT, phase="Succeeded"), pod("b", labels=AGENT, phase="Failed")], [], [], []),
        ([pod("a", labels=AGENT, phase="Pending")], [], ["Pod ns/a"], []),
        ([pod("a", labels=OURS)], [], [], ["Pod ns/a"]),
        ([pod("a", labels={"app": "x"})], [], [], []),
        ([], [daemon_set(AGENT, 1)], ["DaemonSet ns/ds"], []),
        ([], [daemon_set(AGENT, 0)], [], []),
        ([], [daemon_set(OURS, 3)], [], ["DaemonSet ns/ds"]),
    ],
)
def test_who_runs(pods: list[Pod], sets: list[DaemonSet], theirs: list[str], ours: list[str]) -> None:
    assert upstream_that_runs(pods, sets) == theirs
    assert ours_that_run(pods, sets) == ours
