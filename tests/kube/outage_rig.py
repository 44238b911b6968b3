"""A whole site on a cluster of its own: controllers and agents as processes, and pods that nobody runs.

CNI calls are made by the real executable, as a kubelet of the pod's node would.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.kube.cluster import Cluster, free_ports
from lab.kube.components import SERVER, argv
from tests.integration.installation import ROOT, Agent, Installation, Outcome, netns
from tests.kube.controller_rig import API, LEASE, POOLS, SUBNETS, Json, Replica, Requests, controllers, eventually
from tests.kube.subnet_rig import asking, workload

CORE = "/api/v1"
APPS = "/apis/apps/v1/namespaces/default/deployments"
PODS = f"{CORE}/namespaces/default/pods"
CLAIMS = f"{API}/spideripclaims"
CONFIGS = f"{API}/namespaces/default/spidermultusconfigs"
NETWORKS = "/apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions"
POOL, SUBNET = "site", "office"
NODES = ("node1", "node2")
SIDE = "side-server"
"""Name of a second API server on the same etcd."""
CONFIG: Json = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "macvlan",
    "ipam": {"type": "spiderpool", "default_ipv4_ippool": [POOL]},
}
QUICK = ("--reclaim-settle=0.1", "--reclaim-teardown=0.3", "--subnets-settle=0.05", "--status-interval=0.2")


class Side(Requests):
    """The administrator's requests to another port."""

    def __init__(self, cluster: Cluster, port: int) -> None:
        super().__init__(cluster)
        self._port = port


@dataclass(frozen=True)
class Pod:
    """A pod as kubelet knows it."""

    name: str
    node: str
    uid: str


@dataclass
class Site:
    """What runs, and what tests do with it."""

    cluster: Cluster
    ask: Requests
    launch: Callable[..., Replica]
    netns: str
    nodes: dict[str, Installation] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)

    def ready(self, *replicas: Replica) -> None:
        for replica in replicas:
            self._await(replica)

    @staticmethod
    def _await(replica: Replica) -> None:
        def ready() -> bool:
            assert replica.process.poll() is None, f"{replica.name} ended"
            return replica.probe() == 200

        eventually(40, ready, f"{replica.name} is ready")

    def holder(self) -> str:
        """Name of the leading controller."""
        status, lease = self.ask("GET", LEASE)
        return str(lease["spec"].get("holderIdentity") or "").partition("_")[0] if status == 200 else ""

    # Pods and calls

    def pod(self, name: str, node: str, ask: Requests | None = None) -> Pod:
        body = {
            "metadata": {"name": name},
            "spec": {
                "nodeName": node,
                "containers": [{"name": "c", "image": "none"}],
                "terminationGracePeriodSeconds": 0,
            },
        }
        status, made = (ask or self.ask)("POST", PODS, body)
        assert status == 201, made
        return Pod(name, node, made["metadata"]["uid"])

    def delete(self, pod: Pod, ask: Requests | None = None) -> None:
        """Its kubelet is no more, so no DEL follows."""
        status, answer = (ask or self.ask)("DELETE", f"{PODS}/{pod.name}", {"gracePeriodSeconds": 0})
        assert status == 200, answer

    def start(self, command: str, pod: Pod) -> subprocess.Popen[bytes]:
        args = f"K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod.name};K8S_POD_UID={pod.uid}"
        more = {"CNI_CONTAINERID": f"box-{pod.name}", "CNI_ARGS": args}
        return self.nodes[pod.node].start(command, CONFIG, netns=self.netns, **more)

    def call(self, command: str, pod: Pod, timeout: float = 60) -> Outcome:
        process = self.start(command, pod)
        stdout, _ = process.communicate(timeout=timeout)
        return Outcome(process.returncode, stdout)

    def add(self, pod: Pod) -> str:
        """Its address."""
        outcome = self.call("ADD", pod)
        assert outcome.status == 0, outcome
        (address,) = outcome.json["ips"]
        return str(address["address"]).partition("/")[0]

    def claims(self) -> dict[str, str]:
        """UID of the pod that has it, by address."""
        status, found = self.ask("GET", CLAIMS)
        assert status == 200, found
        return {item["spec"]["address"]: item["spec"].get("podUID", "") for item in found["items"]}

    def free(self, address: str) -> bool:
        return self.ask("GET", f"{CLAIMS}/{address}")[0] == 404

    # What the leader does

    def application(self, name: str, ask: Requests | None = None) -> None:
        """A Deployment of two that is to have a pool of its own."""
        body = workload("Deployment", name, asking({"ipv4": [SUBNET]}), 2)
        status, answer = (ask or self.ask)("POST", APPS, body)
        assert status == 201, answer

    def has_pool(self, name: str) -> bool:
        label = f"ipam.spidernet.io/owner-application-name%3D{name}"
        status, found = self.ask("GET", f"{API}/{POOLS}?labelSelector={label}")
        return status == 200 and [len(item["spec"].get("ips") or []) for item in found["items"]] == [1]

    def network(self, name: str) -> None:
        """A SpiderMultusConfig and its network."""
        body = {
            "apiVersion": API.removeprefix("/apis/"),
            "kind": "SpiderMultusConfig",
            "metadata": {"name": name},
            "spec": {"cniType": "macvlan", "macvlan": {"master": ["eth0"]}},
        }
        status, answer = self.ask("POST", CONFIGS, body)
        assert status == 201, answer
        eventually(20, lambda: self.has_network(name), f"network {name} is there")

    def spoil(self, name: str, ask: Requests | None = None) -> None:
        """Somebody deletes the network by hand."""
        status, answer = (ask or self.ask)("DELETE", f"{NETWORKS}/{name}")
        assert status == 200, answer

    def has_network(self, name: str) -> bool:
        return self.ask("GET", f"{NETWORKS}/{name}")[0] == 200

    def counted(self) -> bool:
        """Whether the pool's status agrees with the claims."""
        status, pool = self.ask("GET", f"{API}/{POOLS}/{POOL}")
        of_pool = [a for a in self.claims() if a.startswith("10.70.")]
        return status == 200 and (pool.get("status") or {}).get("allocatedIPCount", 0) == len(of_pool)

    # Outages

    @contextmanager
    def side(self) -> Iterator[Side]:
        """Another way to the same objects, of which nobody but the test knows."""
        (port,) = free_ports(1)
        there = Side(self.cluster, port)

        def ready() -> bool:
            try:
                return there("GET", f"{API}/{POOLS}")[0] == 200
            except OSError:
                return False

        command = argv(SERVER, replace(self.cluster.place, port=port))
        self.cluster.launch(SIDE, command, ready, folder=SERVER)
        try:
            yield there
        finally:
            self.cluster.stop(SIDE)

    def alive(self, *replicas: Replica) -> None:
        """Nobody was restarted: the processes are those that were started."""
        assert [replica.process.poll() for replica in replicas] == [None] * len(replicas)
        assert [agent.process.poll() for agent in self.agents.values()] == [None] * len(self.agents)


@contextmanager
def site(cluster: Cluster, folder: Path, *flags: str) -> Iterator[Site]:
    """Two agents with these flags, a pool, a subnet, nodes; controllers are the test's to launch."""
    subprocess.run([ROOT / "plugins/shim/build.sh", "native"], check=True)
    with ExitStack() as stack:
        namespace = stack.enter_context(netns())
        launch = stack.enter_context(controllers(cluster, folder))
        there = Site(cluster, Requests(cluster), lambda name: launch(name, *QUICK), namespace)
        for name in NODES:
            assert there.ask("POST", f"{CORE}/nodes", {"metadata": {"name": name}})[0] == 201
            root = folder / name
            root.mkdir()
            installed = there.nodes[name] = Installation(root)
            there.agents[name] = stack.enter_context(
                installed.agent(
                    *("--dataplane-enabled=false", "--collector-enabled=false", "--upstream-socket="),
                    *("--store-kind=kubernetes", f"--store-kubeconfig={cluster.admin}", f"--node-name={name}"),
                    *flags,
                    module="agent",
                )
            )
        try:
            yield there
        finally:
            for name, agent in there.agents.items():
                print(f"--- agent of {name}\n{agent.log()}")


def furnish(there: Site) -> None:
    """The pool, the subnet and two networks, once a controller leads."""

    def admitted(plural: str, name: str, **spec: Any) -> None:
        answers: list[tuple[int, Json]] = []

        def made() -> bool:
            answers.append(there.ask.create(plural, name, **spec))
            return answers[-1][0] in (201, 409)

        eventually(20, made, f"{name} is admitted")

    admitted(POOLS, POOL, subnet="10.70.0.0/24", ips=["10.70.0.10-10.70.0.99"])
    admitted(SUBNETS, SUBNET, subnet="10.71.0.0/24", ips=["10.71.0.10-10.71.0.99"])
    account = f"{CORE}/namespaces/default/serviceaccounts/default"
    eventually(20, lambda: there.ask("GET", account)[0] == 200, "pods may be made")
