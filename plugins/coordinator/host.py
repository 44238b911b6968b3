"""The node's side: kept-open sockets, the node's addresses, and the rule that all attachments share."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from socket import AF_INET, AF_INET6

from api.ranges import Address
from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, Attachment, alias_parts
from plugins.coordinator.facts import NodeFacts
from plugins.coordinator.plan import counts_as_host_link, host_rule, usable
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_ROUTE, BatchError, Exchange, Message, Netlink
from plugins.net.netns import in_netns


class Host:
    """The network namespace of the thread that makes it: the node's. Its methods block; any thread may call them."""

    def __init__(self, timeout: float) -> None:
        """`timeout` in seconds bounds every wait for the kernel. Raises OSError."""
        self._timeout = timeout
        self.netns_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._idle: list[Netlink] = []
        self._lock = threading.Lock()
        self._closed = False
        self.addresses = HostAddresses(timeout)
        self._rule_lock = threading.Lock()

    def take(self) -> Netlink:
        """An idle socket, or a new one. Raises OSError."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return in_netns(self.netns_fd, lambda: Netlink(NETLINK_ROUTE, self._timeout))

    def give_back(self, netlink: Netlink) -> None:
        """Return a socket on which every answer was read."""
        with self._lock:
            if not self._closed:
                self._idle.append(netlink)
                return
        netlink.close()

    @contextmanager
    def socket(self) -> Iterator[Netlink]:
        """A socket for a while; one that failed is closed and not used again. Raises OSError."""
        netlink = self.take()
        try:
            yield netlink
        except BatchError:
            self.give_back(netlink)
            raise
        except BaseException:
            netlink.close()
            raise
        else:
            self.give_back(netlink)

    def close(self) -> None:
        """Close all idle sockets, and those in use when they come back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
        for netlink in idle:
            netlink.close()
        os.close(self.netns_fd)
        self.addresses.close()

    def wire(self, netlink: Netlink, messages: Sequence[Message]) -> Exchange:
        """Send a batch that adds the shared rule and routes below it; never while `release_rules` decides."""
        with self._rule_lock:
            return netlink.exchange(messages)

    def release_rules(self, netlink: Netlink) -> None:
        """Remove our rules for tables that are empty. Raises BatchError, OSError.

        Whichever table they name: `hostRuleTable` may have been another at ADD.
        """
        for family in (AF_INET, AF_INET6):
            with self._rule_lock:
                rules = map(rtroute.parse_rule, netlink.dump(rtroute.rule_dump(family)))
                ours = [rule for rule in rules if rule == host_rule(family, rule.table)]
                idle = [rtroute.rule_delete(rule) for rule in ours if not table_routes(netlink, family, rule.table)]
                tolerate(netlink.exchange(idle), errno.ENOENT)


def families_of_links() -> set[int]:
    """The IP versions that links made now have, in the namespace of the calling thread: not 6 where it is off."""
    try:
        with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", encoding="ascii") as file:
            return {4, 6} if file.read().strip() == "0" else {4}
    except FileNotFoundError:
        return {4}


def table_routes(netlink: Netlink, family: int, table: int) -> list[rtroute.Route]:
    """The routes in a table, none if it was never used. Raises BatchError, OSError."""
    try:
        return [rtroute.parse_route(body) for body in netlink.dump(rtroute.route_dump(family, table))]
    except BatchError as error:
        if error.errno == errno.ENOENT:
            return []
        raise


def tolerate(exchange: Exchange, *codes: int) -> None:
    """Raise BatchError for the failures with other errno than `codes`."""
    failures = [failure for failure in exchange.failures if failure.code not in codes]
    if failures:
        raise BatchError(failures)


def find_link(netlink: Netlink, name: str) -> rtlink.Link | None:
    """The link of that name. Raises BatchError, OSError."""
    exchange = netlink.exchange((rtlink.link_get(name),))
    tolerate(exchange, errno.ENODEV)
    return rtlink.parse_link(exchange.replies[0].body) if exchange.replies else None


def is_of(link: rtlink.Link, attachment: Attachment) -> bool:
    """Whether `link` is the node's end of the pair of `attachment`: marked with its alias, or by its group if the agent
    died before the alias was set. A link of the same name that somebody else made is neither."""
    if link.kind != "veth" or link.name != attachment.host_link:
        return False
    if link.alias:
        container_id, ifname, _ = alias_parts(link.alias)
        wanted = alias_parts(attachment.alias)
        return (container_id, ifname) == wanted[:2]
    return link.group == LINK_GROUP


def forget(netlink: Netlink, facts: NodeFacts) -> None:
    """Remove routes that an earlier owner of the NIC's addresses has left, and the neighbours. Raises BatchError."""
    if not facts.stale_routes:
        return
    messages = [
        rtroute.route_delete(route._replace(source=None, scope=rtroute.SCOPE_ANY, protocol=0))
        for route in facts.stale_routes
    ]
    messages += [rtroute.neighbour_delete(index, address) for index, address in facts.ways]
    tolerate(netlink.exchange(messages), errno.ENOENT, errno.ESRCH, errno.ENODEV)


def routes_to_pods(netlink: Netlink) -> list[rtroute.Route]:
    """Our routes to pods in all tables that our rules name. Raises BatchError, OSError."""
    found: list[rtroute.Route] = []
    for family in (AF_INET, AF_INET6):
        rules = map(rtroute.parse_rule, netlink.dump(rtroute.rule_dump(family)))
        for table in {rule.table for rule in rules if rule == host_rule(family, rule.table)}:
            found += (route for route in table_routes(netlink, family, table) if route.protocol == PROTOCOL)
    return found


def remove_routes(netlink: Netlink, routes: Sequence[rtroute.Route]) -> None:
    """Delete routes to pods, and with each the neighbour at its end. Raises BatchError, OSError."""
    messages = [rtroute.route_delete(route) for route in routes]
    messages += [rtroute.neighbour_delete(route.ifindex, route.destination.address) for route in routes]
    tolerate(netlink.exchange(messages), errno.ENOENT, errno.ESRCH, errno.ENODEV)


def remove_link(netlink: Netlink, link: rtlink.Link) -> None:
    """Delete a link, and with it its peer, routes and neighbours; gone already is fine. Raises BatchError, OSError."""
    tolerate(netlink.exchange((rtlink.link_delete(link.ifindex, link.name),)), errno.ENODEV)


class HostAddresses:
    """The node's own addresses, read once and again when the kernel tells that one came or went.

    The kernel queues the notice on our socket before the change becomes visible to whoever made it, so looking into the
    queue before each use is enough: what was changed before an ADD began is seen by it. Link-local addresses come and
    go with each pod's veth and do not count. A link's name is looked up at each use: links may be renamed.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._monitor: Netlink | None = None
        self._known: list[tuple[int, Address]] | None = None
        self._lock = threading.Lock()

    def read(self, netlink: Netlink) -> list[Address]:
        """The usable addresses on links of the node's own, in the kernel's order.

        The calling thread must be in the node's namespace. Raises BatchError, OSError.
        """
        with self._lock:
            if self._monitor is None:
                groups = rtlink.GROUP_IPV4_ADDRESSES | rtlink.GROUP_IPV6_ADDRESSES
                self._monitor = Netlink(NETLINK_ROUTE, self._timeout, groups)
            if self._changed(self._monitor) or self._known is None:
                self._known = None
                self._known = [
                    (found.ifindex, found.address)
                    for found in rtlink.parse_addresses(netlink.dump(rtlink.address_dump()))
                    if usable(found.address) and not found.flags & rtlink.ADDRESS_DADFAILED
                ]
            known = self._known
        count = {index: counts_as_host_link(_link_name(index)) for index in {index for index, _ in known}}
        return [address for index, address in known if count[index]]

    def close(self) -> None:
        """Close the socket."""
        with self._lock:
            if self._monitor is not None:
                self._monitor.close()

    @staticmethod
    def _changed(monitor: Netlink) -> bool:
        changed = False
        try:
            for _, body in monitor.pending():
                found = rtlink.parse_address(body)
                changed = changed or (found is not None and usable(found.address))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            changed = True
        return changed


def _link_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return "lo"  # gone since: no link of the node's
