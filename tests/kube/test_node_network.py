"""Pods get addresses by kubelet, containerd, Multus, macvlan, our IPAM and our coordinator, and give them back."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest

from lab.kube import controller, node
from lab.kube.cluster import Cluster
from lab.kube.components import ETCD, SERVER
from lab.layout import LabError
from lab.nodes import agent
from lab.process import alive
from tests.kube.node_rig import NAMES, Json, Pod, ask, claims, named, pods, queued, settle, until, views, workload
from tests.kube.test_server import apply


def service(name: str) -> Json:
    ports = [{"port": 80, "targetPort": 8080}]
    spec = {"selector": {"app": name}, "ports": ports, "ipFamilyPolicy": "RequireDualStack"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def deployed(there: Cluster, web: int = 3, db: int = 3, lost_after: int = 300) -> list[Pod]:
    apply(there, workload("Deployment", "web", web, lost_after))
    apply(there, workload("StatefulSet", "db", db, lost_after))
    return settle(there, web=web, db=db)


def scale(there: Cluster, web: int, db: int) -> None:
    there.kubectl("scale", "deployment/web", f"--replicas={web}")
    there.kubectl("scale", "statefulset/db", f"--replicas={db}")


def answers(there: Cluster, each: str, address: str, port: int) -> bool:
    try:
        return ask(there, each, address, port) == "ok\n"
    except LabError:
        return False


class TestThinPath:
    @pytest.mark.upstream("E00002", "E00003")
    def test_pods_are_reached_at_their_own_addresses_and_by_service(self, there: Cluster) -> None:
        apply(there, service("web"))
        found = deployed(there)
        views(there, found)
        asking = {name: next(pod for pod in found if pod.node == name) for name in NAMES}
        for pod in found:
            for address in pod.addresses:
                assert ask(there, pod.node, address) == "ok\n"  # the way of the kubelet's probes
        for pod, other in (asking.values(), reversed(asking.values())):
            for address in pod.addresses:
                assert ask(there, other.node, address, pod=other) == "ok\n"
        pod = found[0]
        annotations = json.loads(there.kubectl("get", "pod", pod.name, "-o", "json"))["metadata"]["annotations"]
        (status,) = json.loads(annotations["k8s.v1.cni.cncf.io/network-status"])
        assert (status["name"], status["interface"]) == ("kube-system/underlay", "eth0")
        assert tuple(status["ips"]) == pod.addresses
        document = json.loads(there.kubectl("get", "service/web", "-o", "json"))
        for address in document["spec"]["clusterIPs"]:
            for each in NAMES:
                until(there, partial(answers, there, each, address, 80), 10, f"{address} answers on {each}")
                assert ask(there, each, address, 80, pod=asking[each]) == "ok\n"

    @pytest.mark.upstream("G00004")
    def test_addresses_follow_pods_as_they_come_and_go(self, there: Cluster) -> None:
        deployed(there)
        scale(there, web=5, db=1)
        settle(there, web=5, db=1)
        scale(there, web=2, db=3)
        found = settle(there, web=2, db=3)
        there.kubectl("delete", "pod", "db-1", "--timeout=30s")
        assert named(settle(there, web=2, db=3), "db-1").uid != named(found, "db-1").uid
        there.kubectl("delete", "pod", "--all", "--grace-period=0", "--force", "--timeout=30s")
        views(there, settle(there, web=2, db=3))

    @pytest.mark.upstream("R00004")
    def test_an_agent_that_is_killed_is_not_missed(self, there: Cluster) -> None:
        """What is deleted meanwhile waits for it; what is created meanwhile comes up after it.

        The addresses need not wait: the controller frees those of pods that are gone, and a StatefulSet's next pod may
        be on the other node already.
        """
        found = deployed(there)
        (one, two) = NAMES
        there.stop(agent(one), signal.SIGKILL)
        gone = [pod for pod in found if pod.node == one]
        there.kubectl("delete", "pod", *(pod.name for pod in gone), "--timeout=30s")
        scale(there, web=4, db=3)
        until(there, lambda: len(queued(there, one)) >= len(gone), 20, f"{len(gone)} DELs wait on {one}")
        node.start_agent(there, one)
        views(there, settle(there, web=4, db=3))
        assert queued(there, one) == []
        for pod in found:
            if pod.node == two:
                assert ask(there, two, pod.addresses[0]) == "ok\n"

    @pytest.mark.upstream("R00001")
    def test_pods_need_no_controller(self, there: Cluster) -> None:
        """Only the views wait for it."""
        deployed(there, web=2, db=3)
        controller.stop(there, signal.SIGKILL)
        scale(there, web=4, db=3)
        there.kubectl("delete", "pod", "db-1", "--timeout=30s")
        settle(there, web=4, db=3)
        scale(there, web=3, db=1)
        settle(there, web=3, db=1)
        controller.start(there)
        views(there, settle(there, web=3, db=1))

    @pytest.mark.upstream("R00002", "R00003")
    @pytest.mark.parametrize("component", [ETCD, SERVER])
    def test_pods_come_up_when_the_api_is_back(self, there: Cluster, component: str) -> None:
        """And nothing of ours had to be restarted, though such a server knows no rights and no kinds at first."""
        found = deployed(there, web=2, db=1)
        ours = [there.processes[name] for name in (controller.NAME, *map(agent, NAMES))]
        scale(there, web=3, db=2)
        there.kubectl("delete", "pod", found[0].name, "--wait=false")
        there.stop(component, signal.SIGKILL)
        there.start(component)
        views(there, settle(there, web=3, db=2))
        assert all(map(alive, ours))


class TestMoving:
    def test_a_drained_nodes_pods_go_to_the_other(self, there: Cluster) -> None:
        deployed(there)
        (one, two) = NAMES
        there.kubectl("drain", one, "--timeout=30s")
        assert {pod.node for pod in settle(there, web=3, db=3)} == {two}
        there.kubectl("uncordon", one)
        there.kubectl("drain", two, "--timeout=30s")
        assert {pod.node for pod in settle(there, web=3, db=3)} == {one}

    @pytest.mark.upstream("R00006")
    def test_a_lost_nodes_pods_come_up_elsewhere_and_their_addresses_stay_till_it_is_back(self, there: Cluster) -> None:
        found = deployed(there, lost_after=1)
        (one, two) = NAMES
        lost = [pod for pod in found if pod.node == one]
        stay = {pod.uid for pod in lost}
        node.kill(there, one)

        def replaced() -> bool:
            running = [item for item in pods(there) if "deletionTimestamp" not in item["metadata"]]
            web = [item for item in running if item["metadata"]["labels"]["app"] == "web"]
            ready = [c["status"] for item in web for c in item["status"].get("conditions", ()) if c["type"] == "Ready"]
            return ready == ["True"] * 3 and {item["spec"]["nodeName"] for item in web} == {two}

        until(there, replaced, 60, f"three pods of web on {two}")
        held = {(address, pod.uid) for pod in lost for address in pod.addresses}
        assert held <= claims(there)  # nobody knows yet that they do not run any more
        node.start(there, one)
        found = settle(there, web=3, db=3)
        assert not stay & {pod.uid for pod in found}
        views(there, found)
