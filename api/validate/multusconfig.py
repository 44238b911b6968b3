"""Validation of a SpiderMultusConfig; `api.validate.multusdefaults` has its defaults.

The rules, their order, their texts and the paths (`spec.macvlanConfig` and so on, historical) are upstream's; only the
first failure is reported. Differences: a trunk with `maxID` alone is refused instead of crashing; a refusal of a
further block names the block that the type has; a coordinator block's errors are at `spec.coordinator`.

Whoever admits needs to read one object: the NetworkAttachmentDefinition `network_name(new.metadata)` in the object's
namespace, uncached, if it is there. Deletion is always allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from msgspec import UNSET, Struct, UnsetType

from api.multusconfig import (
    ANNOTATION_CNI_VERSION,
    ANNOTATION_NAME,
    ANNOTATION_RDMA_INJECT,
    CNI_VERSIONS,
    INJECT,
    Block,
    IBSriovConfig,
    IpoibConfig,
    MacvlanConfig,
    MultusConfig,
    OvsConfig,
    SriovConfig,
    VlanConfig,
    block_of,
    blocks,
    network_name,
    resource_of,
)
from api.nad import NetworkAttachmentDefinition
from api.validate.coordinator import first, spec_errors
from api.validate.fields import FieldError, forbidden, invalid, required
from api.validate.labels import is_subdomain

ANNOTATIONS = "metadata.annotations"
CNI_TYPE = "spec.cniType"
CHAIN = "spec.chainCNIJsonData"
PATHS = {
    "macvlan": "spec.macvlanConfig",
    "ipvlan": "spec.ipvlanConfig",
    "vlan": "spec.vlan",
    "sriov": "spec.sriovConfig",
    "ib-sriov": "spec.ibsriovConfig",
    "ipoib": "spec.ipoibConfig",
    "ovs": "spec.ovsConfig",
    "custom": "spec.customCniTypeConfig",
}
"""What upstream calls the block of each type in its messages."""

_json = msgspec.json.Decoder()


class _Plugin(Struct):
    type: str | UnsetType = UNSET


_plugin = msgspec.json.Decoder(_Plugin)


def created_multus_config_errors(
    config: MultusConfig, existing: NetworkAttachmentDefinition | None = None
) -> list[FieldError]:
    """The first thing that is wrong with a new object that `default_multus_config` has seen.

    `existing` is the NetworkAttachmentDefinition that there is under the name of the one to be made.
    """
    return list(first(_errors(None, config, existing)))


def updated_multus_config_errors(
    old: MultusConfig, new: MultusConfig, existing: NetworkAttachmentDefinition | None = None
) -> list[FieldError]:
    """The first thing that is wrong with the change from `old` to `new`, which `default_multus_config` has seen."""
    return list(first(_errors(old, new, existing)))


def spec_problems(config: MultusConfig) -> list[FieldError]:
    """The first thing that is wrong with a defaulted object by itself, whatever else there is."""
    return list(first(_own_errors(config)))


def inject_problem(config: MultusConfig, annotation: str) -> str:
    """Why pods cannot get this configuration by `annotation` (one of `INJECT`); empty if they can."""
    spec, meta = config.spec, config.metadata
    block = block_of(spec)
    if spec.cni_type in {None, "ovs", "custom"}:
        return f"RDMA resource injection does not support cniType: {spec.cni_type or 'custom'}"
    if block is None:
        return f"{spec.cni_type} config is nil"
    resource = (block.master or "") if isinstance(block, IpoibConfig) else resource_of(spec)
    called = f"for spidermultusconfig {meta.namespace}/{meta.name}"
    if annotation == ANNOTATION_RDMA_INJECT and not resource:
        return f"rdmaResourceName can not empty {called}"
    pools = block.ippools
    if resource and not (pools and (pools.ipv4 or pools.ipv6)):
        return f"no any ippools configured {called}"
    return ""


def _errors(
    old: MultusConfig | None, new: MultusConfig, existing: NetworkAttachmentDefinition | None
) -> Iterator[FieldError]:
    if old is not None:
        yield from _name_errors(old, new)
    yield from _network_name_errors(new)
    if existing is not None and existing.metadata.deletion_timestamp is None:
        yield from _rival_errors(new, existing)
    yield from _version_errors(new)
    yield from _body_errors(new)


def _own_errors(config: MultusConfig) -> Iterator[FieldError]:
    yield from _network_name_errors(config)
    yield from _version_errors(config)
    yield from _body_errors(config)


def _body_errors(config: MultusConfig) -> Iterator[FieldError]:
    spec = config.spec
    yield from _block_errors(config)
    if spec.coordinator is not None:
        yield from spec_errors(spec.coordinator, "spec.coordinator")
    for text in spec.chain_cni_json_data or ():
        if problem := _chain_problem(text):
            yield forbidden(CHAIN, f"invalid {text[:256]}: {problem}")


def _name_errors(old: MultusConfig, new: MultusConfig) -> Iterator[FieldError]:
    before, after = (each.metadata.annotations.get(ANNOTATION_NAME) for each in (old, new))
    if after is None or before == after:
        return
    if before is None:
        text = f"it's unsupported to changed Multus net-attach-def '{old.metadata.name}' to customized name '{after}'"
    else:
        text = f"it's unsupported to change customized Multus net-attach-def resource name from '{before}' to '{after}'"
    yield invalid(ANNOTATIONS, after, text)


def _network_name_errors(config: MultusConfig) -> Iterator[FieldError]:
    name = config.metadata.annotations.get(ANNOTATION_NAME)
    if name is not None and not (len(name) <= 253 and is_subdomain(name)):
        yield invalid(
            ANNOTATIONS,
            config.metadata.annotations,
            f"invalid custom net-attach-def resource name, err: {name[:256]!r} is not a DNS-1123 subdomain: at most "
            "253 lower-case letters, digits, '-' and '.', starting and ending with a letter or digit",
        )


def _rival_errors(config: MultusConfig, existing: NetworkAttachmentDefinition) -> Iterator[FieldError]:
    metadata = config.metadata
    for owner in existing.metadata.owner_references:
        if owner.kind == config.TYPE.kind and owner.name != metadata.name:
            yield invalid(
                ANNOTATIONS,
                metadata.annotations,
                f"the net-attach-def {metadata.namespace}/{network_name(metadata)} already exists and is managed by "
                f"SpiderMultusConfig {metadata.namespace}/{owner.name}.",
            )


def _version_errors(config: MultusConfig) -> Iterator[FieldError]:
    version = config.metadata.annotations.get(ANNOTATION_CNI_VERSION)
    if version is not None and version not in CNI_VERSIONS:
        supported = ", ".join(CNI_VERSIONS)
        yield invalid(
            ANNOTATIONS, config.metadata.annotations, f"unsupported CNI version {version}, supported are {supported}"
        )


def _block_errors(config: MultusConfig) -> Iterator[FieldError]:
    spec = config.spec
    kind = spec.cni_type or "custom"
    path, block = PATHS[kind], block_of(spec)
    inject = [key for key in INJECT if key in config.metadata.annotations]
    if kind in {"ovs", "custom"} and inject:
        yield forbidden(CNI_TYPE, f"the cniType {kind} does not support RDMA resource or network resource injected")
    if kind != "custom" and block is None:
        yield required(path, f"no {path} specified")
        return
    if block is not None:
        yield from _RULES[type(block)](kind, block, path)
    others = {name for name, other in blocks(spec).items() if other is not None and name != kind}
    if others or (kind != "custom" and spec.custom_cni is not None):
        yield forbidden(CNI_TYPE, f"the cniType {kind} only supports {path}, please remove other CNI configs")
    if kind != "custom":
        for annotation in inject:
            if problem := inject_problem(config, annotation):
                yield invalid(path, block, problem)
    elif spec.custom_cni and not _is_json(spec.custom_cni):
        yield forbidden(path, "customCniConfig isn't a valid JSON encoding")


def _macvlan_errors(kind: str, block: MacvlanConfig, path: str) -> Iterator[FieldError]:
    yield from _vlan_id_errors(block.vlan_id, path)
    yield from _mtu_errors(block.mtu, path)
    if block.ippools is not None and block.ippools.match_master_subnet:
        yield invalid(path, block, f"MatchMasterSubnet feature is not supported for {kind}")
    if not block.master or not all(block.master):
        yield invalid(path, block, "master can't be empty")
    elif len(block.master) >= 2 and block.bond is None:
        yield invalid(path, block, "the bond property is nil with multiple Interfaces")
    elif len(block.master) >= 2 and block.bond is not None and not block.bond.name:
        yield invalid(path, block, "bond name can't be empty")


def _vlan_errors(kind: str, block: VlanConfig, path: str) -> Iterator[FieldError]:
    if block.vlan_mode == "auto" and block.vlan_id is not None:
        yield invalid(path, block, "vlanId must not be specified when vlanMode is auto")
    elif block.vlan_mode == "manual" and block.vlan_id is None:
        yield invalid(path, block, "vlanId must not be nil when vlanMode is manual")
    elif block.vlan_mode not in {"auto", "manual"}:
        yield invalid(path, block, f"invalid vlanMode {block.vlan_mode}, supported values are manual and auto")
    yield from _macvlan_errors(kind, block, path)


def _sriov_errors(_: str, block: SriovConfig, path: str) -> Iterator[FieldError]:
    yield from _vlan_id_errors(block.vlan_id, path)
    yield from _mtu_errors(block.mtu, path)
    if (block.min_tx_rate_mbps or 0) > (block.max_tx_rate_mbps or 0):
        yield invalid(path, block.min_tx_rate_mbps, "minTxRateMbps must be less than maxTxRateMbps")
    if not block.resource_name:
        yield required(path, f"no {path}[resourceName] specified")


def _ibsriov_errors(_: str, block: IBSriovConfig, path: str) -> Iterator[FieldError]:
    if not block.resource_name:
        yield required(path, f"no {path}[resourceName] specified")


def _ipoib_errors(_: str, block: IpoibConfig, path: str) -> Iterator[FieldError]:
    if not block.master:
        yield required(path, f"no {path}[master] specified")


def _ovs_errors(_: str, block: OvsConfig, path: str) -> Iterator[FieldError]:
    yield from _vlan_id_errors(block.vlan, path)
    for i, trunk in enumerate(block.trunk or ()):
        where = f"{path}[{i}]" if i else path
        if trunk.min_id is not None and trunk.min_id > 4094:
            yield invalid(where, trunk, "incorrect trunk minID parameter")
        if trunk.max_id is not None and trunk.max_id > 4094:
            yield invalid(where, trunk, "incorrect trunk maxID parameter")
        if trunk.max_id is not None and trunk.min_id is None:
            yield invalid(where, trunk, "incorrect trunk minID parameter: maxID needs it")
        elif trunk.max_id is not None and trunk.min_id is not None and trunk.max_id < trunk.min_id:
            yield invalid(where, trunk, "minID is greater than maxID in trunk parameter")
        if trunk.id is not None and trunk.id > 4096:
            yield invalid(where, trunk, "incorrect trunk id parameter")


_RULES: dict[type[Block], Callable[..., Iterator[FieldError]]] = {
    MacvlanConfig: _macvlan_errors,
    VlanConfig: _vlan_errors,
    SriovConfig: _sriov_errors,
    IBSriovConfig: _ibsriov_errors,
    IpoibConfig: _ipoib_errors,
    OvsConfig: _ovs_errors,
}


def _vlan_id_errors(vlan: int | None, path: str) -> Iterator[FieldError]:
    if vlan is not None and not 0 <= vlan <= 4094:
        yield invalid(path, vlan, f"invalid vlanId {vlan}, please make sure vlanId in range [0,4094]")


def _mtu_errors(mtu: int | None, path: str) -> Iterator[FieldError]:
    if mtu is not None and mtu < 0:
        yield invalid(path, mtu, "MTU must be greater than or equal to 0")


def _is_json(text: str) -> bool:
    try:
        _json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _chain_problem(text: str) -> str:
    """Why `text` is no configuration of one CNI plugin; empty if it is."""
    try:
        plugin = _plugin.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        return f"not a JSON object: {error}"
    return "" if plugin.type else "missing 'type'"
