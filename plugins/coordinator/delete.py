"""DEL and GC: take attachments away, by what is on the node and in the pod and by nothing remembered.

With the pair go its routes and neighbours on both sides; the shared rule goes with the last route below it. In the pod
the rest is told by its origin number and the name of the nf_tables table.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from socket import AF_INET, AF_INET6

from plugins.coordinator.add import MARKS
from plugins.coordinator.host import Host, alias_parts, find_link, is_of, remove_link, table_routes, tolerate
from plugins.coordinator.plan import LINK_GROUP, PROTOCOL, Attachment
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink
from plugins.net.netns import in_netns


def detach(host: Host, attachment: Attachment, netns_fd: int | None, timeout: float) -> None:
    """Remove the pair of `attachment`, and what is left in the pod if its namespace still is.

    Deleting a link waits for an RCU grace period, tens of milliseconds. Raises BatchError, OSError.
    """
    with host.socket() as node:
        link = find_link(node, attachment.host_link)
        if link is not None and is_of(link, attachment):
            remove_link(node, link)
        host.release_rules(node)
    if netns_fd is not None:
        in_netns(netns_fd, lambda: clear_pod(timeout))


def clear_pod(timeout: float) -> None:
    """Remove our routes and rules from the namespace of the calling thread. Raises BatchError, OSError."""
    with Netlink(NETLINK_ROUTE, timeout) as pod:
        messages = [
            rtroute.route_delete(route)
            for family in (AF_INET, AF_INET6)
            for route in table_routes(pod, family, rtroute.TABLE_MAIN)
            if route.protocol == PROTOCOL
        ]
        messages += [
            rtroute.rule_delete(rule)
            for family in (AF_INET, AF_INET6)
            for rule in map(rtroute.parse_rule, pod.dump(rtroute.rule_dump(family)))
            if rule.protocol == PROTOCOL and rule.plain
        ]
        tolerate(pod.exchange(messages), errno.ENOENT, errno.ESRCH)
    with Netlink(NETLINK_NETFILTER, timeout) as filters:
        MARKS.remove(filters)


def collect(
    host: Host,
    network: str,
    valid: Iterable[tuple[str, str]],
    in_progress: Callable[[], frozenset[str]],
) -> list[str]:
    """Remove the pairs of `network` whose (container id, ifname) is not in `valid`; the names of their links.

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
        host.release_rules(node)
    return removed
