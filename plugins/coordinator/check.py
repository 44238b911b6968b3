"""CHECK: compare an attachment with what ADD makes.

What ADD saw of the node's addresses is read back from what it left (permanent neighbours and host routes on veth0), so
that an address which the node has got or lost since does not make a sound attachment fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from ipaddress import ip_interface
from socket import AF_INET, AF_INET6

from api.ranges import Address
from plugins.cni import Result
from plugins.coordinator.attachment import PROTOCOL, Attachment
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import PodFacts, read_pod, read_rules
from plugins.coordinator.further import lead_fault, lead_in_pod, question_for, view_of
from plugins.coordinator.host import Host, families_of_links, find_link, table_routes
from plugins.coordinator.plan import (
    POD_VETH,
    REPLY_TABLE,
    NicPlan,
    Plan,
    PodNic,
    Way,
    host_routes,
    make_plan,
    pod_mac,
    resolve_mode,
    sources_of,
    usable,
)
from plugins.coordinator.steps import MARKS, Scene, Task
from plugins.coordinator.tables import FurtherPlan, PodView, plan_further
from plugins.errors import WiringError
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink
from plugins.net.netns import enter

_FAMILIES = (AF_INET, AF_INET6)


def differences(host: Host, task: Task, previous: Result) -> list[str]:
    """What is not as ADD left it, in words; empty if all is well.

    Blocks; runs in a thread of its own, which it takes into the pod's namespace. Raises CniError, BatchError, OSError.
    """
    attachment, config = task.attachment, task.config
    with host.socket() as node:
        now, families = {address.version for address in host.addresses.read(node)}, families_of_links()
        enter(task.netns_fd)
        with Netlink(NETLINK_ROUTE, task.timeout) as pod:
            facts = read_pod(pod, attachment.ifname)
            nic = _as_given(facts.nic, previous)
            found = _nic(facts, nic, config, previous)
            way = resolve_mode(config, attachment.ifname, facts.veth is not None or config.mode == "underlay")
            given = replace(facts, nic=nic, nics=tuple(nic if n.name == nic.name else n for n in facts.nics))
            scene = Scene(task, host, node, pod, given, frozenset(families))
            return found + (_first(scene, now) if way.is_first else _further(scene, way, previous))


def _first(scene: Scene, now: Collection[int]) -> list[str]:
    """`now` holds the IP versions of the node's present addresses."""
    task, node, pod, facts = scene.task, scene.node, scene.pod, scene.facts
    nic = facts.nic
    if facts.veth is None:
        return [f"the pod has no link {POD_VETH}"]
    link = find_link(node, task.attachment.host_link)
    if link is None:
        return [f"the node has no link {task.attachment.host_link}"]
    found = _pair(facts.veth, link, task.attachment)
    tables = {
        table: [route for family in _FAMILIES for route in table_routes(pod, family, table)]
        for table in (rtroute.TABLE_MAIN, REPLY_TABLE)
    }
    neighbours = rtroute.parse_neighbours(pod.dump(rtroute.neighbour_dump(facts.veth.ifindex)))
    hosts = _hosts(facts.veth.ifindex, neighbours, tables)
    if not nic.addresses:
        return found
    plan = make_plan(task.config, nic, hosts, scene.on_node)
    found += _neighbours(neighbours, plan.pod_neighbours, link.mac, "the pod")
    lost = {a.version for a in plan.nic.host_addresses} & {*now} - {a.version for a in hosts}
    found += [f"the pod knows no IPv{version} address of the node" for version in sorted(lost)]
    found += _routes(plan, facts.veth.ifindex, tables)
    rules = read_rules(pod)
    found += [f"the pod has no {_rule(rule)}" for rule in plan.pod_rules if rule not in rules]
    found += _node(node, task.attachment, plan.nic, link, facts.veth.mac)
    if plan.pod_rules:
        with Netlink(NETLINK_NETFILTER, task.timeout) as filters:
            found += MARKS.differences(filters)
    return found + _sysctls(plan.nic)


def _further(scene: Scene, way: Way, previous: Result) -> list[str]:
    node, pod, facts = scene.node, scene.pod, scene.facts
    attachment, config, nic = scene.task.attachment, scene.task.config, facts.nic
    try:
        lead = lead_in_pod(config, facts, way)
    except WiringError as error:
        return [error.details]
    exchange = node.exchange((question_for(attachment, lead, way),))
    link = rtlink.parse_link(exchange.replies[0].body) if exchange.replies else None
    fault = lead_fault(attachment, lead, link, way)
    if fault or link is None:
        return [fault]
    if not nic.addresses:
        return []
    down = ((end.name, where) for end, where in ((lead, "in the pod"), (link, "on the node")) if not _is_up(end))
    found = [f"{name} {where} is down" for name, where in down]
    neighbours = rtroute.parse_neighbours(pod.dump(rtroute.neighbour_dump(lead.ifindex)))
    view = view_of(scene, way, lead.ifindex)
    hosts = dict.fromkeys(
        r.destination.address
        for r in view.routes
        if view.leads(r) and r.hops[0].gateway is None and r.destination.length == r.destination.address.max_prefixlen
    )
    for neighbour in neighbours:
        if neighbour.state & rtroute.STATE_PERMANENT and usable(neighbour.address):
            hosts[neighbour.address] = None
    plan = plan_further(config, view, list(hosts), scene.on_node, scene.task.awaited)
    found += _neighbours(neighbours, hosts, link.mac, "the pod")
    found += _missing_ways(view, plan)
    given = {*map(rtroute.host_prefix, nic.addresses)}
    if view.first is not None:
        given |= {rtroute.host_prefix(address) for address in sources_of(view.first).values() if address is not None}
    wanted = (rule for rule in plan.rules if rule.source is None or rule.source in given)
    found += [f"the pod has no {_rule(rule)}" for rule in wanted]
    found += [
        f"the main table still has the default {departure.route}, which is not the NIC's for the default route"
        for departure in plan.departures
    ]
    for version in sorted(
        {ip_interface(r.dst).version for r in previous.routes if ip_interface(r.dst).network.prefixlen == 0}
    ):
        has = any(
            r.is_default and r.destination.address.version == version and r.over(nic.ifindex) for r in view.routes
        )
        if not has and version in {address.version for address in nic.addresses}:
            found.append(f"{nic.name} in the pod has lost its IPv{version} default route")
    found += _node(node, attachment, plan.nic, link, lead.mac)
    return found + _sysctls(plan.nic)


def _missing_ways(view: PodView, plan: FurtherPlan) -> list[str]:
    # A route of somebody else's to the same destination was there before ADD, which left it alone.
    foreign = {r.destination for r in view.routes if r.table == rtroute.TABLE_MAIN and r.protocol != PROTOCOL}
    wanted = [w for w in plan.ways if w.table != rtroute.TABLE_MAIN or w.destination not in foreign]
    gateways = [(way.destination, way.gateway, way.table) for way in (*wanted, *plan.nic_routes)]
    gateways += [(copy.destination, hop.gateway, copy.table) for copy in plan.copies for hop in copy.hops]
    return [
        f"the pod has not the route {destination}{f' via {gateway}' if gateway else ''} in table {table}"
        for destination, gateway, table in gateways
    ]


def _is_up(link: rtlink.Link) -> bool:
    return bool(link.flags & rtlink.FLAG_UP)


def _sysctls(plan: NicPlan) -> list[str]:
    return [f"{path} in the pod is not {value}" for path, value in plan.sysctls if _read_sysctl(path) != value]


def _as_given(nic: PodNic, previous: Result) -> PodNic:
    """`nic` without the addresses that came after ADD, by router advertisement for example, as far as can be told."""
    given = _given(nic.name, previous)
    return replace(nic, addresses=tuple(a for a in nic.addresses if a in given) or nic.addresses)


def _given(name: str, previous: Result) -> list[Address]:
    """The usable addresses of the NIC `name` in prevResult."""
    return [
        address
        for ip in previous.ips
        if (ip.interface is None or _name(previous, ip.interface) == name)
        and usable(address := ip_interface(ip.address).ip)
    ]


def _nic(facts: PodFacts, nic: PodNic, config: CoordinatorConfig, previous: Result) -> list[str]:
    found = [] if facts.is_up else [f"{nic.name} in the pod is down"]
    missing = (address for address in _given(nic.name, previous) if address not in nic.addresses)
    found += [f"{nic.name} in the pod has not the address {address}" for address in missing]
    if not nic.addresses:
        found.append(f"{nic.name} in the pod has no usable address")
    elif pod_mac(config.pod_mac_prefix, nic.first) not in (None, nic.mac):
        found.append(f"{nic.name} in the pod has not the MAC that podMACPrefix asks for: {rtlink.mac_text(nic.mac)}")
    if config.tx_queue_len not in (0, nic.tx_queue_len):
        found.append(f"{nic.name} in the pod has the transmit queue length {nic.tx_queue_len}")
    return found


def _name(previous: Result, index: int) -> str:
    return previous.interfaces[index].name if 0 <= index < len(previous.interfaces) else ""


def _pair(veth: rtlink.Link, link: rtlink.Link, attachment: Attachment) -> list[str]:
    found = []
    if veth.peer != link.ifindex or link.peer != veth.ifindex:
        found.append(f"{POD_VETH} in the pod is not the peer of {link.name} on the node")
    if link.alias != attachment.alias:
        found.append(f"{link.name} on the node has the alias {link.alias[:80]!r}")
    if not veth.flags & rtlink.FLAG_UP:
        found.append(f"{POD_VETH} in the pod is down")
    if not link.flags & rtlink.FLAG_UP:
        found.append(f"{link.name} on the node is down")
    return found


def _hosts(veth: int, neighbours: Iterable[rtroute.Neighbour], tables: dict[int, list[rtroute.Route]]) -> list[Address]:
    """The node's addresses that ADD has used, those that lead first."""
    leading = [route.gateway for route in tables[REPLY_TABLE] if route.ifindex == veth and route.gateway is not None]
    reached = [
        route.destination.address
        for route in tables[rtroute.TABLE_MAIN]
        if route.ifindex == veth
        and route.protocol == PROTOCOL
        and route.gateway is None
        and route.destination.length == route.destination.address.max_prefixlen
    ]
    known = [n.address for n in neighbours if n.state & rtroute.STATE_PERMANENT and not n.address.is_multicast]
    return list(dict.fromkeys((*leading, *reached, *known)))


def _routes(plan: Plan, veth: int, tables: dict[int, list[rtroute.Route]]) -> list[str]:
    found = []
    for wanted in (*(route._replace(ifindex=veth) for route in plan.veth_routes), *plan.nic_routes):
        there = [route for route in tables[wanted.table] if route.destination == wanted.destination]
        # A route of somebody else's to the same destination was there before ADD, which left it alone.
        kept = wanted.table == rtroute.TABLE_MAIN and any(route.protocol != PROTOCOL for route in there)
        if not kept and not any(_same(route, wanted) for route in there):
            via = f" via {wanted.gateway}" if wanted.gateway else ""
            found.append(f"the pod has not the route {wanted.destination}{via} in table {wanted.table}")
    return found


def _same(route: rtroute.Route, wanted: rtroute.Route) -> bool:
    # An IPv6 address that was still being checked for duplicates at ADD could not be a source then.
    unsettled = route.source is None and wanted.destination.address.version == 6
    return (route.ifindex, route.gateway, route.type) == (wanted.ifindex, wanted.gateway, wanted.type) and (
        unsettled or route.source == wanted.source
    )


def _neighbours(there: Iterable[rtroute.Neighbour], wanted: Iterable[Address], mac: bytes, where: str) -> list[str]:
    known = {n.address: n.mac for n in there if n.state & rtroute.STATE_PERMANENT}
    return [f"{where} has not the neighbour {a} at {rtlink.mac_text(mac)}" for a in wanted if known.get(a) != mac]


def _node(node: Netlink, attachment: Attachment, plan: NicPlan, link: rtlink.Link, mac: bytes) -> list[str]:
    found: list[str] = []
    routes = [route for family in _FAMILIES for route in table_routes(node, family, plan.host_table)]
    there_to = {route.destination for route in routes if route.ifindex == link.ifindex}
    found += [
        f"the node has not the route {wanted.destination} in table {plan.host_table}"
        for wanted in host_routes(plan.host_addresses, plan.host_table, link.ifindex, attachment.tag)
        if wanted.destination not in there_to
    ]
    there = rtroute.parse_neighbours(node.dump(rtroute.neighbour_dump(link.ifindex)))
    found += _neighbours(there, plan.host_addresses, mac, "the node")
    rules = read_rules(node)
    wanted_rules = [rule for rule in plan.host_rules if rule not in rules]
    return found + [f"the node has no {_rule(rule)}" for rule in wanted_rules]


def _rule(rule: rtroute.Rule) -> str:
    mark = f" for mark {rule.mark:#x}" if rule.mark else f" from {rule.source}" if rule.source else ""
    return f"IPv{4 if rule.family == AF_INET else 6} rule{mark} that looks up table {rule.table}"


def _read_sysctl(path: str) -> str:
    with open(f"/proc/sys/net/{path}", encoding="ascii") as file:
        return file.read().strip()
