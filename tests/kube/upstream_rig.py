"""Upstream's own agents, controller and executables on the lab's nodes, in the place of ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from typing import Any

import yaml

from lab.kube import controller, network, node
from lab.kube.build import program
from lab.kube.cluster import Cluster
from lab.kube.components import HOST
from lab.kube.pki import Authority
from lab.layout import SOURCES, LabError
from lab.nodes import CNI_BUILT, HEALTH_PORT, agent, http_get
from tests.kube.node_rig import NAMES, until
from tests.kube.test_server import apply

Json = dict[str, Any]
SOCKET = "/var/run/spidernet/spiderpool.sock"
NETWORK = "swap"
"""The network of these tests: upstream's executables would write their logs to folders of the machine otherwise."""
LABELS = {"app.kubernetes.io/name": "spiderpool", "app.kubernetes.io/component": "spiderpool-agent"}
"""What upstream's chart labels its agents with."""
CONFIGURATION = {
    "ipamUnixSocketPath": SOCKET,
    "enableIPv4": True,
    "enableIPv6": True,
    "enableStatefulSet": True,
    "enableKubevirtStaticIP": True,
    "enableCleanOutdatedEndpoint": False,
    "enableSpiderSubnet": True,
    "enableAutoPoolForApplication": True,
    "enableIPConflictDetection": True,
    "enableGatewayDetection": False,
    "enableValidatingResourcesDeletedWebhook": False,
    "clusterSubnetDefaultFlexibleIPNumber": 1,
    "tuneSysctlConfig": False,
    "podResourceInject": {"enabled": False, "namespacesExclude": [], "namespacesInclude": []},
    "iaasNetworkProvider": {"serverUrl": ""},
}
"""conf.yml as upstream's chart renders it; it leaves the node's settings alone."""
_CONTROLLER = "upstream-controller"
_CONTROLLER_PORT = 5720


def define(there: Cluster) -> None:
    """The network, in upstream's words, for pods with `v1.multus-cni.io/default-network`. Raises LabError."""
    log = f"{there.place.lab.state}/log/upstream-%s.log"
    ipam = {"type": "spiderpool", "log_file_path": log % "spiderpool"}
    logs = {"logLevel": "debug", "logFile": log % "coordinator"}
    coordinator = {"type": "coordinator", "mode": "auto", "logOptions": logs}
    chain = [{"type": "macvlan", "master": "eth0", "mode": "bridge", "ipam": ipam}, coordinator]
    apply(
        there,
        {
            "apiVersion": "k8s.cni.cncf.io/v1",
            "kind": "NetworkAttachmentDefinition",
            "metadata": {"name": NETWORK, "namespace": network.NAMESPACE},
            "spec": {"config": json.dumps({"cniVersion": "0.3.1", "name": NETWORK, "plugins": chain})},
        },
    )


def executables(there: Cluster, *, upstream: bool) -> None:
    """Exchange the nodes' executables, as an installation does: each at once."""
    for each in NAMES:
        folder = f"{there.place.lab.node(each)}/opt-cni/bin"
        for name in network.SHIMS:
            shutil.copy(program(f"upstream-{name}") if upstream else f"{CNI_BUILT}/{name}", f"{folder}/{name}.new")
            os.rename(f"{folder}/{name}.new", f"{folder}/{name}")


def start(there: Cluster) -> None:
    """Upstream's agents and controller, ready; a DaemonSet tells of the agents, which run beside its pods."""
    path = f"{there.place.lab.state}/upstream.yml"
    with open(path, "w") as file:
        yaml.safe_dump(CONFIGURATION, file)
    apply(there, _daemon_set())
    for each in NAMES:
        env = {"SPIDERPOOL_NODE_NAME": each, "SPIDERPOOL_HEALTH_PORT": str(HEALTH_PORT)}
        argv = _command(there, "upstream-spiderpool-agent", env, path)
        ready = partial(_ready, there, each, HEALTH_PORT)
        there.launch(_agent(each), node.on_node(there, each, *argv), ready, folder=f"{each}/agent")
    _start_controller(there, path)
    until(there, lambda: len(_agent_pods(there)) == len(NAMES), 30, "pods of upstream's DaemonSet")


def stop(there: Cluster) -> None:
    """Remove upstream's programs, and wait until their pods are gone. They outlive SIGTERM and so are killed."""
    for name in (_CONTROLLER, *map(_agent, NAMES)):
        there.stop(name, signal.SIGKILL)
    there.kubectl("-n", network.NAMESPACE, "delete", "daemonset", "spiderpool-agent")
    until(there, lambda: not _agent_pods(there), 30, "no pods of upstream's DaemonSet")


def start_ours(there: Cluster) -> None:
    """Our controller and agents."""
    controller.start(there)
    for each in NAMES:
        node.start_agent(there, each)


def stop_ours(there: Cluster) -> None:
    """Remove our agents and controller."""
    for each in NAMES:
        there.stop(agent(each))
    controller.stop(there)


def hand_back(there: Cluster) -> str:
    """The documented command; what it says."""
    flags = [f"--kubernetes-kubeconfig={there.admin}", f"--webhook-configuration={controller.NAME}"]
    command = [sys.executable, "-m", "controller", "hand-back", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=SOURCES)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def records(there: Cluster) -> set[tuple[str, str]]:
    """Addresses that are taken by upstream's records, and the UIDs of the pods that have them."""
    found = set()
    for pool in json.loads(there.kubectl("get", "spiderippools", "-o", "json"))["items"]:
        told = json.loads(pool.get("status", {}).get("allocatedIPs") or "{}")
        found |= {(address, entry["podUid"]) for address, entry in told.items()}
    return found


def _agent(each: str) -> str:
    return f"{each}-upstream"


def _command(there: Cluster, name: str, env: dict[str, str], path: str, *flags: str) -> list[str]:
    given = {
        "KUBECONFIG": there.admin,
        "SPIDERPOOL_LOG_LEVEL": "info",
        "SPIDERPOOL_POD_NAMESPACE": network.NAMESPACE,
        "SPIDERPOOL_POD_NAME": name,
        "SPIDERPOOL_GOPS_LISTEN_PORT": "",
        **env,
    }
    words = [f"{key}={value}" for key, value in given.items()]
    return ["/usr/bin/env", *words, program(name), "daemon", f"--config-path={path}", *flags]


def _start_controller(there: Cluster, path: str) -> None:
    """On a node, for it listens everywhere. Without webhook configurations nobody asks it for admission."""
    each, pki = NAMES[0], there.place.pki
    Authority(pki).issue("tls", "upstream", hosts=["localhost", HOST])
    env = {"SPIDERPOOL_HEALTH_PORT": str(_CONTROLLER_PORT), "SPIDERPOOL_GC_DEFAULT_INTERVAL_DURATION": "5"}
    flags = (f"--tls-server-cert={pki}/tls.crt", f"--tls-server-key={pki}/tls.key")
    argv = _command(there, "upstream-spiderpool-controller", env, path, *flags)
    ready = partial(_ready, there, each, _CONTROLLER_PORT)
    there.launch(_CONTROLLER, node.on_node(there, each, *argv), ready, folder=f"{each}/agent")


def _ready(there: Cluster, each: str, port: int) -> bool:
    with contextlib.suppress(LabError):
        return http_get(there.place.lab, each, port, "/v1/runtime/readiness")[0] == 200
    return False


def _daemon_set() -> Json:
    container = {"name": "agent", "image": "lab.invalid/pause:1", "imagePullPolicy": "Never"}
    spec = {"hostNetwork": True, "terminationGracePeriodSeconds": 0, "containers": [container]}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "spiderpool-agent", "namespace": network.NAMESPACE, "labels": LABELS},
        "spec": {
            "selector": {"matchLabels": LABELS},
            "template": {"metadata": {"labels": LABELS}, "spec": spec},
        },
    }


def _agent_pods(there: Cluster) -> list[str]:
    selector = ",".join(f"{key}={value}" for key, value in LABELS.items())
    return there.kubectl("-n", network.NAMESPACE, "get", "pods", "-l", selector, "-o", "name").split()
