"""Nodes that run pods: a kubelet of the cluster's release on the distribution's containerd and runc.

A node is a network namespace of the lab's segment, a mount namespace (see node_init.py) and a folder in each cgroup
hierarchy; its processes and all of its containers are in the lab's cgroup, so that they end with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from typing import Any

import yaml

from lab import topology
from lab.kube import image, network, points
from lab.kube.build import NODE, missing, program, release
from lab.kube.cluster import READY_WITHIN, Cluster
from lab.kube.components import SCHEDULER
from lab.kube.pki import Authority
from lab.kube.points import POINTS
from lab.layout import NODE_ADDRESS, NODES, Lab, LabError
from lab.nodes import BIN as PROGRAMS
from lab.nodes import HEALTH_PORT, agent, entering, http_get
from lab.pods import cgroup
from lab.process import cgroup2_root, end, kill_cgroup, run
from lab.table import Paper

KERNEL = {"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
"""What a kubelet wants of the kernel. It gets to see it, and the machine's own settings stay as they are."""
SOCKET = "/run/containerd/containerd.sock"
MANIFESTS = "manifests"
"""Folder of the node with the pods that its kubelet runs on its own account."""


def preflight() -> None:
    """Whether this machine can carry nodes. Raises LabError naming what is missing."""
    wrong = []
    packages = {"containerd": "containerd", "runc": "runc", "nsenter": "util-linux", "ip": "iproute2"}
    wrong += [f"{name} (apt install {package})" for name, package in packages.items() if shutil.which(name) is None]
    if not os.access(image.BUSYBOX, os.X_OK):
        wrong.append(f"{image.BUSYBOX} (apt install busybox-static)")
    wrong += [f"{name} (python -m lab.kube build --node)" for name in missing(NODE)]
    wrong += [f"{name} (plugins/shim/build.sh)" for name in network.absent()]
    if wrong:
        raise LabError(f"missing: {', '.join(wrong)}")


def up(cluster: Cluster, paper: Paper) -> None:
    """The scheduler, the segment and its nodes, ready for pods. Raises LabError."""
    begin = time.monotonic()
    lab, place = cluster.place.lab, cluster.place
    authority = Authority(place.pki)
    cluster.kubeconfig("system:kube-scheduler")
    cluster.start(SCHEDULER)
    topology.create(lab)
    network.install(cluster)
    for node in NODES:
        cluster.kubeconfig(f"system:node:{node.name}", ["system:nodes"])
        authority.issue(node.name, node.name, hosts=[node.name, *NODE_ADDRESS[node.name]])
        _prepare(cluster, node.name)
        network.prepare(cluster, node.name)
        points.make()
    network.define(cluster)
    for node in NODES:
        start(cluster, node.name)
    names = " and ".join(node.name for node in NODES)
    paper.step(f"{names}: kubelet {release()}, containerd, Multus, spiderpool", time.monotonic() - begin)


def start(cluster: Cluster, node: str) -> None:
    """Everything that runs on the node; it is Ready when it returns. Raises LabError."""
    _make_cgroups(cluster.place.lab, node)
    start_init(cluster, node)
    start_containerd(cluster, node)
    start_agent(cluster, node)
    start_kubelet(cluster, node)


def kill(cluster: Cluster, node: str) -> None:
    """Pull the node's plug: all of it ends at once, pods too, and what is in memory is lost. Raises LabError.

    `start` is how it comes back.
    """
    lab = cluster.place.lab
    kill_cgroup(f"{cgroup2_root()}/{lab.name}/{node}")
    _remove_cgroups(f"{lab.name}/{node}")  # or cAdvisor waits three seconds for each container that is no more
    for name in [name for name in cluster.processes if name.startswith(f"{node}-")]:
        end(cluster.processes.pop(name), signal.SIGKILL, READY_WITHIN)  # it is dead; nobody else waits for our children
    cluster.save()
    for name, target in POINTS.items():
        if target.startswith("/run/"):
            shutil.rmtree(f"{lab.node(node)}/{name}")
            os.makedirs(f"{lab.node(node)}/{name}", mode=0o755)


def _remove_cgroups(name: str) -> None:
    """Remove a cgroup in all v1 hierarchies, when everything in it was killed. Raises LabError."""
    deadline = time.monotonic() + READY_WITHIN
    for root in hierarchies():
        for path, _, _ in os.walk(f"{root}/{name}", topdown=False):
            while True:
                try:
                    os.rmdir(path)
                    break
                except OSError as error:  # those who were killed in it are still on their way out
                    if time.monotonic() > deadline:
                        raise LabError(f"cannot remove {path}: {error}") from error
                    time.sleep(0.02)


def hierarchies() -> list[str]:
    """Where cgroup v1 hierarchies are mounted; none on a machine with v2 alone."""
    with open("/proc/mounts") as mounts:
        return [fields[1] for fields in map(str.split, mounts) if fields[2] == "cgroup"]


def pods_cgroup(lab: Lab, node: str) -> str:
    """Below which cgroup the node's pods are, in every hierarchy."""
    return f"/{lab.name}/{node}/pods"


def _prepare(cluster: Cluster, node: str) -> None:
    folder = cluster.place.lab.node(node)
    for name in (*POINTS, "sys", "images", MANIFESTS):
        os.makedirs(f"{folder}/{name}", mode=0o755)
    for name, value in KERNEL.items():
        with open(f"{folder}/sys/{os.path.basename(name)}", "w") as file:
            file.write(f"{value}\n")
    with open(f"{folder}/kubelet.yaml", "w") as file:
        yaml.safe_dump(_kubelet(cluster, node), file, sort_keys=False)
    with open(f"{folder}/containerd.toml", "w") as file:
        file.write(_CONTAINERD.format(pause=image.PAUSE, bin=network.BIN, configuration=network.CONFIGURATION))


def _make_cgroups(lab: Lab, node: str) -> None:
    """The cgroup of the node's pods, in every hierarchy."""
    for root in (*hierarchies(), cgroup2_root()):
        path = root
        for name in pods_cgroup(lab, node).strip("/").split("/"):
            inherited, path = path, f"{path}/{name}"
            os.makedirs(path, exist_ok=True)
            for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new v1 folder, which nobody can enter then
                with contextlib.suppress(FileNotFoundError, OSError), open(f"{inherited}/{setting}") as file:
                    value = file.read()
                    if root in hierarchies():
                        with open(f"{path}/{setting}", "w") as own:
                            own.write(value)


_CONTAINERD = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  # Without CAP_SYS_RESOURCE nobody may lower it, and runc fails with an EOF.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{configuration}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def _kubelet(cluster: Cluster, node: str) -> dict[str, Any]:
    pki = cluster.place.pki
    return {
        "staticPodPath": f"{cluster.place.lab.node(node)}/{MANIFESTS}",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": pods_cgroup(cluster.place.lab, node),
        "enforceNodeAllocatable": ["none"],
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": f"{pki}/ca.crt"}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{pki}/{node}.crt",
        "tlsPrivateKeyFile": f"{pki}/{node}.key",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "clusterDNS": ["10.96.0.2"],
        "resolvConf": "",
        "failSwapOn": False,
        "protectKernelDefaults": True,
        "makeIPTablesUtilChains": False,
        "healthzPort": 0,
        # A full disk of the machine is no reason to evict pods here.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        "nodeLeaseDurationSeconds": 8,  # renewed every two seconds
    }


def start_init(cluster: Cluster, node: str) -> None:
    """The node's mount namespace, and its door to the API server. Raises LabError."""
    lab, folder = cluster.place.lab, cluster.place.lab.node(node)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "node_init.py")
    argv = ["/usr/bin/python3", "-I", "-S", script, lab.netns_path(node), str(cluster.place.port)]
    for name, target in POINTS.items():
        argv += [f"{folder}/{name}", target]
    for name in KERNEL:
        argv += [f"{folder}/sys/{os.path.basename(name)}", f"/proc/sys/{name}"]
    log = lab.log(f"{node}-init")
    with open(log, "w"):  # what it said before the node was killed does not count
        pass

    def ready() -> bool:
        with open(log) as file:
            return "READY" in file.read().split()

    cluster.launch(f"{node}-init", argv, ready, folder=f"{node}/system")


def on_node(cluster: Cluster, node: str, *argv: str) -> list[str]:
    """A command line that runs a program in the namespaces of the node. Raises LabError if the node is not there."""
    name = f"{node}-init"
    if not cluster.runs(name):
        raise LabError(f"{node} is not up")
    mounts, nsenter = f"--mount=/proc/{cluster.processes[name].pid}/ns/mnt", shutil.which("nsenter") or "nsenter"
    return [nsenter, f"--net={cluster.place.lab.netns_path(node)}", mounts, "--", *argv]


def start_containerd(cluster: Cluster, node: str) -> None:
    """containerd, with our images in it. Raises LabError."""
    folder = cluster.place.lab.node(node)
    socket = f"{folder}/run-containerd/containerd.sock"

    def ready() -> bool:
        if not os.path.exists(socket):
            return False
        with contextlib.suppress(LabError):
            return bool(run(["ctr", "--address", socket, "version"]))
        return False

    containerd = shutil.which("containerd") or "containerd"
    command = on_node(cluster, node, containerd, "--config", f"{folder}/containerd.toml")
    cluster.launch(f"{node}-containerd", command, ready, folder=f"{node}/system")
    inside = entering(cgroup(cluster.place.lab, node, "system"))
    for path in image.write(f"{folder}/images"):
        importing = on_node(cluster, node, "ctr", "-n", "k8s.io", "image", "import", path)
        run(importing, before=inside, timeout=60)


def start_agent(cluster: Cluster, node: str) -> None:
    """Our agent, ready. Raises LabError."""
    lab = cluster.place.lab

    def ready() -> bool:
        with contextlib.suppress(LabError):
            return http_get(lab, node, HEALTH_PORT, "/v1/runtime/readiness")[0] == 200
        return False

    argv = [f"{PROGRAMS}/spiderpool-agent", "--config", f"{lab.node(node)}/agent.yaml"]
    cluster.launch(agent(node), on_node(cluster, node, *argv), ready, folder=f"{node}/agent")


def start_kubelet(cluster: Cluster, node: str) -> None:
    """The kubelet; the node is Ready when it returns, as this kubelet says and not the one before. Raises LabError."""
    place = cluster.place
    begin = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    argv = [
        program("kubelet"),
        f"--config={place.lab.node(node)}/kubelet.yaml",
        f"--kubeconfig={place.kubeconfig(f'system:node:{node}')}",
        f"--hostname-override={node}",
        f"--node-ip={','.join(NODE_ADDRESS[node])}",
    ]

    def ready() -> bool:
        status, answer = cluster.ask(f"/api/v1/nodes/{node}")
        conditions = answer.get("status", {}).get("conditions", ()) if status == 200 else ()
        ready = [each for each in conditions if each["type"] == "Ready" and each["status"] == "True"]
        return any(each["lastHeartbeatTime"] > begin for each in ready)

    cluster.launch(f"{node}-kubelet", on_node(cluster, node, *argv), ready, folder=f"{node}/system")


def remove(lab: Lab) -> None:
    """What is left when all processes have ended. Raises LabError."""
    _remove_cgroups(lab.name)
    topology.remove(lab)
    if os.path.isdir(lab.state):
        points.remove(lab)
