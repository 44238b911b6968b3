"""What a NIC gets, and how what is there differs from it. Nothing here touches the kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2s
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import Any, Final

from api.claim import Claim
from api.ranges import Address
from plugins.cni import Result, ResultInterface, ResultRoute
from plugins.coordinator.attachment import LINK_GROUP
from plugins.errors import InvalidConfigError, ProviderError
from plugins.net import rtlink, rtroute
from plugins.net.rtmaster import MasterLink
from plugins.net.rtwhole import WholeRoute
from plugins.vlan.config import VlanConfig

KIND: Final = "vlan"
"""The kernel's word for these links."""
_BOOT: Final = 3
"""RTPROT_BOOT, which the reference plugin's routes have."""


@dataclass(frozen=True, slots=True)
class Wish:
    """The link that is wanted."""

    ifname: str
    temporary: str
    """Its name until it is finished."""
    config: VlanConfig
    vlan_id: int
    mac: bytes | None = None
    """None: the master's."""


def temporary_name(container_id: str, ifname: str) -> str:
    """The name under which the NIC is made.

    While the kernel makes a link for another namespace, no link of the maker's namespace may have its name, and a
    node usually has an eth0 of its own. It is the same every time, so that what an agent left when it died is found.
    """
    return f"spv{blake2s(f'{container_id}/{ifname}'.encode(), digest_size=6).hexdigest()}"


def assigned(claims: Iterable[Claim]) -> tuple[int, bytes]:
    """VLAN ID and MAC address that the provider gave for the addresses of one NIC.

    Raises ProviderError if it gave none, or different ones: a NIC has one of each.
    """
    told = {claim.spec.address: claim.spec.provided for claim in claims}
    given = {(p.vlan or 0, p.mac.lower()) for p in told.values() if p is not None and p.mac}
    if not given or any(p is None or not p.mac for p in told.values()):
        raise ProviderError(
            "no VLAN was given for the NIC",
            f"{', '.join(told)}: the provider is asked for pods whose network is a SpiderMultusConfig of this very name"
            " with cniType vlan and vlanMode auto; with vlanId the configuration itself says the VLAN",
        )
    if len(given) > 1:
        answers = ", ".join(f"{address}: VLAN {p.vlan or 0}, {p.mac}" for address, p in told.items() if p is not None)
        raise ProviderError("the provider gave different VLANs or MAC addresses for one NIC", answers)
    vlan_id, mac = given.pop()
    return vlan_id, bytes.fromhex(mac.replace(":", "").replace("-", ""))


def is_ours(link: rtlink.Link) -> bool:
    """Whether this plugin made the link."""
    return link.kind == KIND and link.group == LINK_GROUP


def result_of(given: Result, ifname: str, mac: str, sandbox: str, dns: Mapping[str, Any]) -> Result:
    """The plugin's result for what IPAM gave: one interface, which has all addresses."""
    return replace(
        given,
        ips=tuple(replace(ip, interface=0) for ip in given.ips),
        interfaces=(ResultInterface(ifname, mac, sandbox),),
        dns=dns,
    )


def addresses_of(result: Result) -> list[IPv4Interface | IPv6Interface]:
    """The addresses of a result with the length of their networks."""
    return [ip_interface(ip.address) for ip in result.ips]


def routes_of(result: Result, ifindex: int) -> list[rtroute.Route]:
    """The result's routes over the NIC, each once. One without gateway has its family's first, as the reference does.

    Raises InvalidConfigError if the result is no result.
    """
    gateways: dict[int, Address] = {}
    for ip in result.ips:
        if ip.gateway:
            gateway = ip_address(ip.gateway)
            gateways.setdefault(gateway.version, gateway)
    routes: dict[rtroute.Route, None] = {}
    for index, route in enumerate(result.routes):
        destination, told = _parse(route, index)
        way = told or gateways.get(destination.address.version)
        scope = rtroute.SCOPE_LINK if way is None and destination.address.version == 4 else rtroute.SCOPE_UNIVERSE
        made = rtroute.Route(destination, rtroute.TABLE_MAIN, ifindex, way, None, scope, _BOOT, rtroute.ROUTE_UNICAST)
        routes[made] = None
    return list(routes)


def _parse(route: ResultRoute, index: int) -> tuple[rtroute.Prefix, Address | None]:
    try:
        network = ip_network(route.dst, strict=False)
        prefix = rtroute.Prefix(network.network_address, network.prefixlen)
        return prefix, ip_address(route.gw) if route.gw else None
    except ValueError as error:
        raise InvalidConfigError("a route of the result is malformed", f"routes[{index}]: {error}") from None


@dataclass(frozen=True, slots=True)
class Scene:
    """What is there at a CHECK."""

    nic: MasterLink | None
    master: rtlink.Link | None
    routes: Sequence[WholeRoute]
    """In the pod, of all tables: the coordinator moves those of further NICs."""


def differences(wish: Wish, previous: Result, scene: Scene) -> list[str]:
    """How the NIC differs from what ADD made; IPAM compares the addresses."""
    name, config = wish.ifname, wish.config
    found: list[str] = []
    if scene.master is None:
        found.append(f"master {config.master}: Link not found")
    if scene.nic is None:
        return [*found, f"{name}: Link not found"]
    link = scene.nic.link
    if link.kind != KIND:
        return [*found, f"{name}: a {link.kind or 'physical'} link, not a VLAN"]
    if scene.nic.vlan_id != wish.vlan_id:
        found.append(f"{name}: VLAN {scene.nic.vlan_id}, not {wish.vlan_id}")
    if scene.master is not None and link.peer != scene.master.ifindex:
        found.append(f"{name}: a VLAN of link {link.peer}, not of {config.master}, which is {scene.master.ifindex}")
    if config.mtu and link.mtu != config.mtu:
        found.append(f"{name}: MTU {link.mtu}, not {config.mtu}")
    if not link.flags & rtlink.FLAG_UP:
        found.append(f"{name}: is down")
    mac = next((nic.mac for nic in previous.interfaces if nic.name == name and nic.sandbox), "")
    if mac and mac.lower() != rtlink.mac_text(link.mac):
        found.append(f"{name}: MAC address {rtlink.mac_text(link.mac)}, not {mac}")
    there = {(route.destination, hop.gateway) for route in scene.routes for hop in route.hops}
    wanted = (_parse(route, index) for index, route in enumerate(previous.routes))
    found += [
        f"route {prefix} via {gateway}: is missing"
        for prefix, gateway in wanted
        if gateway is not None and (prefix, gateway) not in there
    ]
    return found
