"""SpiderMultusConfig: a CNI configuration in the terms of its type, of which a NetworkAttachmentDefinition is made."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from api.coordinator import CoordinatorSpec
from api.meta import GROUP, VERSION, Kind, ObjectMeta, Resource, Struct

ANNOTATION_NAME = "multus.spidernet.io/cr-name"
"""Name of the NetworkAttachmentDefinition, if not that of the object."""
ANNOTATION_CNI_VERSION = "multus.spidernet.io/cni-version"
"""`cniVersion` of the configuration."""
ANNOTATION_CONFIG_NAME = "cni.spidernet.io/cniconfig-name"
"""`name` inside the configuration, if not that of the NetworkAttachmentDefinition."""
ANNOTATION_RDMA_INJECT = "cni.spidernet.io/rdma-resource-inject"
"""Group of configurations that pods with the same annotation get, RDMA resources included."""
ANNOTATION_NETWORK_INJECT = "cni.spidernet.io/network-resource-inject"
"""The same without the need for RDMA."""

INJECT = (ANNOTATION_RDMA_INJECT, ANNOTATION_NETWORK_INJECT)
"""In the order in which a pod's are looked at."""

CNI_VERSION = "0.3.1"
"""Where the annotation is absent."""
CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
"""That the annotation may name."""

CNIType = Literal["macvlan", "ipvlan", "vlan", "sriov", "ovs", "ib-sriov", "ipoib", "custom"]

_Number = Annotated[int, Meta(ge=0)]
_TypeOfCNI = Annotated[CNIType | None, Meta(extra_json_schema={"default": "custom"})]
_On = Annotated[bool | None, Meta(extra_json_schema={"default": True})]
_Off = Annotated[bool | None, Meta(extra_json_schema={"default": False})]
_MTU = Annotated[_Number | None, Meta(extra_json_schema={"default": 0})]
_VlanID = Annotated[int, Meta(ge=0, le=4094)]
_VlanMode = Annotated[Literal["manual", "auto"] | None, Meta(extra_json_schema={"default": "manual"})]
_LinkState = Annotated[Literal["auto", "enable", "disable"] | None, Meta(extra_json_schema={"default": "enable"})]
_Texts = Annotated[list[str] | None, Meta(extra_json_schema={"default": []})]


class Bond(Struct, frozen=True, kw_only=True):
    """A bond made of several masters."""

    name: str
    """Name of the bond on the node."""
    mode: Annotated[int, Meta(ge=0, le=6)]
    """The kernel's mode, 0 (balance-rr) to 6 (balance-alb)."""
    options: str | None = None
    """Further options, `key=value;key=value`."""


class Pools(Struct, frozen=True, kw_only=True):
    """Default pools of a network."""

    ipv4: list[str] | None = None
    """IPv4 pools."""
    ipv6: list[str] | None = None
    """IPv6 pools."""
    match_master_subnet: _Off = None
    """Only pools of the master's subnet; sriov alone."""


class MacvlanConfig(Struct, frozen=True, kw_only=True):
    """A macvlan or ipvlan over a master of the node."""

    master: list[str]
    """NIC of the node; several are bonded."""
    mtu: _MTU = None
    """MTU in bytes; 0 is the master's."""
    vlan_id: _VlanID | None = field(default=None, name="vlanID")
    """VLAN of the master that is made for it; 0: none."""
    bond: Bond | None = None
    """Needed with several masters."""
    rdma_resource_name: str | None = None
    """Device plugin's resource of the master's RDMA device."""
    ippools: Pools | None = None
    """Default pools."""


class VlanConfig(MacvlanConfig, frozen=True, kw_only=True):
    """A VLAN interface of a master, moved into the pod."""

    vlan_mode: _VlanMode = None
    """`manual`: the VLAN is `vlanID`; `auto`: the infrastructure provider says which."""


class SriovConfig(Struct, frozen=True, kw_only=True):
    """A virtual function of an SR-IOV NIC."""

    resource_name: str | None = None
    """Device plugin's resource that the function is taken from."""
    vlan_id: _VlanID | None = field(default=None, name="vlanID")
    """VLAN that the NIC puts the function into; 0: none."""
    mtu: _MTU = None
    """MTU in bytes; 0 leaves it."""
    min_tx_rate_mbps: _Number | None = None
    """Guaranteed rate in Mbit/s; 0: none."""
    max_tx_rate_mbps: _Number | None = None
    """Rate limit in Mbit/s; 0: none."""
    rdma_isolation: _Off = None
    """Move the RDMA device into the pod as well."""
    ippools: Pools | None = None
    """Default pools."""


class IBSriovConfig(Struct, frozen=True, kw_only=True):
    """A virtual function of an InfiniBand NIC."""

    resource_name: str | None = None
    """Device plugin's resource that the function is taken from."""
    pkey: str | None = None
    """Partition key, hexadecimal."""
    link_state: _LinkState = None
    """State of the function's link."""
    rdma_isolation: _On = None
    """Move the RDMA device into the pod as well."""
    enable_ib_kubernetes: _Off = None
    """ib-kubernetes manages the fabric."""
    ippools: Pools | None = None
    """Default pools."""


class IpoibConfig(Struct, frozen=True, kw_only=True):
    """An IP-over-InfiniBand child interface."""

    master: str | None = None
    """NIC of the node."""
    ippools: Pools | None = None
    """Default pools."""


class Trunk(Struct, frozen=True, kw_only=True):
    """VLANs that a port of a bridge lets pass."""

    min_id: _VlanID | None = field(default=None, name="minID")
    """First of a range."""
    max_id: _VlanID | None = field(default=None, name="maxID")
    """Last of the range."""
    id: _VlanID | None = None
    """A single one."""


class OvsConfig(Struct, frozen=True, kw_only=True):
    """A port of an Open vSwitch bridge."""

    bridge: str
    """Name of the bridge."""
    vlan: int | None = None
    """VLAN tag; 0: none."""
    trunk: list[Trunk] | None = None
    """VLANs that pass."""
    device_id: str | None = field(default=None, name="deviceID")
    """PCI address of a virtual function, for hardware offload."""
    ippools: Pools | None = None
    """Default pools."""


Block = MacvlanConfig | VlanConfig | SriovConfig | IBSriovConfig | IpoibConfig | OvsConfig
"""What a type may have to say; VlanConfig is a MacvlanConfig too."""


class MultusConfigSpec(Struct, frozen=True, kw_only=True):
    """`spec` of a SpiderMultusConfig: a type, and the block of that type alone."""

    cni_type: _TypeOfCNI = None
    """Main plugin; `custom` takes the configuration as it is."""
    macvlan: MacvlanConfig | None = None
    """For `macvlan`."""
    ipvlan: MacvlanConfig | None = None
    """For `ipvlan`."""
    vlan: VlanConfig | None = None
    """For `vlan`."""
    sriov: SriovConfig | None = None
    """For `sriov`."""
    ibsriov: IBSriovConfig | None = None
    """For `ib-sriov`."""
    ipoib: IpoibConfig | None = None
    """For `ipoib`."""
    ovs: OvsConfig | None = None
    """For `ovs`."""
    enable_coordinator: _On = None
    """Chain the coordinator; not for `custom`."""
    disable_ipam: _Off = field(default=None, name="disableIPAM")
    """No IPAM: the NIC gets no address from us."""
    coordinator: CoordinatorSpec | None = None
    """What goes before the SpiderCoordinator for this network."""
    chain_cni_json_data: _Texts = field(default=None, name="chainCNIJsonData")
    """Further plugins to chain, each a JSON object."""
    custom_cni: str | None = field(default=None, name="customCNI")
    """For `custom`: the whole configuration, JSON; empty: the node's own file of the definition's name."""


class MultusConfig(Resource, frozen=True, kw_only=True):
    """A CNI configuration in the terms of its type."""

    TYPE: ClassVar[Kind] = Kind(
        GROUP, VERSION, "SpiderMultusConfig", "spidermultusconfigs", namespaced=True, short="smc"
    )
    spec: MultusConfigSpec = field(default_factory=MultusConfigSpec)


def network_name(metadata: ObjectMeta) -> str:
    """Name of the NetworkAttachmentDefinition that is made of the object with this metadata, in its namespace."""
    return metadata.annotations.get(ANNOTATION_NAME) or metadata.name


def blocks(spec: MultusConfigSpec) -> dict[str, Block | None]:
    """The blocks by the types that they are for."""
    return {
        "macvlan": spec.macvlan,
        "ipvlan": spec.ipvlan,
        "vlan": spec.vlan,
        "sriov": spec.sriov,
        "ib-sriov": spec.ibsriov,
        "ipoib": spec.ipoib,
        "ovs": spec.ovs,
    }


def block_of(spec: MultusConfigSpec) -> Block | None:
    """The block of the configuration's own type; None if it is missing, and for `custom`."""
    return blocks(spec).get(spec.cni_type or "custom")


def resource_of(spec: MultusConfigSpec) -> str:
    """The device plugin's resource that pods need; empty if none."""
    match block_of(spec):
        case MacvlanConfig(rdma_resource_name=name):
            return name or ""
        case SriovConfig(resource_name=name) | IBSriovConfig(resource_name=name):
            return name or ""
    return ""
