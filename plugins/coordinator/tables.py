"""A pod's further NICs: which tables and rules keep apart what its NICs send. Nothing here touches the kernel.

Every NIC gets a table of its own and a rule that sends what comes from its addresses there, so that an answer leaves by
the NIC on whose address the request came in. The main table has one default route of each family and serves what has no
source address yet. Here for a second NIC net1 (P1) of a pod whose first is eth0 (P0); H a node address, `lead` the link
to the node: veth0 in underlay mode, eth0 in overlay mode:

    main  default via …  dev eth0                   net1's went to table 101
    101   all of net1's routes; H dev lead; CIDR via H1 dev lead; policy routes
    100   all of eth0's routes; H dev lead; CIDR via H1 dev lead      in underlay mode 99: there 100 is for replies
    rule  from P1 lookup 101, from P0 lookup 100, pref 1001

A NIC's table is the one that its rule names, and nothing else says so: whoever repeats an ADD finds it again, and a new
NIC takes the first number that no rule names. The link to the node is never left out: with a default route in it, a
table that does not have the ways to the node would send them to the router.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from api.ranges import Address
from plugins.coordinator.attachment import PROTOCOL
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.plan import (
    REPLY_TABLE,
    NicPlan,
    PodNic,
    Way,
    everything,
    family_number,
    order_host_addresses,
    over_lead,
    plan_nic,
    policy_routes,
    reply_rule,
    sources_of,
)
from plugins.errors import InvalidConfigError
from plugins.net.netlink import family_of
from plugins.net.rtroute import ROUTE_UNICAST, TABLE_MAIN, Prefix, Route, Rule, host_prefix
from plugins.net.rtwhole import WholeRoute

FIRST_FURTHER: Final = 101
"""The table of a pod's first further NIC, as upstream numbers them; the next ones follow."""
OVERLAY_TABLE: Final = 100
"""eth0's own table in overlay mode."""
UNDERLAY_TABLE: Final = 99
"""eth0's own table in underlay mode, where 100 belongs to what came in by veth0."""
SENDER_PRIORITY: Final = 1001
"""After the rule for replies (1000): what came in by veth0 goes back by it, whichever address it was for."""
_RESERVED: Final = frozenset((253, 254, 255))


@dataclass(frozen=True, slots=True)
class PodView:
    """What the decision needs to know of a pod."""

    way: Way
    nics: tuple[PodNic, ...]
    """Every link but lo and veth0, in the order of their indices."""
    nic: PodNic
    """The one that is attached."""
    lead: int
    """Index of the link that leads to the node."""
    default_nic: str
    """Name of the pod's first NIC."""
    routes: tuple[WholeRoute, ...]
    """Of all tables but `local`."""
    rules: tuple[Rule, ...]

    @property
    def first(self) -> PodNic | None:
        """The pod's first NIC."""
        return next((nic for nic in self.nics if nic.name == self.default_nic), None)

    def leads(self, route: WholeRoute) -> bool:
        """Whether it is a way of ours to the node, and no copy of a route that an overlay's first NIC had."""
        copied = self.way.mode == "overlay" and route.table == OVERLAY_TABLE
        return route.protocol == PROTOCOL and bool(route.hops) and route.hops[0].ifindex == self.lead and not copied

    @property
    def reached(self) -> frozenset[Prefix]:
        """The node's addresses to which the main table has ways of ours."""
        return frozenset(
            route.destination
            for route in self.routes
            if route.table == TABLE_MAIN and self.leads(route) and _is_host(route) and not route.hops[0].gateway
        )

    def gateway(self, version: int) -> Address | None:
        """The node's address by which ways over the lead go already."""
        found = (
            route.hops[0].gateway
            for route in self.routes
            if self.leads(route) and route.destination.address.version == version
        )
        return next((gateway for gateway in found if gateway is not None), None)


@dataclass(frozen=True, slots=True)
class Departure:
    """A default route that leaves the main table, wholly or with some of its hops."""

    route: WholeRoute
    gone: tuple[WholeRoute, ...]
    """What is to be deleted."""
    stays: WholeRoute | None
    """What is to be added again in place of `route` (IPv4: its next hops are one object)."""
    was_first: bool
    """Whether it stood before all others to its destination, and so was the one that counted."""


@dataclass(frozen=True, slots=True)
class FurtherPlan:
    """Everything to set for a further NIC that is not there yet; `ways` have their interface index.

    What is there is left out and not only tolerated: it is another NIC's too, and undoing must not take it away when
    the kernel's answer is lost.
    """

    nic: NicPlan
    neighbours: tuple[Address, ...]
    """The node's addresses that the link to the node does not know yet."""
    ways: tuple[Route, ...]
    copies: tuple[WholeRoute, ...]
    """Routes of NICs for their own tables."""
    nic_routes: tuple[Route, ...]
    rules: tuple[Rule, ...]
    stale: tuple[WholeRoute, ...]
    """What an ADD that was killed has left in the NIC's table."""
    departures: tuple[Departure, ...]
    unreached: tuple[Prefix, ...]


def sender_rule(address: Address, table: int) -> Rule:
    """What comes from `address` goes by `table`."""
    return Rule(family_of(address), SENDER_PRIORITY, table, 0, 0, PROTOCOL, plain=True, source=host_prefix(address))


def table_of(nic: PodNic, rules: Iterable[Rule]) -> int:
    """The table that is the NIC's own; 0: it has none."""
    senders = {host_prefix(address) for address in nic.addresses}
    ours = (r.table for r in rules if r.protocol == PROTOCOL and r.priority == SENDER_PRIORITY and r.source in senders)
    return next(ours, 0)


def free_table(routes: Iterable[WholeRoute], rules: Iterable[Rule]) -> int:
    """The first table for a further NIC that no rule names and that has no route of somebody else's.

    Not counted by links, as in upstream: a NIC in the middle may have gone, and an ADD may be repeated.
    """
    taken = {rule.table for rule in rules} | {route.table for route in routes if route.protocol != PROTOCOL} | _RESERVED
    table = FIRST_FURTHER
    while table in taken:
        table += 1
    return table


def own_table(view: PodView) -> int:
    """The table of the pod's first NIC."""
    return OVERLAY_TABLE if view.way.mode == "overlay" else UNDERLAY_TABLE


def plan_further(
    config: CoordinatorConfig,
    view: PodView,
    host: Sequence[Address],
    on_node: Collection[int],
    awaited: Collection[str] = (),
) -> FurtherPlan:
    """Decide about a NIC that is not the pod's first (underlay), or not the overlay's.

    `host` holds the node's addresses, preferred first; `awaited` names NICs that the pod is still to get. Raises
    WiringError if the NIC has no usable address, InvalidConfigError if the NIC for the default route does not exist.
    """
    nic, first = view.nic, view.first
    common = plan_nic(config, nic, on_node)
    wanted = config.pod_default_route_nic
    if config.tune_pod_routes and wanted and wanted not in {known.name for known in view.nics} | {*awaited}:
        raise InvalidConfigError(
            f"podDefaultRouteNIC: {wanted} don't exist in pod",
            f"podDefaultRouteNic: {wanted!r}, allowed: {', '.join(known.name for known in view.nics)}",
        )
    tables = _tables(config, view)
    members = [nic, *((first,) if first is not None and first.ifindex in tables else ())]
    families: set[int] = {
        address.version for member in (nic, first) if member is not None for address in member.addresses
    }
    addresses = order_host_addresses(host, (), families)
    gateways = {
        version: view.gateway(version) or next((a for a in addresses if a.version == version), None)
        for version in families
    }
    ways: list[Route] = []
    source = _sources(view)
    missing = [address for address in addresses if host_prefix(address) not in view.reached]
    hijacked = [p for p in config.hijack if p.address.version in families and p not in set(map(host_prefix, addresses))]
    ways += (over_lead(host_prefix(address), TABLE_MAIN, None, source) for address in missing)
    goals = [TABLE_MAIN] if view.way.mode == "overlay" and not _has_others(view) else []
    for member in members:
        its = {address.version for address in member.addresses}
        goal = tables.get(member.ifindex)
        if goal is not None:
            ways += (over_lead(host_prefix(a), goal, None, source) for a in addresses if a.version in its)
            goals.append(goal)
    ways += (
        over_lead(prefix, goal, gateway, source)
        for goal in goals
        for prefix in hijacked
        if (gateway := gateways[prefix.address.version]) is not None
    )
    rules: list[Rule] = []
    if view.way.mode == "underlay":
        for version in sorted({address.version for address in nic.addresses}):
            gateway = gateways[version]
            if gateway is not None:
                rules.append(reply_rule(family_number(version)))
                ways.append(over_lead(everything(version), REPLY_TABLE, gateway, source))
    copies: list[WholeRoute] = []
    for member in members:
        goal = tables.get(member.ifindex)
        if goal is not None:
            rules += (sender_rule(address, goal) for address in member.addresses)
            copies += _copies(view, member, goal)
    placed = [route._replace(ifindex=view.lead) for route in dict.fromkeys(ways)]
    policies = policy_routes(config, nic, tables.get(nic.ifindex, TABLE_MAIN))
    there = {(r.destination, r.table, hop.ifindex, hop.gateway) for r in view.routes for hop in r.hops}
    return FurtherPlan(
        nic=common,
        neighbours=tuple(missing),
        ways=tuple(r for r in placed if (r.destination, r.table, r.ifindex, r.gateway) not in there),
        copies=tuple(
            r for r in copies if not {(r.destination, r.table, hop.ifindex, hop.gateway) for hop in r.hops} <= there
        ),
        nic_routes=tuple(r for r in policies if (r.destination, r.table, r.ifindex, r.gateway) not in there),
        rules=tuple(rule for rule in rules if rule not in view.rules),
        stale=tuple(_stale(view, tables.get(nic.ifindex), (*placed, *policies))),
        departures=tuple(_departures(view, tables, wanted)) if tables else (),
        unreached=tuple(p for p in hijacked if gateways[p.address.version] is None),
    )


def _tables(config: CoordinatorConfig, view: PodView) -> dict[int, int]:
    """Index of each NIC that has, or now gets, a table of its own, to that table."""
    if not config.tune_pod_routes:
        return {}
    found = {nic.ifindex: table for nic in view.nics if (table := table_of(nic, view.rules))}
    found.setdefault(view.nic.ifindex, free_table(view.routes, view.rules))
    if view.first is not None and view.first.addresses:
        found[view.first.ifindex] = own_table(view)
    return found


def _sources(view: PodView) -> dict[int, Address | None]:
    own, first = sources_of(view.nic), sources_of(view.first) if view.first is not None else {4: None, 6: None}
    return {version: first[version] or own[version] for version in (4, 6)}


def _has_others(view: PodView) -> bool:
    """Whether a further NIC has been attached already."""
    aside = {view.nic.ifindex, view.first.ifindex if view.first is not None else 0}
    return any(table_of(nic, view.rules) for nic in view.nics if nic.ifindex not in aside)


def _copies(view: PodView, nic: PodNic, table: int) -> list[WholeRoute]:
    """The NIC's routes as its own table has them, those without gateway first: the others' gateways rest on them."""
    found: dict[WholeRoute, None] = {}
    # What the pod reaches by its node, it reaches from its first NIC's address, whichever configuration said so.
    lead = view.lead if nic == view.first else 0
    versions = {address.version for address in nic.addresses}
    for route in view.routes:
        if route.table not in (TABLE_MAIN, table) or route.type != ROUTE_UNICAST or (view.leads(route) and not lead):
            continue
        address = route.destination.address
        if address.version not in versions or address.is_link_local or address.is_multicast:
            continue
        mine = route.over(nic.ifindex) or route.over(lead)
        if mine is not None:
            found[mine._replace(table=table, protocol=PROTOCOL)] = None
    return sorted(found, key=lambda route: any(hop.gateway is not None for hop in route.hops))


def _stale(view: PodView, table: int | None, wanted: Iterable[Route]) -> list[WholeRoute]:
    """Routes of ours in the NIC's table that are neither the NIC's own nor wanted.

    Those over the lead stay: the first NIC of an underlay has put them there.
    """
    destinations = {route.destination for route in wanted if route.table == table}
    return [
        route
        for route in view.routes
        if route.table == table
        and route.protocol == PROTOCOL
        and not {hop.ifindex for hop in route.hops} & {view.nic.ifindex, view.lead}
        and route.destination not in destinations
    ]


def keeper(view: PodView, wanted: str, version: int) -> int:
    """Index of the NIC whose default route of an IP version the main table keeps; 0: no other than what it has.

    The one that is wanted, if it has one; else that which has it already, before the NIC that is attached.
    """
    holders = {
        hop.ifindex
        for route in view.routes
        if route.is_default and route.destination.address.version == version and _is_in_main(route)
        for hop in route.hops
    }
    named = next((nic.ifindex for nic in view.nics if nic.name == wanted), 0)
    if named in holders:
        return named
    others = [nic.ifindex for nic in view.nics if nic.ifindex in holders and nic.ifindex != view.nic.ifindex]
    first = view.first.ifindex if view.first is not None else 0
    if first in others:
        return first
    return others[0] if others else 0


def _departures(view: PodView, tables: dict[int, int], wanted: str) -> list[Departure]:
    kept = {version: keeper(view, wanted, version) for version in (4, 6)}
    found: list[Departure] = []
    seen: set[tuple[Prefix, int]] = set()
    for route in view.routes:
        if not route.is_default or not _is_in_main(route):
            continue
        version = route.destination.address.version
        key = (route.destination, route.priority)
        was_first = key not in seen
        seen.add(key)
        leaving = {hop.ifindex for hop in route.hops if hop.ifindex in tables and hop.ifindex != kept[version]}
        if not kept[version] or not leaving:
            continue
        stays: WholeRoute | None = route
        for ifindex in leaving:
            stays = stays.without(ifindex) if stays is not None else None
        if stays is None:
            found.append(Departure(route, (route,), None, was_first))
        elif version == 6:
            gone = tuple(route._replace(hops=(hop,), nexthop_id=0) for hop in route.hops if hop.ifindex in leaving)
            found.append(Departure(route, gone, None, was_first))
        else:
            found.append(Departure(route, (route,), stays, was_first))
    return found


def _is_in_main(route: WholeRoute) -> bool:
    """Whether it is another's route in the main table."""
    return route.table == TABLE_MAIN and route.type == ROUTE_UNICAST and route.protocol != PROTOCOL


def _is_host(route: WholeRoute) -> bool:
    return route.destination.length == route.destination.address.max_prefixlen
