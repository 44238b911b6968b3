"""SpiderMultusConfig to NetworkAttachmentDefinition: the CNI configuration as text, byte for byte the same every time.

Keys stand in the order of upstream's Go structs, so that its definitions are not rewritten when ours takes over; the
objects of `chainCNIJsonData` have theirs sorted, and `<`, `>`, `&` are escaped, as Go's encoder does. What is absent
here is what upstream leaves out: nulls, empty strings and lists of optional members. Differences: `disabled` is written
`disable`, the only spelling that upstream's plugin knows; `podRPFilter` is written whenever it says something else than
the default (upstream: only beside `podCIDRType`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import to_builtins

from api.coordinator import CoordinatorSpec, plugin_mode
from api.meta import ObjectMeta, OwnerReference
from api.multusconfig import (
    ANNOTATION_CNI_VERSION,
    ANNOTATION_CONFIG_NAME,
    CNI_VERSION,
    Block,
    IBSriovConfig,
    IpoibConfig,
    MacvlanConfig,
    MultusConfig,
    MultusConfigSpec,
    OvsConfig,
    Pools,
    SriovConfig,
    VlanConfig,
    block_of,
    network_name,
)
from api.nad import ANNOTATION_RESOURCE, NetworkAttachmentDefinition, NetworkSpec

IPAM = "spiderpool"
"""Name of the IPAM plugin."""

Plugin = dict[str, Any]

_encode = msgspec.json.Encoder().encode
_ESCAPED = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def network_of(config: MultusConfig) -> NetworkAttachmentDefinition:
    """The definition that an object makes, which is defaulted and valid by itself."""
    metadata = config.metadata
    owner = OwnerReference(
        api_version=config.TYPE.api_version,
        kind=config.TYPE.kind,
        name=metadata.name,
        uid=metadata.uid,
        controller=True,
        block_owner_deletion=True,
    )
    return NetworkAttachmentDefinition(
        metadata=ObjectMeta(
            name=network_name(metadata),
            namespace=metadata.namespace,
            annotations=metadata.annotations | _resource_annotation(config.spec),
            owner_references=[owner],
        ),
        spec=NetworkSpec(config=config_text(config)),
    )


def config_text(config: MultusConfig) -> str | None:
    """The CNI configuration; None where Multus shall take the node's own file. The object is defaulted and valid."""
    spec, metadata = config.spec, config.metadata
    if (spec.cni_type or "custom") == "custom":
        return spec.custom_cni or None
    return _text(
        {
            "cniVersion": metadata.annotations.get(ANNOTATION_CNI_VERSION) or CNI_VERSION,
            "name": metadata.annotations.get(ANNOTATION_CONFIG_NAME) or network_name(metadata),
            "plugins": plugins(spec),
        }
    )


def plugins(spec: MultusConfigSpec) -> list[Plugin]:
    """The chain: ifacer, the main plugin, rdma, the chained ones, the coordinator, tuning; those that are wanted."""
    block = block_of(spec)
    if block is None:
        raise ValueError(f"a SpiderMultusConfig of type {spec.cni_type} without its block is not valid")
    chain = [*_ifacer(block), _main(spec, block)]
    if isinstance(block, SriovConfig) and block.rdma_isolation:
        chain.append({"type": "rdma"})
    chain += [_sorted(msgspec.json.decode(text)) for text in spec.chain_cni_json_data or ()]
    if spec.enable_coordinator is not False:
        chain.append(coordinator(spec.coordinator or CoordinatorSpec()))
    if isinstance(block, SriovConfig) and block.mtu:
        chain.append({"type": "tuning", "mtu": block.mtu})
    return chain


def coordinator(spec: CoordinatorSpec) -> Plugin:
    """The coordinator's configuration: what goes before the SpiderCoordinator for this network."""
    filtered = spec.pod_cidr_type is not None or bool(spec.pod_rp_filter)
    return _without(
        {
            "txQueueLen": spec.tx_queue_len,
            "vethLinkAddress": spec.veth_link_address or None,
            "vethMTU": spec.veth_mtu,
            "tunePodRoutes": spec.tune_pod_routes,
            "podMACPrefix": spec.pod_mac_prefix or None,
            "mode": plugin_mode(spec.mode) if spec.mode else None,
            "type": "coordinator",
            "podDefaultRouteNic": spec.pod_default_route_nic or None,
            "podRPFilter": spec.pod_rp_filter if filtered else None,
            "hijackCIDR": spec.hijack_cidr or None,
            "policyRoutes": [{"dst": route.dst, "gw": route.gw} for route in spec.policy_routes or ()] or None,
        }
    )


def _ifacer(block: Block) -> list[Plugin]:
    """The plugin that makes bond and VLAN on the node, if the network needs one."""
    if not isinstance(block, MacvlanConfig):
        return []
    bonded = len(block.master) >= 2
    vlan = 0 if isinstance(block, VlanConfig) else block.vlan_id or 0
    if not bonded and not vlan:
        return []
    bond = {"name": block.bond.name, "mode": block.bond.mode, "options": block.bond.options} if block.bond else None
    return [
        _without(
            {
                "vlanID": vlan or None,
                "type": "ifacer",
                "interfaces": block.master,
                "bond": _without(bond) if bond else None,
            }
        )
    ]


def _main(spec: MultusConfigSpec, block: Block) -> Plugin:
    ipam = None if spec.disable_ipam else _ipam(block)
    kind = spec.cni_type
    plugin: Plugin
    match block:
        case VlanConfig():
            plugin = {
                "type": kind,
                "master": _parent(block),
                "vlanMode": block.vlan_mode,
                "vlanId": block.vlan_id if block.vlan_mode != "auto" else None,
                "mtu": block.mtu,
                "ipam": ipam,
            }
        case MacvlanConfig():
            mode = {"mode": "bridge"} if kind == "macvlan" else {}
            vlan = f".{block.vlan_id}" if block.vlan_id else ""
            plugin = {"type": kind, "master": _parent(block) + vlan, **mode, "mtu": block.mtu, "ipam": ipam}
        case SriovConfig():
            plugin = {
                "vlan": block.vlan_id,
                "min_tx_rate": block.min_tx_rate_mbps,
                "max_tx_rate": block.max_tx_rate_mbps,
                "type": kind,
                "ipam": ipam,
            }
        case IBSriovConfig():
            plugin = {
                "type": kind,
                "pkey": block.pkey,
                "link_state": block.link_state,
                "rdmaIsolation": block.rdma_isolation,
                "ibKubernetesEnabled": block.enable_ib_kubernetes,
                "ipam": ipam,
            }
        case IpoibConfig():
            plugin = {"type": kind, "master": block.master or None, "ipam": ipam}
        case OvsConfig():
            plugin = {
                "vlan": block.vlan,
                "type": kind,
                "bridge": block.bridge,
                "deviceID": block.device_id or None,
                "ipam": ipam,
                "trunk": [to_builtins(trunk) for trunk in block.trunk or ()] or None,
            }
    return _without(plugin)


def _parent(block: MacvlanConfig) -> str:
    """The NIC of the node, or the bond of several."""
    if len(block.master) >= 2 and block.bond is not None:
        return block.bond.name
    return block.master[0]


def _ipam(block: Block) -> Plugin:
    pools = block.ippools or Pools()
    matched = pools.match_master_subnet if isinstance(block, SriovConfig) else None
    return _without(
        {
            "type": IPAM,
            "default_ipv4_ippool": pools.ipv4 or None,
            "default_ipv6_ippool": pools.ipv6 or None,
            "match_master_subnet": matched or None,
        }
    )


def _resource_annotation(spec: MultusConfigSpec) -> dict[str, str]:
    """Where the runtime takes the NIC from a device plugin, its resource's name."""
    match block_of(spec):
        case SriovConfig(resource_name=str(name)) | IBSriovConfig(resource_name=str(name)) if name:
            return {ANNOTATION_RESOURCE: name}
        case OvsConfig(device_id=str(device)) as ovs if device:
            return {ANNOTATION_RESOURCE: f"ovs-cni.network.kubevirt.io/{ovs.bridge}"}
    return {}


def _without(members: Mapping[str, Any]) -> Plugin:
    return {key: value for key, value in members.items() if value is not None}


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_sorted(item) for item in value]
    return value


def _text(document: Plugin) -> str:
    return _encode(document).decode().translate(_ESCAPED)
