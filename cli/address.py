"""`spiderpoolctl ip`: who has an address, and giving it back by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from api.claim import Address, Claim, claim_name
from api.meta import now
from api.pool import Pool
from api.ranges import IPSet
from api.reclaim import Action
from api.reservedip import ReservedIP
from api.validate.pool import pool_addresses
from cli.holder import Holder, in_cluster, on_machine, pod_name
from cli.naming import CliError
from cli.output import age
from store.errors import ConflictError, NotFoundError
from store.port import Store


async def find(store: Store, address: Address) -> Claim:
    """The claim on the address. Raises CliError, which tells where an unclaimed address lies."""
    try:
        return await store.get(Claim, claim_name(address))
    except NotFoundError:
        raise CliError(f"nobody has {address}: {await _where_it_lies(store, address)}") from None


async def describe(store: Store, claim: Claim, *, cluster: bool) -> str:
    """What is known of the claim, one line for each thing. Raises StoreError."""
    holder = await _holder(store, claim, cluster=cluster)
    spec, meta = claim.spec, claim.metadata
    lines: list[tuple[str, str]] = [
        ("Address", spec.address),
        ("Claim", meta.name),
        ("State", spec.state),
        ("Pool", spec.pool),
    ]
    if spec.quarantine is not None:
        quarantine = spec.quarantine
        lines.append(("Quarantine", f"until {quarantine.until:%FT%TZ}: {quarantine.mac} uses it, {quarantine.reason}"))
    lines += [(key, value) for key, value in _of_workload(claim, holder, cluster=cluster) if value]
    lines += [
        (key, value)
        for key, value in (
            ("Container", spec.container_id),
            ("Node", spec.node),
            ("NIC", spec.nic),
            ("Network", spec.network),
            ("Namespace path", spec.netns),
        )
        if value
    ]
    if spec.provided is not None:
        given = f"MAC address {spec.provided.mac}" if spec.provided.mac else "it has not answered yet"
        lines.append(("Provider", f"subnet {spec.provided.subnet} behind {spec.provided.parent_mac}, {given}"))
    if meta.creation_timestamp is not None:
        held = age((now() - meta.creation_timestamp).total_seconds())
        lines.append(("Since", f"{meta.creation_timestamp:%FT%TZ} ({held})"))
    lines.append(("In use", _usage(holder)))
    width = max(len(key) for key, _ in lines) + 1
    return "".join(f"{key + ':':<{width}}  {value}\n" for key, value in lines)


async def release(store: Store, address: Address, *, force: bool, cluster: bool) -> str:
    """Delete the claim on the address if nobody uses it; what was done. Raises CliError, StoreError.

    Without `force`, only what is known to be nobody's. With it, also what is kept for somebody who may come back:
    addresses of StatefulSets and virtual machines, quarantines, and grace periods, of which those of pods that are gone
    are not known here. Never what is known to be in use.
    """
    claim = await find(store, address)
    holder = await _holder(store, claim, cluster=cluster)
    whose = _whose(claim)
    if holder.locked:
        raise CliError(f"{address} was not released, {whose} uses it: {holder.locked}")
    if holder.verdict.action is not Action.RELEASE and not force:
        until = f" (until {holder.verdict.at:%FT%TZ})" if holder.verdict.at else ""
        raise CliError(
            f"{address} was not released, it is kept for {whose}: {holder.verdict.reason}{until}",
            "--force releases it all the same",
        )
    if holder.doubt and not force:
        raise CliError(
            f"{address} was not released, {whose} may still use it: {holder.doubt}",
            "the controller, which saw it go, releases it then (spiderpoolctl gc has it look now); --force releases it "
            "at once: make sure on the node that no container of it runs",
        )
    if claim.spec.provided is not None and not force:
        raise CliError(
            f"{address} was not released: the infrastructure provider has it, whom the controller must tell",
            "--force releases it without telling the provider",
        )
    meta = claim.metadata
    try:
        await store.delete(Claim, meta.name, uid=meta.uid, resource_version=meta.resource_version)
    except (ConflictError, NotFoundError):
        raise CliError(f"{address} was not released: its claim has just changed hands, look again") from None
    return f"{address} of pool {claim.spec.pool} released, it was {whose}'s"


async def _holder(store: Store, claim: Claim, *, cluster: bool) -> Holder:
    return await in_cluster(store, claim, datetime.now(UTC)) if cluster else on_machine(claim)


def _usage(holder: Holder) -> str:
    if holder.locked:
        return f"yes, {holder.locked}"
    verdict = holder.verdict
    if holder.doubt:
        return f"perhaps, {holder.doubt}; the controller releases it then"
    if verdict.action is Action.RELEASE:
        return f"no, {verdict.reason}: it will be released"
    until = f" (until {verdict.at:%FT%TZ})" if verdict.at else ""
    return f"kept, {verdict.reason}{until}"


def _of_workload(claim: Claim, holder: Holder, *, cluster: bool) -> Sequence[tuple[str, str]]:
    spec = claim.spec
    workload = spec.workload
    pod = f"{workload.namespace}/{pod_name(claim)}" if workload and workload.name else ""
    uid = f" (UID {spec.pod_uid})" if spec.pod_uid else ""
    state = ""
    if cluster and spec.pod_uid:
        state = f", {holder.pod.status.phase or 'of unknown phase'}" if holder.pod else ", gone"
        if holder.pod is not None and holder.pod.metadata.deletion_timestamp is not None:
            state += ", terminating"
    controller = workload.controller if workload else None
    return [
        ("Pod", f"{pod}{uid}{state}" if pod or uid else ""),
        ("Controller", f"{controller.kind} {controller.name}" if controller else ""),
    ]


def _whose(claim: Claim) -> str:
    spec = claim.spec
    if spec.state == "Quarantined":
        return "the quarantine"
    if spec.workload is not None and spec.workload.name:
        return f"pod {spec.workload.namespace}/{pod_name(claim)}"
    return f"container {spec.container_id}" if spec.container_id else "somebody unknown"


async def _where_it_lies(store: Store, address: Address) -> str:
    pools = [
        pool.metadata.name
        for pool in (await store.list(Pool)).items
        if (there := pool_addresses(pool.spec)).family == address.version and address in there
    ]
    if not pools:
        return "it is in no pool"
    reserved = [each.metadata.name for each in (await store.list(ReservedIP)).items if _reserves(each, address)]
    held_back = f", kept back by SpiderReservedIP {', '.join(reserved)}" if reserved else ""
    return f"it is an unclaimed address of pool {', '.join(pools)}{held_back}"


def _reserves(reserved: ReservedIP, address: Address) -> bool:
    for text in reserved.spec.ips or ():
        try:
            if address in IPSet.parse([text], address.version):
                return True
        except ValueError:  # a range of the other family, or none at all
            continue
    return False
