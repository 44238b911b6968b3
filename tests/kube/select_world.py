"""What tests of pool selection share: namespaces, nodes and pods made by kubectl, and an Ipam of one node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_interface, ip_network
from secrets import token_hex
from typing import Any, NamedTuple

from api.claim import LABEL_POOL, Claim, claim_name, label_value
from api.meta import ObjectMeta
from api.pool import Pool, PoolSpec
from api.ranges import Family, range_text
from lab.kube.cluster import Cluster
from lab.layout import LabError
from plugins.cni import Call
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.ipam.plugin import Ipam
from plugins.ipam.pods import Pods
from plugins.ipam.settings import IpamSettings
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import Query, Store
from tests.integration.ipam_rig import call

Json = dict[str, Any]
SETTINGS = IpamSettings(auto_pool_wait=10)


class World:
    """A namespace, nodes and pods of a test's own in a cluster that others use too; `end` removes them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespace = f"spt-{token_hex(4)}"
        self.nodes: list[str] = []
        self._made: list[tuple[str, str]] = []
        self.make("v1", "Namespace", self.namespace, namespace="")
        self._await_account(self.namespace)

    def make(
        self,
        api_version: str,
        kind: str,
        name: str,
        *,
        namespace: str | None = None,
        meta: Mapping[str, Any] | None = None,
        **members: Any,
    ) -> Json:
        """Create an object; the namespace is the world's unless said otherwise."""
        space = self.namespace if namespace is None else namespace
        metadata = {"name": name, **({"namespace": space} if space else {}), **(meta or {})}
        document = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **members}
        answer = self.cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(document))
        if not space:
            self._made.append((kind, name))
        return dict(json.loads(answer))

    def node(self, **labels: str) -> str:
        """A node that nobody runs; its name."""
        name = f"{self.namespace}-{len(self.nodes)}"
        self.make("v1", "Node", name, namespace="", meta={"labels": labels})
        self.nodes.append(name)
        return name

    def pod(
        self,
        name: str,
        *,
        node: str = "",
        said: Mapping[str, object] | None = None,
        labels: Mapping[str, str] | None = None,
        namespace: str | None = None,
        owners: Sequence[Mapping[str, object]] = (),
    ) -> PodOf:
        """A pod, bound to the node; nobody runs it. `said` are annotations, as JSON unless they are texts."""
        meta = {
            "labels": dict(labels or {}),
            "annotations": {k: v if isinstance(v, str) else json.dumps(v) for k, v in (said or {}).items()},
            "ownerReferences": list(owners),
        }
        spec: Json = {"containers": [{"name": "c", "image": "lab.invalid/none"}], "terminationGracePeriodSeconds": 0}
        if node:
            spec["nodeName"] = node
        made = self.make("v1", "Pod", name, namespace=namespace, meta=meta, spec=spec)
        return PodOf(made["metadata"]["namespace"], name, made["metadata"]["uid"])

    def space(self, name: str, labels: Mapping[str, str], annotations: Mapping[str, object]) -> str:
        """A further namespace; its full name."""
        full = f"{self.namespace}-{name}"
        texts = {key: json.dumps(value) for key, value in annotations.items()}
        self.make("v1", "Namespace", full, namespace="", meta={"labels": dict(labels), "annotations": texts})
        self._await_account(full)
        return full

    def _await_account(self, namespace: str) -> None:
        """Pods cannot be made before the namespace's service account, which a controller makes."""
        self.cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", namespace, "--timeout=30s")

    def end(self) -> None:
        """Remove what was made; the namespaces' contents go with them."""
        for kind, name in reversed(self._made):
            try:
                self.cluster.kubectl("delete", kind, name, "--wait=false", "--ignore-not-found")
            except LabError as error:
                print(f"{kind} {name} is left: {error}")


class PodOf(NamedTuple):
    """A pod that was made."""

    namespace: str
    name: str
    uid: str

    def call(self, nic: str = "eth0", v4: tuple[str, ...] = (), v6: tuple[str, ...] = (), **more: Any) -> Call:
        """An ADD for the pod, with these pools in the network configuration."""
        args = {"K8S_POD_NAMESPACE": self.namespace, "K8S_POD_NAME": self.name, "K8S_POD_UID": self.uid}
        return call(self.name, nic=nic, v4=v4, v6=v6, container=f"box-{self.uid}", args=args, **more)


@asynccontextmanager
async def on_node(
    cluster: Cluster, node: str, settings: IpamSettings = SETTINGS
) -> AsyncIterator[tuple[Ipam, KubeStore]]:
    """An Ipam of this node that is ready, and its store."""
    store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
    prober = Prober(ProbeSettings())
    ipam = Ipam(store, node, settings, prober, pods=Pods(store, node, settings))
    task = asyncio.create_task(ipam.run())
    try:
        await ipam.ready(20)
        yield ipam, store
    finally:
        task.cancel()
        await asyncio.wait([task])
        await prober.close()
        await store.close()
        if not task.cancelled() and task.exception():
            raise task.exception()  # type: ignore[misc]


class Pools:
    """Pools of a test in two networks of its own; `remove` takes them and the claims on their addresses away."""

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._networks: dict[Family, str] = {4: f"10.{number}.0.0/16", 6: f"fd77:{number}::/64"}
        self._taken = 0
        self._prefix = f"spt-{token_hex(4)}-"
        self.made: list[str] = []

    def name(self, short: str) -> str:
        """The full name of the pool that is called so here."""
        return f"{self._prefix}{short}"

    async def add(self, short: str, *, count: int = 4, family: Family = 4, labels: Any = None, **spec: Any) -> str:
        """A pool of so many addresses that no other pool here has; its full name."""
        first = int(ip_network(self._networks[family])[self._taken + 1])
        self._taken += count
        ips = [range_text(family, (first, first + count - 1))] if count else None
        pool = Pool(
            metadata=ObjectMeta(name=self.name(short), labels=labels or {}),
            spec=PoolSpec(**{"subnet": self._networks[family], "ips": ips, **spec}),
        )
        await self._store.create(pool)
        self.made.append(pool.metadata.name)
        return pool.metadata.name

    async def of(self, result: Mapping[str, Any]) -> list[str]:
        """Short names of the pools that the result's addresses are of, as the claims have it."""
        names = [claim_name(ip_interface(ip["address"]).ip) for ip in result["ips"]]
        claims = [await self._store.get(Claim, name) for name in names]
        return [claim.spec.pool.removeprefix(self._prefix) for claim in claims]

    async def remove(self) -> None:
        """Remove the pools and all claims on their addresses."""
        for name in self.made:
            for claim in (await self._store.list(Claim, Query(labels={LABEL_POOL: label_value(name)}))).items:
                await self._store.delete(Claim, claim.metadata.name)
            await self._store.delete(Pool, name)
