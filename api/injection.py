"""What a created pod gets by its, or its namespace's, annotations: networks, and the resources that they need.

The rules are upstream's, with these differences: pods on their node's own network are left alone, for they have no
NICs; networks are named as their NetworkAttachmentDefinitions are, not as the SpiderMultusConfigs; which configurations
belong to a group is read from their annotation, of which the label is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from api import annotations as multus
from api.multusconfig import (
    INJECT,
    IpoibConfig,
    MacvlanConfig,
    MultusConfig,
    VlanConfig,
    block_of,
    network_name,
    resource_of,
)
from api.validate.multusconfig import inject_problem
from api.validate.verdict import Denial

Json = dict[str, Any]

RESOURCE_DOMAIN = "spidernet.io"
"""Of the resources that the nodes' device plugin advertises."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Which resources of the nodes' device plugin pods are to ask for."""

    master_nics: bool = False
    """A place at each master NIC."""
    sub_eni: str = ""
    """Resource of places for infrastructure providers' sub-interfaces; empty: none."""


NO_DEMAND = Demand()


def inject(
    pod: Json,
    namespace: str,
    namespace_annotations: Mapping[str, str],
    configs: Iterable[MultusConfig],
    demand: Demand = NO_DEMAND,
    *,
    installation: str = "",
) -> Json | Denial:
    """`pod`, changed in place, as it shall be created in `namespace`; or why it shall not.

    `configs` are all SpiderMultusConfigs. `installation` is the namespace where Multus looks for a default network
    that is named without one, and that the pod's own namespace does not have.
    """
    containers = pod.get("spec", {}).get("containers") or []
    if pod.get("spec", {}).get("hostNetwork") or not containers:
        return pod
    configs = list(configs)
    metadata = pod.setdefault("metadata", {})
    group = group_of(metadata.get("annotations") or {}, namespace_annotations)
    if group is not None:
        denied = _inject_networks(pod, *group, configs)
        if denied is not None:
            return denied
    if demand != NO_DEMAND:
        try:
            wanted = _referenced(metadata.get("annotations") or {}, namespace, installation, configs)
        except multus.AnnotationError as error:
            return Denial("Forbidden", str(error))
        for resource, count in _demanded(wanted, demand).items():
            if not _names(containers, resource, "limits", "requests"):
                for part in ("limits", "requests"):
                    _resources(containers[0], part)[resource] = str(count)
    return pod


def group_of(pod: Mapping[str, str], namespace: Mapping[str, str]) -> tuple[str, str] | None:
    """Annotation and group by which networks are injected; both arguments are annotations. None: not at all."""
    for key in INJECT:
        value = pod.get(key, namespace.get(key))
        if value is not None:
            return key, value
    return None


def concerned(pod: Json, namespace_annotations: Mapping[str, str], demand: Demand) -> bool:
    """Whether `inject` will look at SpiderMultusConfigs at all."""
    own = pod.get("metadata", {}).get("annotations") or {}
    referring = multus.NETWORKS in own or multus.DEFAULT_NETWORK in own
    return group_of(own, namespace_annotations) is not None or (demand != NO_DEMAND and referring)


def members(configs: Iterable[MultusConfig], annotation: str, group: str) -> list[MultusConfig]:
    """The configurations of a group, in the order of their NICs in the pod: by master, then by name."""
    found = (each for each in configs if each.metadata.annotations.get(annotation) == group)
    return sorted(found, key=lambda each: (_sort_key(each), f"{each.metadata.namespace}/{each.metadata.name}"))


def _inject_networks(pod: Json, annotation: str, group: str, configs: list[MultusConfig]) -> Denial | None:
    chosen = members(configs, annotation, group)
    if not chosen:
        return Denial("Forbidden", f"no spidermultusconfigs with annotation: {annotation}:{group} found")
    for config in chosen:
        if problem := inject_problem(config, annotation):
            return Denial("Forbidden", problem)
    metadata = pod["metadata"]
    names = [f"{each.metadata.namespace}/{network_name(each.metadata)}" for each in chosen]
    metadata["annotations"] = {**(metadata.get("annotations") or {}), multus.NETWORKS: ",".join(names)}
    containers = pod["spec"]["containers"]
    for resource in dict.fromkeys(resource_of(each.spec) for each in chosen):
        if resource and not _names(containers, resource, "limits"):
            _resources(containers[0], "limits")[resource] = "1"
    return None


def _sort_key(config: MultusConfig) -> str:
    block = block_of(config.spec)
    if isinstance(block, MacvlanConfig):
        if len(block.master) >= 2 and block.bond is not None:
            return block.bond.name
        return block.master[0] if block.master else ""
    return resource_of(config.spec) if config.spec.cni_type == "sriov" else ""


def _referenced(
    annotations: Mapping[str, str], namespace: str, installation: str, configs: list[MultusConfig]
) -> list[MultusConfig]:
    """The configurations of the pod's networks, each once; networks that are not ours are passed over."""
    by_network = {(each.metadata.namespace, network_name(each.metadata)): each for each in configs}
    found: dict[tuple[str, str], MultusConfig] = {}
    # named without a namespace it is the pod's own, or what Multus takes: the installation's
    first = [multus.default_network(annotations, each) for each in (namespace, installation or namespace)]
    places = [(each.namespace, each.name) for each in first if each and (each.namespace, each.name) in by_network][:1]
    for place in [*places, *((each.namespace, each.name) for each in multus.networks(annotations, namespace))]:
        if place in by_network:
            found[place] = by_network[place]
    return list(found.values())


def _demanded(configs: list[MultusConfig], demand: Demand) -> dict[str, int]:
    """Resource to how many of it the networks need."""
    counts: dict[str, int] = {}
    blocks = [block_of(each.spec) for each in configs]
    if demand.master_nics:
        masters: set[str] = set()
        for block in blocks:
            if isinstance(block, MacvlanConfig):
                masters.update(block.master)
            elif isinstance(block, IpoibConfig):
                masters.add(block.master or "")
        counts = {f"{RESOURCE_DOMAIN}/{master}-nic": 1 for master in sorted(masters) if master}
    automatic = sum(isinstance(block, VlanConfig) and block.vlan_mode == "auto" for block in blocks)
    if demand.sub_eni and automatic:
        counts[demand.sub_eni] = automatic
    return counts


def _names(containers: Iterable[Json], resource: str, *parts: str) -> bool:
    """Whether a container already names the resource."""
    return any(resource in ((each.get("resources") or {}).get(part) or {}) for each in containers for part in parts)


def _resources(container: Json, part: str) -> Json:
    """`resources.limits` or `resources.requests` of a container, made if it is not there."""
    resources = container["resources"] = container.get("resources") or {}
    found: Json = resources.get(part) or {}
    resources[part] = found
    return found
