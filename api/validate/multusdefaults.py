"""Defaults of a SpiderMultusConfig, those of its schema included: what the API server filled in is not needed.

Upstream's, but for `coordinator.tunePodRoutes`: upstream's webhook would switch it off in a block that does not have
it, but the schema's default, which comes before, switches it on.
"""

from __future__ import annotations

from typing import TypeVar

from msgspec.structs import replace

from api.multusconfig import (
    INJECT,
    Bond,
    IBSriovConfig,
    IpoibConfig,
    MacvlanConfig,
    MultusConfig,
    OvsConfig,
    Pools,
    SriovConfig,
    VlanConfig,
)
from api.validate.coordinator import default_network_coordinator

T = TypeVar("T")


def default_multus_config(config: MultusConfig) -> MultusConfig:
    """The object as admission stores it; never fails."""
    spec = config.spec
    kind = spec.cni_type or "custom"
    custom = kind == "custom"
    spec = replace(
        spec,
        cni_type=kind,
        enable_coordinator=False if custom else _or(spec.enable_coordinator, True),
        disable_ipam=_or(spec.disable_ipam, False),
        coordinator=None if custom else default_network_coordinator(spec.coordinator),
        chain_cni_json_data=_or(spec.chain_cni_json_data, []),
        custom_cni=_or(spec.custom_cni, "") if custom else spec.custom_cni,
        macvlan=_default_macvlan(spec.macvlan) if kind == "macvlan" else spec.macvlan,
        ipvlan=_default_macvlan(spec.ipvlan) if kind == "ipvlan" else spec.ipvlan,
        vlan=_default_vlan(spec.vlan) if kind == "vlan" else spec.vlan,
        sriov=_default_sriov(spec.sriov) if kind == "sriov" else spec.sriov,
        ibsriov=_default_ibsriov(spec.ibsriov) if kind == "ib-sriov" else spec.ibsriov,
        ipoib=_default_ipoib(spec.ipoib) if kind == "ipoib" else spec.ipoib,
        ovs=_default_ovs(spec.ovs) if kind == "ovs" else spec.ovs,
    )
    metadata = config.metadata
    copied = {key: metadata.annotations[key] for key in INJECT if key in metadata.annotations}
    return replace(config, metadata=replace(metadata, labels=metadata.labels | copied), spec=spec)


def _default_macvlan(block: MacvlanConfig | None) -> MacvlanConfig | None:
    return block and replace(
        block,
        vlan_id=_or(block.vlan_id, 0),
        mtu=_or(block.mtu, 0),
        bond=_default_bond(block.bond),
        rdma_resource_name=_or(block.rdma_resource_name, ""),
        ippools=_default_pools(block.ippools),
    )


def _default_vlan(block: VlanConfig | None) -> VlanConfig | None:
    if block is None:
        return None
    mode = block.vlan_mode or "manual"
    return replace(
        block,
        vlan_mode=mode,
        vlan_id=_or(block.vlan_id, 0) if mode == "manual" else block.vlan_id,
        mtu=_or(block.mtu, 0),
        bond=_default_bond(block.bond),
        rdma_resource_name=_or(block.rdma_resource_name, ""),
        ippools=_default_pools(block.ippools),
    )


def _default_sriov(block: SriovConfig | None) -> SriovConfig | None:
    return block and replace(
        block,
        resource_name=_or(block.resource_name, ""),
        vlan_id=_or(block.vlan_id, 0),
        mtu=_or(block.mtu, 0),
        min_tx_rate_mbps=_or(block.min_tx_rate_mbps, 0),
        max_tx_rate_mbps=_or(block.max_tx_rate_mbps, 0),
        rdma_isolation=_or(block.rdma_isolation, False),
        ippools=_default_pools(block.ippools),
    )


def _default_ibsriov(block: IBSriovConfig | None) -> IBSriovConfig | None:
    return block and replace(
        block,
        resource_name=_or(block.resource_name, ""),
        pkey=_or(block.pkey, ""),
        link_state=_or(block.link_state, "enable"),
        rdma_isolation=_or(block.rdma_isolation, True),
        enable_ib_kubernetes=_or(block.enable_ib_kubernetes, False),
        ippools=_default_pools(block.ippools),
    )


def _default_ipoib(block: IpoibConfig | None) -> IpoibConfig | None:
    return block and replace(block, ippools=_default_pools(block.ippools))


def _default_ovs(block: OvsConfig | None) -> OvsConfig | None:
    return block and replace(
        block, vlan=_or(block.vlan, 0), device_id=_or(block.device_id, ""), ippools=_default_pools(block.ippools)
    )


def _default_bond(bond: Bond | None) -> Bond | None:
    return bond and replace(bond, options=_or(bond.options, ""))


def _default_pools(pools: Pools | None) -> Pools:
    """Empty lists are left out, as upstream's serialisation does."""
    given = pools or Pools()
    return replace(
        given,
        ipv4=given.ipv4 or None,
        ipv6=given.ipv6 or None,
        match_master_subnet=_or(given.match_master_subnet, False),
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
