"""What is missing of what attachments consist of, decided from what is there. Nothing here touches the kernel.

Nothing remembered says what should be there, but the pods and the node do: the node's end of a pair has its alias; a
rule `from P lookup … proto 83` in the pod says that the NIC with P was attached; a claim says whose P is; MAC addresses
and the node's own addresses are asked for. What only the configuration of the ADD could tell is not restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from api.ranges import Address
from plugins.coordinator.attachment import PROTOCOL, Attachment
from plugins.coordinator.plan import (
    RULE_PRIORITY,
    PodNic,
    family_number,
    host_routes,
    host_rule,
    order_host_addresses,
    over_lead,
    sources_of,
)
from plugins.coordinator.tables import OVERLAY_TABLE, SENDER_PRIORITY, table_of
from plugins.net import rtlink, rtroute
from plugins.net.netlink import Message, family_of
from plugins.net.rtroute import TABLE_MAIN, Neighbour, Route, Rule, host_prefix
from plugins.net.rtwhole import WholeRoute, whole_delete

Kind = Literal["link", "rp_filter", "rule", "route", "neighbour", "stale", "node_address"]
KINDS: Final[tuple[Kind, ...]] = ("link", "rp_filter", "rule", "route", "neighbour", "stale", "node_address")


@dataclass(frozen=True, slots=True)
class Repair:
    """One message, and what it is good for."""

    kind: Kind
    what: str
    """What was found, for people."""
    message: Message


@dataclass(frozen=True, slots=True)
class PodSeen:
    """A pod that is joined to its node, as it is."""

    container_id: str
    pair: str
    """The NIC for which the coordinator made the link to the node; empty: an overlay made it."""
    lead: rtlink.Link
    """The pod's end of that link."""
    end: rtlink.Link
    """The node's end."""
    rp_filter: int
    """Of the node's end."""
    nics: tuple[PodNic, ...]
    default_nic: str
    """Name of the first NIC where the pod does not tell."""
    gone: frozenset[str] = frozenset()
    """NICs that were deleted, though the pod has them still."""
    is_open: bool = True
    """Whether the pod's namespace could be entered; if not, the following are empty."""
    routes: tuple[WholeRoute, ...] = ()
    """Of all tables in the pod."""
    rules: tuple[Rule, ...] = ()
    """In the pod."""
    neighbours: tuple[Neighbour, ...] = ()
    """On the pod's end."""

    @property
    def first(self) -> PodNic | None:
        """The pod's first NIC."""
        if self.pair:
            return next((nic for nic in self.nics if nic.name == self.pair), None)
        told = next((nic for nic in self.nics if table_of(nic, self.rules) == OVERLAY_TABLE), None)
        return told or next((nic for nic in self.nics if nic.name == self.default_nic), None)

    def tag(self, nic: PodNic) -> int:
        """The metric of the node's routes to a NIC."""
        return Attachment(self.container_id, nic.name, "").tag


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """The node's side, as far as it concerns all pods."""

    rules: tuple[Rule, ...]
    ways: Mapping[Address, Sequence[Route]]
    """The routes to one address each in the tables with routes to pods, by address."""
    tags: Mapping[int, int]
    """Tag of each NIC that has a route of ours to its table."""
    families: frozenset[int]
    """The IP versions that links made now have."""
    own: tuple[Address, ...]
    """The node's addresses that pods are to know, in the kernel's order."""
    present: frozenset[Address]
    """All addresses on whichever link of the node."""
    pairs: frozenset[int]
    """Indices of the node's ends of our pairs."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What decides beside what is there."""

    holders: Mapping[Address, str]
    """The container that holds an address, as far as there are claims."""
    tables: Mapping[int, int]
    """The table in which a NIC (by its tag) had its routes when it was seen last."""
    default_table: int
    """For NICs of which nothing is left."""
    default_nic: str
    """Name of pods' first NIC."""
    timeout: float
    """Seconds that the kernel may take for one batch."""


def attached(pod: PodSeen, node: NodeSeen) -> list[PodNic]:
    """The NICs that a coordinator has attached, as far as pod and node tell.

    The first of an underlay for its pair; others for their rule in the pod, or, where `tunePodRoutes` was off, for what
    is left of their routes on the node.
    """
    first, found = pod.first, []
    for nic in pod.nics:
        told = bool(pod.pair) if nic is first else table_of(nic, pod.rules) or pod.tag(nic) in node.tags
        if told and nic.addresses and nic.name not in pod.gone:
            found.append(nic)
    return found


def on_node(pod: PodSeen, node: NodeSeen, neighbours: Iterable[Neighbour], terms: Terms) -> list[Repair]:
    """What to do on the node for a pod, in order. `neighbours` are those of the node's end."""
    index, name = pod.end.ifindex, pod.end.name
    nics = attached(pod, node)
    if not nics:
        return []
    found: list[Repair] = []
    if pod.pair and not pod.end.flags & rtlink.FLAG_UP:
        what = f"{name} is down"
        found.append(Repair("link", what, rtlink.link_set(index, f"set up {name}", up=True)))
    if pod.pair and pod.rp_filter:
        what = f"{name} has rp_filter {pod.rp_filter}"
        found.append(Repair("rp_filter", what, rtlink.link_set(index, f"set rp_filter of {name}", rp_filter=0)))
    macs = {n.address: n.mac for n in neighbours if n.state & rtroute.STATE_PERMANENT}
    lost: dict[Rule, None] = {}
    ways: list[Repair] = []
    for nic in nics:
        tag = pod.tag(nic)
        table = node.tags.get(tag) or _table_of_pod(pod, nics, node) or terms.tables.get(tag, terms.default_table)
        mine = [a for a in nic.addresses if a.version in node.families and _is_its(a, pod, node, terms.holders)]
        for route in host_routes(mine, table, index, tag):
            address = route.destination.address
            to_it = [r for r in node.ways.get(address, ()) if r.table == table]
            for wrong in (r for r in to_it if r.ifindex != index):
                ways.append(_stale_route(wrong))
                if wrong.ifindex in node.pairs:
                    message = rtroute.neighbour_delete(wrong.ifindex, address)
                    ways.append(Repair("stale", f"neighbour {address} on link {wrong.ifindex}", message))
            if not any(r.ifindex == index and r.type == rtroute.ROUTE_UNICAST for r in to_it):
                what = f"no route to {address} in table {table}"
                ways.append(Repair("route", what, rtroute.route_add(route)))
            if macs.get(address) != pod.lead.mac:
                what = f"no neighbour {address} at {rtlink.mac_text(pod.lead.mac)} on {name}"
                ways.append(
                    Repair("neighbour", what, rtroute.neighbour_set(index, address, pod.lead.mac, name, PROTOCOL))
                )
            rule = host_rule(family_of(address), table)
            if rule not in node.rules:
                lost[rule] = None
    return found + [_rule(rule) for rule in lost] + ways


def rules_of(node: NodeSeen) -> list[Repair]:
    """Our rules that are missing for tables with routes of ours."""
    wanted = {
        host_rule(family_of(address), route.table): None
        for address, routes in node.ways.items()
        for route in routes
        if route.protocol == PROTOCOL
    }
    return [_rule(rule) for rule in wanted if rule not in node.rules]


def in_pod(pod: PodSeen, node: NodeSeen) -> list[Repair]:
    """What to do in a pod for the node's addresses: those that came are led to the node, those that went are not.

    An address that networks are reached by is exchanged for another of its IP version; if there is none it stays, for
    what the node forwards does not need it.
    """
    nics, first = attached(pod, node), pod.first
    if not nics or not pod.is_open:
        return []
    members = list(dict.fromkeys((*((first,) if first is not None else ()), *nics)))
    lead = pod.lead.ifindex
    wanted = order_host_addresses(node.own, (), {a.version for nic in members for a in nic.addresses})
    by_first = sources_of(members[0])
    source = {version: by_first[version] or sources_of(nics[0])[version] for version in (4, 6)}
    goals = {table: nic for nic in members if (table := table_of(nic, pod.rules))}
    there = {(route.destination, route.table) for route in pod.routes}
    found: list[Repair] = []
    macs = {n.address: n.mac for n in pod.neighbours if n.state & rtroute.STATE_PERMANENT}
    for address in wanted:
        if macs.get(address) != pod.end.mac:
            message = rtroute.neighbour_set(lead, address, pod.end.mac, f"{pod.lead.name} in the pod", PROTOCOL)
            found.append(Repair("node_address", f"the pod has no neighbour {address}, the node", message))
        tables = [table for table, nic in goals.items() if address.version in {a.version for a in nic.addresses}]
        for table in (TABLE_MAIN, *tables):
            if (host_prefix(address), table) not in there:
                route = over_lead(host_prefix(address), table, None, source)._replace(ifindex=lead)
                what = f"the pod has no route to {address}, the node, in table {table}"
                found.append(Repair("node_address", what, rtroute.route_add(route)))
    return found + list(_gone(pod, node, wanted, source))


def _gone(
    pod: PodSeen, node: NodeSeen, wanted: Sequence[Address], source: Mapping[int, Address | None]
) -> Iterator[Repair]:
    lead = pod.lead.ifindex
    leading = [r for r in pod.routes if r.protocol == PROTOCOL and [hop.ifindex for hop in r.hops] == [lead]]
    reached = {
        r.destination.address: None
        for r in leading
        if r.table == TABLE_MAIN and r.hops[0].gateway is None and r.destination == host_prefix(r.destination.address)
    }
    for address in reached:
        if address in node.present:
            continue
        heir = next((a for a in wanted if a.version == address.version), None)
        by_it = [route for route in leading if route.hops[0].gateway == address]
        if by_it and heir is None:
            continue
        for route in by_it:
            moved = over_lead(route.destination, route.table, heir, source)._replace(ifindex=lead)
            what = f"the pod reaches {route.destination} by {address}, which the node has no more"
            yield Repair("node_address", what, rtroute.route_replace(moved))
        what = f"the pod looks for {address} on the node, which has it no more"
        for route in leading:
            if route.destination == host_prefix(address) and route.hops[0].gateway is None:
                yield Repair("node_address", what, whole_delete(route))
        yield Repair("node_address", what, rtroute.neighbour_delete(lead, address))


def is_joined(rules: Iterable[Rule]) -> bool:
    """Whether rules in a pod tell that a coordinator has attached a NIC of it."""
    return any(rule.protocol == PROTOCOL and rule.priority in (RULE_PRIORITY, SENDER_PRIORITY) for rule in rules)


def _table_of_pod(pod: PodSeen, nics: Iterable[PodNic], node: NodeSeen) -> int:
    """The table in which another NIC of the pod has its routes; 0: none has any."""
    return next((table for nic in nics if (table := node.tags.get(pod.tag(nic), 0))), 0)


def _is_its(address: Address, pod: PodSeen, node: NodeSeen, holders: Mapping[Address, str]) -> bool:
    """Whether the address is this pod's. Its earlier owner may still be there, with a DEL to come.

    A claim decides; where there is none, whoever has the route.
    """
    holder = holders.get(address)
    if holder is not None:
        return holder == pod.container_id
    links = {route.ifindex for route in node.ways.get(address, ())}
    return pod.end.ifindex in links or not links & node.pairs


def _stale_route(route: Route) -> Repair:
    anyhow = route._replace(source=None, scope=rtroute.SCOPE_ANY, protocol=0)
    return Repair("stale", f"{route.destination} led to link {route.ifindex}", rtroute.route_delete(anyhow))


def _rule(rule: Rule) -> Repair:
    version = 4 if rule.family == family_number(4) else 6
    return Repair("rule", f"no IPv{version} rule to look up table {rule.table}", rtroute.rule_add(rule))
