"""The acts of repair: see the node, see one pod, restore what `mending` says is missing.

Everything here blocks for milliseconds and is run by the agent's repair loop in threads of their own.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from api.ranges import Address
from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, Attachment, alias_parts
from plugins.coordinator.facts import FAMILIES, nics_of, read_nics, read_routes, read_rules
from plugins.coordinator.host import Host, families_of_links, table_routes
from plugins.coordinator.mending import NodeSeen, PodSeen, Repair, Terms, attached, in_pod, is_joined, on_node, rules_of
from plugins.coordinator.news import PAIRS, Known
from plugins.coordinator.plan import POD_VETH, PodNic, host_rule, usable
from plugins.coordinator.tables import OVERLAY_TABLE, table_of
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_ROUTE, BatchError, Exchange, Netlink
from plugins.net.netns import enter
from plugins.net.rtwhole import WholeRoute

_NO_MATTER = (errno.EEXIST, errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""Somebody was faster, or the link has gone meanwhile."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A pod to look at."""

    container_id: str
    pair: int = 0
    """Index of the node's end of its pair; 0: it has none of ours, as far as is known."""
    gone: frozenset[str] = frozenset()
    """Its NICs that were deleted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of looking at a pod."""

    known: Known | None = None
    """None: nothing of it is the coordinator's, as far as can be told."""
    done: tuple[str, ...] = ()
    """What was found and is mended."""
    kinds: tuple[str, ...] = ()
    """Of what is mended, one by one."""
    failures: tuple[str, ...] = ()
    is_cut_off: bool = False
    """It was attached, and its link to the node is gone."""


def see_node(host: Host, tables: Collection[int]) -> tuple[NodeSeen, dict[str, int]]:
    """The node's side, and the index of the node's end of each pair by the container id in its alias.

    `tables` are looked into beside those that our rules name. The calling thread must be in the node's namespace.
    Raises BatchError, OSError.
    """
    with host.socket() as node:
        own = tuple(host.addresses.read(node))
        links = [rtlink.parse_link(body) for body in node.dump(rtlink.link_dump("veth"))]
        present = rtlink.parse_addresses(node.dump(rtlink.address_dump()))
        view = replace(
            _ways(node, tables),
            families=frozenset(families_of_links()),
            own=own,
            present=frozenset(found.address for found in present if not found.flags & rtlink.ADDRESS_DADFAILED),
            pairs=frozenset(link.ifindex for link in links if link.group == LINK_GROUP),
        )
    pairs = {alias_parts(link.alias)[0]: link.ifindex for link in links if link.group == LINK_GROUP}
    pairs.pop("", None)
    return view, pairs


def _ways(node: Netlink, tables: Collection[int]) -> NodeSeen:
    rules = read_rules(node)
    named = {rule.table for rule in rules if rule == host_rule(rule.family, rule.table)}
    ways: dict[Address, list[rtroute.Route]] = {}
    tags: dict[int, int] = {}
    for table in sorted({*tables} | named):
        for family in FAMILIES:
            for route in table_routes(node, family, table):
                if route.destination == rtroute.host_prefix(route.destination.address):
                    ways.setdefault(route.destination.address, []).append(route)
                    if route.protocol == PROTOCOL:
                        tags[route.priority] = table
    return NodeSeen(rules, ways, tags, frozenset(), (), frozenset(), frozenset())


def mend_rules(host: Host, view: NodeSeen) -> Outcome:
    """Restore the rules for tables with routes of ours. Raises BatchError, OSError."""
    repairs = rules_of(view)
    if not repairs:
        return Outcome()
    with host.socket() as node:
        return _told(repairs, host.wire(node, [repair.message for repair in repairs]))


def mend_pod(host: Host, suspect: Suspect, netns_fd: int | None, view: NodeSeen, terms: Terms) -> Outcome:
    """Look at a pod, and restore what is missing. The thread, one of its own, enters the pod if there is a descriptor.

    Without one, only the node's side of a pair of ours can be looked at: the kernel tells links and addresses of the
    namespace at the other end. No ADD or DEL for the pod may run. Raises BatchError, OSError.
    """
    with ExitStack() as stack:
        node = stack.enter_context(host.socket())
        pod_socket: Netlink | None = None
        if netns_fd is not None:
            enter(netns_fd)
            pod_socket = stack.enter_context(Netlink(NETLINK_ROUTE, terms.timeout))
        inside = _see_inside(pod_socket) if pod_socket is not None else _see_across(node, suspect.pair)
        pod = _joined(node, suspect, inside, terms, is_open=pod_socket is not None)
        if pod is None:
            return Outcome(is_cut_off=is_joined(inside.rules) and not suspect.gone)
        if pod_socket is not None:
            there = pod_socket.dump(rtroute.neighbour_dump(pod.lead.ifindex))
            pod = replace(pod, neighbours=tuple(rtroute.parse_neighbours(there)))
        done = _mend_on_node(host, node, pod, view, terms)
        repairs = in_pod(pod, view)
        if pod_socket is not None and repairs:
            done = _both(done, _told(repairs, pod_socket.exchange([repair.message for repair in repairs])))
        return replace(done, known=_known(pod, view, terms))


@dataclass(frozen=True, slots=True)
class _Inside:
    """What is seen of a pod before it is known by which link it is joined."""

    links: Mapping[str, rtlink.Link]
    nics: tuple[PodNic, ...]
    rules: tuple[rtroute.Rule, ...] = ()
    routes: tuple[WholeRoute, ...] = ()


def _see_inside(pod: Netlink) -> _Inside:
    links, nics = read_nics(pod)
    return _Inside(links, nics, read_rules(pod), read_routes(pod))


def _see_across(node: Netlink, pair: int) -> _Inside:
    """The links and addresses at the other end of a pair, asked from the node."""
    end = _link(node, pair)
    if end is None or end[0].peer_netns < 0:
        return _Inside({}, ())
    try:
        links = map(rtlink.parse_link, node.dump(rtlink.link_dump(netns=end[0].peer_netns)))
        found = rtlink.parse_addresses(node.dump(rtlink.address_dump(end[0].peer_netns)))
    except BatchError:
        return _Inside({}, ())  # the namespace is being taken down
    by_name = {link.name: link for link in links}
    return _Inside(by_name, nics_of(by_name, [address for address in found if usable(address.address)]))


def _link(node: Netlink, index: int) -> tuple[rtlink.Link, int] | None:
    """A link of the node and its rp_filter."""
    replies = node.exchange((rtlink.link_get_index(index),)).replies if index > 0 else []
    return (rtlink.parse_link(replies[0].body), rtlink.parse_rp_filter(replies[0].body)) if replies else None


def _joined(node: Netlink, suspect: Suspect, inside: _Inside, terms: Terms, *, is_open: bool) -> PodSeen | None:
    """The pod with its link to the node; None if it has none of ours, and none of an overlay's by which NICs of it
    could have been attached."""
    lead = inside.links.get(POD_VETH)
    is_underlay = lead is not None
    if lead is None:
        name = next((n.name for n in inside.nics if table_of(n, inside.rules) == OVERLAY_TABLE), terms.default_nic)
        lead = inside.links.get(name)
    if lead is None or lead.kind not in PAIRS:
        return None
    found = _link(node, lead.peer)
    if found is None or found[0].kind not in PAIRS or found[0].peer != lead.ifindex:
        return None
    end, rp_filter = found
    if is_underlay and not Attachment(suspect.container_id, "", "").owns_alias(end.alias):
        return None
    pair = alias_parts(end.alias)[1] if is_underlay else ""
    return PodSeen(
        container_id=suspect.container_id,
        pair=pair,
        lead=lead,
        end=end,
        rp_filter=rp_filter,
        nics=inside.nics,
        default_nic=terms.default_nic,
        gone=suspect.gone,
        is_open=is_open,
        routes=inside.routes,
        rules=inside.rules,
    )


def _mend_on_node(host: Host, node: Netlink, pod: PodSeen, view: NodeSeen, terms: Terms) -> Outcome:
    neighbours = rtroute.parse_neighbours(node.dump(rtroute.neighbour_dump(pod.end.ifindex)))

    def decide(view: NodeSeen) -> list[Repair]:
        return on_node(pod, view, neighbours, terms)

    if not decide(view):
        return Outcome()
    # Others may have been attached since the node was looked at: the routes count as they are now.
    now = _ways(node, {terms.default_table, *terms.tables.values()})
    repairs = decide(replace(view, rules=now.rules, ways=now.ways, tags=now.tags))
    return _told(repairs, host.wire(node, [repair.message for repair in repairs]))


def _known(pod: PodSeen, view: NodeSeen, terms: Terms) -> Known | None:
    nics = attached(pod, view)
    if not nics:
        return None
    addresses = frozenset(
        address
        for nic in nics
        for address in nic.addresses
        if terms.holders.get(address, pod.container_id) == pod.container_id
    )
    tags = frozenset(map(pod.tag, nics))
    return Known(pod.container_id, pod.end.ifindex, pod.end.mac, pod.lead.mac, bool(pod.pair), addresses, tags)


def _told(repairs: Sequence[Repair], exchange: Exchange) -> Outcome:
    failed = {failure.position for failure in exchange.failures}
    done = [repair for position, repair in enumerate(repairs) if position not in failed]
    return Outcome(
        done=tuple(repair.what for repair in done),
        kinds=tuple(repair.kind for repair in done),
        failures=tuple(str(failure) for failure in exchange.failures if failure.code not in _NO_MATTER),
    )


def _both(one: Outcome, other: Outcome) -> Outcome:
    return Outcome(done=one.done + other.done, kinds=one.kinds + other.kinds, failures=one.failures + other.failures)
