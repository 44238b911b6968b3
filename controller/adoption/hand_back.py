"""The way back to upstream: claims become its records and endpoints, exactly, and then are no more.

It works on a cluster in which nothing of ours runs any more, so nothing changes under it. First the pools' records are
written, while the mark still says that claims decide; then endpoints; then the marks go, and last the claims. So as
long as one pool is marked all claims are there, and when none is, the records are the truth and nothing is written from
the claims that are left. Whoever dies in between leaves a cluster in which the command can be repeated.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ipaddress import ip_interface

from msgspec.structs import replace

from api.agents import ours_that_run
from api.apps import DaemonSet
from api.claim import LABEL_WORKLOAD, Claim
from api.core import Pod
from api.endpoint import Endpoint, EndpointCurrent, EndpointIP, EndpointStatus
from api.meta import FINALIZER, ObjectMeta, OwnerReference
from api.mirror import is_mirror, is_pod_of
from api.pool import ANNOTATION_CLAIMS, CLAIMS_AUTHORITATIVE, Pool, PoolStatus
from api.ranges import parse_network
from api.views import allocated_ips, has_foreign_records, is_marked, total_ip_count
from controller.clean import remove_webhooks
from store.errors import AlreadyExistsError, ConflictError, NotFoundError
from store.port import Store

_log = logging.getLogger(__name__)
_ATTEMPTS = 4
_MOST_BYTES = 1 << 20
"""Of the text of one pool's records: the whole object may have 1.5 MiB."""


class HandBackError(Exception):
    """It cannot be done now; the text says why and what to do."""


async def hand_back(store: Store, configurations: Iterable[str] = ()) -> list[str]:
    """Write upstream's records and remove ours; returns what is worth knowing. Raises HandBackError, StoreError.

    `configurations` are names of webhook configurations that go first: nobody answers them any more, and without an
    answer no pool can be changed.
    """
    pods = (await store.list(Pod)).whole()
    running = ours_that_run(pods, (await store.list(DaemonSet)).whole())
    if running:
        raise HandBackError(f"agents or controllers of ours still run, delete them first: {', '.join(running[:5])}")
    await remove_webhooks(store, configurations, configurations)
    pools = {pool.metadata.name: pool for pool in (await store.list(Pool)).items}
    claims = (await store.list(Claim)).whole()
    notes = [
        f"{claim.spec.address} of pool {claim.spec.pool} is left out: {why}"
        for claim in claims
        if (why := _unrecorded(claim, pools))
    ]
    mirrors = {(pod.metadata.namespace, pod.metadata.name): pod for pod in pods if is_mirror(pod)}
    kept = [_as_upstream_names(claim, mirrors) for claim in claims if not _unrecorded(claim, pools)]
    by_pool: dict[str, list[Claim]] = defaultdict(list)
    for claim in kept:
        by_pool[claim.spec.pool].append(claim)
    for name in pools:
        if len(allocated_ips(by_pool[name], len(by_pool[name])) or "") > _MOST_BYTES:
            raise HandBackError(
                f"pool {name} has {len(by_pool[name])} addresses in use; upstream keeps them in one object, "
                "which takes about 8000: move pods to other pools first"
            )
    for name, pool in pools.items():
        if by_pool[name] and not is_marked(pool) and not has_foreign_records(pool):
            pools[name] = await _set_mark(store, name, CLAIMS_AUTHORITATIVE)  # nobody had come to it yet
    marked = [name for name, pool in pools.items() if is_marked(pool)]
    for name in marked:
        await _record(store, name, by_pool[name])
    workloads = await _write_endpoints(store, kept, {name: pools[name] for name in marked})
    for name in marked:
        await _set_mark(store, name, "")
    for claim in claims:
        meta = claim.metadata
        with suppress(NotFoundError):
            await store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)
    _log.info("%d addresses of %d pools are handed back, of %d workloads", len(kept), len(marked), workloads)
    return notes


def _as_upstream_names(claim: Claim, mirrors: Mapping[tuple[str, str], Pod]) -> Claim:
    """The claim with its pod's UID in the API, which upstream goes by, also for a kubelet's own pods."""
    workload = claim.spec.workload
    mirror = mirrors.get((workload.namespace, workload.pod_name)) if workload is not None else None
    if mirror is None or not is_pod_of(mirror, claim):
        return claim
    return replace(claim, spec=replace(claim.spec, pod_uid=mirror.metadata.uid))


def endpoint_of(
    key: tuple[str, str], claims: Iterable[Claim], current: Endpoint | None, pools: Mapping[str, Pool]
) -> Endpoint:
    """The endpoint that upstream needs for these claims of one workload, all of `pools`. Pure.

    What the endpoint that is there says of a NIC with the same addresses stays, as it may know more; and so does what
    it says of addresses of other pools, whose records were upstream's all the time.
    """
    claims = list(claims)
    first = claims[0]
    nics: dict[str, list[Claim]] = defaultdict(list)
    for claim in sorted(claims, key=lambda each: (each.spec.nic, each.spec.ip_version)):
        nics[claim.spec.nic].append(claim)
    told = current.status.current if current and current.status else None
    known = {entry.interface: entry for entry in told.ips} if told else {}
    theirs = {}
    if told is not None and told.uid == first.spec.pod_uid:
        theirs = {nic: left for nic, entry in known.items() if (left := _without(entry, pools)) is not None}
    entries = [
        _entry(nic, nics[nic], pools, known.get(nic), theirs.get(nic)) if nic in nics else theirs[nic]
        for nic in sorted(nics.keys() | theirs.keys())
    ]
    workload = first.spec.workload
    controller = workload.controller if workload else None
    static = LABEL_WORKLOAD in first.metadata.labels
    pod = workload.pod_name if workload else ""
    owners = [] if static else [OwnerReference(api_version="v1", kind="Pod", name=pod, uid=first.spec.pod_uid)]
    meta = current.metadata if current else ObjectMeta(namespace=key[0], name=key[1])
    others = [finalizer for finalizer in meta.finalizers if finalizer != FINALIZER]
    return Endpoint(
        metadata=replace(meta, finalizers=[*others, FINALIZER], owner_references=owners),
        status=EndpointStatus(
            current=EndpointCurrent(uid=first.spec.pod_uid, node=first.spec.node, ips=entries),
            owner_controller_type=controller.kind if controller else "Pod",
            owner_controller_name=controller.name if controller else pod,
        ),
    )


def _without(entry: EndpointIP, pools: Mapping[str, Pool]) -> EndpointIP | None:
    """The entry without addresses of these pools; None if none is left."""
    if entry.ipv4_pool is None or entry.ipv4_pool in pools:
        entry = replace(entry, ipv4=None, ipv4_pool=None, ipv4_gateway=None)
    if entry.ipv6_pool is None or entry.ipv6_pool in pools:
        entry = replace(entry, ipv6=None, ipv6_pool=None, ipv6_gateway=None)
    return replace(entry, vlan=entry.vlan or 0) if entry.ipv4 or entry.ipv6 else None


def _entry(
    nic: str, claims: list[Claim], pools: Mapping[str, Pool], known: EndpointIP | None, theirs: EndpointIP | None
) -> EndpointIP:
    entry = theirs or EndpointIP(interface=nic, vlan=0)
    for claim in claims:
        pool = pools[claim.spec.pool]
        address = f"{claim.spec.address}/{parse_network(pool.spec.subnet).prefixlen}"
        gateway = pool.spec.gateway or None
        if claim.spec.ip_version == 4:
            entry = replace(entry, ipv4=address, ipv4_pool=claim.spec.pool, ipv4_gateway=gateway)
        else:
            entry = replace(entry, ipv6=address, ipv6_pool=claim.spec.pool, ipv6_gateway=gateway)
        if gateway:
            entry = replace(entry, clean_gateway=False)
        if pool.spec.routes:
            entry = replace(entry, routes=[*(entry.routes or []), *pool.spec.routes])
        provided = claim.spec.provided
        if provided is not None and provided.mac:
            entry = replace(entry, mac=provided.mac, vlan=provided.vlan or 0)
    if known is not None and _addresses(known) == _addresses(entry):
        return replace(known, vlan=known.vlan or 0)  # upstream follows it without looking whether it is there
    return entry


def _addresses(entry: EndpointIP) -> set[str]:
    return {str(ip_interface(text)) for text in (entry.ipv4, entry.ipv6) if text}


def _unrecorded(claim: Claim, pools: Mapping[str, Pool]) -> str:
    """Why upstream cannot have a record of the claim; empty if it can."""
    spec = claim.spec
    if spec.state == "Quarantined":
        return "it is in quarantine"
    if spec.pool not in pools:
        return "its pool is gone"
    if spec.workload is None or not spec.pod_uid or not spec.workload.namespace or not spec.workload.name:
        return "it belongs to no pod"
    return ""


async def _record(store: Store, name: str, claims: list[Claim]) -> None:
    """Write the pool's records; a claim more or less than them would be an address given twice, or lost."""
    text = allocated_ips(claims, len(claims))
    for _ in range(_ATTEMPTS):
        pool = await store.get(Pool, name)
        try:
            total = total_ip_count(pool.spec)
        except ValueError:
            total = None
        status = PoolStatus(allocated_ips=text, total_ip_count=total, allocated_ip_count=len(claims))
        try:
            written = await store.update_status(replace(pool, status=status))
        except ConflictError:
            continue
        told = json.loads((written.status.allocated_ips if written.status else None) or "{}")
        if told.keys() != {claim.spec.address for claim in claims}:
            raise HandBackError(f"pool {name}: the records read back are not those written")
        return
    raise HandBackError(f"pool {name} keeps changing: does a controller still run?")


async def _write_endpoints(store: Store, claims: Iterable[Claim], pools: Mapping[str, Pool]) -> int:
    """Write the endpoints of all workloads with claims of these pools; how many they are."""
    workloads: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.spec.pool in pools and claim.spec.workload is not None:
            workloads[claim.spec.workload.namespace, claim.spec.workload.name].append(claim)
    for key, held in workloads.items():
        await _write_endpoint(store, key, held, pools)
    return len(workloads)


async def _write_endpoint(store: Store, key: tuple[str, str], claims: list[Claim], pools: Mapping[str, Pool]) -> None:
    for _ in range(_ATTEMPTS):
        try:
            current: Endpoint | None = await store.get(Endpoint, key[1], key[0])
        except NotFoundError:
            current = None
        wanted = endpoint_of(key, claims, current, pools)
        try:
            if current is None:
                await store.create(wanted)
            elif current.metadata.deletion_timestamp is None:
                await store.update(wanted)
            return  # one that is being deleted is of a pod that goes
        except (AlreadyExistsError, ConflictError, NotFoundError):
            continue
    raise HandBackError(f"endpoint {key[0]}/{key[1]} keeps changing: does an agent still run?")


async def _set_mark(store: Store, name: str, mark: str) -> Pool:
    """Give the pool the mark, or with an empty one take it away, and upstream's finalizer."""
    for _ in range(_ATTEMPTS):
        pool = await store.get(Pool, name)
        annotations = {key: value for key, value in pool.metadata.annotations.items() if key != ANNOTATION_CLAIMS}
        if mark:
            annotations[ANNOTATION_CLAIMS] = mark
        finalizers = pool.metadata.finalizers
        if pool.metadata.deletion_timestamp is None and FINALIZER not in finalizers:
            finalizers = [*finalizers, FINALIZER]
        meta = replace(pool.metadata, annotations=annotations, finalizers=finalizers)
        with suppress(ConflictError):
            return await store.update(replace(pool, metadata=meta))
    raise HandBackError(f"pool {name} keeps changing: does a controller still run?")
