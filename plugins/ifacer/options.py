"""The options of a bond: what may be written, what it means to the kernel, and what may change while traffic flows.

The table follows drivers/net/bonding/bond_options.c: ranges, names of values, the modes that have an option, and
whether the kernel takes it on a bond that is up and has slaves. Pure.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

import msgspec

from plugins.net.netlink import attribute, nested

MODES: Final = ("balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb")
"""By number."""
DEFAULT_MIIMON: Final = 100
"""Milliseconds. The kernel's own default for three of the modes; for the others it is never to look, and a bond that
never looks does not fail over."""

Value = int | str | bytes | tuple[IPv4Address, ...]
"""A number, the name of a slave, a MAC address, or addresses."""

_INT_MAX = 2**31 - 1
_MAX_TARGETS = 16
_ROUND_ROBIN, _LACP, _ACTIVE = frozenset({0}), frozenset({4}), frozenset({1, 5, 6})
_TLB = frozenset({5, 6})
_ARP = frozenset({0, 1, 2, 3})
_ALL = frozenset(range(len(MODES)))
_DELAYS = ("updelay", "downdelay", "peer_notif_delay")
_MONITORING = ("miimon", *_DELAYS, "arp_interval", "arp_validate")
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}")


class OptionError(ValueError):
    """What is wrong and what is allowed, to be told after `bond.options: `."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option by its kernel name."""

    name: str
    attribute: int
    """IFLA_BOND_*."""
    kind: str = "u32"
    """`u8`, `u16`, `u32`; `link`, `mac` or `targets`."""
    low: int = 0
    high: int = _INT_MAX
    values: tuple[str, ...] = ()
    """Names of the numbers from 0 on."""
    modes: frozenset[int] = _ALL
    live: bool = True
    """May be changed on a bond that is in use. False: the kernel refuses, or links renegotiate or fall."""


_OPTIONS: Final = (
    Option("active_slave", 2, "link", modes=_ACTIVE, live=False),
    Option("miimon", 3),
    Option("updelay", 4),
    Option("downdelay", 5),
    Option("use_carrier", 6, "u8", high=1, values=("off", "on")),
    Option("arp_interval", 7, modes=_ARP),
    Option("arp_ip_target", 8, "targets"),
    Option(
        "arp_validate",
        9,
        high=6,
        values=("none", "active", "backup", "all", "filter", "filter_active", "filter_backup"),
        modes=_ARP,
    ),
    Option("arp_all_targets", 10, high=1, values=("any", "all")),
    Option("primary", 11, "link", modes=_ACTIVE),
    Option("primary_reselect", 12, "u8", high=2, values=("always", "better", "failure")),
    Option("fail_over_mac", 13, "u8", high=2, values=("none", "active", "follow"), live=False),
    Option(
        "xmit_hash_policy",
        14,
        "u8",
        high=5,
        values=("layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac"),
    ),
    Option("resend_igmp", 15, high=255),
    Option("num_grat_arp", 16, "u8", high=255),
    Option("all_slaves_active", 17, "u8", high=1, values=("dropped", "delivered")),
    Option("min_links", 18, live=False),
    Option("lp_interval", 19, low=1),
    Option("packets_per_slave", 20, high=65535, modes=_ROUND_ROBIN),
    Option("lacp_rate", 21, "u8", high=1, values=("slow", "fast"), modes=_LACP, live=False),
    Option("ad_select", 22, "u8", high=2, values=("stable", "bandwidth", "count"), live=False),
    Option("ad_actor_sys_prio", 24, "u16", low=1, high=65535, modes=_LACP, live=False),
    Option("ad_user_port_key", 25, "u16", high=1023, modes=_LACP, live=False),
    Option("ad_actor_system", 26, "mac", modes=_LACP, live=False),
    Option("tlb_dynamic_lb", 27, "u8", high=1, values=("off", "on"), modes=_TLB, live=False),
    Option("peer_notif_delay", 28, high=300_000),
)
OPTIONS: Final[Mapping[str, Option]] = {option.name: option for option in _OPTIONS}
"""By name."""
_ALIASES: Final = {"up_delay": "updelay", "num_unsol_na": "num_grat_arp"}
"""Upstream's spelling, and the kernel's second one."""

_PACKED = {"u8": struct.Struct("=B"), "u16": struct.Struct("=H"), "u32": struct.Struct("=I")}


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """An option string, understood."""

    given: Mapping[str, Value]
    """What it asks for, by kernel name."""
    ignored: tuple[str, ...]
    """What it says that means nothing, as upstream ignores it; for the log."""

    @property
    def at_creation(self) -> Mapping[str, Value]:
        """What a new bond gets."""
        monitored = "miimon" in self.given or self.given.get("arp_interval")
        return self.given if monitored else {"miimon": DEFAULT_MIIMON, **self.given}


def parse_mode(value: object) -> int:
    """A bond's mode by number or name. Raises OptionError."""
    if isinstance(value, str) and value in MODES:
        return MODES.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(MODES):
        return value
    names = ", ".join(f"{number} ({name})" for number, name in enumerate(MODES))
    raise OptionError(f"unknown bond mode: {str(value)[:40]!r}, available mode: [0,6]: {names}")


def parse_options(text: str, mode: int, slaves: Sequence[str]) -> ParsedOptions:
    """An option string `k1=v1;k2=v2`. Raises OptionError.

    Upstream ignores keys that it does not know, items without exactly one `=`, and zeros; here the first two are
    ignored and told, and a zero counts wherever the kernel has it.
    """
    given: dict[str, Value] = {}
    ignored: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(";"))):
        key, *values = (word.strip() for word in item.split("="))
        option = OPTIONS.get(_ALIASES.get(key, key))
        if len(values) != 1:
            ignored.append(f"{item[:80]!r} is not KEY=VALUE")
        elif option is None:
            ignored.append(f"{key[:40]!r} is not one of {', '.join(sorted(OPTIONS))}")
        elif option.low and values[0] == "0":
            ignored.append(f"{item!r}: from {option.low} to {option.high}")
        else:
            if option.name in given:
                ignored.append(f"{key!r} before its last occurrence")
            if mode not in option.modes:
                having = ", ".join(f"{number} ({MODES[number]})" for number in sorted(option.modes))
                raise OptionError(f"{key} is for the modes {having}; mode is {mode}")
            given[option.name] = _value(key, option, values[0], slaves)
    _check_monitoring(given)
    return ParsedOptions(_rounded(given, ignored), tuple(ignored))


def _value(key: str, option: Option, text: str, slaves: Sequence[str]) -> Value:
    if option.kind == "link":
        if text not in slaves:
            raise OptionError(f"{key}={text[:40]}, allowed: one of the interfaces {', '.join(slaves)}")
        return text
    if option.kind == "mac":
        if not _MAC.fullmatch(text) or int(text[:2], 16) & 1:
            raise OptionError(f"{key}={text[:40]}, allowed: a unicast MAC address, such as 02:00:00:00:00:01")
        return bytes.fromhex(text.replace(":", "").replace("-", ""))
    if option.kind == "targets":
        return _targets(key, text)
    if text in option.values:
        return option.values.index(text)
    allowed = f"an integer from {option.low} to {option.high}"
    if option.values:
        allowed = ", ".join(f"{number} ({name})" for number, name in enumerate(option.values))
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or not option.low <= int(text) <= option.high:
        raise OptionError(f"{key}={text[:40]}, allowed: {allowed}")
    return int(text)


def _targets(key: str, text: str) -> tuple[IPv4Address, ...]:
    listed = text.split(",")
    if text.startswith("["):
        try:
            listed = msgspec.json.decode(text, type=list[str])
        except msgspec.DecodeError:
            listed = [text]
    found: list[IPv4Address] = []
    for item in listed:
        try:
            address = IPv4Address(item.strip())
        except ValueError:
            address = IPv4Address(0)
        if not int(address) or int(address) == 2**32 - 1 or address in found:
            raise OptionError(f'{key}={text[:80]}, allowed: different IPv4 addresses, such as ["10.0.0.1","10.0.0.2"]')
        found.append(address)
    if len(found) > _MAX_TARGETS:
        raise OptionError(f"{key} has {len(found)} addresses, allowed: {_MAX_TARGETS} at most")
    return tuple(found)


def _check_monitoring(given: Mapping[str, Value]) -> None:
    """Raise OptionError for combinations that the kernel refuses, or that leave the bond blind."""
    by_arp = given.get("arp_interval")
    if by_arp and given.get("miimon"):
        raise OptionError("arp_interval and miimon exclude each other, allowed: one of them above 0")
    if by_arp and not given.get("arp_ip_target"):
        raise OptionError("arp_interval needs somebody to ask, allowed: with arp_ip_target")
    if given.get("arp_validate") and not by_arp:
        raise OptionError("arp_validate needs ARP monitoring, allowed: with arp_interval above 0")
    delayed = next((name for name in _DELAYS if given.get(name)), "")
    if delayed and (by_arp or given.get("miimon") == 0):
        raise OptionError(f"{delayed} counts in intervals of miimon, allowed: with miimon above 0")


def _rounded(given: dict[str, Value], ignored: list[str]) -> dict[str, Value]:
    """Delays as the kernel keeps them: whole multiples of miimon."""
    interval = given.get("miimon", DEFAULT_MIIMON)
    for name in _DELAYS:
        delay = given.get(name)
        if isinstance(delay, int) and isinstance(interval, int) and interval and delay % interval:
            given[name] = kept = delay - delay % interval
            ignored.append(f"{name}={delay} is no multiple of miimon={interval} and counts as {kept}")
    return given


def encode(values: Mapping[str, Value], index_of: Mapping[str, int]) -> bytes:
    """The attributes of `values`; `index_of` gives the interface index of slaves."""
    return b"".join(_encode(option, values[name], index_of) for name, option in OPTIONS.items() if name in values)


def _encode(option: Option, value: Value, index_of: Mapping[str, int]) -> bytes:
    if isinstance(value, tuple):
        payload = b"".join(attribute(slot, address.packed) for slot, address in enumerate(value))
    elif isinstance(value, bytes):
        payload = value
    elif isinstance(value, str):
        payload = _PACKED["u32"].pack(index_of[value])
    else:
        payload = _PACKED[option.kind].pack(value)
    return attribute(option.attribute, payload)


def restore(changed: Iterable[str], mode: int, data: Mapping[int, bytes]) -> bytes:
    """The attributes that bring the options `changed` of a bond back to what they were in `data`.

    Each way of monitoring turns the other one off, so if one changes, all that belongs to both is brought back.
    """
    names = set(changed)
    if names & {*_MONITORING}:
        names |= {name for name in _MONITORING if mode in OPTIONS[name].modes}
    if not any(data.get(OPTIONS["miimon"].attribute, b"")):
        names -= {*_DELAYS}  # which the kernel does not take then, not even as zero
    found = b""
    for name in (name for name in OPTIONS if name in names):
        option = OPTIONS[name]
        empty = b"" if option.kind == "targets" else bytes(4)
        found += attribute(option.attribute, data.get(option.attribute, empty))
    return found


def present(name: str, data: Mapping[int, bytes], name_of: Callable[[int], str]) -> Value:
    """An option's value of a bond that the kernel describes by `data`; empty if it has none."""
    option = OPTIONS[name]
    raw = data.get(option.attribute)
    if raw is None:
        return () if option.kind == "targets" else ""
    if option.kind == "targets":
        return tuple(IPv4Address(packed) for _, packed in nested(raw))
    if option.kind == "mac":
        return raw[:6]
    if option.kind == "link":
        return name_of(_PACKED["u32"].unpack_from(raw)[0])
    return int(_PACKED[option.kind].unpack_from(raw)[0])


def shown(name: str, value: Value) -> str:
    """A value for people."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bytes):
        return value.hex(":")
    if isinstance(value, str):
        return value or "none"
    names = OPTIONS[name].values
    return f"{value} ({names[value]})" if value < len(names) else str(value)


def differing(
    wanted: Mapping[str, Value], data: Mapping[int, bytes], name_of: Callable[[int], str]
) -> dict[str, tuple[Value, Value]]:
    """Options that a bond has otherwise than `wanted`: (what it has, what it should have).

    `active_slave` is an order for the moment, which every failover changes; it never differs.
    """
    found: dict[str, tuple[Value, Value]] = {}
    for name, value in wanted.items():
        has = present(name, data, name_of)
        same = set(has) == set(value) if isinstance(has, tuple) and isinstance(value, tuple) else has == value
        if not same and name != "active_slave":
            found[name] = (has, value)
    # The kernel keeps delays as multiples of miimon: with another interval they all become others.
    if "miimon" in found:
        found |= {name: (present(name, data, name_of), wanted[name]) for name in _DELAYS if name in wanted}
    return found
