"""What the attachment of a pod consists of, decided from configuration and facts. Nothing here touches the kernel.

The end state (underlay, first NIC; H a node address, P a pod address, `veth…` the node's end of the pair):

    node  rule   from all lookup 500, pref 1000
          500    P dev veth… scope link            neighbour P on veth…
    pod   main   H dev veth0 scope link            neighbour H on veth0
                 CIDR via H1 dev veth0             services, overlay pods, hijacked networks
                 DST via GW dev eth0               policy routes
          100    default via H1 dev veth0          replies to what came in by veth0
          rule   fwmark 0x1 lookup 100, pref 1000
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6
from typing import Final, Literal

from api.ranges import Address
from plugins.coordinator.attachment import PROTOCOL
from plugins.coordinator.config import CoordinatorConfig
from plugins.errors import InvalidConfigError, WiringError
from plugins.net.rtroute import ROUTE_UNICAST, SCOPE_LINK, SCOPE_UNIVERSE, TABLE_MAIN, Prefix, Route, Rule, host_prefix

POD_VETH: Final = "veth0"
REPLY_TABLE: Final = 100
"""Routes for replies to what came in by veth0."""
RULE_PRIORITY: Final = 1000
REPLY_MARK: Final = 1
IPV6_SWITCH: Final = "ipv6/conf/all/disable_ipv6"
"""Turned to 0 for pods with IPv6, so that veth0 and lo have it. A failed ADD leaves it so: turning it back would take
the addresses off a NIC for which it had been turned on alone."""
MIN_MTU_IPV6: Final = 1280
"""RFC 8200 section 5; below it the kernel turns IPv6 off on the link."""

_EXCLUDED_HOST_LINKS = re.compile(
    r"docker|cbr|dummy|virbr|lxcbr|veth|lo$|cali|flannel|kube-ipvs|cni|vx-submariner|cilium"
)


def usable(address: Address) -> bool:
    """Whether an address is one that others can send to beyond the link."""
    return not (address.is_link_local or address.is_multicast or address.is_loopback or address.is_unspecified)


def counts_as_host_link(name: str) -> bool:
    """Whether addresses on a link of the node are the node's own, not a container network's."""
    return not _EXCLUDED_HOST_LINKS.match(name)


@dataclass(frozen=True, slots=True)
class PodNic:
    """What the pod's NIC is before the attachment."""

    name: str
    ifindex: int
    mac: bytes
    tx_queue_len: int
    addresses: tuple[Address, ...]
    """Usable ones, in the kernel's order, IPv4 first."""
    source6: Address | None = None
    """The IPv6 address to send from: of those that did not configure themselves the first that was given."""
    kind: str = ""
    """Of the link, in the kernel's word; empty for a physical one."""

    @property
    def first(self) -> Address:
        """The address that stands for the pod, and does not change when others come. Raises IndexError if none is."""
        first = self.addresses[0]
        return first if first.version == 4 else self.source6 or first


@dataclass(frozen=True, slots=True)
class NicPlan:
    """What every NIC gets."""

    host_rules: tuple[Rule, ...]
    host_addresses: tuple[Address, ...]
    """The NIC's addresses, each a route and a neighbour on the node; without those of a version that is off there."""
    host_table: int
    pod_mac: bytes | None
    tx_queue_len: int | None
    sysctls: tuple[tuple[str, str], ...]
    """(path below /proc/sys/net, value) in the pod."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything to set for a pod's first NIC, with interface indices left open: `veth` is the pair's end there."""

    nic: NicPlan
    veth_address: IPv4Address | None
    veth_mtu: int
    veth_rp_filter: int
    pod_neighbours: tuple[Address, ...]
    """The node's addresses."""
    veth_routes: tuple[Route, ...]
    """Over veth0. In the main table a route that is there already to the same destination stays, as in upstream."""
    nic_routes: tuple[Route, ...]
    """Over the pod's NIC."""
    pod_rules: tuple[Rule, ...]
    unreached: tuple[Prefix, ...]
    """Hijacked networks without a route, for the node has no address of their family."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a NIC is attached."""

    mode: Literal["underlay", "overlay", "disable"]
    is_first: bool = False
    """Whether it is the pod's first NIC, for which the pair is made."""


def host_routes(addresses: Iterable[Address], table: int, ifindex: int, tag: int) -> list[Route]:
    """The node's routes to a NIC of a pod over the link `ifindex`."""
    return [
        Route(host_prefix(address), table, ifindex, None, None, SCOPE_LINK if address.version == 4 else 0,
              PROTOCOL, ROUTE_UNICAST, tag)
        for address in addresses
    ]  # fmt: skip


def resolve_mode(config: CoordinatorConfig, ifname: str, has_veth: bool) -> Way:
    """How to attach the NIC `ifname` to a pod that has a link veth0 or not. Raises InvalidConfigError.

    The sentences are upstream's.
    """
    first = ifname == config.pod_default_cni_nic
    mode = config.mode
    if mode == "auto":
        mode = "underlay" if first or has_veth else "overlay"
    if mode == "disable":
        return Way("disable")
    detected = f"when creating interface {ifname} in {mode} mode, it detects that the"
    if mode == "underlay":
        if not first and not has_veth:
            raise InvalidConfigError(
                "mode does not fit the pod",
                f"mode: {detected} auxiliary interface {POD_VETH} was not created by previous interface. "
                "please enable coordinator plugin in previous interface",
            )
        return Way("underlay", first)
    if first:
        raise InvalidConfigError(
            "mode does not fit the pod",
            f"mode: {detected} current interface is first interface named {ifname}, this plugin should not work for "
            "it. please modify in the CNI configuration",
        )
    if has_veth:
        raise InvalidConfigError(
            "mode does not fit the pod",
            f"mode: {detected} auxiliary interface {POD_VETH} of underlay mode exists. It seems that the previous "
            "interface work in underlay mode",
        )
    return Way("overlay")


def order_host_addresses(preferred: Iterable[Address], others: Iterable[Address], families: set[int]) -> list[Address]:
    """The node's addresses as the pod sees them: those it is reached from first; each once, of `families`, usable."""
    return [a for a in dict.fromkeys((*preferred, *others)) if a.version in families and usable(a)]


def plan_nic(config: CoordinatorConfig, nic: PodNic, on_node: Collection[int]) -> NicPlan:
    """Decide what every NIC gets; `on_node` holds the IP versions that the node's links have.

    Raises WiringError if the NIC has no usable address, InvalidConfigError if it cannot have the MAC that is wanted.
    """
    if not nic.addresses:
        raise WiringError("no usable IP addresses", f"{nic.name} in the pod has none that others can send to")
    families: set[int] = {address.version for address in nic.addresses}
    mac = pod_mac(config.pod_mac_prefix, nic.first)
    if mac is not None and nic.kind == "ipvlan":
        raise InvalidConfigError(
            "podMACPrefix is invalid",
            f"podMACPrefix: {nic.name} is an ipvlan, which has its master's MAC address; allowed: an empty text",
        )
    return NicPlan(
        host_rules=tuple(
            host_rule(family_number(version), config.host_rule_table) for version in sorted(families & {*on_node})
        ),
        host_addresses=tuple(address for address in nic.addresses if address.version in on_node),
        host_table=config.host_rule_table,
        pod_mac=mac if mac != nic.mac else None,
        tx_queue_len=config.tx_queue_len if config.tx_queue_len not in (0, nic.tx_queue_len) else None,
        sysctls=_sysctls(config, nic.name, families),
    )


def make_plan(
    config: CoordinatorConfig, nic: PodNic, host: Iterable[Address], on_node: Collection[int] = (4, 6)
) -> Plan:
    """Decide about the first NIC in underlay mode. `host` holds the node's addresses, preferred first.

    Raises WiringError if the NIC has no usable address, InvalidConfigError if the configuration cannot serve them.
    """
    common = plan_nic(config, nic, on_node)
    families: set[int] = {address.version for address in nic.addresses}
    if 6 in families and config.veth_mtu < MIN_MTU_IPV6:
        raise InvalidConfigError(
            "vethMTU is invalid",
            f"vethMTU: {config.veth_mtu}, allowed: at least {MIN_MTU_IPV6} for a pod with an IPv6 address",
        )
    addresses = order_host_addresses(host, (), families)
    gateways = {version: next((a for a in addresses if a.version == version), None) for version in families}
    source = sources_of(nic)
    routes = [over_lead(host_prefix(address), TABLE_MAIN, None, source) for address in addresses]
    reached = {host_prefix(address) for address in addresses}
    hijacked = [p for p in config.hijack if p.address.version in families and p not in reached]
    routes += (
        over_lead(prefix, TABLE_MAIN, gateway, source)
        for prefix in hijacked
        if (gateway := gateways[prefix.address.version]) is not None
    )
    rules: list[Rule] = []
    for version, gateway in sorted(gateways.items()):
        if gateway is not None:
            rules.append(reply_rule(family_number(version)))
            routes.append(over_lead(everything(version), REPLY_TABLE, gateway, source))
    return Plan(
        nic=common,
        veth_address=config.veth_link_address if 4 in families else None,
        veth_mtu=config.veth_mtu,
        # What comes in by veth0 is answered by a mark that the filter does not see, so veth0 is never strict: the
        # greater of `all` and the link's own counts, and loose (2) wins over strict (1). Without an address on veth0
        # the kernel takes loose for strict; then only the node's own addresses get through.
        veth_rp_filter=0 if config.pod_rp_filter == 0 else 2,
        pod_neighbours=tuple(addresses),
        veth_routes=tuple(routes),
        nic_routes=policy_routes(config, nic, TABLE_MAIN),
        pod_rules=tuple(rules),
        unreached=tuple(p for p in hijacked if gateways[p.address.version] is None),
    )


def sources_of(nic: PodNic) -> dict[int, Address | None]:
    """By IP version, what to send from when the way is over the link to the node.

    On a segment with router advertisements the kernel would prefer an address that came later, and for which the node
    has no route to this pod.
    """
    return {4: next((a for a in nic.addresses if a.version == 4), None), 6: nic.source6}


def policy_routes(config: CoordinatorConfig, nic: PodNic, table: int) -> tuple[Route, ...]:
    """The configured routes over the pod's own NIC, of the families that it has."""
    families = {address.version for address in nic.addresses}
    return tuple(
        Route(route.destination, table, nic.ifindex, route.gateway, None, SCOPE_UNIVERSE, PROTOCOL, ROUTE_UNICAST)
        for route in config.policy_routes
        if route.gateway.version in families
    )


def pod_mac(prefix: bytes, address: Address) -> bytes | None:
    """The MAC that `prefix` asks for: the prefix and the last four bytes of the pod's first address; None: keep it."""
    return prefix + address.packed[-4:] if prefix else None


def host_rule(family: int, table: int) -> Rule:
    """The node's rule that leads to the routes to its pods."""
    return Rule(family, RULE_PRIORITY, table, 0, 0, PROTOCOL, plain=True)


def reply_rule(family: int) -> Rule:
    """The pod's rule for replies."""
    return Rule(family, RULE_PRIORITY, REPLY_TABLE, REPLY_MARK, 0xFFFFFFFF, PROTOCOL, plain=True)


def over_lead(destination: Prefix, table: int, gateway: Address | None, source: Mapping[int, Address | None]) -> Route:
    """A route over the link that leads to the node, whose index is left open."""
    version = destination.address.version
    scope = SCOPE_LINK if version == 4 and gateway is None else SCOPE_UNIVERSE
    return Route(destination, table, 0, gateway, source[version], scope, PROTOCOL, ROUTE_UNICAST)


def family_number(version: int) -> int:
    """AF_INET or AF_INET6."""
    return AF_INET if version == 4 else AF_INET6


def everything(version: int) -> Prefix:
    """The destination of a default route."""
    return Prefix(IPv4Address(0) if version == 4 else IPv6Address(0), 0)


def _sysctls(config: CoordinatorConfig, nic: str, families: set[int]) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    if 6 in families:
        found.append((IPV6_SWITCH, "0"))
    if config.pod_rp_filter is not None:
        # The greater of `all` and the NIC's own counts, and the NIC has inherited the node's: both are written.
        found += ((f"ipv4/conf/{name}/rp_filter", str(config.pod_rp_filter)) for name in ("all", nic))
    return tuple(found)
