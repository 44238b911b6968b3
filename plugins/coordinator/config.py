"""The coordinator's network configuration: netconf member, else the node's setting, else the default in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any, Final, NoReturn

from api.ranges import Address
from plugins.cni import check_ifname
from plugins.coordinator.settings import CoordinatorSettings
from plugins.errors import InvalidConfigError, InvalidEnvironmentError
from plugins.net.rtroute import Prefix

MODES: Final = ("auto", "underlay", "overlay", "disable", "disabled")
MTU_RANGE: Final = (68, 65535)
"""What the kernel lets a veth have (drivers/net/veth.c)."""
RESERVED_TABLES: Final = (253, 254, 255)
"""default, main, local: the node's own."""
LOG_LEVELS: Final = ("debug", "info", "warn", "error", "dpanic", "panic", "fatal")

_MAC_PREFIX = re.compile(r"([0-9a-fA-F]{2})[:-]([0-9a-fA-F]{2})")


@dataclass(frozen=True, slots=True)
class PolicyRoute:
    """A route over the pod's own NIC."""

    destination: Prefix
    gateway: Address


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """The configuration of one call, checked. Field meanings as in CoordinatorSettings."""

    mode: str
    """`auto`, `underlay`, `overlay` or `disable`."""
    hijack: tuple[Prefix, ...]
    """Everything that the pod reaches through its node: overlay pods, services, hijacked networks, in this order."""
    policy_routes: tuple[PolicyRoute, ...]
    pod_mac_prefix: bytes
    """Two bytes, or none."""
    pod_default_cni_nic: str
    tune_pod_routes: bool
    pod_default_route_nic: str
    veth_link_address: IPv4Address | None
    veth_mtu: int
    host_rule_table: int
    pod_rp_filter: int | None
    """0, 1, 2 or None: leave it."""
    tx_queue_len: int
    """0: leave it."""


def parse_config(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> CoordinatorConfig:
    """Check `netconf` and fill it up from `settings`. Raises InvalidConfigError naming the member.

    Unknown members are ignored, and so are those of upstream that its plugin no longer uses.
    """
    _log_options(netconf)
    return CoordinatorConfig(
        mode=parse_mode(netconf, settings),
        hijack=_networks(netconf, settings),
        policy_routes=_policy_routes(netconf, settings),
        pod_mac_prefix=_mac_prefix(_text(netconf, "podMACPrefix", settings.pod_mac_prefix)),
        pod_default_cni_nic=parse_default_nic(netconf, settings),
        tune_pod_routes=_boolean(netconf, "tunePodRoutes", settings.tune_pod_routes),
        pod_default_route_nic=_nic(netconf, "podDefaultRouteNic", settings.pod_default_route_nic, empty=True),
        veth_link_address=_link_address(_text(netconf, "vethLinkAddress", settings.veth_link_address)),
        veth_mtu=_integer(netconf, "vethMTU", settings.veth_mtu, *MTU_RANGE),
        host_rule_table=_host_table(netconf, settings),
        pod_rp_filter=_rp_filter(netconf, settings),
        tx_queue_len=_integer(netconf, "txQueueLen", settings.tx_queue_len, 0, 2**31 - 1),
    )


def parse_mode(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> str:
    """The member `mode`, both spellings of `disable` as one. Raises InvalidConfigError."""
    mode = _text(netconf, "mode", settings.mode)
    if mode not in MODES:
        _refuse("mode", mode, f"one of {', '.join(MODES)}")
    return "disable" if mode == "disabled" else mode


def parse_default_nic(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> str:
    """The member `podDefaultCniNic`. Raises InvalidConfigError."""
    return _nic(netconf, "podDefaultCniNic", settings.pod_default_cni_nic, empty=False)


def _host_table(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> int:
    table = _integer(netconf, "hostRuleTable", settings.host_rule_table, 1, 2**32 - 1)
    if table in RESERVED_TABLES:
        _refuse("hostRuleTable", table, "not 253, 254 or 255, which are the node's own tables")
    return table


def _refuse(path: str, value: object, allowed: str) -> NoReturn:
    raise InvalidConfigError(f"{path} is invalid", f"{path}: {str(value)[:80]!r}, allowed: {allowed}")


def _text(netconf: Mapping[str, Any], key: str, default: str) -> str:
    value = netconf.get(key)
    if value is None or value == "":
        return default
    if not isinstance(value, str):
        _refuse(key, value, "a string")
    return value


def _boolean(netconf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = netconf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(key, value, "true or false")
    return value


def _integer(netconf: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = netconf.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(key, value, f"an integer from {low} to {high}")
    return value


def _nic(netconf: Mapping[str, Any], key: str, default: str, *, empty: bool) -> str:
    name = _text(netconf, key, default)
    if name or not empty:
        try:
            check_ifname(name)
        except InvalidEnvironmentError:
            _refuse(key, name, "the name of a network interface: 1 to 15 bytes, no '/', ':' or white space")
    return name


def _strings(netconf: Mapping[str, Any], key: str, default: Iterable[str]) -> list[str]:
    value = netconf.get(key)
    if value is None or value == []:
        return list(default)
    if not isinstance(value, list):
        _refuse(key, value, "a list of strings")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            _refuse(f"{key}[{index}]", item, "a string")
    return value


def _networks(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> tuple[Prefix, ...]:
    found: dict[Prefix, None] = {}
    for key, default in (
        ("overlayPodCIDR", settings.overlay_pod_cidr),
        ("serviceCIDR", settings.service_cidr),
        ("hijackCIDR", settings.hijack_cidr),
    ):
        for index, text in enumerate(_strings(netconf, key, default)):
            found[_network(f"{key}[{index}]", text.strip())] = None
    return tuple(found)


def _network(path: str, text: str) -> Prefix:
    if "/" not in text:
        _refuse(path, text, "a network in CIDR notation, ADDRESS/LENGTH")
    return _destination(path, text)


def _destination(path: str, text: str) -> Prefix:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        _refuse(path, text, "an IPv4 or IPv6 network in CIDR notation, ADDRESS/LENGTH")
    return Prefix(network.network_address, network.prefixlen)


def _policy_routes(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> tuple[PolicyRoute, ...]:
    routes = netconf.get("policyRoutes")
    if routes is None or routes == []:
        routes = [_written_route(index, text) for index, text in enumerate(settings.policy_routes)]
    if not isinstance(routes, list):
        _refuse("policyRoutes", routes, 'a list of {"dst": CIDR, "gw": ADDRESS}')
    found: list[PolicyRoute] = []
    for index, route in enumerate(routes):
        path = f"policyRoutes[{index}]"
        if not isinstance(route, dict):
            _refuse(path, route, 'an object {"dst": CIDR, "gw": ADDRESS}')
        dst, gw = route.get("dst"), route.get("gw")
        if not isinstance(dst, str):
            _refuse(f"{path}.dst", dst, "an address or a network in CIDR notation")
        if not isinstance(gw, str):
            _refuse(f"{path}.gw", gw, "an IP address")
        destination = _destination(f"{path}.dst", dst.strip())
        gateway = _plain_address(f"{path}.gw", gw.strip())
        if gateway.version != destination.address.version:
            _refuse(f"{path}.gw", gw, f"an IPv{destination.address.version} address, as {path}.dst")
        found.append(PolicyRoute(destination, gateway))
    return tuple(found)


def _written_route(index: int, text: str) -> dict[str, str]:
    destination, via, gateway = text.partition(" via ")
    if not via:
        _refuse(f"setting policy_routes[{index}]", text, "DESTINATION via GATEWAY")
    return {"dst": destination, "gw": gateway}


def _plain_address(path: str, text: str) -> Address:
    try:
        address = ip_address(text)
    except ValueError:
        _refuse(path, text, "an IPv4 or IPv6 address")
    if getattr(address, "scope_id", None):
        _refuse(path, text, "an address without a zone")
    return address


def _mac_prefix(text: str) -> bytes:
    if not text:
        return b""
    match = _MAC_PREFIX.fullmatch(text)
    if not match:
        _refuse("podMACPrefix", text, "two bytes in hexadecimal, such as 0a:1b")
    prefix = bytes.fromhex(match[1] + match[2])
    if prefix[0] & 1:
        _refuse("podMACPrefix", text, "a unicast address: the first byte must be even")
    return prefix


def _link_address(text: str) -> IPv4Address | None:
    if not text:
        return None
    address = _plain_address("vethLinkAddress", text)
    if not isinstance(address, IPv4Address) or address.is_multicast or address.is_unspecified or address.is_loopback:
        _refuse("vethLinkAddress", text, "a unicast IPv4 address, such as 169.254.100.1")
    return address


def _rp_filter(netconf: Mapping[str, Any], settings: CoordinatorSettings) -> int | None:
    value = netconf.get("podRPFilter")
    if value is None:
        value = settings.pod_rp_filter
    if not isinstance(value, int) or isinstance(value, bool) or value > 2:
        _refuse("podRPFilter", value, "0, 1, 2, or a negative number to leave it alone")
    return value if value >= 0 else None


def _log_options(netconf: Mapping[str, Any]) -> None:
    options = netconf.get("logOptions")
    if options is None:
        return
    if not isinstance(options, dict):
        _refuse("logOptions", options, "an object")
    level = options.get("logLevel") or "info"
    if not isinstance(level, str) or level.lower() not in LOG_LEVELS:
        _refuse("logOptions.logLevel", level, f"one of {', '.join(LOG_LEVELS)}")
