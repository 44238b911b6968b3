"""The infrastructure provider: an HTTP service that binds pods' addresses to NICs of the node, as clouds want it.

Asked for the NICs whose SpiderMultusConfig is of type `vlan` with `vlanMode: auto`: it answers which MAC address and
which VLAN the pod's NIC must have. What it was asked about is written into the claim beforehand (`spec.provided`), so
whoever deletes the claim, now or after a crash, knows that the provider has to be told first.

Source: upstream, docs/usage/iaas-network-provider.md. Unlike upstream, TLS certificates are verified unless that is
switched off; a failed ADD takes its request back; and a call is tried with whatever time is left instead of being
given up when less than 48 s are.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec.structs import replace

from api.claim import Claim, Provided
from api.meta import Struct
from api.multusconfig import MultusConfig, MultusConfigSpec
from daemon.limits import at_least
from daemon.upstream import seconds, upstream
from plugins.errors import ProviderError
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import network_of
from store.errors import NotFoundError
from store.port import Store

ALLOCATE = "/v1/apis/network.iaas.io/ipam/allocate-ips"
RELEASE = "/v1/apis/network.iaas.io/ipam/release-ip"
BUDGET = "X-Request-Timeout-Ms"
"""Header that tells how long we wait for the answer."""

_LARGEST = 1 << 20
"""Bytes of an answer; a real one has a few hundred."""
_QUOTED = 300
"""Characters of a refusal that our error repeats."""
_MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")

T = TypeVar("T")


@dataclass(frozen=True)
class ProviderSettings:
    """The infrastructure provider that addresses are bound at. Times are in seconds."""

    server_url: str = field(default="", metadata=upstream(key="iaasNetworkProvider.serverUrl"))
    """Where it listens: `https://HOST[:PORT][/PATH]`. Empty: there is none."""
    http_request_timeout: float = field(
        default=50.0, metadata=upstream(key="iaasNetworkProvider.httpRequestTimeout", translate=seconds)
    )
    """How long one request may take. An ADD may take so much longer than `ipam.add_deadline`, but never longer than
    `server.add_deadline`."""
    verify_tls: bool = True
    """Check the provider's certificate. Upstream does not: whoever is on the path can then bind addresses to NICs."""
    ca_file: str = ""
    """PEM file with the authorities to believe; empty: the system's."""

    def __post_init__(self) -> None:
        at_least(0.01, http_request_timeout=self.http_request_timeout)
        if self.http_request_timeout >= 100:
            raise ValueError(f"http_request_timeout is {self.http_request_timeout}; it must be below 100")
        if not self.server_url:
            return
        url = urlsplit(self.server_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError(f"server_url is {self.server_url!r}; allowed: http[s]://HOST[:PORT][/PATH]")


class AllocationItem(Struct, frozen=True, kw_only=True):
    """One address to bind."""

    ip_address: str
    subnet: str
    parent_nic_mac: str


class AllocationRequest(Struct, frozen=True, kw_only=True):
    """Body of a request to `ALLOCATE`."""

    pod_name: str = ""
    pod_namespace: str = ""
    pod_uid: str = msgspec.field(default="", name="podUID")
    node_name: str
    items: list[AllocationItem] = msgspec.field(name="iaasIPsAllocationRequest")


class AllocationResult(Struct, frozen=True, kw_only=True):
    """One address as it was bound."""

    ip_address: str
    mac_address: str = ""
    vlan_id: int = 0


class AllocationResponse(Struct, frozen=True, kw_only=True):
    """Body of the answer to it."""

    items: list[AllocationResult] = msgspec.field(default_factory=list, name="iaasIPsAllocationResponse")


class ReleaseRequest(Struct, frozen=True, kw_only=True):
    """Body of a request to `RELEASE`."""

    pod_name: str = ""
    pod_namespace: str = ""
    pod_uid: str = msgspec.field(default="", name="podUID")
    node_name: str
    parent_nic_mac: str = ""
    subnet: str
    ip_address: str


class Provider:
    """Asks the provider, for one node. Connections are opened when first needed; `close` gives them back."""

    def __init__(self, store: Store, node: str, settings: ProviderSettings, ipam: IpamSettings) -> None:
        self._store = store
        self._node = node
        self._settings = settings
        self._ipam = ipam
        self._session: aiohttp.ClientSession | None = None

    async def parent_mac(self, facts: PodFacts, nic: str) -> str:
        """MAC address of the node's NIC below the pod's, if the provider has to be asked about that; empty otherwise.

        Raises ProviderError if the NIC below cannot be read, StoreError.
        """
        network, _ = network_of(nic, facts, self._ipam)
        namespace, _, name = network.partition("/")
        if not name:
            return ""
        try:
            config = await self._store.get(MultusConfig, name, namespace)
        except NotFoundError:
            return ""
        link = parent_link(config.spec)
        if not link:
            return ""
        try:
            return await asyncio.to_thread(_mac_of, link)
        except OSError as error:
            raise ProviderError(
                "the NIC below the pod's cannot be read",
                f"{link}, named by SpiderMultusConfig {network}: {error.strerror}",
            ) from None

    async def allocate(self, claims: Sequence[Claim], deadline: float) -> list[Claim]:
        """The claims with the provider's answers, not yet written; `deadline` is loop time. Raises ProviderError.

        All of them are one pod's, and have what the provider must know in `spec.provided`.
        """
        limit = min(self._settings.http_request_timeout, deadline - asyncio.get_running_loop().time())
        request = allocation_request(claims, self._node)
        answer = await self._post(ALLOCATE, request, "allocate", AllocationResponse, limit)
        try:
            return with_answers(claims, answer)
        except ValueError as error:
            raise ProviderError("the provider's answer is wrong", f"allocate: {error}") from None

    async def release(self, claim: Claim) -> None:
        """Unbind the claim's address; nothing without `spec.provided`. Raises ProviderError, and then it is bound."""
        if claim.spec.provided is not None:
            body = release_request(claim, claim.spec.provided)
            await self._post(RELEASE, body, "release", None, self._settings.http_request_timeout)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, path: str, body: Struct, what: str, kind: type[T] | None, limit: float) -> T:
        if self._session is None:
            tls = _tls(self._settings)
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), trust_env=False)
        url = self._settings.server_url.rstrip("/") + path
        headers = {"Content-Type": "application/json", BUDGET: str(math.ceil(limit * 1000))}
        try:
            async with (
                asyncio.timeout(limit),
                self._session.post(
                    url, data=msgspec.json.encode(body), headers=headers, allow_redirects=False
                ) as response,
            ):
                text = await response.content.read(_LARGEST)
                if not 200 <= response.status < 300:
                    said = text[:_QUOTED].decode(errors="replace").strip()
                    raise ProviderError("the provider refuses", f"{what} at {url}: HTTP {response.status} {said}")
                return msgspec.json.decode(text, type=kind) if kind is not None else None  # type: ignore[return-value]
        except TimeoutError:
            raise ProviderError("the provider does not answer", f"{what} at {url}: {limit:g} s are over") from None
        except aiohttp.ClientError as error:
            raise ProviderError("the provider cannot be reached", f"{what} at {url}: {error}") from None
        except msgspec.MsgspecError as error:
            raise ProviderError("the provider's answer is wrong", f"{what} at {url}: {error}") from None


def parent_link(spec: MultusConfigSpec) -> str:
    """The node's NIC below the pod's, if the provider decides on the VLAN; empty otherwise."""
    vlan = spec.vlan
    if spec.cni_type != "vlan" or vlan is None or vlan.vlan_mode != "auto" or not vlan.master:
        return ""
    if len(vlan.master) == 1:
        return vlan.master[0]
    return vlan.bond.name if vlan.bond is not None else ""


def allocation_request(claims: Sequence[Claim], node: str) -> AllocationRequest:
    """The request for the claims of one pod."""
    first = claims[0].spec
    workload = first.workload
    return AllocationRequest(
        pod_name=(workload.pod or workload.name) if workload else "",
        pod_namespace=workload.namespace if workload else "",
        pod_uid=first.pod_uid,
        node_name=node,
        items=[
            AllocationItem(
                ip_address=claim.spec.address,
                subnet=claim.spec.provided.subnet,
                parent_nic_mac=claim.spec.provided.parent_mac,
            )
            for claim in claims
            if claim.spec.provided is not None
        ],
    )


def release_request(claim: Claim, provided: Provided) -> ReleaseRequest:
    """The request that takes back what was asked for the claim."""
    workload = claim.spec.workload
    return ReleaseRequest(
        pod_name=(workload.pod or workload.name) if workload else "",
        pod_namespace=workload.namespace if workload else "",
        pod_uid=claim.spec.pod_uid,
        node_name=claim.spec.node,
        parent_nic_mac=provided.parent_mac,
        subnet=provided.subnet,
        ip_address=claim.spec.address,
    )


def with_answers(claims: Sequence[Claim], answer: AllocationResponse) -> list[Claim]:
    """The claims with MAC and VLAN of the answer. Raises ValueError if it does not tell both of every address."""
    given = {item.ip_address: item for item in answer.items}
    unknown = given.keys() - {claim.spec.address for claim in claims}
    if unknown:
        raise ValueError(f"it tells of {', '.join(sorted(unknown))}, which nobody asked about")
    found = []
    for claim in claims:
        item = given.get(claim.spec.address)
        if item is None:
            raise ValueError(f"it does not tell of {claim.spec.address}")
        if not _MAC.fullmatch(item.mac_address):
            raise ValueError(f"{claim.spec.address}: {item.mac_address!r} is not a MAC address")
        if not 0 <= item.vlan_id <= 4094:
            raise ValueError(f"{claim.spec.address}: {item.vlan_id} is not a VLAN ID of 0 to 4094")
        if claim.spec.provided is not None:
            provided = replace(claim.spec.provided, mac=item.mac_address, vlan=item.vlan_id)
            claim = replace(claim, spec=replace(claim.spec, provided=provided))  # noqa: PLW2901
        found.append(claim)
    return found


def _mac_of(link: str) -> str:
    if "/" in link or link in (".", ".."):
        raise OSError(0, "it is not a NIC's name", link)
    with open(f"/sys/class/net/{link}/address") as file:
        return file.read().strip()


def _tls(settings: ProviderSettings) -> ssl.SSLContext | bool:
    if not settings.verify_tls:
        return False
    return ssl.create_default_context(cafile=settings.ca_file or None)
