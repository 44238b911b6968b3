"""What an attachment needs to know of the pod and the node, in as few questions as possible."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from socket import AF_INET, AF_INET6

from api.ranges import Address
from plugins.coordinator.plan import POD_VETH, PodNic, usable
from plugins.errors import AddressConflictError, InvalidEnvironmentError
from plugins.net import rtlink, rtroute, rtwhole
from plugins.net.netlink import Message, Netlink

FAMILIES = (AF_INET, AF_INET6)
_LOOPBACK = 0x8
"""IFF_LOOPBACK."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """The pod's side."""

    nic: PodNic
    """The one that is attached."""
    nics: tuple[PodNic, ...]
    """Every link but lo and veth0."""
    links: Mapping[str, rtlink.Link]
    addresses: tuple[Address, ...]
    """Usable addresses on all links."""

    @property
    def is_up(self) -> bool:
        """Whether the NIC is up."""
        return bool(self.links[self.nic.name].flags & rtlink.FLAG_UP)

    @property
    def veth(self) -> rtlink.Link | None:
        """The link veth0, if there is one."""
        return self.links.get(POD_VETH)


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The node's side."""

    link: rtlink.Link | None
    """The link that was asked for, if there is one."""
    preferred: tuple[Address, ...]
    """What the node would send from to the pod's addresses."""
    stale_routes: tuple[rtroute.Route, ...]
    """Routes of ours to the NIC's addresses, left by an earlier owner or an earlier ADD."""
    ways: tuple[tuple[int, Address], ...]
    """(interface index, address of the NIC): where the node would look for it, and may remember a neighbour."""


def read_pod(pod: Netlink, ifname: str) -> PodFacts:
    """Ask in the pod's namespace. Raises InvalidEnvironmentError if there is no such NIC, AddressConflictError if
    IPv6's own duplicate detection has failed for an address of it, BatchError, OSError."""
    links, found = _read_links(pod)
    if ifname not in links:
        raise InvalidEnvironmentError("CNI_IFNAME does not exist", f"there is no link {ifname!r} in the pod")
    for address in found:
        if address.ifindex == links[ifname].ifindex and address.flags & rtlink.ADDRESS_DADFAILED:
            raise AddressConflictError(
                "an address of the pod is in use", f"{address.address} on {ifname}: duplicate address detection failed"
            )
    nics = nics_of(links, found)
    nic = next((nic for nic in nics if nic.name == ifname), None)
    if nic is None:
        raise InvalidEnvironmentError("CNI_IFNAME is not a NIC", f"{ifname!r} is the coordinator's own or loopback")
    return PodFacts(nic, nics, links, tuple(address.address for address in found))


def read_nics(pod: Netlink) -> tuple[Mapping[str, rtlink.Link], tuple[PodNic, ...]]:
    """All links by name, and as NICs all but lo and veth0. Raises BatchError, OSError."""
    links, found = _read_links(pod)
    return links, nics_of(links, found)


def _read_links(pod: Netlink) -> tuple[dict[str, rtlink.Link], list[rtlink.LinkAddress]]:
    links = {link.name: link for link in map(rtlink.parse_link, pod.dump(rtlink.link_dump()))}
    found = rtlink.parse_addresses(pod.dump(rtlink.address_dump()))
    return links, [address for address in found if usable(address.address)]


def nics_of(links: Mapping[str, rtlink.Link], found: list[rtlink.LinkAddress]) -> tuple[PodNic, ...]:
    """All `links` but lo and veth0, as NICs; `found` holds usable addresses."""
    return tuple(
        _nic(link, [address for address in found if address.ifindex == link.ifindex])
        for link in sorted(links.values())
        if not link.flags & _LOOPBACK and link.name != POD_VETH
    )


def _nic(link: rtlink.Link, addresses: list[rtlink.LinkAddress]) -> PodNic:
    return PodNic(
        name=link.name,
        ifindex=link.ifindex,
        mac=link.mac,
        tx_queue_len=link.tx_queue_len,
        addresses=tuple(a.address for a in addresses),
        source6=next((a.address for a in reversed(addresses) if _is_given(a)), None),
        kind=link.kind,
    )


def _is_given(address: rtlink.LinkAddress) -> bool:
    """Whether it is an IPv6 address that somebody put there, not autoconfigured, and that may be a source already."""
    state = address.flags & (rtlink.ADDRESS_PERMANENT | rtlink.ADDRESS_TENTATIVE | rtlink.ADDRESS_DEPRECATED)
    return address.address.version == 6 and state == rtlink.ADDRESS_PERMANENT


def read_routes(pod: Netlink) -> tuple[rtwhole.WholeRoute, ...]:
    """The routes of all tables but `local`. Raises BatchError, OSError."""
    found = [rtwhole.parse_whole(body) for family in FAMILIES for body in pod.dump(rtroute.route_dump(family))]
    return tuple(route for route in found if route is not None)


def read_rules(netlink: Netlink) -> tuple[rtroute.Rule, ...]:
    """The rules of both families. Raises BatchError, OSError."""
    return tuple(rtroute.parse_rule(body) for family in FAMILIES for body in netlink.dump(rtroute.rule_dump(family)))


def read_node(node: Netlink, link: Message, pod: PodFacts, table: int) -> NodeFacts:
    """Ask in the node's namespace where it would look for the pod's addresses, and for `link`.

    `table` is the one with the routes to pods. Raises AddressConflictError if the node itself has one of the addresses,
    BatchError, OSError.
    """
    addresses, own = pod.addresses, {*pod.nic.addresses}
    questions: list[Message] = [link, *map(rtroute.route_get, addresses)]
    failures, replies = node.exchange(questions)
    for failure in failures:
        if failure.position == 0 and failure.code != errno.ENODEV:
            raise OSError(failure.code, str(failure))
    # A failed look-up of a route only says that the node knows none, and so prefers no address.
    found: rtlink.Link | None = None
    preferred: list[Address] = []
    stale: list[rtroute.Route] = []
    ways: list[tuple[int, Address]] = []
    for index, _, body in replies:
        if index == 0:
            found = rtlink.parse_link(body)
            continue
        route, address = rtroute.parse_route(body), addresses[index - 1]
        if route.type == rtroute.ROUTE_LOCAL:
            raise AddressConflictError("an address of the pod is in use", f"{address} is an address of this node")
        if address in own:
            ways.append((route.ifindex, address))
        if route.table == table:
            # Where it leads tells what the kernel would pick at a loss, not from where the node talks to that network.
            if address in own:
                stale.append(route)
        elif route.source is not None:
            preferred.append(route.source)
    return NodeFacts(found, tuple(preferred), tuple(stale), tuple(ways))
