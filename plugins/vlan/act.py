"""Making the NIC, and taking it away. Everything here blocks, in a thread of its own that dies with its work."""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable
from ipaddress import IPv4Interface, IPv6Interface

from plugins.cni import Result
from plugins.coordinator.attachment import LINK_GROUP
from plugins.coordinator.facts import read_routes
from plugins.coordinator.host import find_link
from plugins.coordinator.steps import write_sysctl
from plugins.errors import AddressConflictError, InvalidConfigError, InvalidEnvironmentError, WiringError
from plugins.net import rtlink, rtmaster, rtroute
from plugins.net.netlink import NETLINK_ROUTE, BatchError, Message, Netlink
from plugins.net.netns import enter
from plugins.vlan.config import VlanConfig
from plugins.vlan.plan import KIND, Scene, Wish, addresses_of, is_ours, routes_of

SETTLING = 5.0
"""Seconds until IPv6 must know that an address is no duplicate; the reference plugin's. It takes one to two."""


def make(wish: Wish, netns_fd: int, timeout: float) -> str:
    """Make the NIC, down and without addresses; its MAC address. `timeout` in seconds is the kernel's for each batch.

    What an earlier ADD of this plugin left is replaced. Raises CniError, BatchError, OSError, and may then leave what
    `remove` removes.
    """
    with Netlink(NETLINK_ROUTE, timeout) as node:
        enter(netns_fd)
        with Netlink(NETLINK_ROUTE, timeout) as pod:
            _remove(pod, wish.temporary, is_ours)
            there = _remove(pod, wish.ifname, is_ours)
            if there is not None:
                raise InvalidEnvironmentError(
                    "CNI_IFNAME exists", f"{wish.ifname}: a {there.kind or 'physical'} link that somebody else made"
                )
            maker = pod if wish.config.in_container else node
            master = _master(maker, wish.config)
            create = rtmaster.vlan(
                wish.temporary,
                master.ifindex,
                wish.vlan_id,
                LINK_GROUP,
                wish.config.mtu,
                mac=wish.mac,
                netns_fd=netns_fd,
            )
            failures = maker.exchange((create,)).failures
            if failures and failures[0].code == errno.EEXIST:
                raise WiringError(
                    "the VLAN exists already",
                    f"{wish.config.master}.{wish.vlan_id}: the kernel has each VLAN of a NIC once, over all network"
                    " namespaces; another pod or a link of the node has it",
                )
            if failures and failures[0].code == errno.EOPNOTSUPP:
                raise WiringError("the kernel has no VLANs", f"8021q is missing: {failures[0]}")
            if failures:
                raise BatchError(failures)
            link = rtlink.parse_link(pod.request((rtlink.link_get(wish.temporary),))[0].body)
            finished = pod.request((rtlink.link_rename(link.ifindex, wish.ifname), rtlink.link_get(wish.ifname)))
            return rtlink.mac_text(rtlink.parse_link(finished[0].body).mac)


def _master(netlink: Netlink, config: VlanConfig) -> rtlink.Link:
    master = find_link(netlink, config.master)
    if master is None:
        where = "pod" if config.in_container else "node"
        raise InvalidConfigError("failed to lookup master", f"master: {config.master}: Link not found on the {where}")
    if config.mtu > master.mtu:
        raise InvalidConfigError("invalid MTU", f"mtu: {config.mtu}, allowed: 0 to {master.mtu}, that of {master.name}")
    if not master.flags & rtlink.FLAG_UP:
        raise WiringError("the master is down", f"{master.name}: a VLAN can only be up while its master is")
    return master


def configure(ifname: str, result: Result, netns_fd: int, timeout: float) -> None:
    """Give the NIC its addresses and routes and set it up; IPv6 addresses are usable afterwards.

    Raises AddressConflictError if IPv6's own detection finds a duplicate, BatchError, OSError.
    """
    own = addresses_of(result)
    has_v6 = any(address.version == 6 for address in own)
    enter(netns_fd)
    if has_v6:
        for name in ("lo", ifname):
            write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
        write_sysctl(f"ipv6/conf/{ifname}/keep_addr_on_down", "1")
    with Netlink(NETLINK_ROUTE, timeout) as pod, Netlink(NETLINK_ROUTE, timeout, rtlink.GROUP_IPV6_ADDRESSES) as news:
        index = rtlink.parse_link(pod.request((rtlink.link_get(ifname),))[0].body).ifindex
        pod.request(
            [
                *(_address(one, index, f"{ifname} in the pod") for one in own),
                rtmaster.set_up(index, f"{ifname} in the pod"),
                *map(rtroute.route_beside, routes_of(result, index)),
            ]
        )
        if has_v6:
            _settle(pod, news, index, {one.ip for one in own})


def _address(own: IPv4Interface | IPv6Interface, index: int, where: str) -> Message:
    length = own.network.prefixlen
    broadcast = own.network.broadcast_address if isinstance(own, IPv4Interface) and length < 31 else None
    return rtlink.address_add(index, own.ip, length, where, broadcast)


def _settle(pod: Netlink, news: Netlink, index: int, own: set[object]) -> None:
    """Return when none of the addresses is tentative, or time is up: then the kernel finishes it without us."""
    end = time.monotonic() + SETTLING
    while True:
        found = [
            address
            for address in rtlink.parse_addresses(pod.dump(rtlink.address_dump()))
            if address.ifindex == index and address.address in own
        ]
        for address in found:
            if address.flags & rtlink.ADDRESS_DADFAILED:
                raise AddressConflictError(
                    "an address of the pod is in use", f"{address.address}: duplicate address detection failed"
                )
        left = end - time.monotonic()
        if left <= 0 or not any(address.flags & rtlink.ADDRESS_TENTATIVE for address in found):
            return
        select.select((news,), (), (), left)
        for _ in news.pending():
            pass


def remove(ifname: str, temporary: str, netns_fd: int, timeout: float, *, only_ours: bool) -> None:
    """Delete the NIC and what was to become it; nothing there is success. Raises BatchError, OSError.

    Not `only_ours`: a VLAN of that name goes whoever made it, such as the plugin that was installed before this one.
    """
    enter(netns_fd)
    with Netlink(NETLINK_ROUTE, timeout) as pod:
        _remove(pod, temporary, is_ours)
        _remove(pod, ifname, is_ours if only_ours else _is_vlan)


def _is_vlan(link: rtlink.Link) -> bool:
    return link.kind == KIND


def _remove(pod: Netlink, name: str, unwanted: Callable[[rtlink.Link], bool]) -> rtlink.Link | None:
    """Delete the link of that name if it is unwanted; what has that name afterwards."""
    link = find_link(pod, name)
    if link is None or not unwanted(link):
        return link
    failures = pod.exchange((rtlink.link_delete(link.ifindex, name),)).failures
    if failures and failures[0].code != errno.ENODEV:
        raise BatchError(failures)
    return None


def look(wish: Wish, netns_fd: int, timeout: float) -> Scene:
    """What is there. Raises BatchError, OSError."""
    with Netlink(NETLINK_ROUTE, timeout) as node:
        enter(netns_fd)
        with Netlink(NETLINK_ROUTE, timeout) as pod:
            replies = pod.exchange((rtlink.link_get(wish.ifname),)).replies
            return Scene(
                nic=rtmaster.parse_master(replies[0].body) if replies else None,
                master=find_link(pod if wish.config.in_container else node, wish.config.master),
                routes=read_routes(pod),
            )


def look_for_master(config: VlanConfig, timeout: float) -> None:
    """Raise CniError if an ADD would not take the master that the node has now. Raises BatchError, OSError."""
    with Netlink(NETLINK_ROUTE, timeout) as node:
        _master(node, config)
