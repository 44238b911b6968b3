"""What goes, and what comes back, when a further NIC leaves a pod that lives on. Nothing here touches the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from api.ranges import Address
from plugins.coordinator.attachment import PROTOCOL
from plugins.coordinator.plan import PodNic
from plugins.coordinator.tables import SENDER_PRIORITY, table_of
from plugins.net.rtroute import TABLE_MAIN, Rule, host_prefix
from plugins.net.rtwhole import WholeRoute

BOOT: Final = 3
"""RTPROT_BOOT, the origin of routes that CNI plugins and people make."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """What to delete, and what to put back into the main table."""

    rules: tuple[Rule, ...]
    routes: tuple[WholeRoute, ...]
    returns: tuple[WholeRoute, ...]
    neighbours: tuple[Address, ...]
    """Of the link to the node."""


def plan_leaving(
    pod: tuple[Sequence[PodNic], Sequence[WholeRoute], Sequence[Rule]],
    ifname: str,
    default_nic: str,
    overlay_lead: int,
    marked: Sequence[Address] = (),
) -> Leaving:
    """Decide by the pod's NICs, routes and rules. `overlay_lead` is the index of an overlay's first NIC, else 0;
    `marked` are the neighbours on it that have our origin number.

    An ADD that was killed leaves routes in tables that no rule names yet, and neighbours without a route.
    Rules for addresses that nobody has any more go as well: the NIC may have been deleted before. With the last further
    NIC go the first one's table and, in overlay mode, the ways to the node, which nobody else had asked for.
    """
    known, routes, rules = pod
    stay = [nic for nic in known if nic.name != ifname]
    others = [nic for nic in stay if nic.name != default_nic and nic.addresses]
    senders = {host_prefix(address) for nic in stay for address in nic.addresses}
    ours = [rule for rule in rules if rule.protocol == PROTOCOL and rule.priority == SENDER_PRIORITY]
    going = [rule for rule in ours if not others or rule.source not in senders]
    named = {(rule.family, rule.table) for rule in rules}
    tables = {rule.table for rule in going} - {rule.table for rule in ours if rule not in going}
    index = next((nic.ifindex for nic in known if nic.name == ifname), 0)

    def goes(route: WholeRoute) -> bool:
        links = {hop.ifindex for hop in route.hops}
        if route.protocol != PROTOCOL:
            return False
        if route.table == TABLE_MAIN:
            return index in links or (not others and overlay_lead in links)
        return route.table in tables or (route.family, route.table) not in named

    out = [route for route in routes if goes(route)]
    heirs = sorted((nic for nic in stay), key=lambda nic: nic.name != default_nic)
    returns: list[WholeRoute] = []
    for version in (4, 6):
        defaults = [r for r in routes if r.is_default and r.destination.address.version == version]
        held = any(hop.ifindex != index for r in defaults if r.table == TABLE_MAIN for hop in r.hops)
        of_heirs = ([r for r in defaults if r.table == table_of(nic, rules) and _over(r, nic)] for nic in heirs)
        back = next(filter(None, of_heirs), []) if not held else []
        returns += (route._replace(table=TABLE_MAIN, protocol=BOOT) for route in back)
    ways = [r for r in routes if r.protocol == PROTOCOL and r.table == TABLE_MAIN and _reaches(r, overlay_lead)]
    kept = {route.destination.address for route in ways if route not in out}
    on_lead = dict.fromkeys((*(route.destination.address for route in ways), *marked)) if overlay_lead else {}
    neighbours = [address for address in on_lead if address not in kept]
    return Leaving(tuple(going), tuple(out), tuple(returns), tuple(neighbours))


def _reaches(route: WholeRoute, link: int) -> bool:
    """Whether it leads to a neighbour on the link."""
    return any(hop.ifindex == link and not hop.gateway for hop in route.hops)


def _over(route: WholeRoute, nic: PodNic) -> bool:
    return route.table != 0 and nic.ifindex in {hop.ifindex for hop in route.hops}
