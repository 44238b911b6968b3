"""`spiderpoolctl pool explain`: which pools a pod's NICs may use, and why not the others.

The agents' own deciding functions are asked, with what the API server says now. What only a node knows is not here: the
agent's settings are taken as shipped, and a NIC's physical function is not looked at (`match_master_subnet`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

from api.annotations import FIRST_NIC, AnnotationError, PoolNames, networks
from api.autopools import Application, lookup_labels
from api.claim import Claim, identity_label
from api.conflicts import pool_conflicts
from api.core import Namespace, Node, Pod
from api.mirror import uid_on_node
from api.nad import NetworkAttachmentDefinition
from api.pool import Pool
from api.ranges import Family, IPSet
from api.reservedip import ReservedIP
from api.views import has_foreign_records
from api.workloads import static_name
from cli.naming import CliError
from cli.output import table
from plugins.errors import CniError
from plugins.ipam.candidates import Asker, PoolFacts, expand, pool_facts, refusal, specificity
from plugins.ipam.config import IpamConfig, parse_config
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings
from plugins.ipam.source import Source, network_of, source_of
from store.errors import NotFoundError, NotServedError
from store.owners import top_controller
from store.port import Store

NO_NODE = "<not scheduled>"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the API server says about pools."""

    pools: Mapping[str, PoolFacts]
    conflicts: Mapping[str, str]
    free: Mapping[str, int]
    """Addresses that are neither claimed nor reserved."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is to be said of one pool for one NIC."""

    family: Family
    pool: str
    place: int
    """When it is tried, from 1 on; 0: it is not."""
    free: int | None
    reason: str


def judged(source: Source, named: Mapping[Family, tuple[str, ...]], asker: Asker, seen: Seen) -> list[Row]:
    """Every pool that `source` names, and then every other one. Pure."""
    rows: list[Row] = []
    for family in (4, 6):
        fit: list[PoolFacts] = []
        unfit: list[Row] = []
        for name in named.get(family, ()):
            pool = seen.pools.get(name)
            if pool is None:
                unfit.append(Row(family, name, 0, None, "there is no such pool, or none that matches"))
                continue
            reason = refusal(pool, family, asker) or seen.conflicts.get(name, "")
            if reason:
                unfit.append(Row(family, name, 0, seen.free.get(name), reason))
            else:
                fit.append(pool)
        for place, pool in enumerate(sorted(fit, key=specificity), start=1):
            free = seen.free[pool.name]
            rows.append(Row(family, pool.name, place, free, "" if free else "no free address is left"))
        rows += unfit
    asked = {name for names in named.values() for name in names}
    others = sorted((pool.family, name) for name, pool in seen.pools.items() if name not in asked)
    return rows + [Row(f, name, 0, seen.free.get(name), f"not asked for by {source.what}") for f, name in others]


async def explain(store: Store, namespace: str, name: str, default_network: str) -> str:
    """The text for one pod; `default_network` is `namespace/name` of the cluster's, if known. Raises CliError."""
    try:
        pod = await store.get(Pod, name, namespace)
        space = await store.get(Namespace, namespace)
    except NotFoundError as error:
        raise CliError(str(error)) from None
    if pod.spec.host_network:
        return f"Pod {namespace}/{name} is in its node's network and gets no addresses.\n"
    settings = IpamSettings(multus_cluster_network=default_network)
    controller = await top_controller(store, pod)
    node = await _node(store, pod.spec.node_name)
    facts = PodFacts(
        pod=pod,
        namespace=space,
        controller=controller,
        static=static_name(name, controller, stateful_sets=True, virtual_machines=True),
        node_labels=node.metadata.labels if node else {},
    )
    claims = (await store.list(Claim)).items
    seen = await _seen(store, claims)
    parts = [f"Pod {namespace}/{name} ({controller.kind} {controller.name}) on node {pod.spec.node_name or NO_NODE}\n"]
    held = [claim for claim in claims if identity_label(claim.spec.pod_uid, "") == identity_label(uid_on_node(pod), "")]
    parts += [await _of_nic(store, facts, nic, settings=settings, seen=seen, held=held) for nic in _nics(pod)]
    return "\n".join(parts)


async def _of_nic(
    store: Store, facts: PodFacts, nic: str, *, settings: IpamSettings, seen: Seen, held: Iterable[Claim]
) -> str:
    network, problem = network_of(nic, facts, settings)
    config, note = await _config(store, network, problem)
    has = ", ".join(f"{c.spec.address} of {c.spec.pool}" for c in held if c.spec.nic == nic)
    try:
        source = source_of(config, nic, facts, settings)
    except CniError as error:
        return f"NIC {nic}: {error}\n"
    head = [f"NIC {nic}: pools are named by {source.what}", f"  has {has}" if has else "  has no address yet"]
    if note:
        head.append(f"  {note}")
    meta = facts.pod.metadata
    asker = Asker(
        node=facts.pod.spec.node_name or NO_NODE,
        namespace=meta.namespace,
        pod_labels=meta.labels,
        namespace_labels=facts.namespace.metadata.labels,
        node_labels=facts.node_labels,
        application=Application.of(facts.controller, meta.namespace),
        network=network,
        network_problem=problem,
        installation=settings.namespace,
    )
    names = _automatic(source, facts, seen.pools) if source.subnets is not None else source.pools
    rows = judged(source, expand(names, seen.pools) if names else {}, asker, seen)
    if source.subnets is not None and not names:
        head.append("  spiderpool-controller has not made its pool yet; the SpiderSubnet's conditions may tell why")
    cells = [
        (
            str(row.family),
            row.pool,
            "-" if row.free is None else str(row.free),
            f"{row.place}." if row.place else "no",
            row.reason,
        )
        for row in rows
    ]
    return "\n".join(head) + "\n" + table(("IPV", "POOL", "FREE", "USED", "WHY NOT"), cells)


def _automatic(source: Source, facts: PodFacts, pools: Mapping[str, PoolFacts]) -> PoolNames | None:
    """The application's pools of the source's subnets; None if there are none."""
    subnets = source.subnets
    if subnets is None:
        return None
    application = Application.of(facts.controller, facts.pod.metadata.namespace)
    wanted: dict[Family, str] = {4: subnets.ipv4, 6: subnets.ipv6}

    def of(family: Family) -> Iterator[str]:
        if wanted[family]:
            labels = lookup_labels(application, facts.controller.uid, family, subnets.interface, wanted[family])
            for pool in pools.values():
                if pool.labels is not None and labels.items() <= pool.labels.items():
                    yield pool.name

    found = PoolNames(tuple(of(4)), tuple(of(6)))
    return found if found != PoolNames() else None


async def _config(store: Store, network: str, problem: str) -> tuple[IpamConfig, str]:
    """IPAM's part of the NIC's network configuration, and what is not known of it."""
    nothing = IpamConfig()
    if not network:
        return nothing, f"default pools of the network configuration are not considered: {problem}"
    namespace, _, name = network.partition("/")
    try:
        text = (await store.get(NetworkAttachmentDefinition, name, namespace)).spec.config or "{}"
    except (NotFoundError, NotServedError):
        return nothing, f"there is no NetworkAttachmentDefinition {network}"
    try:
        content = json.loads(text)
        plugins = content.get("plugins") or [content]
        ours = next((each for each in plugins if (each.get("ipam") or {}).get("type") == "spiderpool"), None)
    except (ValueError, AttributeError, TypeError):
        return nothing, f"the configuration of NetworkAttachmentDefinition {network} is not that of a CNI plugin"
    if ours is None:
        return nothing, f"NetworkAttachmentDefinition {network} does not ask spiderpool for addresses"
    try:
        return parse_config(ours), ""
    except CniError as error:
        return nothing, f"NetworkAttachmentDefinition {network}: {error}"


async def _node(store: Store, name: str) -> Node | None:
    try:
        return await store.get(Node, name) if name else None
    except NotFoundError:
        return None


async def _seen(store: Store, claims: list[Claim]) -> Seen:
    pools = (await store.list(Pool)).items
    facts = {p.metadata.name: replace(pool_facts(p), foreign=has_foreign_records(p)) for p in pools}
    reserved = _reserved((await store.list(ReservedIP)).items)
    taken = {family: reserved[family] | _claimed(claims, family) for family in reserved}
    free = {name: (pool.addresses - taken[pool.family]).count for name, pool in facts.items()}
    return Seen(facts, pool_conflicts(pools), free)


def _claimed(claims: Iterable[Claim], family: Family) -> IPSet:
    numbers = [int(ip_address(claim.spec.address)) for claim in claims if claim.spec.ip_version == family]
    return IPSet(family, [(number, number) for number in numbers])


def _reserved(resources: Iterable[ReservedIP]) -> dict[Family, IPSet]:
    found: dict[Family, IPSet] = {4: IPSet(4), 6: IPSet(6)}
    for resource in resources:
        for text in resource.spec.ips or ():
            family: Family = 6 if ":" in text else 4
            try:
                found[family] |= IPSet.parse([text], family)
            except ValueError:  # it reserves nothing, as for the agents
                continue
    return found


def _nics(pod: Pod) -> tuple[str, ...]:
    """The pod's NICs in order. Raises CliError."""
    meta = pod.metadata
    try:
        further = networks(meta.annotations, meta.namespace)
    except AnnotationError as error:
        raise CliError(str(error)) from None
    return FIRST_NIC, *(network.interface or f"net{number}" for number, network in enumerate(further, start=1))
