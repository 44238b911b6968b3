"""vlan's network configuration, checked: the reference plugin's members, and upstream's `vlanMode`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from plugins.cni import check_ifname
from plugins.errors import InvalidConfigError, InvalidEnvironmentError

IPAM: Final = "spiderpool"
"""The one `ipam.type` that is served: addresses come from the agent itself, and it executes nobody else's plugins."""
MAX_VLAN: Final = 4094
_MAX_MTU: Final = 65535


@dataclass(frozen=True, slots=True)
class VlanConfig:
    """What a configuration says about the NIC."""

    master: str
    """The NIC of the node that the VLAN is made of."""
    vlan_id: int | None
    """None: the infrastructure provider chooses it (mode auto)."""
    mtu: int = 0
    """Bytes; 0: the master's."""
    in_container: bool = False
    """Whether the master is in the pod's network namespace."""
    dns: Mapping[str, Any] = field(default_factory=dict)
    """What the result tells of name servers."""


def require_our_ipam(netconf: Mapping[str, Any]) -> None:
    """Refuse a configuration whose addresses are somebody else's; one without `ipam` passes. Raises InvalidConfigError.

    That is all that a DEL looks at: it must work with what ADD would not take any more.
    """
    block = netconf.get("ipam")
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind is not None and kind != IPAM:
        raise InvalidConfigError(
            "this vlan plugin serves networks of Spiderpool only",
            f"ipam.type: {str(kind)[:80]!r}, allowed: {IPAM!r}; for others install the reference plugin as `vlan`",
        )


def parse_config(netconf: Mapping[str, Any]) -> VlanConfig:
    """Check `netconf`. Raises InvalidConfigError naming the member. Unknown members are ignored.

    `vlanId` decides, as with upstream's plugin; `vlanMode` must not contradict it.
    """
    require_our_ipam(netconf)
    if not isinstance(netconf.get("ipam"), Mapping) or "type" not in netconf["ipam"]:
        _refuse("ipam.type", None, repr(IPAM))
    mode, vlan_id = netconf.get("vlanMode"), netconf.get("vlanId")
    if mode not in (None, "", "manual", "auto"):
        _refuse("vlanMode", mode, "'manual', 'auto'")
    if vlan_id is not None:
        vlan_id = _integer("vlanId", vlan_id, MAX_VLAN)
        if mode == "auto":
            _refuse("vlanId", vlan_id, "none with vlanMode 'auto', in which the provider chooses it")
    elif mode == "manual":
        _refuse("vlanId", None, f"an integer from 0 to {MAX_VLAN} with vlanMode 'manual'")
    in_container = netconf.get("linkInContainer")
    if in_container is not None and not isinstance(in_container, bool):
        _refuse("linkInContainer", in_container, "true, false")
    if in_container and vlan_id is None:
        _refuse(
            "linkInContainer", in_container, "false where the provider chooses the VLAN: it does so for a node's NIC"
        )
    return VlanConfig(
        master=_master(netconf.get("master")),
        vlan_id=vlan_id,
        mtu=_integer("mtu", netconf.get("mtu") or 0, _MAX_MTU),
        in_container=bool(in_container),
        dns=_dns(netconf.get("dns")),
    )


def _master(value: object) -> str:
    if value in (None, ""):
        raise InvalidConfigError('"master" field is required', "master: the name of the NIC that the VLAN is made of")
    try:
        return check_ifname(value if isinstance(value, str) else "")
    except InvalidEnvironmentError:
        _refuse("master", value, "the name of a NIC: 1 to 15 bytes, no '/', ':' or white space")


def _dns(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _refuse("dns", value, "an object")
    return value


def _integer(key: str, value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        _refuse(key, value, f"an integer from 0 to {most}")
    return value


def _refuse(path: str, value: object, allowed: str) -> NoReturn:
    shown = "is missing" if value is None else repr(value)[:80]
    raise InvalidConfigError(f"invalid {path}", f"{path}: {shown}, allowed: {allowed}")
