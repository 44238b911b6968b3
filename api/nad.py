"""NetworkAttachmentDefinition: the network that Multus attaches a pod's NIC to.

Source: Kubernetes Network Custom Resource Definition De-facto Standard, version 1.3.
"""

from __future__ import annotations

from typing import ClassVar

from msgspec import field

from api.meta import Kind, Resource, Struct

ANNOTATION_RESOURCE = "k8s.v1.cni.cncf.io/resourceName"
"""Annotation of a network: the device plugin's resource that its NICs are taken from."""


class NetworkSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a NetworkAttachmentDefinition."""

    config: str | None = None
    """CNI configuration, JSON text; absent: the node's own file of the definition's name."""


class NetworkAttachmentDefinition(Resource, frozen=True, kw_only=True):
    """A network that Multus attaches NICs to."""

    TYPE: ClassVar[Kind] = Kind(
        "k8s.cni.cncf.io",
        "v1",
        "NetworkAttachmentDefinition",
        "network-attachment-definitions",
        namespaced=True,
        short="net-attach-def",
    )
    spec: NetworkSpec = field(default_factory=NetworkSpec)
