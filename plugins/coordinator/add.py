"""ADD: wire a pod's NIC, all or nothing.

The whole of it is one blocking sequence of a few milliseconds at most, run in a thread of its own: facts, plan, the
pair and its way on the node, the way in the pod, the marks. What was done is noted as it is done and taken back if
anything fails or the caller has given up.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import SystemRandom

from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import NodeFacts, PodFacts, read_node, read_pod
from plugins.coordinator.host import Host, families_of_links, find_link, is_of, remove_link, tolerate
from plugins.coordinator.plan import IPV6_SWITCH, LINK_GROUP, POD_VETH, Attachment, Plan, make_plan, resolve_mode
from plugins.errors import WiringError
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, BatchError, Failure, Message, Netlink
from plugins.net.netns import enter
from plugins.net.nft import ReplyMarks

log = logging.getLogger(__name__)

MARKS = ReplyMarks(POD_VETH)
_random = SystemRandom()


class AbandonedError(Exception):
    """The caller has gone; what was done is taken back."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is attached or checked, and how."""

    attachment: Attachment
    config: CoordinatorConfig
    netns_fd: int
    """The pod's namespace; open until the work is over."""
    timeout: float
    """Seconds that the kernel may take for one batch."""


@dataclass(frozen=True, slots=True)
class Step:
    """A message, what takes it back, and which errno means that it need not be done."""

    message: Message
    undo: Message | None = None
    tolerated: int = 0


@dataclass
class Undo:
    """What an ADD has done so far. Taking back never raises: it logs what cannot be taken back."""

    host: Host
    task: Task
    pair: bool = False
    marks: bool = False
    in_pod: list[Message] = field(default_factory=list)
    sysctls: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Take everything back, the pair first: no packet passes any more. The thread must be one of its own."""
        for name, take_back in (("node", self._node), ("pod", self._pod)):
            try:
                take_back()
            except OSError as error:
                log.error("cannot take back all of a failed ADD", extra={"side": name, "error": str(error)})

    def _node(self) -> None:
        if not self.pair:
            return
        with self.host.socket() as node:
            link = find_link(node, self.task.attachment.host_link)
            if link is not None and is_of(link, self.task.attachment):
                remove_link(node, link)
            self.host.release_rules(node)

    def _pod(self) -> None:
        if not (self.in_pod or self.marks or self.sysctls):
            return
        enter(self.task.netns_fd)
        with Netlink(NETLINK_ROUTE, self.task.timeout) as pod:
            tolerate(pod.exchange(self.in_pod[::-1]), errno.ENOENT, errno.ESRCH, errno.ENODEV)
        for path, value in reversed(self.sysctls):
            write_sysctl(path, value)
        if self.marks:
            with Netlink(NETLINK_NETFILTER, self.task.timeout) as filters:
                MARKS.remove(filters)


@dataclass(frozen=True, slots=True)
class Attached:
    """A finished attachment that can still be taken back."""

    plan: Plan
    pod: PodFacts
    undo: Undo


def attach(host: Host, task: Task, abandoned: Callable[[], bool]) -> Attached:
    """Attach. Blocks; runs in a thread of its own, which it takes into the pod's namespace.

    Raises CniError, BatchError, OSError, and AbandonedError as soon as `abandoned()`; nothing is left then.
    """
    attachment, config, netns_fd, timeout = task.attachment, task.config, task.netns_fd, task.timeout
    undo = Undo(host, task)
    try:
        with host.socket() as node:
            others, families = host.addresses.read(node), families_of_links()
            enter(netns_fd)
            with Netlink(NETLINK_ROUTE, timeout) as pod:
                pod_facts = read_pod(pod, attachment.ifname)
                resolve_mode(config, attachment.ifname, pod_facts.veth is not None)
                node_facts = _settled(node, attachment, config, pod_facts)
                plan = make_plan(config, pod_facts.nic, (*node_facts.preferred, *others), families)
                for prefix in plan.unreached:
                    log.warning("the node has no address of that family, so pods cannot reach %s", prefix)
                _stop_if(abandoned)
                for path, value in plan.sysctls:
                    former = write_sysctl(path, value)
                    if path != IPV6_SWITCH:
                        undo.sysctls.append((path, former))
                pair = _create_pair(node, attachment, plan, netns_fd, undo)
                steps = _node_steps(attachment, plan, pair, node_facts)
                _judge(steps, host.wire(node, [step.message for step in steps]).failures)
                _stop_if(abandoned)
                _run(pod, _pod_steps(plan, pod_facts, pair), undo.in_pod)
            with Netlink(NETLINK_NETFILTER, timeout) as filters:
                undo.marks = bool(plan.pod_rules)
                if undo.marks:
                    MARKS.install(filters)
            _stop_if(abandoned)
    except BaseException:
        undo.run()
        raise
    return Attached(plan, pod_facts, undo)


def write_sysctl(path: str, value: str) -> str:
    """Set a sysctl below /proc/sys/net of the thread's namespace; its former value. Raises OSError."""
    with open(f"/proc/sys/net/{path}", "r+", encoding="ascii") as file:
        former = file.read().strip()
        file.seek(0)
        file.write(value)
    return former


def _stop_if(abandoned: Callable[[], bool]) -> None:
    if abandoned():
        raise AbandonedError


def _settled(node: Netlink, attachment: Attachment, config: CoordinatorConfig, pod: PodFacts) -> NodeFacts:
    """The node's side, free of what earlier owners of the name or the addresses have left."""
    table = config.host_rule_table
    facts = read_node(node, attachment.host_link, pod.addresses, table)
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
    if facts.stale_routes:
        messages = [
            rtroute.route_delete(route._replace(source=None, scope=rtroute.SCOPE_ANY, protocol=0))
            for route in facts.stale_routes
        ]
        messages += [rtroute.neighbour_delete(index, address) for index, address in facts.ways]
        tolerate(node.exchange(messages), errno.ENOENT, errno.ESRCH, errno.ENODEV)
    return read_node(node, attachment.host_link, pod.addresses, table)


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
    steps += [Step(rtroute.rule_add(rule), tolerated=errno.EEXIST) for rule in plan.host_rules]
    steps += [Step(rtroute.route_replace(route)) for route in plan.host_routes(index)]
    steps += [Step(rtroute.neighbour_set(index, address, pair.pod_mac, name)) for address in plan.host_addresses]
    return steps


def _pod_steps(plan: Plan, facts: PodFacts, pair: _Pair) -> list[Step]:
    nic, index = facts.nic, pair.pod_index
    steps = [Step(rtlink.link_set(index, "set up veth0 in the pod", up=True, rp_filter=plan.veth_rp_filter))]
    if plan.pod_mac is not None or plan.tx_queue_len is not None or not facts.is_up:
        change = rtlink.link_set(
            nic.ifindex, f"set up {nic.name} in the pod", up=True, mac=plan.pod_mac, tx_queue_len=plan.tx_queue_len
        )
        undo = rtlink.link_set(nic.ifindex, f"restore {nic.name}", mac=nic.mac, tx_queue_len=nic.tx_queue_len)
        steps.append(Step(change, undo))
    if plan.veth_address is not None:
        steps.append(Step(rtlink.address_add(index, plan.veth_address, 32, "veth0 in the pod")))
    steps += [Step(rtroute.neighbour_set(index, a, pair.node_mac, "veth0 in the pod")) for a in plan.pod_neighbours]
    for route in plan.veth_routes:
        tolerated = errno.EEXIST if route.table == rtroute.TABLE_MAIN else 0
        steps.append(Step(rtroute.route_add(route._replace(ifindex=index)), tolerated=tolerated))
    steps += [Step(rtroute.route_add(r), rtroute.route_delete(r), errno.EEXIST) for r in plan.nic_routes]
    steps += [Step(rtroute.rule_add(r), rtroute.rule_delete(r), errno.EEXIST) for r in plan.pod_rules]
    return steps


def _run(netlink: Netlink, steps: Sequence[Step], undo: list[Message]) -> None:
    """Do all steps; those that succeeded are noted in `undo`. Raises BatchError, OSError."""
    mark = len(undo)
    undo += [step.undo for step in steps if step.undo is not None]  # all of them, should the answer never come
    failures = netlink.exchange([step.message for step in steps]).failures
    if failures:
        failed = {failure.position for failure in failures}
        undo[mark:] = [step.undo for i, step in enumerate(steps) if step.undo is not None and i not in failed]
    _judge(steps, failures)


def _judge(steps: Sequence[Step], failures: Sequence[Failure]) -> None:
    wrong = [failure for failure in failures if failure.code != steps[failure.position].tolerated]
    if wrong:
        raise BatchError(wrong)
