"""The work of an ADD as steps: each with what takes it back, and what was done noted as it is done."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from plugins.coordinator.attachment import PROTOCOL, Attachment
from plugins.coordinator.config import CoordinatorConfig
from plugins.coordinator.facts import PodFacts
from plugins.coordinator.host import Host, find_link, is_of, remove_link, tolerate
from plugins.coordinator.plan import IPV6_SWITCH, POD_VETH, NicPlan, PodNic, host_routes
from plugins.net import rtlink, rtroute
from plugins.net.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, BatchError, Exchange, Failure, Message, Netlink
from plugins.net.netns import enter
from plugins.net.nft import ReplyMarks

log = logging.getLogger(__name__)

MARKS = ReplyMarks(POD_VETH)


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
    awaited: frozenset[str] = frozenset()
    """NICs that the pod is still to get."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Where an ADD or CHECK stands once it knows the pod's links: in the pod's namespace, a socket on either side."""

    task: Task
    host: Host
    node: Netlink
    pod: Netlink
    facts: PodFacts
    on_node: frozenset[int]
    """The IP versions that the node's links have."""


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
    abandoned: Callable[[], bool] = lambda: False
    """Whether the caller has gone."""
    pair: bool = False
    marks: bool = False
    on_node: list[Message] = field(default_factory=list)
    in_pod: list[Message] = field(default_factory=list)
    sysctls: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Take everything back, the node first: no packet passes any more. The thread must be one of its own."""
        for name, take_back in (("node", self._node), ("pod", self._pod)):
            try:
                take_back()
            except OSError as error:
                log.error("cannot take back all of a failed ADD", extra={"side": name, "error": str(error)})

    def stop_if_abandoned(self) -> None:
        """Raise AbandonedError if the caller has gone."""
        if self.abandoned():
            raise AbandonedError

    def _node(self) -> None:
        if not (self.pair or self.on_node):
            return
        with self.host.socket() as node:
            if self.pair:
                link = find_link(node, self.task.attachment.host_link)
                if link is not None and is_of(link, self.task.attachment):
                    remove_link(node, link)
            else:
                tolerate(node.exchange(self.on_node[::-1]), errno.ENOENT, errno.ESRCH, errno.ENODEV)
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


def host_steps(attachment: Attachment, plan: NicPlan, index: int, mac: bytes, where: str) -> list[Step]:
    """What every NIC needs on the node: the shared rule, and a route and a neighbour for each address."""
    steps = [Step(rtroute.rule_add(rule), tolerated=errno.EEXIST) for rule in plan.host_rules]
    routes = host_routes(plan.host_addresses, plan.host_table, index, attachment.tag)
    steps += (Step(rtroute.route_replace(route), rtroute.route_delete(route)) for route in routes)
    for address in plan.host_addresses:
        undo = rtroute.neighbour_delete(index, address)
        steps.append(Step(rtroute.neighbour_set(index, address, mac, where, PROTOCOL), undo))
    return steps


def nic_steps(plan: NicPlan, nic: PodNic, *, is_up: bool) -> list[Step]:
    """What is to change on the pod's NIC itself."""
    if plan.pod_mac is None and plan.tx_queue_len is None and is_up:
        return []
    what = f"set up {nic.name} in the pod"
    change = rtlink.link_set(nic.ifindex, what, up=True, mac=plan.pod_mac, tx_queue_len=plan.tx_queue_len)
    undo = rtlink.link_set(nic.ifindex, f"restore {nic.name}", mac=nic.mac, tx_queue_len=nic.tx_queue_len)
    return [Step(change, undo)]


def run(exchange: Callable[[Sequence[Message]], Exchange], steps: Sequence[Step], undo: list[Message]) -> None:
    """Do all steps; those that succeeded are noted in `undo`. Raises BatchError, OSError."""
    mark = len(undo)
    undo += [step.undo for step in steps if step.undo is not None]  # all of them, should the answer never come
    failures = exchange([step.message for step in steps]).failures
    if failures:
        failed = {failure.position for failure in failures}
        undo[mark:] = [step.undo for i, step in enumerate(steps) if step.undo is not None and i not in failed]
    judge(steps, failures)


def judge(steps: Sequence[Step], failures: Sequence[Failure]) -> None:
    """Raise BatchError for failures that their steps do not tolerate."""
    wrong = [failure for failure in failures if failure.code != steps[failure.position].tolerated]
    if wrong:
        raise BatchError(wrong)


def set_sysctls(plan: NicPlan, undo: Undo) -> None:
    """Set what the plan says in the thread's namespace. Raises OSError."""
    for path, value in plan.sysctls:
        former = write_sysctl(path, value)
        if path != IPV6_SWITCH:
            undo.sysctls.append((path, former))


def write_sysctl(path: str, value: str) -> str:
    """Set a sysctl below /proc/sys/net of the thread's namespace; its former value. Raises OSError."""
    with open(f"/proc/sys/net/{path}", "r+", encoding="ascii") as file:
        former = file.read().strip()
        file.seek(0)
        file.write(value)
    return former
