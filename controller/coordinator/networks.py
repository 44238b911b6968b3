"""Which networks the cluster's pods and services have, from what there is to tell. Pure.

Upstream's rules, with these differences: only what the type needs has to be there (upstream is NotReady without
kube-controller-manager's pod, which managed clusters do not show, even where Calico and ServiceCIDRs say everything);
Cilium's CiliumPodIPPool is needed in the mode `multi-pool` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from api.clusternet import CalicoIPPool, CiliumPodIPPool, ControllerManager, ServiceCIDR
from api.coordinator import CoordinatorStatus
from api.core import ConfigMap
from api.meta import R
from api.ranges import parse_network

CLUSTER_NOT_READY = "ClusterNotReady"
CILIUM_NOT_READY = "CiliumNotReady"

_BY_CNI_NAME = {"calico": "calico", "k8s-pod-network": "calico", "cilium": "cilium", "flannel": "cluster"}
"""Name inside the node's CNI configuration to the type; any other is `none`."""

_POD_SUBNET = re.compile(r"podSubnet:[ \t]*(\S+)")
_SERVICE_SUBNET = re.compile(r"serviceSubnet:[ \t]*(\S+)")


class NotReadyError(Exception):
    """The networks cannot be found out; the text is for the status."""

    def __init__(self, reason: str, event: str = "", message: str = "") -> None:
        super().__init__(reason)
        self.event = event
        """Reason of the Event to write; empty: none."""
        self.message = message or reason


@dataclass(frozen=True, slots=True)
class ClusterNetworks:
    """What the cluster was set up with."""

    pods: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """What there is to tell."""

    kubeadm: ConfigMap | None = None
    """kube-system/kubeadm-config."""
    managers: tuple[ControllerManager, ...] = ()
    """Pods of kube-controller-manager."""
    service_cidrs: tuple[ServiceCIDR, ...] = ()
    calico: tuple[CalicoIPPool, ...] | None = None
    """None: the API server does not have the kind."""
    cilium: ConfigMap | None = None
    cilium_pools: tuple[CiliumPodIPPool, ...] | None = None
    """None: the API server does not have the kind."""


def type_of_cni(name: str | None) -> str:
    """What `podCIDRType: auto` means on a node whose first CNI configuration is called `name`; None: there is none."""
    return _BY_CNI_NAME.get(name or "", "none")


def found_out(pod_cidr_type: str, sources: Sources) -> CoordinatorStatus:
    """The status for a type that is not `auto`. Raises NotReadyError."""
    pods = _pod_networks(pod_cidr_type, sources)
    services = [each for cidr in _by_age(sources.service_cidrs) for each in cidr.spec.cidrs]
    if not services:
        services = list(_cluster(sources).services)
    return CoordinatorStatus(phase="Synced", overlay_pod_cidr=pods, service_cidr=services)


def not_ready(reason: str) -> CoordinatorStatus:
    """The status while the networks are not known: nothing half known is handed to pods."""
    return CoordinatorStatus(phase="NotReady", reason=reason, overlay_pod_cidr=[], service_cidr=[])


def _pod_networks(pod_cidr_type: str, sources: Sources) -> list[str]:
    match pod_cidr_type:
        case "none":
            return []
        case "cluster":
            return list(_cluster(sources).pods)
        case "calico":
            if sources.calico is None:
                raise NotReadyError("Calico's kind ippools.crd.projectcalico.org is not there, is Calico installed?")
            usable = (each for each in sources.calico if each.metadata.deletion_timestamp is None)
            return [each.spec.cidr for each in _by_age(usable) if not each.spec.disabled]
        case "cilium":
            return _cilium(sources)
    raise NotReadyError(f"podCIDRType {pod_cidr_type} is unknown")


def _cluster(sources: Sources) -> ClusterNetworks:
    """From kubeadm's configuration if it names both, else from kube-controller-manager's command line."""
    kubeadm = kubeadm_networks(sources.kubeadm) if sources.kubeadm is not None else ClusterNetworks()
    if kubeadm.pods and kubeadm.services:
        return kubeadm
    if not sources.managers:
        if kubeadm.pods or kubeadm.services:
            return kubeadm
        raise NotReadyError(
            "No kube-controller-manager pod found, unable to get clusterCIDR",
            CLUSTER_NOT_READY,
            "Neither kubeadm-config ConfigMap nor kube-controller-manager Pod can be found",
        )
    return manager_networks(min(sources.managers, key=lambda each: each.metadata.name))


def kubeadm_networks(config: ConfigMap) -> ClusterNetworks:
    """What kubeadm's ClusterConfiguration says; it is looked through as text, as it is YAML of many versions."""
    text = config.data.get("ClusterConfiguration", "")
    found = [match[1] if (match := pattern.search(text)) else "" for pattern in (_POD_SUBNET, _SERVICE_SUBNET)]
    return ClusterNetworks(*(_valid(each) for each in found))


def manager_networks(pod: ControllerManager) -> ClusterNetworks:
    """What kube-controller-manager's flags say."""
    container = next(iter(pod.spec.containers), None)
    words = [*container.command, *container.args] if container else []
    return ClusterNetworks(_valid(_flag(words, "cluster-cidr")), _valid(_flag(words, "service-cluster-ip-range")))


def _flag(words: Iterable[str], name: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), "")


def _cilium(sources: Sources) -> list[str]:
    if sources.cilium is None:
        raise NotReadyError("Cilium's ConfigMap is not there", CILIUM_NOT_READY, "Cilium needs to be installed first")
    data = sources.cilium.data
    match mode := data.get("ipam", ""):
        case "cluster-pool" | "cluster-pool-v2beta":
            return [
                network
                for key in ("cluster-pool-ipv4-cidr", "cluster-pool-ipv6-cidr")
                for network in _required(key, data.get(key, ""))
            ]
        case "multi-pool":
            if sources.cilium_pools is None:
                raise NotReadyError("Cilium's kind ciliumpodippools.cilium.io is not there, which multi-pool needs")
            usable = (each for each in sources.cilium_pools if each.metadata.deletion_timestamp is None)
            return [
                cidr for each in _by_age(usable) for part in (each.spec.ipv4, each.spec.ipv6) for cidr in part.cidrs
            ]
        case "kubernetes":
            return list(_cluster(sources).pods)
    raise NotReadyError(f"unsupported CIlium IPAM mode: {mode}")


def _required(key: str, text: str) -> list[str]:
    networks = [part for part in re.split(r"[,\s]+", text) if part]
    for each in networks:
        if not _valid(each):
            raise NotReadyError(f"Cilium's {key} is {each[:80]!r}, which is not a CIDR")
    return networks


def _valid(text: str) -> tuple[str, ...]:
    """The CIDRs of a comma list, without quotes; others are dropped."""
    found = []
    for part in text.strip("\"'").split(","):
        try:
            parse_network(part)
        except ValueError:
            continue
        found.append(part)
    return tuple(found)


def _by_age(resources: Iterable[R]) -> list[R]:
    return sorted(resources, key=lambda each: (str(each.metadata.creation_timestamp or ""), each.metadata.name))
