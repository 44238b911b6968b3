"""CHECK: compare an attachment with what ADD makes.

What ADD saw of the node's addresses is read back from what it left (permanent neighbours and host routes on veth0), so
that an address which the node has got or lost since does not make a sound attachment fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_interface
from socket import AF_INET, AF_INET6

from api.ranges import Address
from plugins.cni import Result
from plugins.coordinator.add import MARKS, Task
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import PodFacts, read_pod
from plugins.coordinator.host import Host, families_of_links, find_link, table_routes
from plugins.coordinator.plan import (
    FIRST_TABLE,
    POD_VETH,
    PROTOCOL,
    REPLY_TABLE,
    Attachment,
    Plan,
    PodNic,
    make_plan,
    pod_mac,
    usable,
)
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink
from plugins.net.netns import enter

_FAMILIES = (AF_INET, AF_INET6)


def differences(host: Host, task: Task, previous: Result) -> list[str]:
    """What is not as ADD left it, in words; empty if all is well.

    Blocks; runs in a thread of its own, which it takes into the pod's namespace. Raises CniError, BatchError, OSError.
    """
    attachment, config, timeout = task.attachment, task.config, task.timeout
    with host.socket() as node:
        now, families = {address.version for address in host.addresses.read(node)}, families_of_links()
        enter(task.netns_fd)
        with Netlink(NETLINK_ROUTE, timeout) as pod:
            facts = read_pod(pod, attachment.ifname)
            nic = _as_given(facts.nic, previous)
            found = _nic(facts, nic, config, previous)
            if facts.veth is None:
                return [*found, f"the pod has no link {POD_VETH}"]
            link = find_link(node, attachment.host_link)
            if link is None:
                return [*found, f"the node has no link {attachment.host_link}"]
            found += _pair(facts.veth, link, attachment)
            tables = {
                table: [route for family in _FAMILIES for route in table_routes(pod, family, table)]
                for table in (rtroute.TABLE_MAIN, REPLY_TABLE, FIRST_TABLE)
            }
            neighbours = rtroute.parse_neighbours(pod.dump(rtroute.neighbour_dump(facts.veth.ifindex)))
            hosts = _hosts(facts.veth.ifindex, neighbours, tables)
            if not nic.addresses:
                return found
            plan = make_plan(config, nic, hosts, families)
            found += _neighbours(neighbours, plan.pod_neighbours, link.mac, "the pod")
            lost = {a.version for a in plan.host_addresses} & now - {a.version for a in hosts}
            found += [f"the pod knows no IPv{version} address of the node" for version in sorted(lost)]
            found += _routes(plan, facts.veth.ifindex, tables)
            rules = [rtroute.parse_rule(body) for family in _FAMILIES for body in pod.dump(rtroute.rule_dump(family))]
            found += [f"the pod has no {_rule(rule)}" for rule in plan.pod_rules if rule not in rules]
        found += _node(node, plan, link, facts.veth.mac)
        if plan.pod_rules:
            with Netlink(NETLINK_NETFILTER, timeout) as filters:
                found += MARKS.differences(filters)
        found += [f"{path} in the pod is not {value}" for path, value in plan.sysctls if _read_sysctl(path) != value]
    return found


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
        for table in (rtroute.TABLE_MAIN, FIRST_TABLE)
        for route in tables[table]
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


def _node(node: Netlink, plan: Plan, link: rtlink.Link, pod_mac_address: bytes) -> list[str]:
    found: list[str] = []
    routes = [route for family in _FAMILIES for route in table_routes(node, family, plan.host_table)]
    there_to = {route.destination for route in routes if route.ifindex == link.ifindex}
    found += [
        f"the node has not the route {wanted.destination} in table {plan.host_table}"
        for wanted in plan.host_routes(link.ifindex)
        if wanted.destination not in there_to
    ]
    there = rtroute.parse_neighbours(node.dump(rtroute.neighbour_dump(link.ifindex)))
    found += _neighbours(there, plan.host_addresses, pod_mac_address, "the node")
    rules = [rtroute.parse_rule(body) for family in _FAMILIES for body in node.dump(rtroute.rule_dump(family))]
    wanted_rules = [rule for rule in plan.host_rules if rule not in rules]
    return found + [f"the node has no {_rule(rule)}" for rule in wanted_rules]


def _rule(rule: rtroute.Rule) -> str:
    mark = f" for mark {rule.mark:#x}" if rule.mark else ""
    return f"IPv{4 if rule.family == AF_INET else 6} rule{mark} that looks up table {rule.table}"


def _read_sysctl(path: str) -> str:
    with open(f"/proc/sys/net/{path}", encoding="ascii") as file:
        return file.read().strip()
