"""DEL and GC: take attachments away, by what is on the node and in the pod and by nothing remembered.

With the pair of an underlay go its routes and neighbours on both sides; the shared rule goes with the last route below
it. A further NIC's routes on the node are told by their metric, also on links that are not ours. In the pod the rest is
told by its origin number and the name of the nf_tables table.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable

from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, Attachment, alias_parts
from plugins.coordinator.facts import read_nics, read_routes, read_rules
from plugins.coordinator.host import Host, find_link, is_of, remove_link, remove_routes, routes_to_pods, tolerate
from plugins.coordinator.leaving import plan_leaving
from plugins.coordinator.plan import POD_VETH
from plugins.coordinator.steps import MARKS
from plugins.net import rtlink, rtroute, rtwhole
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, BatchError, Netlink
from plugins.net.netns import in_netns


def detach_first(host: Host, attachment: Attachment, netns_fd: int | None, default_nic: str, timeout: float) -> None:
    """Remove the pair of `attachment`, and what is left in the pod if its namespace still is.

    Deleting a link waits for an RCU grace period, tens of milliseconds. Raises BatchError, OSError.
    """
    del default_nic  # it is the NIC itself
    with host.socket() as node:
        link = find_link(node, attachment.host_link)
        if link is not None and is_of(link, attachment):
            remove_link(node, link)
        host.release_rules(node)
    if netns_fd is not None:
        in_netns(netns_fd, lambda: clear_pod(timeout))


def detach_further(host: Host, attachment: Attachment, netns_fd: int | None, default_nic: str, timeout: float) -> None:
    """Remove the ways to a NIC that is not the first of an underlay, and its table if the pod's namespace still is.

    Raises BatchError, OSError.
    """
    with host.socket() as node:
        remove_routes(node, [route for route in routes_to_pods(node) if route.priority == attachment.tag])
        host.release_rules(node)
    if netns_fd is not None:
        in_netns(netns_fd, lambda: clear_nic(attachment.ifname, default_nic, timeout))


def clear_pod(timeout: float) -> None:
    """Remove our routes and rules from the namespace of the calling thread. Raises BatchError, OSError."""
    with Netlink(NETLINK_ROUTE, timeout) as pod:
        messages = [rtwhole.whole_delete(route) for route in read_routes(pod) if route.protocol == PROTOCOL]
        messages += [rtroute.rule_delete(r) for r in read_rules(pod) if r.protocol == PROTOCOL and r.plain]
        tolerate(pod.exchange(messages), errno.ENOENT, errno.ESRCH)
    with Netlink(NETLINK_NETFILTER, timeout) as filters:
        MARKS.remove(filters)


def clear_nic(ifname: str, default_nic: str, timeout: float) -> None:
    """Remove the table and rules of a NIC from the namespace of the calling thread, and give the main table a default
    route again if that was the NIC's. Raises BatchError, OSError."""
    with Netlink(NETLINK_ROUTE, timeout) as pod:
        links, nics = read_nics(pod)
        first = links.get(default_nic)
        lead = first.ifindex if first is not None and POD_VETH not in links else 0
        there = rtroute.parse_neighbours(pod.dump(rtroute.neighbour_dump(lead))) if lead else []
        marked = [neighbour.address for neighbour in there if neighbour.protocol == PROTOCOL]
        leaving = plan_leaving((nics, read_routes(pod), read_rules(pod)), ifname, default_nic, lead, marked)
        messages = [rtwhole.whole_prepend(route) for route in leaving.returns]
        messages += [rtroute.rule_delete(rule) for rule in leaving.rules]
        messages += [rtwhole.whole_delete(route) for route in leaving.routes]
        messages += [rtroute.neighbour_delete(lead, address) for address in leaving.neighbours]
        tolerate(pod.exchange(messages), errno.EEXIST, errno.ENOENT, errno.ESRCH)


def collect(
    host: Host,
    network: str,
    valid: Iterable[tuple[str, str]],
    in_progress: Callable[[], frozenset[str]],
) -> list[str]:
    """Remove the pairs of `network` whose (container id, ifname) is not in `valid`; the names of their links.

    Routes to addresses that the pod at their end does not have any more go too, whatever the network: their NIC has
    gone without a DEL, and the link, which is another NIC's, has stayed.
    Of our links only those are touched that tell of this network, or of none since the agent died while it made them.
    `in_progress` gives the names of links that ADDs are making or have made since the caller began to collect; it is
    asked after the links were listed. Raises BatchError, OSError.
    """
    attachments = [Attachment(container_id, ifname, network) for container_id, ifname in valid]
    kept = {alias_parts(attachment.alias)[:2] for attachment in attachments}
    kept_names = {attachment.host_link for attachment in attachments}
    wanted_network = alias_parts(Attachment("-", "-", network).alias)[2]
    removed: list[str] = []
    with host.socket() as node:
        links = [rtlink.parse_link(body) for body in node.dump(rtlink.link_dump("veth"))]
        busy = in_progress()
        for link in links:
            if link.kind != "veth" or not link.name.startswith("veth") or link.name in busy:
                continue
            container_id, ifname, its_network = alias_parts(link.alias)
            if link.alias:
                dead = bool(container_id) and its_network == wanted_network and (container_id, ifname) not in kept
            else:
                dead = link.group == LINK_GROUP and link.name not in kept_names
            if dead:
                remove_link(node, link)
                removed.append(link.name)
        _remove_dead_ends(node, [link for link in links if link.name not in removed])
        host.release_rules(node)
    return removed


def _remove_dead_ends(node: Netlink, links: Iterable[rtlink.Link]) -> None:
    ways = routes_to_pods(node)
    dead: list[rtroute.Route] = []
    for link in links:
        over = [way for way in ways if way.ifindex == link.ifindex]
        if not over or link.peer_netns < 0:
            continue
        try:
            there = rtlink.parse_addresses(node.dump(rtlink.address_dump(link.peer_netns)))
        except BatchError:
            continue  # the pod's namespace is being taken down, and the link with it
        addresses = {found.address for found in there}
        dead += (way for way in over if way.destination.address not in addresses)
    remove_routes(node, dead)
