"""`spiderpoolctl` on a real cluster: what it prints, what it refuses, and what it never takes away."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from api.annotations import NAMESPACE_IPV4
from api.pool import Pool
from cli.__main__ import main
from lab.kube.cluster import Cluster
from plugins.ipam.plugin import Ipam
from tests.integration.ipam_rig import addresses, until
from tests.kube.ipam_pods import CORE, World, pools, world
from tests.kube.reclaim_rig import api, is_gone, leading


class Shell:
    """Runs commands on the cluster and keeps what they printed."""

    def __init__(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        self._cluster = cluster
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        status = main([*words, "--kubeconfig", self._cluster.admin])
        self.out, self.err = self._capsys.readouterr()
        return status

    async def beside(self, *words: str) -> int:
        """The same in a thread: the command runs an event loop of its own."""
        return await asyncio.to_thread(self, *words)


@pytest.fixture
def shell(kube: Cluster, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(kube, capsys)


@asynccontextmanager
async def node(kube: Cluster) -> AsyncIterator[tuple[World, Ipam]]:
    """A world, and the IPAM of its node."""
    async with world(kube) as there, there.node() as ipam:
        yield there, ipam


@pytest.fixture
def pool_name(shell: Shell) -> Iterator[str]:
    """Name for a pool, which is removed."""
    name = f"cli-{secrets.token_hex(4)}"
    yield name
    shell("delete", "sp", name, "--ignore-not-found")


def test_objects_are_made_shown_and_deleted(shell: Shell, tmp_path: Path, pool_name: str) -> None:
    file = tmp_path / "pool.yaml"
    head = f"apiVersion: spiderpool.spidernet.io/v2beta1\nkind: SpiderIPPool\nmetadata: {{name: {pool_name}}}\n"
    spec = "spec: {subnet: 10.250.7.0/24, ips: [10.250.7.9, 10.250.7.8]}\n"
    file.write_text(head + spec)
    what = f"spiderippool.spiderpool.spidernet.io/{pool_name}"
    assert (shell("apply", "-f", str(file)), shell.out) == (0, f"{what} created\n"), shell.err
    assert (shell("apply", "-f", str(file)), shell.out) == (0, f"{what} unchanged\n"), shell.err
    assert shell("get", "sp", pool_name, "-o", "json") == 0
    assert json.loads(shell.out)["spec"]["ips"] == ["10.250.7.8-10.250.7.9"]
    file.write_text(head + spec.replace("10.250.7.9,", "10.250.9.9,"))
    assert shell("apply", "-f", str(file)) == 1
    assert "does not match base subnet" in shell.err
    assert shell("ip", "show", "10.250.7.8") == 1
    assert shell.err == f"error: nobody has 10.250.7.8: it is an unclaimed address of pool {pool_name}\n"

    file.write_text("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {clusterIP: 10.96.9.9}\n")
    assert shell("apply", "-f", str(file)) == 1
    assert "it belongs to Kubernetes, use kubectl apply" in shell.err
    assert "nothing was changed" in shell.err
    assert (shell("get", "svc", "kubernetes"), shell.out.split()[:2]) == (0, ["NAME", "TYPE"])
    assert (shell("get", "svc", "x"), "not found" in shell.err) == (1, True)


def test_a_cluster_that_is_not_there_is_told(shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "sp", "--kubeconfig", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_an_address_in_use_is_told_of_and_never_released(kube: Cluster, shell: Shell) -> None:
    async def main() -> None:
        async with node(kube) as (there, ipam):
            v4 = await there.pool("v4", 10, 20)
            pod = await there.pod("a", pools(v4))
            (address,) = addresses(await ipam.add(pod.call()))
            assert await shell.beside("ip", "show", "--ip", address) == 0, shell.err
            shown = {line.partition(":")[0]: line.partition(":")[2].strip() for line in shell.out.splitlines()}
            assert shown["Pod"] == f"{there.namespace}/a (UID {pod.uid}), Pending"
            assert (shown["Pool"], shown["Node"], shown["NIC"], shown["State"]) == (v4, "node1", "eth0", "Allocated")
            assert shown["Since"].endswith("s)")
            assert shown["In use"] == "yes, its pod is there"
            for force in ((), ("--force",)):
                assert await shell.beside("ip", "release", address, *force) == 1
                assert f"{address} was not released, pod {there.namespace}/a uses it: its pod is there" in shell.err
            assert (await there.claims())[address].spec.pod_uid == pod.uid

            await there.delete_pod(pod)
            assert await shell.beside("ip", "show", address) == 0
            assert f"(UID {pod.uid}), gone" in shell.out
            # Nobody here knows when it went, and its kubelet gives what was removed by force the whole grace period.
            assert "perhaps, its pod is gone, nobody here saw when" in shell.out
            assert await shell.beside("ip", "release", address) == 1
            assert f"{address} was not released, pod {there.namespace}/a may still use it" in shell.err
            assert "on node node1 have their grace period" in shell.err
            assert "spiderpoolctl gc" in shell.err
            assert "--force" in shell.err
            assert address in await there.claims()
            assert await shell.beside("ip", "release", address, "--force") == 0, shell.err
            assert shell.out == f"{address} of pool {v4} released, it was pod {there.namespace}/a's\n"
            assert await there.claims() == {}

    asyncio.run(main())


def test_what_has_ended_before_the_eyes_of_the_api_needs_no_force(kube: Cluster, shell: Shell) -> None:
    async def main() -> None:
        async with node(kube) as (there, ipam), api(kube) as admin:
            v4 = await there.pool("v4", 10, 20)
            pod = await there.pod("job", pools(v4))
            (address,) = addresses(await ipam.add(pod.call()))
            await admin.phase(there.namespace, "job", "Succeeded", ended=20)
            assert await shell.beside("ip", "release", address) == 1
            assert f"pod {there.namespace}/job uses it: its pod has succeeded" in shell.err
            await admin.phase(there.namespace, "job", "Succeeded", ended=30 + 30 + 1)
            assert await shell.beside("ip", "release", address) == 0, shell.err
            assert await there.claims() == {}

    asyncio.run(main())


def test_what_waits_for_a_successor_is_released_only_by_force(kube: Cluster, shell: Shell) -> None:
    async def main() -> None:
        async with node(kube) as (there, ipam):
            v4 = await there.pool("v4", 10, 20)
            await there.stateful_set("db", 1, pools(v4))
            first = await there.bound("db-0", "node1")
            (address,) = addresses(await ipam.add(first.call()))
            await there.delete_pod(first)
            second = await there.bound("db-0", "node1", not_=first.uid)
            assert await shell.beside("ip", "release", address) == 1
            assert f"it is kept for pod {there.namespace}/db-0: its workload will have the pod again" in shell.err
            assert await shell.beside("ip", "release", address, "-f") == 0, shell.err
            (address,) = addresses(await ipam.add(second.call()))
            assert await shell.beside("ip", "release", address, "-f") == 1, "the successor uses it"

    asyncio.run(main())


def test_why_pools_are_used_and_not_used(kube: Cluster, shell: Shell) -> None:
    async def main() -> None:
        async with node(kube) as (there, ipam):
            await there.pool("one", 10, 12)
            await there.pool("best", 13, 14, node_name=["node1"])
            await there.pool("elsewhere", 15, 16, node_name=["node2"])
            await there.pool("off", 17, 18, disable=True)
            await there.pool("unasked", 19, 20)
            names = {short: there.pool_name(short) for short in ("one", "best", "elsewhere", "off", "unasked")}
            asked = [names["one"], names["elsewhere"], names["off"], "nowhere", names["best"]]
            pod = await there.pod("a", pools(*asked))
            (address,) = addresses(await ipam.add(pod.call()))
            assert await shell.beside("pool", "explain", f"{there.namespace}/a") == 0, shell.err
            lines = shell.out.splitlines()
            assert lines[0] == f"Pod {there.namespace}/a (Pod a) on node node1"
            assert "NIC eth0: pools are named by ipam.spidernet.io/ippool" in lines
            assert f"  has {address} of {names['best']}" in lines
            rows = {row.split()[1]: row.split(maxsplit=4)[2:] for row in lines if row.startswith("4 ")}
            assert rows[names["best"]] == ["1", "1."]
            assert rows[names["one"]] == ["3", "2."]
            assert rows[names["elsewhere"]] == ["2", "no", "nodeName does not list node node1"]
            assert rows[names["off"]] == ["2", "no", "it is disabled"]
            assert rows["nowhere"] == ["-", "no", "there is no such pool, or none that matches"]
            assert rows[names["unasked"]] == ["2", "no", "not asked for by ipam.spidernet.io/ippool"]

            # the namespace's pools count where the pod names none; the agent agrees with every word
            patch = {"metadata": {"annotations": {NAMESPACE_IPV4: json.dumps([names["unasked"]])}}}
            await there.ask("PATCH", f"{CORE}/namespaces/{there.namespace}", patch)
            await there.pod("b", {})
            assert await shell.beside("pool", "explain", "b", "-n", there.namespace) == 0
            assert f"NIC eth0: pools are named by namespace {there.namespace}" in shell.out
            await there.pod("c", {"ipam.spidernet.io/ippool": "{"})
            assert await shell.beside("pool", "explain", "c", "-n", there.namespace) == 0
            assert "NIC eth0: wrong input: invalid format of annotation ipam.spidernet.io/ippool" in shell.out
            assert await shell.beside("pool", "explain", "nobody", "-n", there.namespace) == 1
            assert "nobody" in shell.err

    asyncio.run(main())


def test_gc_has_the_leader_look_at_everything(kube: Cluster, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world(kube) as there:
            pool = await there.pool("v4", 10, 20)
            async with leading(kube) as rooms:
                scans = threading.Semaphore(0)
                monkeypatch.setattr(rooms.reclaim._endpoints, "scan", scans.release)

                async def idle() -> bool:
                    return rooms.reclaim.idle

                await until(idle, 20)
                while scans.acquire(blocking=False):
                    pass
                assert await shell.beside("gc") == 0, shell.err
                assert "asked the leading controller to look at all claims" in shell.out

                async def scanned() -> bool:
                    return scans.acquire(blocking=False)

                await until(scanned)
                assert await shell.beside("gc") == 0, "once more, at another time"
                await until(scanned)
                # As long as there is somebody to take off the finalizer that the leader gave it.
                await rooms.store.delete(Pool, pool)

                async def gone() -> bool:
                    return await is_gone(rooms.store, Pool, pool)

                await until(gone, 20)

    asyncio.run(main())
