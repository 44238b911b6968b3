"""ADD of a NIC that is not the first of an underlay: a further NIC, or one beside an overlay's.

As batched as the first: six dumps in the pod, one exchange and one batch on the node, one batch in the pod.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from api.ranges import Address
from plugins.coordinator.attachment import PROTOCOL, Attachment
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import PodFacts, read_node, read_routes, read_rules
from plugins.coordinator.host import forget
from plugins.coordinator.plan import POD_VETH, Way
from plugins.coordinator.steps import Scene, Step, Undo, host_steps, nic_steps, run, set_sysctls
from plugins.coordinator.tables import Departure, FurtherPlan, PodView, plan_further
from plugins.errors import WiringError
from plugins.net import rtlink, rtroute, rtwhole
from plugins.net.netlink import Message

log = logging.getLogger(__name__)

_PEERS = ("veth", "netkit")
"""Kinds of links that come in pairs across namespaces."""


@dataclass(frozen=True, slots=True)
class Lead:
    """The link between pod and node: both ends, each with the other's MAC address to send to."""

    pod: rtlink.Link
    node: rtlink.Link


def lead_in_pod(config: CoordinatorConfig, facts: PodFacts, way: Way) -> rtlink.Link:
    """The pod's end: veth0, or an overlay's first NIC. Raises WiringError if that does not lead to the node."""
    name = POD_VETH if way.mode == "underlay" else config.pod_default_cni_nic
    link = facts.links.get(name)
    if link is None:
        raise WiringError("the pod has no link to its node", f"{name}: there is no such link in the pod")
    if link.kind not in _PEERS or not link.peer:
        raise WiringError(
            "the pod has no link to its node", f"{name}: a {link.kind or 'physical'} link, not one end of a veth pair"
        )
    return link


def question_for(attachment: Attachment, lead: rtlink.Link, way: Way) -> Message:
    """What to ask the node for its end of the lead."""
    return rtlink.link_get(attachment.host_link) if way.mode == "underlay" else rtlink.link_get_index(lead.peer)


def lead_fault(attachment: Attachment, lead: rtlink.Link, link: rtlink.Link | None, way: Way) -> str:
    """Why `link` is not the node's end of the lead; empty if it is."""
    if link is None:
        name = attachment.host_link if way.mode == "underlay" else f"with index {lead.peer}"
        return f"the node has no link {name}"
    if link.kind not in _PEERS or (link.ifindex, link.peer) != (lead.peer, lead.ifindex):
        return f"{lead.name} in the pod is not the peer of {link.name} on the node"
    if way.mode == "underlay" and not attachment.owns_alias(link.alias):
        return f"{link.name} on the node has the alias {link.alias[:80]!r}"
    return ""


def join(scene: Scene, way: Way, others: Sequence[Address], undo: Undo) -> FurtherPlan:
    """Attach. `others` are the node's addresses. Raises CniError, BatchError, OSError, AbandonedError."""
    attachment, config, facts = scene.task.attachment, scene.task.config, scene.facts
    node, table = scene.node, config.host_rule_table
    lead = lead_in_pod(config, facts, way)
    question = question_for(attachment, lead, way)
    node_facts = read_node(node, question, facts, table)
    fault = lead_fault(attachment, lead, node_facts.link, way)
    if fault or node_facts.link is None:
        raise WiringError("the pod's link to its node is broken", fault)
    link = node_facts.link
    if node_facts.stale_routes:
        forget(node, node_facts)
        node_facts = read_node(node, question, facts, table)
    view = view_of(scene, way, lead.ifindex)
    plan = plan_further(config, view, (*node_facts.preferred, *others), scene.on_node, scene.task.awaited)
    for prefix in plan.unreached:
        log.warning("the node has no address of that family, so pods cannot reach %s", prefix)
    undo.stop_if_abandoned()
    set_sysctls(plan.nic, undo)
    steps = [
        Step(rtroute.neighbour_delete(index, address), tolerated=errno.ENOENT)
        for index, address in node_facts.ways
        if index and index != link.ifindex
    ]
    steps += host_steps(attachment, plan.nic, link.ifindex, lead.mac, link.name)
    run(lambda messages: scene.host.wire(node, messages), steps, undo.on_node)
    undo.stop_if_abandoned()
    run(scene.pod.exchange, pod_steps(plan, facts, Lead(lead, link)), undo.in_pod)
    undo.stop_if_abandoned()
    return plan


def view_of(scene: Scene, way: Way, lead: int) -> PodView:
    """What decides about a further NIC, read in the pod. Raises BatchError, OSError."""
    facts, default_nic = scene.facts, scene.task.config.pod_default_cni_nic
    return PodView(way, facts.nics, facts.nic, lead, default_nic, read_routes(scene.pod), read_rules(scene.pod))


def pod_steps(plan: FurtherPlan, facts: PodFacts, lead: Lead) -> list[Step]:
    """Everything in the pod, in an order in which a packet always finds a way: new ways before old ones go."""
    steps = [Step(rtwhole.whole_delete(route), rtwhole.whole_append(route), errno.ESRCH) for route in plan.stale]
    steps += nic_steps(plan.nic, facts.nic, is_up=facts.is_up)
    index, where = lead.pod.ifindex, f"{lead.pod.name} in the pod"
    for address in plan.neighbours:
        undo = rtroute.neighbour_delete(index, address)
        steps.append(Step(rtroute.neighbour_set(index, address, lead.node.mac, where, PROTOCOL), undo))
    for way in (*plan.ways, *plan.nic_routes):
        steps.append(Step(rtroute.route_add(way), rtroute.route_delete(way), errno.EEXIST))
    for copy in plan.copies:
        steps.append(Step(rtwhole.whole_add(copy), rtwhole.whole_delete(copy), errno.EEXIST))
    for rule in plan.rules:
        steps.append(Step(rtroute.rule_add(rule), rtroute.rule_delete(rule), errno.EEXIST))
    for departure in plan.departures:
        steps += _departure_steps(departure)
    return steps


def _departure_steps(departure: Departure) -> list[Step]:
    back = rtwhole.whole_prepend if departure.was_first else rtwhole.whole_append
    steps = [Step(rtwhole.whole_delete(route), back(route)) for route in departure.gone]
    if departure.stays is not None:
        steps.append(Step(rtwhole.whole_append(departure.stays), rtwhole.whole_delete(departure.stays)))
    return steps
