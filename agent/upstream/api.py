"""Upstream's API: each request becomes the CNI call that it stands for, and the answer is put in upstream's words.

Nothing is allocated or released here: requests go through the same host as the executable's calls, with its order,
limits, deadlines and checks.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_interface
from typing import Any, Final

import msgspec

from agent.host import Host
from agent.upstream.messages import (
    AddArgs,
    BatchDelArgs,
    CoordinatorArgs,
    DelArgs,
    add_response,
    call_of,
    endpoint_status,
    nics_of,
)
from agent.upstream.settings import UpstreamSettings
from agent.wire import Request, Status
from api.claim import LABEL_IDENTITY, LABEL_WORKLOAD, Claim, claim_name, identity_label
from api.coordinator import Coordinator, CoordinatorUnusableError, in_force, node_config
from api.core import Pod
from api.endpoint import Endpoint
from daemon.health import Health
from store.errors import NotFoundError, StoreError
from store.port import Query, Store

RELEASE_DISABLED: Final = 521
"""Upstream's status for: releasing conflicting addresses is switched off."""
STATEFUL: Final = 522
"""Upstream's status for: the workload keeps its addresses."""
_DEFAULT_ROUTE_NIC: Final = "ipam.spidernet.io/default-route-nic"
_REMEMBERED: Final = 256
_VIEW_DEADLINE: Final = 2.0
"""Seconds until an endpoint, which is written after the ADD, must tell of it."""
_VIEW_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    """Status and JSON body; None: no body."""

    status: int
    body: Any = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, read and bounded."""

    method: str
    path: str
    parameters: Mapping[str, str]
    body: bytes
    abandoned: Callable[[], bool]
    """Whether the caller has gone."""


class UpstreamApi:
    """What upstream's paths do, with a host to call and a store to look into."""

    def __init__(self, settings: UpstreamSettings, store: Store, host: Host, health: Health) -> None:
        self._settings = settings
        self._store = store
        self._host = host
        self._health = health
        self._told: OrderedDict[tuple[str, str], tuple[str, set[str]]] = OrderedDict()
        """Pod to its UID and NICs that an ADD was answered for lately: its endpoint follows."""
        self._paths: dict[tuple[str, str], Callable[[Asked], Awaitable[Reply]]] = {
            ("GET", "/v1/ipam/healthy"): self._healthy,
            ("POST", "/v1/ipam/ip"): self._add,
            ("DELETE", "/v1/ipam/ip"): self._delete,
            ("POST", "/v1/ipam/ips"): self._nothing,
            ("DELETE", "/v1/ipam/ips"): self._delete_all,
            ("GET", "/v1/workloadendpoint"): self._endpoint,
            ("GET", "/v1/coordinator/config"): self._coordinator,
        }

    async def answer(self, asked: Asked) -> Reply:
        """The answer to a request, whatever it is."""
        work = self._paths.get((asked.method, asked.path))
        if work is None:
            methods = [method for method, path in self._paths if path == asked.path]
            status = HTTPStatus.METHOD_NOT_ALLOWED if methods else HTTPStatus.NOT_FOUND
            text = f"path {asked.path[:80]} was not found" if not methods else f"there is {', '.join(methods)}"
            return _refusal(status, text)
        try:
            return await work(asked)
        except msgspec.ValidationError as error:
            return _refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}")
        except StoreError as error:
            return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, f"the store cannot be reached: {error}")

    async def _healthy(self, _: Asked) -> Reply:
        if self._health.ready:
            return Reply(HTTPStatus.OK)
        return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, "the agent is not ready")

    async def _nothing(self, _: Asked) -> Reply:
        return Reply(HTTPStatus.OK)

    async def _add(self, asked: Asked) -> Reply:
        args = msgspec.json.decode(asked.body, type=AddArgs)
        netns_fd, error = await asyncio.to_thread(_open_netns, args.net_namespace)
        try:
            body, problem = await self._call("ADD", args, asked, netns_fd, error)
        finally:
            if netns_fd is not None:
                os.close(netns_fd)
        if problem:
            return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, problem)
        result = msgspec.json.decode(body)
        claims: dict[str, Claim] = {}
        for ip in result["ips"]:
            address = ip_interface(ip["address"]).ip
            with suppress(NotFoundError):
                claims[str(address)] = await self._store.get(Claim, claim_name(address))
        self._remember(args)
        return Reply(HTTPStatus.OK, add_response(args.if_name, result, claims))

    async def _delete(self, asked: Asked) -> Reply:
        args = msgspec.json.decode(asked.body, type=DelArgs)
        _, problem = await self._call("DEL", args, asked)
        return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, problem) if problem else Reply(HTTPStatus.OK)

    async def _delete_all(self, asked: Asked) -> Reply:
        """Release all NICs' addresses. Stateful workloads keep theirs, as after every DEL."""
        args = msgspec.json.decode(asked.body, type=BatchDelArgs)
        identity = identity_label(args.pod_uid, args.container_id)
        claims = (await self._store.list(Claim, Query(labels={LABEL_IDENTITY: identity}))).items
        if args.is_release_conflict_ips:
            if not self._settings.release_conflict_ips:
                return Reply(RELEASE_DISABLED, "forbid releasing IPs for stateless workload")
            if any(LABEL_WORKLOAD in claim.metadata.labels for claim in claims):
                return Reply(STATEFUL, "forbid releasing IPs for stateful workload")
        problems: list[str] = []
        for nic in nics_of(claims, args):
            one = DelArgs(
                container_id=args.container_id,
                pod_namespace=args.pod_namespace,
                pod_name=args.pod_name,
                pod_uid=args.pod_uid,
                if_name=nic,
                net_namespace=args.net_namespace,
            )
            _, problem = await self._call("DEL", one, asked)
            problems += [f"{nic}: {problem}"] if problem else []
        return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, "; ".join(problems)) if problems else Reply(HTTPStatus.OK)

    async def _endpoint(self, asked: Asked) -> Reply:
        namespace, name = (asked.parameters.get(key, "") for key in ("podNamespace", "podName"))
        if not namespace or not name:
            return Reply(HTTPStatus.BAD_REQUEST, "podNamespace and podName are required")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _VIEW_DEADLINE
        while True:
            try:
                endpoint: Endpoint | None = await self._store.get(Endpoint, name, namespace)
            except NotFoundError:
                endpoint = None
            if self._is_complete((namespace, name), endpoint) or loop.time() >= deadline:
                break
            await asyncio.sleep(_VIEW_PAUSE)
        if endpoint is None:
            return Reply(HTTPStatus.NOT_FOUND, f"there is no SpiderEndpoint {namespace}/{name}")
        return Reply(HTTPStatus.OK, endpoint_status(endpoint))

    async def _coordinator(self, asked: Asked) -> Reply:
        args = msgspec.json.decode(asked.body or b"{}", type=CoordinatorArgs)
        nic = ""
        if args.pod_name and args.pod_namespace:
            with suppress(NotFoundError):  # a DEL may come after the pod has gone
                pod = await self._store.get(Pod, args.pod_name, args.pod_namespace)
                nic = pod.metadata.annotations.get(_DEFAULT_ROUTE_NIC, "")
        try:
            coordinator = in_force((await self._store.list(Coordinator)).items)
        except CoordinatorUnusableError as error:
            return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        return Reply(HTTPStatus.OK, node_config(coordinator, nic))

    async def _call(
        self, command: str, args: AddArgs | DelArgs, asked: Asked, netns_fd: int | None = None, netns_error: str = ""
    ) -> tuple[bytes, str]:
        """Body of the CNI result, and what went wrong."""
        env, config = call_of(command, args)
        if netns_error:
            env["SPIDERPOOL_NETNS_ERROR"] = netns_error
        packed = b"".join(f"{name}={value}\0".encode() for name, value in env.items())
        reply = await self._host.call(Request(packed, msgspec.json.encode(config)), netns_fd, asked.abandoned)
        if reply.status is Status.DONE:
            return reply.body, ""
        error = msgspec.json.decode(reply.body)
        return b"", f"{error['msg']}: {error['details']}" if error["details"] else error["msg"]

    def _remember(self, args: AddArgs) -> None:
        key = (args.pod_namespace, args.pod_name)
        uid, nics = self._told.pop(key, ("", set()))
        nics = (nics if uid == args.pod_uid else set()) | {args.if_name}
        self._told[key] = (args.pod_uid, nics)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)

    def _is_complete(self, key: tuple[str, str], endpoint: Endpoint | None) -> bool:
        """Whether the endpoint tells of the ADDs that were answered here; it is asked for right after them."""
        uid, nics = self._told.get(key, ("", set()))
        if not nics:
            return True
        if endpoint is None or endpoint.status is None:
            return False
        current = endpoint.status.current
        if nics <= {ip.interface for ip in current.ips} and uid in ("", current.uid):
            del self._told[key]
            return True
        return False


def _refusal(status: HTTPStatus, text: str) -> Reply:
    """In the form of upstream's HTTP library."""
    return Reply(status, {"code": int(status), "message": text})


def _open_netns(path: str) -> tuple[int | None, str]:
    """A descriptor of what is at the path, or why there is none; whether it is a namespace, the host checks."""
    if not path.startswith("/"):
        return None, "it is not an absolute path"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), ""
    except (OSError, ValueError) as error:
        return None, str(getattr(error, "strerror", error))
