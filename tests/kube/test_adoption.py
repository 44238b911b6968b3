"""From upstream and back: its records become claims, and claims its records, on a real API server.

The records and endpoints are written as upstream writes them, and sometimes as it should not. What its own agents write
is in test_upstream_swap.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from api.claim import LABEL_WORKLOAD, Claim, ClaimSpec, Workload, claim_name, identity_label, workload_label
from api.endpoint import Endpoint
from api.meta import ObjectMeta
from api.mirror import MIRROR, is_mirrored
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool
from api.views import has_foreign_records
from controller.adoption.adopt import Adopter, AdoptionRoom
from controller.adoption.decide import Switches
from controller.adoption.hand_back import HandBackError, hand_back
from controller.adoption.settings import AdoptionSettings
from controller.caches import Caches
from controller.room import Desk
from lab.kube.cluster import Cluster
from lab.layout import LabError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Store
from store.recorder import Recorder
from tests.kube.history_child import CALM
from tests.kube.history_play import DURING
from tests.kube.history_processes import DiedError, Nursery, process
from tests.kube.ipam_pods import Watched
from tests.kube.store_rig import empty

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NS = "adopt"
NODE = "adopt-node"
"""It has to exist: pods of nodes that are gone are collected after 40 s."""
UPSTREAM = {"app.kubernetes.io/component": "spiderpool-agent", "app.kubernetes.io/name": "spiderpool"}
OURS = UPSTREAM | {"spiderpool.spidernet.io/records": "claims"}
SETTINGS = AdoptionSettings(retry=0.1)


class Site:
    """The cluster, in which upstream has worked."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def apply(self, *documents: dict[str, Any], subresource: str = "") -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
        flags = [f"--subresource={subresource}", "--validate=false"] if subresource else []
        self.cluster.kubectl("apply", "--server-side", "--force-conflicts", *flags, "-f", "-", stdin=text)

    def pod(
        self,
        name: str,
        *,
        labels: dict[str, str] | None = None,
        owner: dict[str, Any] | None = None,
        mirrors: str = "",
    ) -> str:
        """A pod on a node without a kubelet; its UID. `mirrors` is the UID that a kubelet knows its static pod by."""
        meta: dict[str, Any] = {"name": name, "namespace": NS, "labels": labels or {"app": "x"}}
        if mirrors:
            meta["annotations"] = {MIRROR: mirrors}
            node = self.cluster.kubectl("get", "node", NODE, "-o", "jsonpath={.metadata.uid}")
            owner = {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": node}
        if owner:
            meta["ownerReferences"] = [owner | {"controller": True}]
        spec = {"containers": [{"name": "c", "image": "lab.invalid/none:1"}], "nodeName": NODE}
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        return self.uid("pod", name)

    def uid(self, kind: str, name: str) -> str:
        return self.cluster.kubectl("-n", NS, "get", kind, name, "-o", "jsonpath={.metadata.uid}")

    def delete_pod(self, name: str) -> None:
        self.cluster.kubectl("-n", NS, "delete", "pod", name, "--force", "--grace-period=0", "--ignore-not-found")

    def stateful_set(self, name: str, replicas: int) -> str:
        """A StatefulSet that the controllers leave alone, since its pods can never be made; its UID."""
        template = {
            "metadata": {"labels": {"app": name}},
            "spec": {"containers": [{"name": "c", "image": "lab.invalid/none:1"}], "serviceAccountName": "nobody"},
        }
        spec = {"replicas": replicas, "serviceName": name, "selector": {"matchLabels": {"app": name}}}
        meta = {"name": name, "namespace": NS}
        self.apply(
            {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": spec | {"template": template}}
        )
        return self.uid("statefulset", name)

    def pool(self, name: str, third: int, records: dict[str, tuple[str, str]]) -> None:
        """A pool with upstream's records: last byte of the address to pod (or virtual machine) and UID."""
        spec = {
            "subnet": f"10.88.{third}.0/24",
            "ipVersion": 4,
            "ips": [f"10.88.{third}.10-10.88.{third}.200"],
            "gateway": f"10.88.{third}.1",
            "routes": [{"dst": "10.9.0.0/16", "gw": f"10.88.{third}.2"}],
        }
        kind = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderIPPool"}
        meta = {"name": name, "finalizers": ["spiderpool.spidernet.io"]}
        self.apply(kind | {"metadata": meta, "spec": spec})
        told = {f"10.88.{third}.{last}": {"pod": f"{NS}/{pod}", "podUid": uid} for last, (pod, uid) in records.items()}
        status = {"allocatedIPs": json.dumps(told), "allocatedIPCount": len(told), "totalIPCount": 191}
        self.apply(kind | {"metadata": {"name": name}, "status": status}, subresource="status")

    def endpoint(self, name: str, uid: str, pool: str, address: str, owner: tuple[str, str], **entry: Any) -> None:
        """A SpiderEndpoint with its finalizer."""
        gateway = address.rpartition(".")[0] + ".1"
        ip = {"interface": "eth0", "ipv4": f"{address}/24", "ipv4Pool": pool, "ipv4Gateway": gateway, "vlan": 0}
        routes = [{"dst": "10.9.0.0/16", "gw": address.rpartition(".")[0] + ".2"}]
        current = {"uid": uid, "node": NODE, "ips": [ip | {"cleanGateway": False, "routes": routes} | entry]}
        meta: dict[str, Any] = {"name": name, "namespace": NS, "finalizers": ["spiderpool.spidernet.io"]}
        if owner[0] not in ("StatefulSet", "VirtualMachineInstance"):
            meta["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]
        self.apply(
            {
                "apiVersion": "spiderpool.spidernet.io/v2beta1",
                "kind": "SpiderEndpoint",
                "metadata": meta,
                "status": {"current": current, "ownerControllerType": owner[0], "ownerControllerName": owner[1]},
            }
        )


@pytest.fixture(scope="module")
def cluster(kube: Cluster) -> Iterator[Cluster]:
    kube.kubectl("create", "namespace", NS)
    kube.kubectl(
        "create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    )
    empty(kube)
    try:
        yield kube
    finally:
        empty(kube)
        kube.kubectl("delete", "namespace", NS, "--wait=false")
        kube.kubectl("delete", "node", NODE)


@pytest.fixture
def site(cluster: Cluster) -> Iterator[Site]:
    try:
        yield Site(cluster)
    finally:
        for kind in ("statefulset", "daemonset", "pod"):
            cluster.kubectl("-n", NS, "delete", kind, "--all", "--force", "--grace-period=0")
        empty(cluster)


async def opened(cluster: Cluster) -> KubeStore:
    return await KubeStore.open(KubeSettings(kubeconfig=cluster.place.kubeconfig("admin")))


def adopted(cluster: Cluster) -> tuple[bool, dict[str, str], dict[str, Claim]]:
    """One pass: whether all is done, what is in its way, and the claims by address."""

    async def work() -> tuple[bool, dict[str, str], dict[str, Claim]]:
        store = await opened(cluster)
        try:
            adopter = Adopter(store, SETTINGS, Switches())
            done = await adopter.adopt_all()
            claims = {claim.spec.address: claim for claim in (await store.list(Claim)).items}
            return done, adopter.troubles, claims
        finally:
            await store.close()

    return asyncio.run(work())


def read_pool(cluster: Cluster, name: str) -> Pool:
    async def work() -> Pool:
        store = await opened(cluster)
        try:
            return await store.get(Pool, name)
        finally:
            await store.close()

    return asyncio.run(work())


def mixed(site: Site) -> dict[str, str]:
    """A live pod, a leaked record, a retained and a superfluous pod of a StatefulSet; the UIDs."""
    live = site.pod("web")
    of_set = site.stateful_set("db", 1)
    site.pool(
        "p1", 1, {"10": ("web", live), "11": ("leaked", "uid-leaked"), "12": ("db-0", "uid-db"), "13": ("db-7", "u7")}
    )
    site.endpoint("web", live, "p1", "10.88.1.10", ("Pod", "web"))
    site.endpoint("db-0", "uid-db", "p1", "10.88.1.12", ("StatefulSet", "db"))
    site.endpoint("db-7", "u7", "p1", "10.88.1.13", ("StatefulSet", "db"), interface="net1")
    return {"web": live, "db": of_set}


def test_records_become_claims_and_claims_authoritative(site: Site) -> None:
    uids = mixed(site)
    assert has_foreign_records(read_pool(site.cluster, "p1"))
    done, troubles, claims = adopted(site.cluster)
    assert (done, troubles) == (True, {})
    assert set(claims) == {"10.88.1.10", "10.88.1.12"}
    web, db = claims["10.88.1.10"], claims["10.88.1.12"]
    assert (web.spec.pod_uid, web.spec.nic, web.spec.node, web.spec.pool) == (uids["web"], "eth0", NODE, "p1")
    assert web.spec.workload is not None
    assert (web.spec.workload.namespace, web.spec.workload.name) == (NS, "web")
    assert LABEL_WORKLOAD not in web.metadata.labels
    assert web.metadata.labels["ipam.spidernet.io/identity"] == identity_label(uids["web"], "")
    assert db.metadata.labels[LABEL_WORKLOAD] == workload_label(NS, "db-0")
    assert db.spec.workload is not None
    assert db.spec.workload.controller is not None
    assert (db.spec.workload.controller.kind, db.spec.workload.controller.uid) == ("StatefulSet", uids["db"])
    assert db.spec.pod_uid == "uid-db"
    pool = read_pool(site.cluster, "p1")
    assert pool.metadata.annotations[ANNOTATION_CLAIMS] == CLAIMS_AUTHORITATIVE
    assert not has_foreign_records(pool)
    assert adopted(site.cluster)[0]  # nothing is left to do


def test_static_pods_are_known_by_another_uid_here_and_by_the_apis_there(site: Site) -> None:
    """Upstream records the UID of the mirror, which may have been made anew since; its kubelet names its own."""
    mirror = site.pod("etcd", mirrors="of-the-file")
    site.pool("p1", 1, {"10": ("etcd", "of-the-mirror-before"), "11": ("scheduler", "of-one-that-is-gone")})
    done, troubles, claims = adopted(site.cluster)
    assert (done, troubles) == (True, {})
    (claim,) = claims.values()
    assert (claim.spec.address, claim.spec.pod_uid, is_mirrored(claim)) == ("10.88.1.10", "of-the-file", True)

    async def back() -> Pool:
        store = await opened(site.cluster)
        try:
            assert await hand_back(store) == []
            return await store.get(Pool, "p1")
        finally:
            await store.close()

    status = asyncio.run(back()).status
    assert status is not None
    assert json.loads(status.allocated_ips or "") == {"10.88.1.10": {"pod": f"{NS}/etcd", "podUid": mirror}}


def test_not_while_an_agent_of_upstream_may_write(site: Site) -> None:
    live = site.pod("web")
    site.pool("p1", 1, {"10": ("web", live)})
    site.pod("their-agent", labels=UPSTREAM)
    site.pod("our-agent", labels=OURS)
    done, troubles, claims = adopted(site.cluster)
    assert (done, claims) == (False, {})
    assert f"Pod {NS}/their-agent" in troubles["p1"]
    assert "our-agent" not in troubles["p1"]
    assert has_foreign_records(read_pool(site.cluster, "p1"))
    site.delete_pod("their-agent")
    assert adopted(site.cluster)[0]


def test_the_room_adopts_as_soon_as_upstreams_agents_are_gone(site: Site) -> None:
    live = site.pod("web")
    site.pod("their-agent", labels=UPSTREAM)

    async def work() -> str:
        store = await opened(site.cluster)
        events = Recorder(store, "adoption-test")
        caches = Caches(store)
        room = AdoptionRoom(Desk(store, caches, events, NS), SETTINGS, Switches())
        tasks = [asyncio.create_task(work) for work in (caches.run(), events.run(), room.run())]
        try:
            await asyncio.to_thread(site.pool, "p1", 1, {"10": ("web", live)})

            async def told() -> bool:
                found = await asyncio.to_thread(site.cluster.kubectl, "get", "events", "-A", "-o", "json")
                return any(each["reason"] == "NotAdopted" for each in json.loads(found)["items"])

            async def marked() -> bool:
                return not has_foreign_records(await store.get(Pool, "p1"))

            await _until(told)
            assert not await marked()
            await asyncio.to_thread(site.delete_pod, "their-agent")
            await _until(marked)
            return (await store.get(Claim, "10.88.1.10")).spec.pod_uid
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()

    assert asyncio.run(work()) == live


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 (the API server is another process)
            await asyncio.sleep(0.1)


def test_records_that_cannot_be_read_are_not_guessed(site: Site) -> None:
    live = site.pod("web")
    site.pool("bad", 1, {"10": ("web", live)})
    kind = {"apiVersion": "spiderpool.spidernet.io/v2beta1", "kind": "SpiderIPPool", "metadata": {"name": "bad"}}
    site.apply(kind | {"status": {"allocatedIPs": '{"10.88.1.10": {"pod": "web"}}'}}, subresource="status")
    site.pool("good", 2, {"10": ("web", live)})
    done, troubles, claims = adopted(site.cluster)
    assert not done
    assert set(troubles) == {"bad"}
    assert "'web' is not NAMESPACE/NAME" in troubles["bad"]
    assert set(claims) == {"10.88.2.10"}


@pytest.mark.timeout(300)
def test_killed_at_every_call(site: Site, tmp_path: Path) -> None:
    """Adoption and the way back, killed with -9 after and during each of their calls to the API in turn."""
    mixed(site)
    nursery = Nursery()
    try:
        forth, back = asyncio.run(_killed_at_every_call(site, nursery, str(tmp_path)))
    finally:
        nursery.close()
    print(f"killed after and during each of {forth} calls, and {back} on the way back")
    assert forth >= 7  # pools, agents, pods, endpoints; two claims and a mark
    assert back >= 10  # pods, agents, pools, claims; records, two endpoints, mark, two claims


async def _killed_at_every_call(site: Site, nursery: Nursery, folder: str) -> tuple[int, int]:
    """How many calls each of the two makes."""
    kubeconfig = site.cluster.place.kubeconfig("admin")
    config = {"role": "adopter", "kubeconfig": kubeconfig, "log": f"{folder}/log", "attempt": CALM}
    store = await opened(site.cluster)
    calls = {"adopt": 0, "hand back": 0}
    try:
        async with process(nursery, config) as adopter:
            for fatal in range(1, 60):
                deaths = 0
                for do, within in product(calls, (None, DURING)):
                    other = "hand back" if do == "adopt" else "adopt"
                    await adopter.ensure()
                    await adopter.answer(other)
                    await adopter.arm(fatal, within)
                    with suppress(DiedError):
                        await adopter.answer(do)
                    died = not adopter.alive
                    await _nothing_is_lost(store)
                    await adopter.ensure()
                    await adopter.arm(0)
                    await adopter.answer(do)
                    await _is_done(store, claims=do == "adopt")
                    deaths += died
                    calls[do] = fatal if died else calls[do]
                if not deaths:
                    return calls["adopt"], calls["hand back"]
    finally:
        await store.close()
    raise AssertionError("it never ends")


HELD = {"10.88.1.10", "10.88.1.12"}
"""Of the addresses of `mixed`, those that somebody holds."""


async def _addresses(store: Store) -> tuple[bool, set[str], set[str]]:
    """Whether claims decide; which addresses have claims, and which upstream's records."""
    pool = await store.get(Pool, "p1")
    claims = {claim.spec.address for claim in (await store.list(Claim)).items}
    records = json.loads((pool.status.allocated_ips if pool.status else None) or "{}")
    return ANNOTATION_CLAIMS in pool.metadata.annotations, claims, set(records)


async def _nothing_is_lost(store: Store) -> None:
    """Whichever side decides at present has all that is held."""
    marked, claims, records = await _addresses(store)
    assert (claims if marked else records) >= HELD


async def _is_done(store: Store, *, claims: bool) -> None:
    marked, claimed, recorded = await _addresses(store)
    assert (marked, claimed) == (claims, HELD if claims else set())
    assert claims or recorded == HELD


def test_a_record_that_changes_meanwhile_is_not_lost(site: Site) -> None:
    """The mark is written under the condition of the version in which the records were read."""
    live = site.pod("web")
    late = site.pod("late")
    site.pool("p1", 1, {"10": ("web", live)})

    async def work() -> tuple[bool, bool]:
        store = Watched(await opened(site.cluster))

        async def meanwhile(_: Any) -> None:
            store.before.clear()
            await asyncio.to_thread(site.pool, "p1", 1, {"10": ("web", live), "11": ("late", late)})

        store.before["create", Claim] = meanwhile
        try:
            first = Adopter(store, SETTINGS, Switches())
            done = await first.adopt_all()
            assert "changed meanwhile" in first.troubles["p1"]
            return done, await first.adopt_all()
        finally:
            await store.close()

    assert asyncio.run(work()) == (False, True)
    assert set(adopted(site.cluster)[2]) == {"10.88.1.10", "10.88.1.11"}


def test_claims_in_the_way(site: Site) -> None:
    """What an interrupted way back left is replaced; what a live pod has stays with it."""
    live, other = site.pod("web"), site.pod("other")
    site.pool("p1", 1, {"10": ("web", live), "11": ("web", live)})

    async def claim(address: str, uid: str) -> None:
        store = await opened(site.cluster)
        try:
            spec = ClaimSpec(
                address=address, ip_version=4, pool="p1", pod_uid=uid, workload=Workload(namespace=NS, name="other")
            )
            await store.create(Claim(metadata=ObjectMeta(name=claim_name(ip_address(address))), spec=spec))
        finally:
            await store.close()

    asyncio.run(claim("10.88.1.10", "uid-of-the-past"))
    asyncio.run(claim("10.88.1.11", other))
    done, _, claims = adopted(site.cluster)
    assert done
    assert claims["10.88.1.10"].spec.pod_uid == live
    assert claims["10.88.1.11"].spec.pod_uid == other


def test_a_pool_that_is_being_deleted_is_adopted_too(site: Site) -> None:
    live = site.pod("web")
    site.pool("p1", 1, {"10": ("web", live)})
    site.cluster.kubectl("delete", "spiderippool", "p1", "--wait=false")
    done, _, claims = adopted(site.cluster)
    assert done
    assert set(claims) == {"10.88.1.10"}
    assert not has_foreign_records(read_pool(site.cluster, "p1"))


def test_back_to_upstream_exactly_as_it_was(site: Site) -> None:
    uids = mixed(site)
    site.delete_pod("leaked")
    assert adopted(site.cluster)[0]

    async def back() -> tuple[list[str], Pool, dict[str, Endpoint]]:
        store = await opened(site.cluster)
        try:
            await store.create(
                Claim(
                    metadata=ObjectMeta(name="10.88.1.99"),
                    spec=ClaimSpec(address="10.88.1.99", ip_version=4, pool="p1", container_id="c"),
                )
            )
            gone = await store.get(Endpoint, "web", NS)  # ours has no finalizer, and may have been lost altogether
            await store.update(replace(gone, metadata=replace(gone.metadata, finalizers=[])))
            await store.delete(Endpoint, "web", NS)
            notes = await hand_back(store)
            endpoints = {each.metadata.name: each for each in (await store.list(Endpoint)).items}
            return notes, await store.get(Pool, "p1"), endpoints
        finally:
            await store.close()

    notes, pool, endpoints = asyncio.run(back())
    assert notes == ["10.88.1.99 of pool p1 is left out: it belongs to no pod"]
    assert pool.status is not None
    assert json.loads(pool.status.allocated_ips or "") == {
        "10.88.1.10": {"pod": f"{NS}/web", "podUid": uids["web"]},
        "10.88.1.12": {"pod": f"{NS}/db-0", "podUid": "uid-db"},
    }
    assert (pool.status.allocated_ip_count, pool.status.total_ip_count) == (2, 191)
    assert ANNOTATION_CLAIMS not in pool.metadata.annotations
    assert pool.metadata.finalizers == ["spiderpool.spidernet.io"]
    web, db = endpoints["web"], endpoints["db-0"]
    for endpoint in (web, db):
        assert endpoint.metadata.finalizers == ["spiderpool.spidernet.io"]
        assert endpoint.status is not None
        (entry,) = endpoint.status.current.ips
        assert (entry.interface, entry.vlan, entry.ipv4_pool) == ("eth0", 0, "p1")
        assert (entry.ipv4_gateway, entry.clean_gateway) == ("10.88.1.1", False)
        assert [(route.dst, route.gw) for route in entry.routes or ()] == [("10.9.0.0/16", "10.88.1.2")]
    assert [(owner.kind, owner.uid, owner.controller) for owner in web.metadata.owner_references] == [
        ("Pod", uids["web"], None)
    ]
    assert db.metadata.owner_references == []
    assert db.status is not None
    assert (db.status.owner_controller_type, db.status.owner_controller_name) == ("StatefulSet", "db")
    assert db.status.current.uid == "uid-db"


def test_not_back_while_something_of_ours_runs(site: Site) -> None:
    live = site.pod("web")
    site.pool("p1", 1, {"10": ("web", live)})
    assert adopted(site.cluster)[0]
    site.pod("our-agent", labels=OURS)

    async def back() -> None:
        store = await opened(site.cluster)
        try:
            with pytest.raises(HandBackError, match=f"Pod {NS}/our-agent"):
                await hand_back(store)
            assert len((await store.list(Claim)).items) == 1
        finally:
            await store.close()

    asyncio.run(back())


def documented() -> list[list[str]]:
    """The commands in docs/upgrade.md, in order."""
    with open(os.path.join(ROOT, "docs/upgrade.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```sh\n(.*?)```", file.read(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_documented_way(site: Site) -> None:
    """docs/upgrade.md, there and back, by its own commands."""
    live = site.pod("web")
    site.pool("p1", 1, {"10": ("web", live)})
    look, back = documented()
    assert (look[0], back) == ("kubectl", ["spiderpool-controller", "hand-back"])
    assert site.cluster.kubectl(*look[1:]).split() == ["NAME", "CLAIMS", "p1", "<none>"]
    assert adopted(site.cluster)[0]
    assert site.cluster.kubectl(*look[1:]).split() == ["NAME", "CLAIMS", "p1", "authoritative"]
    name = "adoption-test"
    webhook = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [
            {
                "name": "spiderippool.spiderpool.spidernet.io",
                "clientConfig": {"url": "https://127.0.0.1:9/nobody"},
                "rules": [
                    {
                        "apiGroups": ["spiderpool.spidernet.io"],
                        "apiVersions": ["*"],
                        "operations": ["UPDATE"],
                        "resources": ["spiderippools"],
                    }
                ],
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "failurePolicy": "Fail",
            }
        ],
    }
    site.apply(webhook)
    try:
        flags = [
            f"--kubernetes-kubeconfig={site.cluster.place.kubeconfig('admin')}",
            f"--webhook-configuration={name}",
        ]
        result = subprocess.run(
            [sys.executable, "-m", "controller", *back[1:], *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        assert has_foreign_records(read_pool(site.cluster, "p1"))
        with pytest.raises(LabError, match="NotFound"):
            site.cluster.kubectl("get", "validatingwebhookconfiguration", name)
    finally:
        site.cluster.kubectl("delete", "validatingwebhookconfiguration", name, "--ignore-not-found")
