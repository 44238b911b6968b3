"""What IPAM's tests share: a running Ipam on a real store, calls, pools, and a store that misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_interface
from typing import Any, cast

from api.claim import Claim
from api.meta import ObjectMeta, R, Resource
from api.pool import Pool, PoolSpec
from plugins.cni import Call, Command
from plugins.coordinator.probe import Prober, ProbeSettings
from plugins.ipam.plugin import Ipam
from plugins.ipam.pods import PodSource
from plugins.ipam.provider import Provider
from plugins.ipam.settings import IpamSettings
from store.port import EVERYTHING, Event, Listing, Query, Store
from store.sqlite import SqliteStore

DEFAULTS = IpamSettings()
Hook = Callable[[Resource], Awaitable[None]]


def call(
    pod: str,
    command: Command = "ADD",
    *,
    container: str = "",
    uid: bool = True,
    nic: str = "eth0",
    v4: tuple[str, ...] = ("v4",),
    v6: tuple[str, ...] = (),
    ipam: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    args: Mapping[str, str] | None = None,
    version: str = "1.0.0",
    netns: str = "",
    netns_fd: int | None = None,
) -> Call:
    """One call for the pod `pod`, whose sandbox is `container` (by default one of its own)."""
    names = {"K8S_POD_NAMESPACE": "ns", "K8S_POD_NAME": pod} | ({"K8S_POD_UID": f"uid-{pod}"} if uid else {})
    block = {"type": "spiderpool", "default_ipv4_ippool": list(v4), "default_ipv6_ippool": list(v6), **(ipam or {})}
    return Call(
        plugin="spiderpool",
        command=command,
        container_id=container or f"sandbox-{pod}",
        netns=netns or f"/run/netns/{pod}",
        netns_fd=netns_fd,
        ifname=nic,
        args={**names, **(args or {})},
        path="",
        config={"cniVersion": version, "name": "net", "type": "macvlan", "ipam": block, **(config or {})},
        cni_version=version,
    )


def addresses(result: Mapping[str, Any]) -> list[str]:
    """The addresses of a result, without prefix length."""
    return [str(ip_interface(ip["address"]).ip) for ip in result["ips"]]


async def pool(store: Store, name: str, ips: str, **spec: Any) -> Pool:
    """Create a pool with one range, in 10.6.0.0/16 or fd06::/64."""
    subnet = "fd06::/64" if ":" in ips else "10.6.0.0/16"
    spec = {"subnet": subnet, "ips": [ips] if ips else None, **spec}
    meta = ObjectMeta(name=name, finalizers=["spiderpool.spidernet.io"])
    return await store.create(Pool(metadata=meta, spec=PoolSpec(**spec)))


async def claims(store: Store) -> dict[str, Claim]:
    """All claims, by address."""
    return {claim.spec.address: claim for claim in (await store.list(Claim)).items}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - the store is another process's too, no event tells
            await asyncio.sleep(0.01)


class Trouble(Store):
    """A real store in front of which a test may put hooks: before a write, or after it and before the answer."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.before: dict[str, Hook] = {}
        self.after: dict[str, Hook] = {}
        """Method name to what happens; it may raise, which is then the answer."""

    async def get(self, kind: type[R], name: str, namespace: str = "") -> R:
        return await self.inner.get(kind, name, namespace)

    async def list(self, kind: type[R], query: Query = EVERYTHING) -> Listing[R]:
        return await self.inner.list(kind, query)

    def watch(self, kind: type[R], query: Query, since: str) -> AsyncGenerator[Event[R], None]:
        return self.inner.watch(kind, query, since)

    async def create(self, resource: R) -> R:
        return cast(R, await self._write("create", resource, self.inner.create(resource)))

    async def update(self, resource: R) -> R:
        return cast(R, await self._write("update", resource, self.inner.update(resource)))

    async def update_status(self, resource: R) -> R:
        return await self.inner.update_status(resource)

    async def delete(
        self, kind: type[R], name: str, namespace: str = "", *, uid: str = "", resource_version: str = ""
    ) -> None:
        work = self.inner.delete(kind, name, namespace, uid=uid, resource_version=resource_version)
        if kind is Claim and ("delete" in self.before or "delete" in self.after):
            await self._write("delete", await self.inner.get(kind, name, namespace), work)
        else:
            await work

    async def close(self) -> None:
        await self.inner.close()

    async def _write(self, method: str, resource: Resource, work: Any) -> Any:
        hooked = isinstance(resource, Claim)
        try:
            if hooked and method in self.before:
                await self.before[method](resource)
        except BaseException:
            work.close()
            raise
        result = await work
        if hooked and method in self.after:
            await self.after[method](resource)
        return result


@asynccontextmanager
async def running(
    store: Store,
    *,
    node: str = "node1",
    settings: IpamSettings = DEFAULTS,
    probe: ProbeSettings | None = None,
    pods: PodSource | None = None,
    provider: Provider | None = None,
) -> AsyncIterator[Ipam]:
    """An Ipam on `store` that is ready."""
    prober = Prober(probe or ProbeSettings())
    ipam = Ipam(store, node, settings, prober, pods=pods, provider=provider)
    task = asyncio.create_task(ipam.run())
    try:
        await ipam.ready(10)
        yield ipam
    finally:
        task.cancel()
        await asyncio.wait([task])
        await prober.close()
        if not task.cancelled() and task.exception():
            raise task.exception()  # type: ignore[misc]


@asynccontextmanager
async def opened(path: str) -> AsyncIterator[Trouble]:
    """A store in the file `path`."""
    store = await SqliteStore.open(path)
    try:
        yield Trouble(store)
    finally:
        await store.close()


@asynccontextmanager
async def node(
    directory: Any, *, settings: IpamSettings = DEFAULTS, probe: ProbeSettings | None = None
) -> AsyncIterator[tuple[Ipam, Trouble]]:
    """An Ipam that is ready on a store of its own, and the store."""
    async with opened(f"{directory}/store.db") as store, running(store, settings=settings, probe=probe) as ipam:
        yield ipam, store
