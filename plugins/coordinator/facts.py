"""What an attachment needs to know of the pod and the node, in as few questions as possible."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from api.ranges import Address
from plugins.coordinator.host import tolerate
from plugins.coordinator.plan import POD_VETH, PodNic, usable
from plugins.errors import AddressConflictError, InvalidEnvironmentError
from plugins.net import rtlink, rtroute
from plugins.net.netlink import Message, Netlink

_READ_TRIES = 5


@dataclass(frozen=True, slots=True)
class PodFacts:
    """The pod's side."""

    nic: PodNic
    is_up: bool
    veth: rtlink.Link | None
    """The link veth0, if there is one."""
    addresses: tuple[Address, ...]
    """Usable addresses on all links."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The node's side."""

    link: rtlink.Link | None
    """The link with the name that the node's end of the pair gets, if there is one."""
    preferred: tuple[Address, ...]
    """What the node would send from to the pod's addresses."""
    stale_routes: tuple[rtroute.Route, ...]
    """Routes of ours to the pod's addresses, left by an earlier owner."""
    ways: tuple[tuple[int, Address], ...]
    """(interface index, pod address): where the node would look for the pod now, and may remember a neighbour."""


def read_pod(pod: Netlink, ifname: str) -> PodFacts:
    """Ask in the pod's namespace. Raises InvalidEnvironmentError if there is no such NIC, AddressConflictError if
    IPv6's own duplicate detection has failed for an address of it, BatchError, OSError."""
    questions = (rtlink.link_get(ifname), rtlink.link_get(POD_VETH), rtlink.address_dump())
    for _ in range(_READ_TRIES):
        exchange = pod.exchange(questions)
        if not any(failure.code == errno.EINTR for failure in exchange.failures):
            break
    tolerate(exchange, errno.ENODEV)
    links: dict[int, rtlink.Link] = {}
    found: list[rtlink.LinkAddress] = []
    for index, _, body in exchange.replies:
        if index < 2:
            links[index] = rtlink.parse_link(body)
        else:
            address = rtlink.parse_address(body)
            if address is not None and usable(address.address):
                found.append(address)
    if 0 not in links:
        raise InvalidEnvironmentError("CNI_IFNAME does not exist", f"there is no link {ifname!r} in the pod")
    link = links[0]
    for address in found:
        if address.ifindex == link.ifindex and address.flags & rtlink.ADDRESS_DADFAILED:
            raise AddressConflictError(
                "an address of the pod is in use", f"{address.address} on {ifname}: duplicate address detection failed"
            )
    nic = PodNic(
        name=ifname,
        ifindex=link.ifindex,
        mac=link.mac,
        tx_queue_len=link.tx_queue_len,
        addresses=tuple(a.address for a in found if a.ifindex == link.ifindex),
        source6=next((a.address for a in reversed(found) if a.ifindex == link.ifindex and _is_given(a)), None),
    )
    return PodFacts(nic, bool(link.flags & rtlink.FLAG_UP), links.get(1), tuple(a.address for a in found))


def _is_given(address: rtlink.LinkAddress) -> bool:
    """Whether it is an IPv6 address that somebody put there, not autoconfigured, and that may be a source already."""
    state = address.flags & (rtlink.ADDRESS_PERMANENT | rtlink.ADDRESS_TENTATIVE | rtlink.ADDRESS_DEPRECATED)
    return address.address.version == 6 and state == rtlink.ADDRESS_PERMANENT


def read_node(node: Netlink, name: str, pod: Iterable[Address], table: int) -> NodeFacts:
    """Ask in the node's namespace. `table` is the one with the routes to pods.

    Raises AddressConflictError if the node itself has an address of the pod, BatchError, OSError.
    """
    addresses = list(pod)
    questions: list[Message] = [rtlink.link_get(name), *map(rtroute.route_get, addresses)]
    failures, replies = node.exchange(questions)
    for failure in failures:
        if failure.position == 0 and failure.code != errno.ENODEV:
            raise OSError(failure.code, str(failure))
    # A failed look-up of a route only says that the node knows none, and so prefers no address.
    link: rtlink.Link | None = None
    preferred: list[Address] = []
    stale: list[rtroute.Route] = []
    ways: list[tuple[int, Address]] = []
    for index, _, body in replies:
        if index == 0:
            link = rtlink.parse_link(body)
            continue
        route, address = rtroute.parse_route(body), addresses[index - 1]
        if route.type == rtroute.ROUTE_LOCAL:
            raise AddressConflictError("an address of the pod is in use", f"{address} is an address of this node")
        ways.append((route.ifindex, address))
        if route.table == table:
            stale.append(route)
        elif route.source is not None:
            preferred.append(route.source)
    return NodeFacts(link, tuple(preferred), tuple(stale), tuple(ways))
