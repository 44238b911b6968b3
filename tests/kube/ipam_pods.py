"""Pods for IPAM's tests: real objects on a real API server, of real controllers, on nodes that nobody runs.

A pod is bound to a node by name and stays Pending there: no kubelet starts it, and none waits for its end, so it is
deleted at once. CNI calls are made as a kubelet of that node would.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from api.claim import Claim
from api.endpoint import Endpoint
from api.meta import ObjectMeta, R, Resource
from api.pool import Pool, PoolSpec
from lab.kube.cluster import Cluster
from plugins.cni import Call, Command
from plugins.ipam.plugin import Ipam
from plugins.ipam.pods import Pods
from plugins.ipam.provider import Provider
from plugins.ipam.settings import IpamSettings
from store.errors import NotFoundError
from store.kube import KubeStore
from store.kube_settings import KubeSettings
from store.port import EVERYTHING, Event, Listing, Query, Store
from tests.integration.ipam_rig import Hook, call, running, until
from tests.kube.store_rig import raw_session

Json = dict[str, Any]
IPPOOL = "ipam.spidernet.io/ippool"
IPPOOLS = "ipam.spidernet.io/ippools"
NETWORKS = "k8s.v1.cni.cncf.io/networks"
CORE = "/api/v1"
APPS = "/apis/apps/v1"
KUBEVIRT = "/apis/kubevirt.io/v1"
VIRTUAL = ("VirtualMachine", "VirtualMachineInstance", "VirtualMachineInstanceMigration")


class Watched(Store):
    """The real store, with what was asked of it counted, and with hooks before and after requests.

    A hook is called with the object written, or an object that has only the name of what is read or deleted.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.counts: Counter[tuple[str, str]] = Counter()
        """By method and kind."""
        self.before: dict[tuple[str, type[Resource]], Hook] = {}
        self.after: dict[tuple[str, type[Resource]], Hook] = {}

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        await self._note(
            "get", kind, kind(metadata=ObjectMeta(name=name, namespace=namespace)) if _bare(kind) else None
        )
        return await self.inner.get(kind, name, namespace)

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        await self._note("list", kind, None)
        return await self.inner.list(kind, query)

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        return self.inner.watch(kind, query, since)

    async def create(self, resource: R) -> R:
        await self._note("create", type(resource), resource)
        return await self._after("create", await self.inner.create(resource))

    async def update(self, resource: R) -> R:
        await self._note("update", type(resource), resource)
        return await self._after("update", await self.inner.update(resource))

    async def update_status(self, resource: R) -> R:
        return await self.inner.update_status(resource)

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        await self._note("delete", kind, None)
        await self.inner.delete(kind, name, namespace, uid=uid, resource_version=resource_version)

    async def close(self) -> None:
        await self.inner.close()

    async def _note(self, method: str, kind: type[Resource], resource: Resource | None) -> None:
        self.counts[method, kind.TYPE.kind] += 1
        if hook := self.before.get((method, kind)):
            await hook(resource)  # type: ignore[arg-type]

    async def _after(self, method: str, resource: R) -> R:
        if hook := self.after.get((method, type(resource))):
            await hook(resource)
        return resource


def _bare(kind: type[Resource]) -> bool:
    return kind.TYPE.partial


@dataclass(frozen=True)
class Started:
    """A pod as kubelet knows it."""

    namespace: str
    name: str
    uid: str

    def call(self, command: Command = "ADD", *, container: str = "", **more: Any) -> Call:
        """A CNI call for it; its sandbox has its UID if no other is named."""
        args = {"K8S_POD_NAMESPACE": self.namespace, "K8S_POD_NAME": self.name, "K8S_POD_UID": self.uid}
        more.setdefault("v4", ())
        return call(self.name, command, container=container or f"box-{self.uid}", args=args, **more)


class World:
    """One namespace, with pools whose names and addresses nobody else has."""

    def __init__(self, session: aiohttp.ClientSession, store: Watched) -> None:
        self._session = session
        self.store = store
        self.namespace = f"ipam-{secrets.token_hex(4)}"
        self.key = secrets.token_hex(3)
        self._net = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}"
        # No group begins with a zero: addresses are compared as claims have them, in the shortest form.
        self._net6 = f"fd{secrets.token_hex(1)}:{secrets.randbelow(0xF000) + 0x1000:x}::"

    # Raw objects

    async def ask(self, method: str, path: str, body: Any = None, *, missing_ok: bool = False) -> Json:
        """One request to the API server by the administrator."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = json.dumps(body) if body is not None else None
        async with self._session.request(method, path, data=data, headers={"Content-Type": kind}) as answer:
            text = await answer.text()
            assert answer.status < 300 or (missing_ok and answer.status == 404), f"{method} {path}: {text}"
            found: Json = json.loads(text)
            return found if answer.status < 300 else {}

    async def takes_pods(self) -> bool:
        """Whether pods may be made already: the controllers give a new namespace the account that they need."""
        return bool(await self.ask("GET", self.path(CORE, "serviceaccounts", "default"), missing_ok=True))

    def path(self, base: str, plural: str, name: str = "") -> str:
        return f"{base}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    # Pools

    def pool_name(self, name: str) -> str:
        return f"{name}-{self.key}"

    async def pool(self, name: str, first: int, last: int, *, v6: bool = False, **spec: Any) -> str:
        """A pool of this world with the addresses of these numbers; its name in full."""
        net, subnet = (self._net6, f"{self._net6}/64") if v6 else (f"{self._net}.", f"{self._net}.0/24")
        numbers = (f"{first:x}", f"{last:x}") if v6 else (str(first), str(last))
        ips = "-".join(f"{net}{number}" for number in numbers)
        meta = ObjectMeta(name=self.pool_name(name))
        await self.store.inner.create(Pool(metadata=meta, spec=PoolSpec(subnet=subnet, ips=[ips], **spec)))
        return meta.name

    def address(self, number: int, *, v6: bool = False) -> str:
        return f"{self._net6}{number:x}" if v6 else f"{self._net}.{number}"

    async def claims(self) -> dict[str, Claim]:
        """The claims on this world's addresses, by address."""
        found = (await self.store.inner.list(Claim)).items
        mine = (f"{self._net}.", self._net6)
        return {claim.spec.address: claim for claim in found if claim.spec.address.startswith(mine)}

    async def endpoint(self, name: str) -> Endpoint | None:
        try:
            return await self.store.inner.get(Endpoint, name, self.namespace)
        except NotFoundError:
            return None

    # Workloads

    async def stateful_set(self, name: str, replicas: int, annotations: Mapping[str, str], **more: Any) -> None:
        """A StatefulSet whose pods are all made at once."""
        await self.ask("POST", self.path(APPS, "statefulsets"), _stateful_set(name, replicas, annotations) | more)

    async def patch_stateful_set(self, name: str, spec: Json) -> None:
        await self.ask("PATCH", self.path(APPS, "statefulsets", name), {"spec": spec})

    async def pod(
        self, name: str, annotations: Mapping[str, str], node: str = "node1", owner: Json | None = None
    ) -> Started:
        """A pod on a node; of nobody if no owner is given."""
        meta = {"name": name, "annotations": dict(annotations), "ownerReferences": [owner] if owner else []}
        spec = {"nodeName": node, "containers": [{"name": "c", "image": "none"}]}
        made = await self.ask("POST", self.path(CORE, "pods"), {"metadata": meta, "spec": spec})
        return Started(self.namespace, name, made["metadata"]["uid"])

    async def bound(self, name: str, node: str, *, not_: str = "") -> Started:
        """The pod of that name that a controller makes, once it is there, bound to the node; not that of UID `not_`."""
        uid = ""

        async def there() -> bool:
            nonlocal uid
            found = await self.ask("GET", self.path(CORE, "pods", name), missing_ok=True)
            uid = found["metadata"]["uid"] if found else ""
            return uid not in ("", not_)

        await until(there, 20)
        target = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": node}}
        await self.ask("POST", self.path(CORE, "pods", f"{name}/binding"), target)
        return Started(self.namespace, name, uid)

    async def delete_pod(self, pod: Started, *, seconds: int = 0) -> None:
        """Delete the pod; with `seconds` it goes on terminating."""
        body = {"gracePeriodSeconds": seconds, "preconditions": {"uid": pod.uid}}
        await self.ask("DELETE", self.path(CORE, "pods", pod.name), body)

    async def virtual(self, kind: str, name: str, owner: Json | None = None) -> Json:
        """A KubeVirt object of that kind; what owns something as it."""
        meta = {"name": name, "ownerReferences": [owner] if owner else []}
        body = {"apiVersion": "kubevirt.io/v1", "kind": kind, "metadata": meta}
        made = await self.ask("POST", self.path(KUBEVIRT, f"{kind.lower()}s"), body)
        uid = made["metadata"]["uid"]
        return {"apiVersion": "kubevirt.io/v1", "kind": kind, "name": name, "uid": uid, "controller": True}

    async def delete_virtual(self, kind: str, name: str) -> None:
        await self.ask("DELETE", self.path(KUBEVIRT, f"{kind.lower()}s", name), {"propagationPolicy": "Orphan"})

    @asynccontextmanager
    async def node(
        self,
        name: str = "node1",
        *,
        settings: IpamSettings = IpamSettings(),  # noqa: B008 - frozen
        provider: Provider | None = None,
    ) -> AsyncIterator[Ipam]:
        """An agent's IPAM on the node of that name."""
        pods = Pods(self.store, name, settings)
        async with running(self.store, node=name, settings=settings, pods=pods, provider=provider) as ipam:
            yield ipam


@asynccontextmanager
async def world(cluster: Cluster) -> AsyncIterator[World]:
    """A world of the test's own, whose objects go with it."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(raw_session(cluster))
        store = await KubeStore.open(KubeSettings(kubeconfig=cluster.admin))
        stack.push_async_callback(store.close)
        there = World(session, Watched(store))
        await there.ask("POST", f"{CORE}/namespaces", {"metadata": {"name": there.namespace}})
        try:
            await until(there.takes_pods, 30)
            yield there
        finally:
            await _clean(there)


async def _clean(there: World) -> None:
    """Pools and claims outlive a namespace, and pods without a kubelet would keep it."""
    for name in (await there.claims()).values():
        await there.store.inner.delete(Claim, name.metadata.name)
    for pool in (await there.store.inner.list(Pool)).items:
        if pool.metadata.name.endswith(f"-{there.key}"):
            await there.store.inner.delete(Pool, pool.metadata.name)
    await there.ask("DELETE", f"{CORE}/namespaces/{there.namespace}")
    await there.ask("DELETE", there.path(APPS, "statefulsets"))
    await there.ask("DELETE", there.path(CORE, "pods"), {"gracePeriodSeconds": 0})


def define_kubevirt(cluster: Cluster) -> None:
    """KubeVirt's kinds as far as anybody here reads them: any content will do."""
    documents = []
    for kind in VIRTUAL:
        plural = f"{kind.lower()}s"
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        names = {"kind": kind, "plural": plural, "singular": kind.lower()}
        spec = {"group": "kubevirt.io", "scope": "Namespaced", "names": names, "versions": [version]}
        documents.append(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{plural}.kubevirt.io"},
                "spec": spec,
            }
        )
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", "-", stdin=text)
    for kind in VIRTUAL:
        asyncio.run(_served(cluster, f"{KUBEVIRT}/{kind.lower()}s"))


async def _served(cluster: Cluster, path: str) -> None:
    async def answers() -> bool:
        return (await asyncio.to_thread(cluster.ask, path))[0] == 200

    await until(answers, 30)


def pools(*v4: str, v6: tuple[str, ...] = ()) -> dict[str, str]:
    """The annotation that names pools for all NICs."""
    return {IPPOOL: json.dumps({"ipv4": list(v4), "ipv6": list(v6)})}


def _stateful_set(name: str, replicas: int, annotations: Mapping[str, str]) -> Json:
    labels = {"app": name}
    template = {
        "metadata": {"labels": labels, "annotations": dict(annotations)},
        "spec": {"containers": [{"name": "c", "image": "none"}], "terminationGracePeriodSeconds": 0},
    }
    spec = {
        "replicas": replicas,
        "podManagementPolicy": "Parallel",
        "serviceName": name,
        "selector": {"matchLabels": labels},
        "template": template,
    }
    return {"metadata": {"name": name}, "spec": spec}
