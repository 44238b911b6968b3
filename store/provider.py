"""The infrastructure provider's HTTP service: it binds pods' addresses to NICs of nodes, as clouds want it.

Whom it was asked about is written into the claim beforehand (`spec.provided`), so whoever deletes a claim, the node's
agent or the controller, knows that the provider has to be told first.

Source: upstream, docs/usage/iaas-network-provider.md. Unlike upstream, TLS certificates are verified unless that is
switched off, and a call is tried with whatever time is left instead of being given up when less than 48 s are.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec.structs import replace

from api.claim import Claim, Provided
from api.meta import Struct
from daemon.limits import at_least
from daemon.upstream import seconds, upstream
from store.errors import UnavailableError

ALLOCATE = "/v1/apis/network.iaas.io/ipam/allocate-ips"
RELEASE = "/v1/apis/network.iaas.io/ipam/release-ip"
BUDGET = "X-Request-Timeout-Ms"
"""Header that tells how long we wait for the answer."""

_LARGEST = 1 << 20
"""Bytes of an answer; a real one has a few hundred."""
_QUOTED = 300
"""Characters of a refusal that our error repeats."""
_MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")


@dataclass(frozen=True)
class ProviderSettings:
    """The infrastructure provider that addresses are bound at. Times are in seconds."""

    server_url: str = field(default="", metadata=upstream(key="iaasNetworkProvider.serverUrl"))
    """Where it listens: `https://HOST[:PORT][/PATH]`. Empty: there is none."""
    http_request_timeout: float = field(
        default=50.0, metadata=upstream(key="iaasNetworkProvider.httpRequestTimeout", translate=seconds)
    )
    """How long one request may take, and no longer than the ADD or DEL that it is for (`ipam.add_deadline`)."""
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


class ProviderClient:
    """Asks the provider. Connections are opened when first needed; `close` gives them back."""

    def __init__(self, settings: ProviderSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def allocate(self, claims: Sequence[Claim], deadline: float) -> list[Claim]:
        """The claims with the provider's answers, not yet written; `deadline` is loop time.

        All of them are one pod's, and have what the provider must know in `spec.provided`. Raises UnavailableError.
        """
        limit = min(self._settings.http_request_timeout, deadline - asyncio.get_running_loop().time())
        text = await self._post(ALLOCATE, allocation_request(claims), limit)
        try:
            return with_answers(claims, msgspec.json.decode(text, type=AllocationResponse))
        except (msgspec.MsgspecError, ValueError) as error:
            raise UnavailableError(f"the provider's answer to {ALLOCATE} is wrong: {error}") from None

    async def release(self, claim: Claim) -> None:
        """Unbind the claim's address; nothing without `spec.provided`.

        Raises UnavailableError, and then the address may still be bound: it must not be freed.
        """
        if claim.spec.provided is not None:
            body = release_request(claim, claim.spec.provided)
            await self._post(RELEASE, body, self._settings.http_request_timeout)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, path: str, body: Struct, limit: float) -> bytes:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=_tls(self._settings))
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        url = self._settings.server_url.rstrip("/") + path
        headers = {"Content-Type": "application/json", BUDGET: str(max(0, math.ceil(limit * 1000)))}
        data = msgspec.json.encode(body)
        try:
            async with (
                asyncio.timeout(limit),
                self._session.post(url, data=data, headers=headers, allow_redirects=False) as answer,
            ):
                text = await answer.content.read(_LARGEST)
        except TimeoutError:
            raise UnavailableError(f"the provider at {url} does not answer within {limit:.3g} s") from None
        except aiohttp.ClientError as error:
            raise UnavailableError(f"the provider at {url} cannot be reached: {error}") from None
        if not 200 <= answer.status < 300:
            said = text[:_QUOTED].decode(errors="replace").strip()
            raise UnavailableError(f"the provider at {url} refuses: HTTP {answer.status} {said}")
        return text


def allocation_request(claims: Sequence[Claim]) -> AllocationRequest:
    """The request for the claims of one pod."""
    first = claims[0].spec
    workload = first.workload
    return AllocationRequest(
        pod_name=workload.pod_name if workload else "",
        pod_namespace=workload.namespace if workload else "",
        pod_uid=first.pod_uid,
        node_name=first.node,
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
        pod_name=workload.pod_name if workload else "",
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


def _tls(settings: ProviderSettings) -> ssl.SSLContext | bool:
    if not settings.verify_tls:
        return False
    return ssl.create_default_context(cafile=settings.ca_file or None)
