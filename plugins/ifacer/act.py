"""Making what is wanted, all or nothing.

Everything here blocks and runs in one thread, one call after the other: what a call finds is never another call's half
work, and of eight pods that start at once one makes the master and seven find it. Others on the node are not held back
by that; where they were quicker, it is looked and decided again, and nothing is taken back: they may use it by now.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from plugins.errors import CniError, WiringError
from plugins.ifacer.config import Wish
from plugins.ifacer.options import encode, restore
from plugins.ifacer.plan import ALIAS, LINK_GROUP, Node, Plan, decide, is_ours, reasons_to_leave
from plugins.net import rtlink, rtmaster
from plugins.net.netlink import NETLINK_ROUTE, BatchError, Failure, Message, Netlink, attribute
from plugins.net.rtmaster import MasterLink

log = logging.getLogger(__name__)

_TRIES = 10
_READ_TRIES = 5


class AbandonedError(Exception):
    """The caller has gone; what was done is taken back."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which terms masters are made."""

    one_link_per_vlan_id: bool
    timeout: float
    """Seconds that the kernel may take for one batch."""
    abandoned: Callable[[], bool]
    """Whether the caller has gone."""


def look(netlink: Netlink, wish: Wish, terms: Terms) -> Plan:
    """What an ADD would do now. Raises CniError, BatchError, OSError."""
    return decide(wish, read(netlink, wish), one_link_per_vlan_id=terms.one_link_per_vlan_id)


def ensure(netlink: Netlink, wish: Wish, terms: Terms) -> Plan:
    """Make what is wanted; the plan that was followed. One question to the kernel if all is there already.

    Raises CniError, BatchError, OSError, and AbandonedError as soon as the caller has gone; nothing new is left then.
    """
    undo = _Undo(terms.timeout)
    try:
        for _ in range(_TRIES):
            _stop_if(terms.abandoned)
            plan = look(netlink, wish, terms)
            if not plan.missing():
                return plan
            try:
                _carry_out(netlink, wish, plan, undo, terms)
            except BatchError as error:
                if error.failures[0].code not in (errno.EEXIST, errno.ENODEV):
                    raise
                overtaken = error
            else:
                return plan
        raise _explained(overtaken)
    except BaseException:
        undo.run()
        raise


def read(netlink: Netlink, wish: Wish) -> Node:
    """Look at the links that `wish` is about, and at all VLANs. Raises BatchError, OSError."""
    names: list[str] = []
    if wish.bond is not None:
        names += [*wish.bond.slaves, wish.bond.name]
    if wish.vlan is not None:
        names += [wish.vlan.name] if wish.vlan.parent in names else [wish.vlan.parent, wish.vlan.name]
    questions = [*map(rtlink.link_get, names), rtlink.link_dump("vlan")]
    for last in (*(False,) * (_READ_TRIES - 1), True):
        failures, replies = netlink.exchange(questions)
        failures = [f for f in failures if f.code != errno.ENODEV]
        if not failures:
            break
        if last or any(failure.code != errno.EINTR for failure in failures):
            raise BatchError(failures)
    links: dict[str, MasterLink] = {}
    vlans: list[MasterLink] = []
    for position, _, body in replies:
        found = rtmaster.parse_master(body)
        if position < len(names):
            links[names[position]] = found
        elif found.link.kind == "vlan":
            vlans.append(found)
    known = {one.link.ifindex: one.link.name for one in (*links.values(), *vlans)}
    strange = {one.master for one in links.values()} - known.keys() - {0}
    for _, _, body in netlink.exchange([rtlink.link_get_index(index) for index in strange]).replies:
        found = rtmaster.parse_master(body)
        known[found.link.ifindex] = found.link.name
    return Node(links, tuple(vlans), known)


def in_use_below(netlink: Netlink, link: rtlink.Link) -> bool:
    """Whether a link has macvlans or ipvlans, wherever they are, or belongs to a bridge.

    A macvlan that wants the link for itself alone is made and removed in one batch, so that a kill cannot come between.
    A kernel without macvlan says nothing, and then there are none. Raises BatchError, OSError.
    """
    name = f"spd{link.ifindex}"
    failures = netlink.exchange(
        (rtmaster.probe_below(name, link.ifindex, LINK_GROUP), rtmaster.remove_by_name(name))
    ).failures
    codes = {failure.position: failure.code for failure in failures}
    if codes.get(0) in (errno.EINVAL, errno.EBUSY):
        return True
    wrong = [f for f in failures if (f.position, f.code) not in ((0, errno.EOPNOTSUPP), (1, errno.ENODEV))]
    if wrong:
        raise BatchError(wrong)
    return False


@dataclass
class _Undo:
    """What an ADD has done so far. Taking back never raises: it logs what cannot be taken back."""

    timeout: float
    made: list[str] = field(default_factory=list)
    """Links that were created, or may have been."""
    before: list[list[Message]] = field(default_factory=list)
    """What brings links that were there back to what they were; the last first."""

    def run(self) -> None:
        steps: list[Callable[[Netlink], None]] = [
            partial(_restore, messages=messages) for messages in reversed(self.before)
        ]
        steps += [partial(_remove_ours, name=name) for name in reversed(self.made)]
        for step in steps:
            try:
                with Netlink(NETLINK_ROUTE, self.timeout) as netlink:
                    step(netlink)
            except OSError as error:
                log.error("cannot take back all of a failed ADD", extra={"error": str(error)})


def _restore(netlink: Netlink, messages: Sequence[Message]) -> None:
    failures = [failure for failure in netlink.exchange(messages).failures if failure.code != errno.ENODEV]
    if failures:
        raise BatchError(failures)


def _remove_ours(netlink: Netlink, name: str) -> None:
    replies = netlink.exchange((rtlink.link_get(name),)).replies
    if replies:
        link = rtlink.parse_link(replies[0].body)
        if is_ours(link):
            _restore(netlink, [rtlink.link_delete(link.ifindex, link.name)])


def _carry_out(netlink: Netlink, wish: Wish, plan: Plan, undo: _Undo, terms: Terms) -> None:
    for nic in plan.enslave:
        _refuse_used(netlink, nic.link)
    for link in plan.up:
        undo.before.append([rtmaster.set_down(link.ifindex, link.name)])
        netlink.request((rtmaster.set_up(link.ifindex, link.name),))
    below = 0
    if plan.new_bond is not None:
        below = _new_bond(netlink, plan, undo, terms)
    elif plan.bond is not None:
        below = plan.bond.link.ifindex
        _change_bond(netlink, plan.bond, plan, undo, terms)
    for link, mtu in plan.mtus:
        undo.before.append([rtmaster.set_mtu(link.ifindex, link.name, link.mtu)])
        netlink.request((rtmaster.set_mtu(link.ifindex, link.name, mtu),))
    _stop_if(terms.abandoned)
    if plan.new_vlan is not None:
        vlan = plan.new_vlan
        parent = below or _index_of(netlink, vlan.parent)
        create = rtmaster.vlan(vlan.name, parent, vlan.id, LINK_GROUP, wish.mtu)
        link = _new_link(netlink, vlan.name, create, undo)
        netlink.request((rtmaster.set_up(link.ifindex, link.name),))
    _stop_if(terms.abandoned)


def _new_bond(netlink: Netlink, plan: Plan, undo: _Undo, terms: Terms) -> int:
    """Make the bond and put the NICs in; its index. It is set up last, as upstream does: it never runs empty."""
    wish = plan.new_bond
    assert wish is not None  # noqa: S101 (the caller looked)
    index_of = {nic.link.name: nic.link.ifindex for nic in plan.enslave}
    options = {name: value for name, value in wish.options.at_creation.items() if name != "active_slave"}
    packed = attribute(rtmaster.BOND_MODE, bytes((wish.mode,))) + encode(options, index_of)
    bond = _new_link(netlink, wish.name, rtmaster.bond(wish.name, packed, LINK_GROUP, plan.bond_mtu), undo)
    _enslave(netlink, bond, plan.enslave, undo, terms)
    netlink.request((rtmaster.set_up(bond.ifindex, bond.name),))
    active = wish.options.given.get("active_slave")
    if active is not None:
        change = rtmaster.bond_set(bond.ifindex, encode({"active_slave": active}, index_of), "set the active slave")
        failures = netlink.exchange((change,)).failures
        if failures:  # It has no link yet: the bond takes the first that has.
            log.warning("the bond's active slave is not the wanted one", extra={"error": str(failures[0])})
    return bond.ifindex


def _change_bond(netlink: Netlink, there: MasterLink, plan: Plan, undo: _Undo, terms: Terms) -> None:
    index, name = there.link.ifindex, there.link.name
    _enslave(netlink, there.link, plan.enslave, undo, terms)
    if not plan.options:
        return
    wanted = {option: value for option, (_, value) in plan.options.items()}
    index_of = {value: _index_of(netlink, value) for value in wanted.values() if isinstance(value, str)}
    former = restore(wanted, there.data[rtmaster.BOND_MODE][0], there.data)
    undo.before.append([rtmaster.bond_set(index, former, f"restore {name}")])
    netlink.request((rtmaster.bond_set(index, encode(wanted, index_of), f"change {', '.join(wanted)} of {name}"),))
    log.info("changed a bond", extra={"link": name, "options": list(wanted)})


def _new_link(netlink: Netlink, name: str, create: Message, undo: _Undo) -> rtlink.Link:
    """Create a link of ours, which carries no addresses."""
    undo.made.append(name)
    failures, replies = netlink.exchange((create, rtlink.link_get(name)))
    if failures:
        if failures[0].position == 0:
            undo.made.remove(name)
        raise BatchError(failures)
    link = rtlink.parse_link(replies[0].body)
    mark = rtlink.link_set(link.ifindex, f"mark {name}", alias=ALIAS)
    failures = netlink.exchange((mark, rtmaster.no_own_ipv6(link.ifindex, name))).failures
    if any(failure.code != errno.EAFNOSUPPORT for failure in failures):
        raise BatchError(failures)
    # A master is no way of the node's into the pods' network: no address and no route by router advertisement.
    with suppress(FileNotFoundError), open(f"/proc/sys/net/ipv6/conf/{name}/accept_ra", "w", encoding="ascii") as file:
        file.write("0")
    log.info("made a master", extra={"link": name})
    return link


def _enslave(netlink: Netlink, bond: rtlink.Link, nics: Sequence[MasterLink], undo: _Undo, terms: Terms) -> None:
    """Put NICs into a bond; the kernel takes them only while they are down."""
    for nic in nics:
        index, name = nic.link.ifindex, nic.link.name
        was_up = nic.link.flags & rtlink.FLAG_UP
        _stop_if(terms.abandoned)
        before = [rtmaster.set_master(index, 0, f"take {name} out of {bond.name}")]
        before.append(rtmaster.set_up(index, name) if was_up else rtmaster.set_down(index, name))
        undo.before.append(before)
        if was_up:
            netlink.request((rtmaster.set_down(index, name),))
        netlink.request(
            (rtmaster.set_master(index, bond.ifindex, f"put {name} into {bond.name}"), rtmaster.set_up(index, name))
        )


def _refuse_used(netlink: Netlink, nic: rtlink.Link) -> None:
    addresses = rtlink.parse_addresses(netlink.dump(rtlink.address_dump()))
    reasons = reasons_to_leave(nic, _links(netlink), addresses)
    if not reasons and in_use_below(netlink, nic):
        master = next((one.master for one in _links(netlink) if one.link.ifindex == nic.ifindex), 0)
        if master:
            raise BatchError([Failure(0, f"take {nic.name}", errno.EEXIST, "it was put into another link meanwhile")])
        reasons = ["macvlan or ipvlan links are made of it, or it belongs to a bridge"]
    if reasons:
        raise WiringError("an interface is in use and is not put into a bond", f"{nic.name}: " + "; ".join(reasons))


def _links(netlink: Netlink) -> list[MasterLink]:
    return [rtmaster.parse_master(body) for body in netlink.dump(rtlink.link_dump())]


def _index_of(netlink: Netlink, name: str) -> int:
    return rtlink.parse_link(netlink.request((rtlink.link_get(name),))[0].body).ifindex


def _explained(error: BatchError) -> CniError | BatchError:
    """The kernel's refusal; EEXIST that persists although no link is to be seen has one cause only."""
    first = error.failures[0]
    if first.code == errno.EEXIST and first.what.startswith("create VLAN"):
        name = first.what.removeprefix("create VLAN ")
        return WiringError(
            "the VLAN exists in another network namespace",
            f"{name}: the kernel has each VLAN of an interface once; a pod of type vlan may have it",
        )
    return error


def _stop_if(abandoned: Callable[[], bool]) -> None:
    if abandoned():
        raise AbandonedError
