"""Where the pools of one NIC come from: the pod, its namespace, the network configuration, or the cluster. Pure.

The first source that says anything is the only one. Source: upstream, docs/concepts/ipam-des.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from api import annotations as notes
from api.annotations import AnnotationError, NicPools, NicSubnets, PoolNames
from api.core import Pod
from api.pool import Route
from api.workloads import is_third_party
from plugins.errors import InvalidConfigError
from plugins.ipam.config import IpamConfig
from plugins.ipam.pods import PodFacts
from plugins.ipam.settings import IpamSettings

WRONG_INPUT = "wrong input"
"""Upstream's sentence for what a user must change."""
NOTHING = PoolNames()


@dataclass(frozen=True, slots=True)
class Source:
    """What one NIC is to get, before any pool was looked at."""

    what: str
    """Who says so, for people."""
    pools: PoolNames = NOTHING
    """Names or shell patterns; both families empty: the cluster's default pools, unless there are `subnets`."""
    subnets: NicSubnets | None = None
    """The subnets that the application's automatic pools are cut from."""
    clean_gateway: bool = False
    """Give no default route."""
    routes: tuple[Route, ...] = ()
    """Routes of the pod's annotation, each for the NICs whose subnet has its gateway."""


def source_of(config: IpamConfig, nic: str, facts: PodFacts | None, settings: IpamSettings) -> Source:
    """The source for `nic`; without a pod, the configuration or the default pools. Raises InvalidConfigError."""
    try:
        routes = notes.routes(facts.pod.metadata.annotations) if facts is not None else ()
        found = _of_pod(config, nic, facts, settings) if facts is not None else None
        if found is None and facts is not None:
            pools = notes.namespace_pools(facts.namespace.metadata.annotations)
            if pools != NOTHING:
                name = facts.namespace.metadata.name
                found = Source(f"namespace {name}, annotations {notes.NAMESPACE_IPV4} and …ipv6-ippool", pools)
    except AnnotationError as error:
        raise InvalidConfigError(WRONG_INPUT, f"invalid format of annotation {error}") from None
    if found is None and config.pools != NOTHING:
        found = Source("ipam.default_ipv4_ippool and default_ipv6_ippool of the network configuration", config.pools)
    if found is None:
        found = Source("pools with spec.default: true")
    clean_gateway = found.clean_gateway if found.what == notes.IPPOOLS else config.clean_gateway
    return Source(found.what, found.pools, found.subnets, clean_gateway, routes)


def network_of(nic: str, facts: PodFacts, settings: IpamSettings) -> tuple[str, str]:
    """`namespace/name` of the NIC's NetworkAttachmentDefinition; else empty, and why it is not known."""
    meta = facts.pod.metadata
    try:
        if nic == notes.FIRST_NIC:
            first = notes.default_network(meta.annotations, settings.namespace)
            name = first.full_name if first is not None else settings.multus_cluster_network
            return name, f"the pod has no annotation {notes.DEFAULT_NETWORK}, and no cluster network is set"
        further = notes.networks(meta.annotations, meta.namespace)
        number = notes.nic_number(nic, further)
    except AnnotationError as error:
        return "", f"invalid format of annotation {error}"
    if number is None:
        return "", f"annotation {notes.NETWORKS} has no network for {nic}"
    return further[number - 1].full_name, ""


def _of_pod(config: IpamConfig, nic: str, facts: PodFacts, settings: IpamSettings) -> Source | None:
    said = facts.pod.metadata.annotations
    if settings.enable_spider_subnet:
        subnets = _subnets(nic, facts, settings)
        if subnets is not None:
            return subnets
    items = notes.ippools(said)
    if items is not None:
        item = _item(items, nic, facts)
        return Source(notes.IPPOOLS, item.pools, clean_gateway=item.clean_gateway)
    pools = notes.ippool(said)
    return Source(notes.IPPOOL, pools, clean_gateway=config.clean_gateway) if pools is not None else None


def _subnets(nic: str, facts: PodFacts, settings: IpamSettings) -> Source | None:
    """What `subnets`, or else `subnet`, has for the NIC.

    All NICs must be in `subnets`; `subnet` is about one of them, and the others go on to the next source.
    """
    demand = notes.subnets(facts.pod.metadata.annotations)
    if demand is None:
        return None
    if not settings.enable_auto_pools:
        raise InvalidConfigError(
            WRONG_INPUT, f"it's invalid to use '{demand.key}' annotation when Auto-Pool feature is disabled"
        )
    if (facts.controller.api_version, facts.controller.kind) == (Pod.TYPE.api_version, Pod.TYPE.kind):
        raise InvalidConfigError(
            WRONG_INPUT, f"{demand.key}: SpiderSubnet feature doesn't support no-controller pod, give it a Deployment"
        )
    number = notes.ip_number(facts.pod.metadata.annotations)
    if is_third_party(facts.controller) and (number is None or number.flexible):
        raise InvalidConfigError(
            WRONG_INPUT,
            f"{notes.IP_NUMBER}: {facts.controller.api_version} {facts.controller.kind} is a third-party"
            ' controller and only supports fixed auto-created IPPool IP Number, such as "5"',
        )
    item = demand.of(nic)
    if item is None and demand.key == notes.SUBNETS:
        raise InvalidConfigError(WRONG_INPUT, f"{demand.key}: interface {nic} must be specified")
    return Source(demand.key, subnets=item) if item is not None else None


def _item(items: tuple[NicPools, ...], nic: str, facts: PodFacts) -> NicPools:
    """The item of `ippools` for the NIC: by its name, or by its place among the pod's NICs."""
    if items[0].interface:
        named = next((item for item in items if item.interface == nic), None)
        if named is None:
            raise InvalidConfigError(WRONG_INPUT, f"{notes.IPPOOLS}: interface {nic} must be specified")
        return named
    meta = facts.pod.metadata
    number = notes.nic_number(nic, notes.networks(meta.annotations, meta.namespace))
    if number is None:
        raise InvalidConfigError(
            WRONG_INPUT,
            f"{notes.IPPOOLS}: no item names an interface, and {nic} is neither {notes.FIRST_NIC} nor that"
            f" of a network in annotation {notes.NETWORKS}",
        )
    if number >= len(items):
        raise InvalidConfigError(
            WRONG_INPUT,
            f"{notes.IPPOOLS}: {nic} is the pod's NIC number {number + 1}, and there are {len(items)} items",
        )
    return items[number]
