"""Objects that tell which networks a cluster's pods and services have, as far as they are read for that.

All are partial, as in `api.core`. Source: Kubernetes API reference, networking.k8s.io/v1 ServiceCIDR; Calico API,
IPPool; Cilium API, CiliumPodIPPool.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import Kind, Resource, Struct


class CommandContainer(Struct, frozen=True, kw_only=True):
    """`spec.containers[]`, of which only the command line is of interest."""

    command: list[str] = field(default_factory=list)
    args: list[str] = field(default_factory=list)


class CommandSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a Pod."""

    containers: list[CommandContainer] = field(default_factory=list)


class ControllerManager(Resource, frozen=True, kw_only=True):
    """A pod of kube-controller-manager: its command line names the cluster's networks."""

    TYPE: ClassVar[Kind] = Kind("", "v1", "Pod", "pods", namespaced=True, partial=True)
    spec: CommandSpec = CommandSpec()


class NetworksSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a ServiceCIDR."""

    cidrs: list[str] = field(default_factory=list)


class ServiceCIDR(Resource, frozen=True, kw_only=True):
    """Networks that Services get their addresses from."""

    TYPE: ClassVar[Kind] = Kind(
        "networking.k8s.io", "v1", "ServiceCIDR", "servicecidrs", namespaced=False, partial=True
    )
    spec: NetworksSpec = NetworksSpec()


class CalicoSpec(Struct, frozen=True, kw_only=True):
    """`spec` of Calico's IPPool."""

    cidr: str = ""
    disabled: bool = False


class CalicoIPPool(Resource, frozen=True, kw_only=True):
    """A network that Calico gives pods addresses of."""

    TYPE: ClassVar[Kind] = Kind("crd.projectcalico.org", "v1", "IPPool", "ippools", namespaced=False, partial=True)
    spec: CalicoSpec = CalicoSpec()


class CiliumNetworks(Struct, frozen=True, kw_only=True):
    """`spec.ipv4` or `spec.ipv6` of a CiliumPodIPPool."""

    cidrs: list[str] = field(default_factory=list)


class CiliumSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a CiliumPodIPPool."""

    ipv4: CiliumNetworks = CiliumNetworks()
    ipv6: CiliumNetworks = CiliumNetworks()


class CiliumPodIPPool(Resource, frozen=True, kw_only=True):
    """Networks that Cilium gives pods addresses of, in its mode `multi-pool`."""

    TYPE: ClassVar[Kind] = Kind(
        "cilium.io", "v2alpha1", "CiliumPodIPPool", "ciliumpodippools", namespaced=False, partial=True
    )
    spec: CiliumSpec = CiliumSpec()
