"""Pods run on the lab's nodes as on any: kubelet, containerd, runc, CNI; and nothing of them stays."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import layout
from lab.kube import lifecycle, node, points
from lab.kube.cluster import Cluster
from lab.kube.components import Place
from lab.layout import Lab
from lab.process import alive, cgroup2_root, in_netns, run, start_time
from tests.kube.conftest import running
from tests.kube.node_rig import settle, workload
from tests.kube.test_server import apply, assert_gone, get

NODES = {"node1", "node2"}


def ready(there: Cluster, kind: str, name: str) -> list[Any]:
    there.kubectl("rollout", "status", f"{kind}/{name}", "--timeout=60s", timeout=70)
    items: Any = get(there, "pods", "-l", f"app={name}")["items"]
    return [item for item in items if "deletionTimestamp" not in item["metadata"]]


def answer(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:
        content: bytes = response.read()
        return content


class TestNode:
    def test_workloads_come_and_pass_their_probes(self, there: Cluster) -> None:
        apply(there, workload("Deployment", "web"))
        apply(there, workload("StatefulSet", "db"))
        found = ready(there, "deployment", "web") + ready(there, "statefulset", "db")
        assert {pod["spec"]["nodeName"] for pod in found} == NODES
        assert len({pod["status"]["podIP"] for pod in found}) == len(found) == 6
        for pod in found:
            # What the node reaches by the pod's network, seen from the node's own namespace.
            url = f"http://{pod['status']['podIP']}:8080/"
            where = there.place.lab.netns_path(pod["spec"]["nodeName"])
            assert in_netns(where, partial(answer, url)) == b"ok\n"
        there.kubectl("scale", "deployment/web", "--replicas=5")
        assert len(ready(there, "deployment", "web")) == 5
        first = {pod.name: pod for pod in settle(there, web=5, db=3)}
        there.kubectl("delete", "pod", "db-1", "--timeout=30s")
        again = {pod.name: pod for pod in settle(there, web=5, db=3)}
        assert again.keys() == first.keys()
        assert again["db-1"].uid != first["db-1"].uid
        assert again["db-1"].addresses == first["db-1"].addresses

    def test_a_pod_moves_when_its_node_is_closed(self, there: Cluster) -> None:
        apply(there, workload("Deployment", "mover", 1))
        (pod,) = ready(there, "deployment", "mover")
        there.kubectl("drain", pod["spec"]["nodeName"], "--ignore-daemonsets", "--timeout=30s")
        (moved,) = ready(there, "deployment", "mover")
        assert {pod["spec"]["nodeName"], moved["spec"]["nodeName"]} == NODES

    def test_it_holds_nobody_elses_namespaces(self, nodes: Cluster) -> None:
        mounts = Path(f"/proc/{nodes.processes['node1-init'].pid}/mounts").read_text().splitlines()
        assert not [line for line in mounts if line.split()[2] == "nsfs" and "/cni-" not in line.split()[1]]
        assert "nsfs" in Path("/proc/mounts").read_text()  # the lab's own, at least

    def test_pods_are_in_the_labs_cgroup(self, there: Cluster) -> None:
        apply(there, workload("Deployment", "inside", 1))
        (pod,) = ready(there, "deployment", "inside")
        folder = f"{cgroup2_root()}{node.pods_cgroup(there.place.lab, pod['spec']['nodeName'])}"
        found = [path for path in Path(folder).rglob("cgroup.procs") if path.read_text()]
        assert len(found) == 2  # pause and web

    def test_the_machines_kernel_settings_are_left_alone(self, nodes: Cluster) -> None:
        for name, wanted in node.KERNEL.items():
            seen = run(node.on_node(nodes, "node1", "cat", f"/proc/sys/{name}")).strip()
            assert seen == wanted
        ours = {name: Path(f"/proc/sys/{name}").read_text().strip() for name in node.KERNEL}
        seen_by_node = Path(f"{nodes.place.lab.node('node1')}/sys/panic")
        before = seen_by_node.read_text()
        try:
            seen_by_node.write_text("77\n")
            assert run(node.on_node(nodes, "node1", "cat", "/proc/sys/kernel/panic")).strip() == "77"
            assert ours == {name: Path(f"/proc/sys/{name}").read_text().strip() for name in node.KERNEL}
        finally:
            seen_by_node.write_text(before)  # a kubelet that starts later wants it

    def test_a_kubelet_comes_back_to_its_pods(self, there: Cluster) -> None:
        apply(there, workload("Deployment", "stay", 2))
        before = {pod["metadata"]["uid"] for pod in ready(there, "deployment", "stay")}
        for name in NODES:
            there.stop(f"{name}-kubelet")
            node.start_kubelet(there, name)
        found = ready(there, "deployment", "stay")
        assert {pod["metadata"]["uid"] for pod in found} == before
        assert all(status["restartCount"] == 0 for pod in found for status in pod["status"]["containerStatuses"])

    def test_down_with_pods_running_leaves_nothing_of_it_and_all_of_others(self, nodes: Cluster) -> None:
        with running(nodes=True) as own:
            apply(own, workload("Deployment", "left"))
            ready(own, "deployment", "left")
            inside = [
                int(pid)
                for path in Path(f"{cgroup2_root()}/{own.place.lab.name}").rglob("cgroup.procs")
                for pid in path.read_text().split()
            ]
            assert len(inside) >= 6 + len(own.processes)
            assert json.loads(Path(f"{own.place.lab.state}/cluster.json").read_text())["complete"]
            began = time.monotonic()
            assert lifecycle.down(own.place.lab)
            assert time.monotonic() - began < 20
        assert not any(map(alive, own.processes.values()))
        assert not [pid for pid in inside if start_time(pid) is not None]
        assert_no_nodes(own.place)
        for name in NODES:
            assert "multus" in run(node.on_node(nodes, name, "ls", "/opt/cni/bin"))

    def test_an_up_that_was_killed_is_cleaned_away(self) -> None:
        lab = Lab(f"splt{os.urandom(4).hex()}")
        command = [sys.executable, "-m", "lab.kube", "--name", lab.name]
        try:
            with subprocess.Popen([*command, "up", "--node"], stdout=subprocess.DEVNULL) as half:
                deadline = time.monotonic() + 60
                while not os.path.exists(lab.log("node2-agent")):
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                half.kill()
            place = Cluster.load(lab).place
            subprocess.run([*command, "down"], check=True, stdout=subprocess.DEVNULL, timeout=60)
            assert_no_nodes(place)
        finally:
            lifecycle.down(lab)


class TestPoints:
    def test_the_last_lab_removes_them(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(layout, "STATE_ROOT", str(tmp_path / "labs"))
        there, made, filled = (tmp_path / name for name in ("there", "made", "filled"))
        monkeypatch.setattr(points, "POINTS", dict(enumerate(map(str, (there, made, filled)))))
        there.mkdir()
        labs = Lab("splone"), Lab("spltwo")
        for lab in labs:
            os.makedirs(f"{lab.node('node1')}/run-containerd")
            points.make()
        assert made.is_dir()
        (filled / "file").touch()
        points.remove(labs[1])
        assert made.is_dir()
        points.remove(labs[0])
        assert (there.is_dir(), made.is_dir(), filled.is_dir()) == (True, False, True)
        assert not (tmp_path / "labs" / ".points").exists()


def assert_no_nodes(place: Place) -> None:
    assert_gone(place)
    for root in node.hierarchies():
        assert not os.path.exists(f"{root}/{place.lab.name}")
    assert not glob.glob(f"/run/netns/{place.lab.name}*")
    assert place.lab.name not in Path("/proc/mounts").read_text()
