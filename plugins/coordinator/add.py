"""ADD: wire a pod's NIC, all or nothing.

The whole of it is one blocking sequence of a few milliseconds at most, run in a thread of its own: facts, plan, the
way on the node, the way in the pod; for the first NIC of an underlay (here) also the pair and the marks, for all others
(`further`) tables. What was done is noted as it is done and taken back if anything fails or the caller has given up.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom

from api.ranges import Address
from plugins.coordinator.attachment import LINK_GROUP, PROTOCOL, Attachment
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import NodeFacts, PodFacts, read_node, read_pod
from plugins.coordinator.further import join
from plugins.coordinator.host import Host, families_of_links, forget, is_of, remove_link
from plugins.coordinator.plan import POD_VETH, Plan, make_plan, resolve_mode
from plugins.coordinator.steps import MARKS, Scene, Step, Task, Undo, host_steps, judge, nic_steps, run, set_sysctls
from plugins.errors import WiringError
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, BatchError, Netlink
from plugins.net.netns import enter

log = logging.getLogger(__name__)

_random = SystemRandom()


@dataclass(frozen=True, slots=True)
class Attached:
    """A finished attachment that can still be taken back."""

    pod: PodFacts
    new_mac: bytes | None
    """The MAC address that the NIC was given."""
    undo: Undo


def attach(host: Host, task: Task, abandoned: Callable[[], bool]) -> Attached:
    """Attach. Blocks; runs in a thread of its own, which it takes into the pod's namespace.

    Raises CniError, BatchError, OSError, and AbandonedError as soon as `abandoned()`; nothing is left then.
    """
    attachment, config = task.attachment, task.config
    undo = Undo(host, task, abandoned)
    try:
        with host.socket() as node:
            others, on_node = host.addresses.read(node), families_of_links()
            enter(task.netns_fd)
            with Netlink(NETLINK_ROUTE, task.timeout) as pod:
                facts = read_pod(pod, attachment.ifname)
                way = resolve_mode(config, attachment.ifname, facts.veth is not None)
                scene = Scene(task, host, node, pod, facts, frozenset(on_node))
                if not way.is_first:
                    return Attached(facts, join(scene, way, others, undo).nic.pod_mac, undo)
                plan = _attach_first(scene, others, undo)
            with Netlink(NETLINK_NETFILTER, task.timeout) as filters:
                undo.marks = bool(plan.pod_rules)
                if undo.marks:
                    MARKS.install(filters)
            undo.stop_if_abandoned()
            return Attached(facts, plan.nic.pod_mac, undo)
    except BaseException:
        undo.run()
        raise


def _attach_first(scene: Scene, others: list[Address], undo: Undo) -> Plan:
    attachment, config = scene.task.attachment, scene.task.config
    node, facts = scene.node, scene.facts
    node_facts = _settled(node, attachment, config, facts)
    plan = make_plan(config, facts.nic, (*node_facts.preferred, *others), scene.on_node)
    for prefix in plan.unreached:
        log.warning("the node has no address of that family, so pods cannot reach %s", prefix)
    undo.stop_if_abandoned()
    set_sysctls(plan.nic, undo)
    pair = _create_pair(node, attachment, plan, scene.task.netns_fd, undo)
    steps = _node_steps(attachment, plan, pair, node_facts)
    judge(steps, scene.host.wire(node, [step.message for step in steps]).failures)
    undo.stop_if_abandoned()
    run(scene.pod.exchange, _pod_steps(plan, facts, pair), undo.in_pod)
    return plan


def _settled(node: Netlink, attachment: Attachment, config: CoordinatorConfig, pod: PodFacts) -> NodeFacts:
    """The node's side, free of what earlier owners of the name or the addresses have left."""
    table = config.host_rule_table
    question = rtlink.link_get(attachment.host_link)
    facts = read_node(node, question, pod, table)
    if facts.link is None and not facts.stale_routes and pod.veth is None:
        return facts
    link = facts.link
    if link is not None:
        if not is_of(link, attachment):
            raise WiringError(
                "the name of the node's link is taken",
                f"{link.name}: a {link.kind or 'physical'} link with alias {link.alias[:80]!r}, not of this attachment",
            )
        remove_link(node, link)
    if pod.veth is not None and (link is None or pod.veth.peer != link.ifindex):
        raise WiringError("the pod has a link veth0", "veth0: it is not the coordinator's, so it is left alone")
    forget(node, facts)
    return read_node(node, question, pod, table)


@dataclass(frozen=True, slots=True)
class _Pair:
    node_index: int
    node_mac: bytes
    pod_index: int
    pod_mac: bytes


def _new_mac() -> bytes:
    """A random one, locally administered and unicast; given explicitly so that systemd-udevd does not change it."""
    first, *rest = _random.randbytes(6)
    return bytes((first & 0xFC | 0x02, *rest))


def _create_pair(node: Netlink, attachment: Attachment, plan: Plan, netns_fd: int, undo: Undo) -> _Pair:
    pod_mac, node_mac = _new_mac(), _new_mac()
    name = attachment.host_link
    create = rtlink.veth(
        name, node_mac, plan.veth_mtu, LINK_GROUP, peer=POD_VETH, peer_mac=pod_mac, peer_netns_fd=netns_fd
    )
    undo.pair = True
    exchange = node.exchange((create, rtlink.link_get(name)))
    if exchange.failures:
        undo.pair = exchange.failures[0].position != 0
        raise BatchError(exchange.failures)
    link = rtlink.parse_link(exchange.replies[0].body)
    return _Pair(link.ifindex, node_mac, link.peer, pod_mac)


def _node_steps(attachment: Attachment, plan: Plan, pair: _Pair, facts: NodeFacts) -> list[Step]:
    index, name = pair.node_index, attachment.host_link
    # Off, whatever the node's default for new links. The node's `all` still counts and is not ours to touch; where it
    # filters, the pod's packets pass since the route to the pod is over this link. Loose (2) would not do instead: on a
    # link without an address the kernel takes it for strict (net/ipv4/fib_frontend.c, __fib_validate_source).
    steps = [Step(rtlink.link_set(index, f"set up {name}", alias=attachment.alias, rp_filter=0))]
    steps += [
        Step(rtroute.neighbour_delete(way, address), tolerated=errno.ENOENT) for way, address in facts.ways if way
    ]
    return steps + host_steps(attachment, plan.nic, index, pair.pod_mac, name)


def _pod_steps(plan: Plan, facts: PodFacts, pair: _Pair) -> list[Step]:
    index = pair.pod_index
    steps = [Step(rtlink.link_set(index, "set up veth0 in the pod", up=True, rp_filter=plan.veth_rp_filter))]
    steps += nic_steps(plan.nic, facts.nic, is_up=facts.is_up)
    if plan.veth_address is not None:
        steps.append(Step(rtlink.address_add(index, plan.veth_address, 32, "veth0 in the pod")))
    mac, where = pair.node_mac, "veth0 in the pod"
    steps += [Step(rtroute.neighbour_set(index, a, mac, where, PROTOCOL)) for a in plan.pod_neighbours]
    for route in plan.veth_routes:
        tolerated = errno.EEXIST if route.table == rtroute.TABLE_MAIN else 0
        steps.append(Step(rtroute.route_add(route._replace(ifindex=index)), tolerated=tolerated))
    steps += [Step(rtroute.route_add(r), rtroute.route_delete(r), errno.EEXIST) for r in plan.nic_routes]
    steps += [Step(rtroute.rule_add(r), rtroute.rule_delete(r), errno.EEXIST) for r in plan.pod_rules]
    return steps
