"""Leaders that die, and API servers that go away: everything goes on, nobody is restarted, no event is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.kube.cluster import Cluster
from lab.kube.components import CONTROLLERS, ETCD, SERVER
from tests.integration.installation import Outcome
from tests.kube.conftest import running
from tests.kube.controller_rig import POOLS, eventually
from tests.kube.outage_rig import NODES, Pod, Site, furnish, site

LEASE = 5.0
"""Seconds of the controllers' lease in these tests."""
WORK = 5.0
"""Seconds that the new leader has for what is to be done, on a machine with other work."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as there:
        yield there


def test_what_a_dead_leader_had_to_do_is_done_within_the_lease(cluster: Cluster, tmp_path: Path) -> None:
    """A reclaim, an automatic pool and a repair that came to a leader too late, and such that came when it was dead."""
    with site(cluster, tmp_path) as there:
        leader = there.launch("one")
        there.ready(leader)
        eventually(20, lambda: there.holder() == "one", "the first one leads")
        furnish(there)
        standby = there.launch("two")
        there.ready(standby)
        pods = [there.pod(f"dead{n}", NODES[n % 2]) for n in range(4)]
        addresses = [there.add(pod) for pod in pods]
        kept = there.pod("kept", "node2")
        kept_address = there.add(kept)
        for name in ("lan-a", "lan-b"):
            there.network(name)

        leader.process.send_signal(signal.SIGSTOP)  # so that it certainly does nothing of what follows
        for pod in pods[:2]:
            there.delete(pod)
        there.application("early")
        there.spoil("lan-a")
        leader.stop(signal.SIGKILL)
        died = time.monotonic()
        for pod in pods[2:]:
            there.delete(pod)
        there.application("late")
        there.spoil("lan-b")

        eventually(LEASE + 1.5, lambda: there.holder() == "two", "the other leads")
        took = time.monotonic() - died
        eventually(WORK, lambda: all(there.free(address) for address in addresses), "addresses were reclaimed")
        eventually(WORK, lambda: there.has_network("lan-a") and there.has_network("lan-b"), "networks were repaired")
        eventually(2 * WORK, lambda: there.has_pool("early") and there.has_pool("late"), "pools were made")
        print(f"lease of {LEASE:g} s: led after {took:.1f} s, all done after {time.monotonic() - died:.1f} s")
        assert there.claims() == {kept_address: kept.uid}
        eventually(WORK, there.counted, "the pool's status is right")
        there.alive(standby)
        there.delete(kept)
        for name in ("early", "late"):
            there.ask(
                "DELETE", f"/apis/apps/v1/namespaces/default/deployments/{name}", {"propagationPolicy": "Background"}
            )
        eventually(30, lambda: there.claims() == {}, "all addresses are given back")


def outage(cluster: Cluster, folder: Path, seconds: float, *flags: str) -> None:
    """Both controllers and both agents through an outage of so many seconds, etcd's included."""
    with site(cluster, folder, *flags) as there:
        first, second = there.launch("one"), there.launch("two")
        there.ready(first, second)
        eventually(20, lambda: there.holder() in ("one", "two"), "somebody leads")
        furnish(there)
        run_outage(there, seconds)
        there.alive(first, second)
        for replica in (first, second):
            assert not replica.lines("cannot go on")
        eventually(40, lambda: [r.probe() for r in (first, second)] == [200, 200], "both are ready")


def run_outage(there: Site, seconds: float) -> None:
    cluster, key = there.cluster, f"o{seconds:g}".replace(".", "-")
    early = [there.pod(f"{key}-early{n}", NODES[n % 2]) for n in range(8)]
    addresses = {pod.name: there.add(pod) for pod in early}
    flying = [there.pod(f"{key}-flying{n}", NODES[n % 2]) for n in range(12)]
    hopeless = there.pod(f"{key}-hopeless", "node1")
    for name in (f"{key}-lan-a", f"{key}-lan-b"):
        there.network(name)

    calls = [(pod, there.start("ADD", pod)) for pod in flying]  # the server dies under their hands
    cluster.stop(SERVER, signal.SIGKILL)
    gone = time.monotonic()
    outcomes = {pod: Outcome(0, b"") for pod in flying}
    failed = there.call("ADD", hopeless)
    details = failed.error(11)
    print(f"an ADD fails after {time.monotonic() - gone:.1f} s: {details['msg']}: {details['details']}")
    for pod, process in calls:
        stdout, _ = process.communicate(timeout=90)
        outcomes[pod] = Outcome(process.returncode, stdout)
        if process.returncode:
            outcomes[pod].error(11)

    # Everything else goes on behind their backs, by another API server.
    with there.side() as side:
        for pod in early[:4]:
            there.delete(pod, side)
        there.application(f"{key}-app", side)
        there.spoil(f"{key}-lan-a", side)
        made = there.pod(f"{key}-made", "node2", side)
        time.sleep(max(0.0, gone + 0.7 * seconds - time.monotonic()))
    # And nobody can do anything, and etcd forgets the past: the watches' versions are unknown afterwards.
    cluster.stop(ETCD, signal.SIGKILL)
    time.sleep(max(0.0, gone + seconds - time.monotonic()))
    cluster.start(ETCD)
    cluster.compact()
    cluster.start(SERVER)
    back = time.monotonic()
    there.delete(early[4])
    there.spoil(f"{key}-lan-b")
    if not cluster.runs(CONTROLLERS):  # not ours, and it gives up
        cluster.start(CONTROLLERS)

    # Nothing is left of the ADDs that failed, and all is there of those that did not.
    begun = {pod.uid for pod, outcome in outcomes.items() if outcome.status == 0}
    wanted = {pod.uid for pod in early[5:]} | begun

    def settled() -> bool:
        return set(there.claims().values()) == wanted

    eventually(30, settled, "claims are those of pods that are there and have an answer")
    print(f"claims right {time.monotonic() - back:.1f} s after the return; {len(begun)} of 12 ADDs had been in time")
    for name in (f"{key}-lan-a", f"{key}-lan-b"):
        eventually(30, lambda name=name: there.has_network(name), f"{name} is repaired")  # type: ignore[misc]
    eventually(30, lambda: there.has_pool(f"{key}-app"), "the pool was made")
    eventually(30, there.counted, "the pool's status is right")
    print(f"all done {time.monotonic() - back:.1f} s after the return")
    for pod in [*flying, hopeless, made]:
        again(there, pod, outcomes.get(pod))
    assert {pod.name: there.add(pod) for pod in early[5:]} == {p.name: addresses[p.name] for p in early[5:]}
    assert len(set(there.claims().values())) == len(there.claims())
    tidy(there, [*early[5:], *flying, hopeless, made], f"{key}-app")


def again(there: Site, pod: Pod, before: Outcome | None) -> None:
    """The runtime tries again: it gets an address, and the same one if it had been given one."""
    address = there.add(pod)
    if before is not None and before.status == 0:
        assert before.json["ips"][0]["address"].partition("/")[0] == address


def tidy(there: Site, pods: list[Pod], application: str) -> None:
    for pod in pods:
        there.delete(pod)
        there.call("DEL", pod).empty()
    path = f"/apis/apps/v1/namespaces/default/deployments/{application}"
    there.ask("DELETE", path, {"propagationPolicy": "Background"})
    assert there.claims() == {}
    assert there.ask("GET", f"/apis/spiderpool.spidernet.io/v2beta1/{POOLS}/site")[0] == 200


@pytest.mark.timeout(240)  # most of it is starting and stopping programs, which a busy machine does slowly
def test_an_api_server_that_is_gone_for_a_while_is_waited_for(tmp_path: Path) -> None:
    with running() as cluster:
        outage(cluster, tmp_path, 8, "--ipam-add-deadline=4", "--ipam-rollback-deadline=2")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_an_api_server_that_is_gone_for_a_minute_is_waited_for(tmp_path: Path) -> None:
    """With all times as shipped."""
    with running() as cluster:
        outage(cluster, tmp_path, 60)
