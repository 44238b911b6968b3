"""The pods' network on the nodes, as an installation brings it: Multus, our executables, our agent, and their rights.

Everything is where it is on any node: executables in /opt/cni/bin, Multus' configuration in /etc/cni/net.d, the agent's
socket and queue where the executables expect them by default. Each client of the API server is a service account with
the rights of its manifest, and a token.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import yaml

from lab.kube import controller
from lab.kube.build import CNI, program
from lab.kube.cluster import Cluster
from lab.layout import NODES, SOURCES
from lab.nodes import CNI_BUILT, HEADERS
from lab.pods import cgroup

HERE = os.path.dirname(os.path.abspath(__file__))
NAMESPACE = "kube-system"
"""Where Multus, our agents and the network definition live."""
NETWORK = "underlay"
"""The pods' first network, in manifests/network.yaml."""
SHIMS = ("spiderpool", "coordinator")
RIGHTS = (f"{SOURCES}/deploy/rbac-agent.yaml", f"{HERE}/manifests/multus.yaml")
DEFINITIONS = f"{HERE}/manifests/network.yaml"
BIN = "/opt/cni/bin"
CONFIGURATION = "/etc/cni/net.d"
AGENT_SOCKET = "/var/run/spidernet/cni.sock"
AGENT_QUEUE = "/var/lib/spidernet/queue"
BPFFS = "/sys/fs/bpf"
"""A BPF file system of the node's own, mounted by node_init.py: pins go when the node goes."""


def absent() -> list[str]:
    """Which of our executables are not built."""
    return [name for name in SHIMS if not os.access(f"{CNI_BUILT}/{name}", os.X_OK)]


def install(cluster: Cluster) -> None:
    """What has to be there before nodes can be prepared; our kinds are there already. Raises LabError."""
    cluster.kubectl("apply", "--server-side", *(word for path in RIGHTS for word in ("-f", path)))
    for account in ("multus", "spiderpool-agent"):
        cluster.service_account(NAMESPACE, account)


def define(cluster: Cluster) -> None:
    """The controller, and what it admits: default pools, the coordinator's configuration, the first network.

    The nodes are prepared: the controller looks at the first one's CNI configuration. Raises LabError, OSError.
    """
    controller.install(cluster, f"{cluster.place.lab.node(NODES[0].name)}/etc-cni/net.d")
    controller.start(cluster)
    cluster.kubectl("apply", "--server-side", "-f", DEFINITIONS)
    made = (f"net-attach-def/{NETWORK}", f"--namespace={NAMESPACE}", "--for=create")
    cluster.kubectl("wait", *made, "--timeout=30s")
    cluster.kubectl("wait", "spidercoordinator/default", "--for=jsonpath={.status.phase}=Synced", "--timeout=30s")


def prepare(cluster: Cluster, node: str) -> None:
    """The node's executables and configurations, before anything runs there. Raises LabError, OSError."""
    lab = cluster.place.lab
    folder = lab.node(node)
    executables, configuration = f"{folder}/opt-cni/bin", f"{folder}/etc-cni/net.d"
    for path in (executables, f"{configuration}/multus.d", f"{folder}/lib-spidernet/queue"):
        os.makedirs(path, exist_ok=True)
    for name in CNI.packages:
        _place(program(name), f"{executables}/{name}")
    for name in SHIMS:
        _place(f"{CNI_BUILT}/{name}", f"{executables}/{name}")
    with open(f"{executables}/.spiderpool.paths", "w") as file:
        file.write(f"{AGENT_SOCKET}\n{AGENT_QUEUE}\n")
    shutil.copy(cluster.place.kubeconfig("multus"), f"{configuration}/multus.d/multus.kubeconfig")
    with open(f"{configuration}/00-multus.conf", "w") as file:
        json.dump(_multus(lab.log(f"{node}-multus")), file, indent=1)
    with open(f"{folder}/agent.yaml", "w") as file:
        yaml.safe_dump(_agent(cluster, node), file, sort_keys=False)


def _place(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)


def _multus(log: str) -> dict[str, Any]:
    return {
        "cniVersion": "1.0.0",
        "name": "multus-cni-network",
        "type": "multus",
        "binDir": BIN,
        "confDir": CONFIGURATION,
        "kubeconfig": f"{CONFIGURATION}/multus.d/multus.kubeconfig",
        "clusterNetwork": NETWORK,
        "multusNamespace": NAMESPACE,
        "logFile": log,
        "logLevel": "verbose",
    }


def _agent(cluster: Cluster, node: str) -> dict[str, Any]:
    """The agent's settings file; what is not in it has its default, as on any node."""
    return {
        "node": {"name": node},
        "server": {"socket": AGENT_SOCKET},
        "queue": {"directory": AGENT_QUEUE},
        "store": {"kind": "kubernetes", "kubeconfig": cluster.place.kubeconfig("spiderpool-agent")},
        "ipam": {"enable_ip_conflict_detection": True, "enable_gateway_detection": True},
        "collector": {"enabled": False},  # the controller does it
        "dataplane": {"cgroup": cgroup(cluster.place.lab, node), "bpffs": BPFFS, "headers_cache": HEADERS},
    }
