"""ifacer's network configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from plugins.cni import check_ifname
from plugins.errors import InvalidConfigError, InvalidEnvironmentError
from plugins.ifacer.options import OptionError, ParsedOptions, parse_mode, parse_options

DEFAULT_BOND: Final = "sp_bond0"
"""Upstream's name for a bond that has none."""
MTU_RANGE: Final = (68, 65535)
MAX_VLAN: Final = 4094
NAME_LENGTH: Final = 15
"""Bytes of a link's name."""


@dataclass(frozen=True, slots=True)
class BondWish:
    """A bond that is wanted."""

    name: str
    mode: int
    options: ParsedOptions
    slaves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VlanWish:
    """A VLAN that is wanted."""

    name: str
    """`<parent>.<id>`"""
    parent: str
    id: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What one call wants to be there. Neither: nothing to do."""

    bond: BondWish | None
    vlan: VlanWish | None
    mtu: int
    """Bytes, of bond and VLAN; 0: as those of the NICs below."""
    ignored: tuple[str, ...] = ()
    """What the configuration says to no effect, for the log."""

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the links that ifacer makes for it."""
        return tuple(wish.name for wish in (self.bond, self.vlan) if wish is not None)


def parse_config(netconf: Mapping[str, Any]) -> Wish:
    """Check `netconf`. Raises InvalidConfigError naming the member. Unknown members are ignored."""
    interfaces = _interfaces(netconf)
    vlan_id = _integer(netconf, "vlanID", 0, MAX_VLAN, "invalid vlan tag: vlan tag must be in range [0,4094]")
    mtu = _integer(netconf, "mtu", *MTU_RANGE, "mtu is invalid")
    wanted = netconf.get("bond")
    if wanted is not None and not isinstance(wanted, dict):
        _refuse("bond", wanted, 'an object {"name": string, "mode": integer, "options": string}')
    if len(interfaces) == 1:
        vlan = _vlan(interfaces[0], vlan_id) if vlan_id else None
        return Wish(None, vlan, mtu, ("bond: there is one interface only",) if wanted is not None else ())
    if wanted is None:
        return Wish(None, None, mtu, (f"vlanID: {vlan_id} of several interfaces, without bond",) if vlan_id else ())
    bond = _bond(wanted, interfaces)
    ignored = tuple(f"bond.options: {text}" for text in bond.options.ignored)
    return Wish(bond, _vlan(bond.name, vlan_id) if vlan_id else None, mtu, ignored)


def _interfaces(netconf: Mapping[str, Any]) -> tuple[str, ...]:
    listed = netconf.get("interfaces")
    if listed is None or listed == []:
        raise InvalidConfigError(
            "invalid config: interfaces have at least one interface", "interfaces: a list of names of the node's NICs"
        )
    if not isinstance(listed, list):
        _refuse("interfaces", listed, "a list of names of the node's NICs")
    for index, name in enumerate(listed):
        _name(f"interfaces[{index}]", name)
        if name in listed[:index]:
            _refuse(f"interfaces[{index}]", name, "each NIC once")
    return tuple(listed)


def _bond(wanted: Mapping[str, Any], interfaces: tuple[str, ...]) -> BondWish:
    name = wanted.get("name") or DEFAULT_BOND
    _name("bond.name", name)
    if name in interfaces:
        _refuse("bond.name", name, "another name than those of its interfaces")
    try:
        mode = parse_mode(wanted.get("mode") or 0)
    except OptionError as error:
        raise InvalidConfigError("bond.mode is invalid", f"bond.mode: {error}") from None
    text = wanted.get("options") or ""
    if not isinstance(text, str):
        _refuse("bond.options", text, "a string k1=v1;k2=v2")
    try:
        options = parse_options(text, mode, interfaces)
    except OptionError as error:
        raise InvalidConfigError("bond.options is invalid", f"bond.options: {error}") from None
    return BondWish(name, mode, options, interfaces)


def _vlan(parent: str, vlan_id: int) -> VlanWish:
    name = f"{parent}.{vlan_id}"
    if len(name.encode()) > NAME_LENGTH:
        _refuse("vlanID", vlan_id, f"a VLAN whose name, here {name}, has {NAME_LENGTH} bytes at most")
    return VlanWish(name, parent, vlan_id)


def _name(path: str, value: object) -> None:
    try:
        check_ifname(value if isinstance(value, str) else "")
    except InvalidEnvironmentError:
        _refuse(path, value, "the name of a network interface: 1 to 15 bytes, no '/', ':' or white space")


def _integer(netconf: Mapping[str, Any], key: str, low: int, high: int, msg: str) -> int:
    value = netconf.get(key)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidConfigError(msg, f"{key}: {str(value)[:80]!r}, allowed: 0, or an integer from {low} to {high}")
    return value


def _refuse(path: str, value: object, allowed: str) -> NoReturn:
    raise InvalidConfigError(f"{path} is invalid", f"{path}: {str(value)[:80]!r}, allowed: {allowed}")
